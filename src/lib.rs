//! candle-phi: Phi-3-family GGUF models as a stream of text.
pub mod error;
pub mod gguf;
