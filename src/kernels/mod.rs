//! The CPU kernels: which there are on this machine, and what each of them computes.
//!
//! A kernel works on plain slices and knows nothing of models, files or threads: `ops` cuts the work into tasks and
//! hands each of them one call. `portable` is the specification.

pub mod blocks;
mod cpu;
mod portable;

use std::ops::Range;

pub use blocks::Format;
pub use cpu::features;
pub use portable::{Portable, dequantize};

/// One way of computing. Chosen once per model.
pub trait Kernel: Send + Sync {
    /// The name that `doctor` shows and `CANDLE_PHI_KERNEL` takes.
    fn name(&self) -> &'static str;

    /// `out = x W^T`: x is (tokens, cols), the weights (rows, cols), out (tokens, rows).
    fn matmul(&self, weights: Weights<'_>, x: &[f32], out: &mut [f32]);

    /// `out = weight * x / sqrt(mean(x^2) + eps)`, one row.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);

    /// `out = silu(gate) * up`.
    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]);

    /// Scaled dot-product attention of queries that share one KV head. `pages` are consecutive, (page_len, head_dim)
    /// each, and cover every query's keys.
    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], page_len: usize, head_dim: usize);
}

/// Rows of a weight matrix as they lie in the file.
#[derive(Copy, Clone)]
pub struct Weights<'a> {
    pub format: Format,
    pub cols: usize,
    /// Whole rows.
    pub bytes: &'a [u8],
}

impl<'a> Weights<'a> {
    pub fn row(self, row: usize) -> Weights<'a> {
        self.rows(row..row + 1)
    }

    pub fn rows(self, rows: Range<usize>) -> Weights<'a> {
        let row_bytes = self.format.row_bytes(self.cols);
        Weights { bytes: &self.bytes[rows.start * row_bytes..rows.end * row_bytes], ..self }
    }
}

/// One query head at one position.
pub struct Query<'a> {
    /// (head_dim)
    pub q: &'a [f32],
    /// The absolute positions that it sees; at least one.
    pub keys: Range<usize>,
    /// (head_dim)
    pub out: &'a mut [f32],
}

/// The keys and values of one KV head at the absolute positions `start .. start + page_len`.
pub struct KvPage<'a> {
    pub start: usize,
    pub k: KvSlice<'a>,
    pub v: KvSlice<'a>,
}

/// (page_len, head_dim)
#[derive(Copy, Clone)]
pub enum KvSlice<'a> {
    F16(&'a [half::f16]),
    F32(&'a [f32]),
}

/// The names of every kernel that this CPU can run, the best one last.
pub fn available() -> Vec<&'static str> {
    vec![Portable.name()]
}

/// The kernel of this name, if there is one and this CPU can run it.
pub fn by_name(name: &str) -> Option<Box<dyn Kernel>> {
    match name {
        "portable" => Some(Box::new(Portable)),
        _ => None,
    }
}
