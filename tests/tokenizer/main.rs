//! Ids like Hugging Face's, text like the model's: the tokenizer and the detokenizer, over a small vocabulary made here,
//! over cl100k and o200k, and over Phi-3's own where `../shared/data/phi3` (or `CANDLE_PHI_SHARED`) has it.
mod byte_level;
mod files;
#[path = "../gguf_writer/mod.rs"]
mod gguf_writer;
mod phi3;
mod small;
mod texts;
mod vocabulary;
