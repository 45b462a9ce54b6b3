//! An estimate of the memory that a model needs, from its header alone.
//!
//! Decisions: docs/design/model.md

use std::path::Path;

use crate::compute::ops::KvType;
use crate::error::Result;
use crate::files::gguf::Gguf;
use crate::model::chunks::Chunks;
use crate::model::phi3::Config;

/// Context that the estimate assumes if the caller gives none: a file may state 131072, and the cache grows with use.
const USUAL_CONTEXT: usize = 4096;

/// The memory of a model, in bytes.
pub struct Requirements {
    pub weights: u64,
    /// Keys and values of one sequence.
    pub context: u64,
    /// Activations of the longest chunk of a prompt.
    pub activations: u64,
}

/// The requirements of the model in a file for a sequence of `n_ctx` tokens (None: a usual conversation).
pub fn estimate(path: &Path, n_ctx: Option<usize>, kv_cache: &str) -> Result<Requirements> {
    let gguf = Gguf::open(path, true)?;
    let config = Config::read(&gguf)?;
    let kv_type = KvType::named(kv_cache)?;
    let weights = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
    let tokens = n_ctx.unwrap_or(USUAL_CONTEXT).min(config.context_length);
    let chunks = Chunks::new(config.sizes(), weights);
    let longest = chunks.length(0, false).min(tokens);
    // A sliding window frees the keys and values behind it, before the next chunk is added.
    let held = config.sliding_window.map_or(tokens, |window| tokens.min(window + longest));
    Ok(Requirements {
        weights,
        context: (held * config.kv_bytes(kv_type)) as u64,
        activations: chunks.bytes(longest, false),
    })
}
