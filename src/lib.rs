//! candle-phi: Phi-3-family GGUF models as a stream of text.
pub mod cache;
pub mod error;
pub mod gguf;
pub mod kernels;
pub mod model;
pub mod ops;
pub mod phi3;
pub mod rope;
pub mod threads;
