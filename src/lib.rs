//! candle-phi: Phi-3-family GGUF models as a stream of text.
pub mod cache;
pub mod detokenizer;
pub mod error;
pub mod generate;
pub mod gguf;
pub mod kernels;
pub mod model;
pub mod ops;
pub mod phi3;
pub mod rope;
pub mod sampling;
pub mod schedule;
pub mod stop;
pub mod stream;
pub mod threads;
pub mod tokenizer;
