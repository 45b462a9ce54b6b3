//! candle-phi: Phi-3-family GGUF models as a stream of text.
pub mod chat;
pub mod detokenizer;
pub mod error;
pub mod gguf;
pub mod tokenizer;
