//! Hashes of what decides a text, and of what decides keys and values.
//!
//! Decisions: docs/design/engine.md

use sha2::{Digest, Sha256};

use crate::compute::kernels;
use crate::files::gguf::Gguf;
use crate::model::Model;

/// A hash of what decides the bits of keys and values: the file by its content, kernel, device and KV type. Of the file it
/// covers the size, all bytes before the first tensor, and some of each tensor: at its start, in its middle, at its end.
pub fn of_kv(gguf: &Gguf, model: &dyn Model, kv_cache: &str) -> String {
    const SAMPLE: usize = 256;
    let mut hash = Sha256::new();
    for (_, bytes) in gguf.parts() {
        let start = bytes.as_ptr().addr();
        let offsets = gguf.tensors().map(|tensor| tensor.bytes().as_ptr().addr().wrapping_sub(start));
        let header = offsets.filter(|offset| *offset < bytes.len()).min().unwrap_or(0);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes[..header]);
    }
    for tensor in gguf.tensors() {
        let bytes = tensor.bytes();
        for from in [0, bytes.len() / 2, bytes.len().saturating_sub(SAMPLE)] {
            hash.update(&bytes[from..bytes.len().min(from + SAMPLE)]);
        }
    }
    for text in [model.info().kernel, model.info().device, kv_cache, kernels::NUMERICS] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A hash of everything besides prompt, options and seed that decides the text: the file, this version, engine, kernel
/// and KV type. Of the file it covers the size, the first bytes, which are the metadata, and the first bytes of each tensor.
pub fn of_text(gguf: &Gguf, model: &dyn Model, kv_cache: &str) -> String {
    const HEADER: usize = 1 << 16;
    const SAMPLE: usize = 256;
    let mut hash = Sha256::new();
    for (_, bytes) in gguf.parts() {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes[..bytes.len().min(HEADER)]);
    }
    for tensor in gguf.tensors() {
        let bytes = tensor.bytes();
        hash.update(&bytes[..bytes.len().min(SAMPLE)]);
    }
    for text in [env!("CARGO_PKG_VERSION"), model.info().engine, model.info().kernel, model.info().device, kv_cache] {
        hash.update(text);
    }
    let digits: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("phi_{digits}")
}
