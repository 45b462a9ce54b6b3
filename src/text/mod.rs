//! Text: chat templates, tokenizers, the text of generated ids, and stop strings. It may use `files`, which hold
//! templates and vocabularies. It does not know models.

pub mod chat;
pub mod detokenizer;
pub mod stop;
pub mod tokenizer;
