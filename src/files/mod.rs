//! Files: what a GGUF file holds, and how one is found or downloaded. It may use `system`.

pub mod gguf;
pub mod hub;
