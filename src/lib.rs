//! candle-phi: Phi-3-family GGUF models as a stream of text.
//!
//! The engine behind the Python package of the same name. Only `python.rs` knows Python. It is compiled only with the
//! feature `python`. The modules in the order of one call:
//!
//! ```text
//! Engine::load            engine      opens file, tokenizer, template and weights
//!   Gguf::open            gguf        maps and checks the file; its bytes are the weights
//! Engine::stream          engine      checks the prompt ids; computes nothing yet
//!   Template::render      chat        messages -> prompt text, user text marked as text
//!   Tokenizer::encode     tokenizer   text -> ids
//! Stream::next            stream      submits the work at the first read, then waits at an outbox
//!   Scheduler             schedule    chooses the next step among the jobs that have a slot, on the compute thread
//!   Generation::step      generate    the prompt in turns, then an id at a time (or logits: the prompt alone)
//!     Sequence::advance   phi3        the model, over ops, rope and cache (or stock: Candle's own)
//!       Ops::norm_linear  ops         a Candle custom op: tasks for the thread pool (threads)
//!         Kernel::matmul  kernels     plain slices; portable, avx2, avx512, amx or neon: chosen for this CPU
//!     Sampler::sample     sampling    logits -> id
//!     Detokenizer::push   detokenizer ids -> text, once its bytes are whole
//!     StopStrings::push   stop        holds back text that may become a stop string
//! Engine::bandwidth       bandwidth   measures how fast the weights can be read: for benchmarks
//! ```
//!
//! Other modules: `hub` finds or downloads the file, `requirements` estimates the memory of a model, `memory` checks
//! allocations, `ready` is the queue of streams that have something to read, `panic` turns panics into errors.
//!
//! Four words for work:
//!
//! - A `Work` (work) is what a stream computes, step by step: a `Generation` or `Logits`. It knows no threads.
//! - A `Job` (schedule) is what the scheduler runs in turn: a `Work` with the outbox of its reader.
//! - A task of the pool (threads) is the part of one operation that one thread computes.
//! - A `BackgroundTask` (task) is a load or a download on a thread of its own, and `Task` is what that work sees of its
//!   caller: cancellation and progress.
//!
//! Imports go down this list, never up.
//!
//! # Example
//!
//! ```
//! use candle_phi::text::chat::Message;
//! use candle_phi::engine::{Engine, LoadOptions};
//! use candle_phi::runtime::generation::Request;
//! use candle_phi::runtime::sampling::Sampling;
//! use candle_phi::system::task::Task;
//!
//! # fn main() -> Result<(), candle_phi::error::Error> {
//! let path = "python/candle_phi/demo/phi3-demo-q4_k_m.gguf".as_ref();
//! let engine = Engine::load(path, &LoadOptions::default(), &Task::default())?;
//! let question = Message { role: "user".into(), content: "What is a power play?".into() };
//! let prompt = engine.tokenize_messages(&[question])?;
//! let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
//! let stream = engine.stream(Request { prompt, sampling: greedy, ..Request::default() }, None, None)?;
//! let mut text = String::new();
//! while let Some(piece) = stream.next()? {
//!     text += &piece.text;
//! }
//! assert_eq!(text, "One team has a player in the box, so the other team skates with one more for a while.");
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `hub` (default): downloads from the Hugging Face Hub, with TLS.
//! - `python`: the module for Python.
//! - `cuda`, `metal`: Candle's other back ends.

// Each exception names its reason, here or where the module is declared.
#![deny(unsafe_code)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("candle-phi needs a 64-bit system, and for the package a 64-bit Python: models are larger than 2 GB");

pub mod compute;
pub mod engine;
pub mod error;
pub mod files;
pub mod kv;
pub mod model;
#[cfg(feature = "python")]
mod python;
pub mod runtime;
pub mod system;
pub mod text;
