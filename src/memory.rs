//! How much memory a model takes, from its header alone.

use std::path::Path;

use crate::cache::KvType;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::phi3::Config;

/// Tokens that a conversation is taken to have where nobody says: the context of a file may be 131072, and the cache
/// grows with use.
const USUAL_CONTEXT: usize = 4096;

/// Bytes of the weights, and of the keys and values of `n_ctx` tokens (None: of a usual conversation).
pub fn needed(path: &Path, n_ctx: Option<usize>, kv_cache: &str) -> Result<(u64, u64)> {
    let gguf = Gguf::open(path, true)?;
    let config = Config::read(&gguf)?;
    let weights = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
    let tokens = n_ctx.unwrap_or(USUAL_CONTEXT).min(config.context_length);
    Ok((weights, (tokens * config.kv_bytes(KvType::named(kv_cache)?)) as u64))
}
