//! candle-phi: Phi-3-family GGUF models as a stream of text.
//!
//! The engine behind the Python package of the same name. It knows nothing of Python: `python.rs` is the one file that
//! does, and is compiled with the feature `python` only. The data's way through one call:
//!
//! ```text
//! Engine::load            engine      file, tokenizer, template, weights, compute thread
//!   Gguf::open            gguf        the file, mapped and checked; its bytes are the weights
//! Engine::stream          engine      prompt ids checked; nothing is computed yet
//!   Template::render      chat        messages -> prompt text, user text marked as text
//!   Tokenizer::encode     tokenizer   text -> ids
//! Stream::next            stream      the reader waits at an outbox; the compute thread takes a step
//!   Scheduler             schedule    whose turn it is, and who waits for a slot
//!   Generation::step      generate    the prompt in turns, then an id at a time (or logits: the prompt alone)
//!     Sequence::advance   phi3        the model, over ops, rope and cache (or stock: Candle's own)
//!       Ops::norm_linear  ops         a Candle custom op: tasks for the thread pool
//!         Kernel::matmul  kernels     plain slices; portable, avx2, avx512, amx or neon: chosen for this CPU
//!     Sampler::sample     sampling    logits -> id
//!     Detokenizer::push   detokenizer ids -> text, once its bytes are whole
//!     StopStrings::push   stop        what may become a stop string waits
//! Engine::bandwidth       bandwidth   how fast the weights can be read at all: for benchmarks
//! ```
//!
//! Beside it: `hub` finds or fetches the file, `task` waits for what takes long, `memory` says what a model needs, `ready`
//! says which of many streams have something to read.
//!
//! Imports go down this list, never up.

// Each exception names its reason, here or where the module is declared.
#![deny(unsafe_code)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("candle-phi needs a 64-bit system, and for the package a 64-bit Python: models are larger than 2 GB");

pub mod bandwidth;
pub mod cache;
pub mod chat;
pub mod detokenizer;
pub mod engine;
pub mod error;
pub mod generate;
pub mod gguf;
pub mod hub;
#[allow(unsafe_code)] // instructions, and files and buffers viewed as blocks
pub mod kernels;
pub mod logits;
pub mod memory;
pub mod model;
pub mod ops;
pub mod outbox;
pub mod panic;
pub mod phi3;
#[cfg(feature = "python")]
mod python;
pub mod ready;
pub mod rope;
pub mod sampling;
pub mod schedule;
pub mod stock;
pub mod stop;
pub mod stream;
pub mod task;
#[allow(unsafe_code)] // workers borrow a job from the thread that waits for them
pub mod threads;
pub mod tokenizer;
pub mod work;
