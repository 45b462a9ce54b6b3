//! candle-phi: Phi-3-family GGUF models as a stream of text.
pub mod cache;
pub mod chat;
pub mod detokenizer;
pub mod engine;
pub mod error;
pub mod generate;
pub mod gguf;
pub mod hub;
pub mod kernels;
pub mod model;
pub mod ops;
pub mod phi3;
#[cfg(feature = "python")]
mod python;
pub mod rope;
pub mod sampling;
pub mod schedule;
pub mod stock;
pub mod stop;
pub mod stream;
pub mod threads;
pub mod tokenizer;
