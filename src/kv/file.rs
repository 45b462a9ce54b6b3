//! A file of ids and of their keys and values: a chat, or a column of a prompt. It is a safetensors file, which other tools
//! open as well.
//!
//! ```text
//! length of the header u64 · header: JSON, and spaces up to a multiple of 4096
//! per column of 128 positions, in memory layout, all layers:
//!     k.NNNN · (q8_0: k_scales.NNNN) · v.NNNN · (q8_0: v_scales.NNNN)      each at a multiple of 64
//! ids: u32.. · runs: u32.., lengths that alternate prefill, decode, .. · check: XXH3 of all but the columns
//! ```
//!
//! Column NNNN has the positions from 128 * NNNN on. (<https://github.com/huggingface/safetensors#format>.)
//!
//! Decisions: docs/design/kv.md

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::path::Path;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use crate::compute::ops::{Column, KvShape, Part};
use crate::error::{Error, Result};
use crate::system::task::Task;

mod layout;
#[allow(unsafe_code)] // the file is mapped into memory
mod reader;
mod writer;

pub use reader::KvFile;

/// What a file holds.
pub struct Contents<'a> {
    /// Decides the bits of keys and values: the model by content, KV type, kernel, window, RoPE.
    pub fingerprint: &'a str,
    /// The position of the first id.
    pub start: usize,
    pub ids: &'a [u32],
    /// Lengths that alternate prefill, decode, prefill, .. of the first ids. Ids after them have no phase.
    pub runs: &'a [usize],
    /// Consecutive; empty for a file without keys and values.
    pub columns: &'a [Arc<Column>],
    /// The columns have the positions below it. It is at most the position after the last run.
    pub computed: usize,
    /// The caller's own texts. Their names do not begin with `candle_phi.`.
    pub metadata: &'a BTreeMap<String, String>,
}

/// Writes a file, in place of one that may have this name. Returns its size.
///
/// # Errors
///
/// `Error::File`: it cannot be written; an old file is as it was. `Error::Cancelled`.
pub fn write(path: &Path, contents: &Contents<'_>, task: &Task) -> Result<u64> {
    let mut file = writer::Writer::create(path, contents, task)?;
    file.columns(contents, task)?;
    file.finish(contents)
}

const ALIGNMENT: usize = 64;
const PAGE_BYTES: usize = 4096;
/// 128k positions have a header of 300 kB without texts. A hostile header of this size takes 230 MB and 0.7 s.
const MAX_HEADER: usize = 8 << 20;
/// A context of this length takes 6 TB of keys and values in f16 for the mini models.
const MAX_IDS: usize = 1 << 24;
const VERSION: &str = "1";

/// Names in `__metadata__`.
const OWN: &str = "candle_phi.";
const VERSION_KEY: &str = "candle_phi.kv_version";
const FINGERPRINT_KEY: &str = "candle_phi.fingerprint";
const START_KEY: &str = "candle_phi.start";
const COMPUTED_KEY: &str = "candle_phi.computed";
/// `kernels`, or `candle`, whose keys lie like values.
const LAYOUT_KEY: &str = "candle_phi.layout";
/// The XXH3 of each column, 16 hexadecimal digits each.
const CHECKSUMS_KEY: &str = "candle_phi.checksums";

fn layout_name(shape: &KvShape) -> &'static str {
    if shape.device.is_some() { "candle" } else { "kernels" }
}

fn tensor_name(part: Part, column: usize) -> String {
    let part = match part {
        Part::Keys => "k",
        Part::KeyScales => "k_scales",
        Part::Values => "v",
        Part::ValueScales => "v_scales",
    };
    format!("{part}.{column:04}")
}

/// Bytes of a column of this shape.
fn column_bytes(shape: &KvShape) -> usize {
    shape.parts().iter().map(|&part| shape.n_layers * shape.layer_bytes(part)).sum()
}

/// The checksum of a file without its columns. `header` has its length before it.
fn check(header: &[u8], ids_and_runs: &[u8]) -> u64 {
    let mut hash = XxHash3_64::new();
    hash.write(header);
    hash.write(ids_and_runs);
    hash.finish()
}

fn misuse(what: String) -> Error {
    Error::Internal(format!("a file of keys and values: {what}"))
}
