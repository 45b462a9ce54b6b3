//! Files: what a GGUF file holds, how one is found or downloaded, and how a new file gets its name. It may use `system`.

pub mod gguf;
pub mod hub;
pub mod new_file;
