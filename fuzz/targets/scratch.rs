//! Parts that the targets share: a file with given bytes, and a sound model.
#![allow(dead_code)] // each target uses its own part of it

#[path = "../../tests/gguf_writer/mod.rs"]
mod gguf_writer;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use candle_phi::files::gguf::Gguf;
use candle_phi::text::tokenizer::Tokenizer;

/// A file that is written again and again. Its directory entry stays until the process ends.
pub struct Scratch {
    pub path: PathBuf,
    file: File,
}

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("candle-phi-fuzz-{}-{name}", std::process::id()));
        let file = File::create(&path).expect("a writable temporary folder");
        Scratch { path, file }
    }

    pub fn write(&self, bytes: &[u8]) {
        self.file.set_len(bytes.len() as u64).expect("room for the file");
        self.file.write_all_at(bytes, 0).expect("room for the file");
    }
}

/// The file and the tokenizer of the small model.
pub fn sound() -> (Gguf, Arc<Tokenizer>) {
    let scratch = Scratch::new("sound.gguf");
    scratch.write(&gguf_writer::model::small_model().bytes());
    let gguf = Gguf::open(&scratch.path, false).expect("a sound file");
    std::fs::remove_file(&scratch.path).expect("our own file");
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("a sound tokenizer");
    (gguf, Arc::new(tokenizer))
}

/// Checks the form of an error about a file: one line, not too long, and not a bug of ours.
pub fn check_message(error: &candle_phi::error::Error) {
    let message = error.to_string();
    assert!(!message.contains('\n') && message.len() < 4096, "{message}");
    assert!(!matches!(error, candle_phi::error::Error::Internal(_)), "{message}");
}
