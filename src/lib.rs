//! candle-phi: Phi-3-family GGUF models as a stream of text.
//!
//! The engine behind the Python package of the same name. The listing of `src/` is its map, from the door down. A floor
//! uses those below it (`tests/test_house.py` holds the order), and its `mod.rs` says what it is for.
//!
//! ```text
//! python     the door: the module for Python, one file a class (feature `python`)
//! engine     an open model, with all that it takes to talk to it
//! runtime    who computes when: scheduler, generations, sampling, streams and their outboxes
//! text       chat templates, tokenizers, the text of ids          model    token ids in, logits out
//! kv         keys and values by sequence: tables of columns
//! compute    operations, the thread pool, kernels
//! files      GGUF files, and the Hub that has them
//! system     memory that may be refused, panics, cancellation, forks, background tasks
//! error      the one error type
//! ```
//!
//! The way of a call:
//!
//! ```text
//! Engine::stream               engine.rs                   checks the prompt's ids; computes nothing yet
//! Stream::next                 runtime/stream.rs           submits the work at the first read, then waits at an outbox
//!   Scheduler                  runtime/scheduler.rs        one compute thread; jobs.rs chooses the next turn
//!     pass::decode             runtime/scheduler/pass.rs   the ready sequences become the members of a `Batch`
//!       Model::forward         model/runner.rs             embed, layers, head over the rows of several sequences
//!         Phi3::layer          model/phi3.rs               a layer, written in operations
//!           Ops::norm_linear   compute/ops                 tasks for the thread pool; rows are rows
//!           Ops::attention     compute/ops/attention.rs    each row over the columns of its own sequence
//!             Kernel::matmul   compute/kernels             plain slices; portable, avx2, avx512, amx or neon
//!       Generation::accept     runtime/generation.rs       samples, detokenizes, stops: a task of the pool for each stream
//!   Outbox::take               runtime/outbox.rs           the piece of text, for the reader
//! ```
//!
//! Four words for work:
//!
//! - A `Work` is what a stream computes: a `Generation`, `Logits` or `Scores`. It is passive: its `Sequence` says what is
//!   computed next, and it takes the logits.
//! - A `Job` is what the scheduler runs: a `Work` with the outbox of its reader.
//! - A task of the pool is the part of one operation that one thread computes.
//! - A `BackgroundTask` is a load or a download on a thread of its own, and `Task` is what that work sees of its caller:
//!   cancellation and progress.
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
//! let stream = engine.stream(Request { prompt: prompt.into(), sampling: greedy, ..Request::default() }, None, None)?;
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
