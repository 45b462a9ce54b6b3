//! The CPU kernels: which there are on this machine, and what each of them computes.
//!
//! A kernel works on plain slices and knows nothing of models, files or threads: `ops` cuts the work into tasks and
//! hands each of them one call. `portable` is the specification; the others are compiled for an instruction set and
//! chosen at run time. What they share is written once: `products` (the shapes of a matrix product), `pack`
//! (activations), `float` and `attention` (over the vectors of `simd`).
//!
//! Decisions: docs/design/kernels.md

#![allow(clippy::needless_range_loop)] // several arrays of registers at a time, by constant indices
#![allow(clippy::undocumented_unsafe_blocks)] // instructions: `simd` gives the reason, once for all

pub mod blocks;
mod cpu;
pub mod kv;
mod pack;
mod portable;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[macro_use]
mod fast;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod attention;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod float;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod products;
mod scratch;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod simd;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod dealt;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

pub use blocks::Format;
pub use cpu::features;
#[cfg(all(target_arch = "aarch64", target_feature = "fp16"))]
pub use cpu::has_fp16;
pub use kv::{KvPage, KvSlice, KvSliceMut, PAGE};
pub use pack::{Line, view, view_mut};
pub use portable::{Portable, dequantize};
pub use scratch::Scratch;

/// One way of computing. Chosen once per model.
///
/// For one kernel and phase the result for a token has the same bits however many tokens come with it, and however
/// weights and tokens are divided among calls.
pub trait Kernel: Send + Sync {
    /// The name that `doctor` shows and `CANDLE_PHI_KERNEL` takes.
    fn name(&self) -> &'static str;

    /// How activations of so many features lie when they are to meet weights of a format.
    fn tile(&self, format: Format, cols: usize, phase: Phase) -> Tile;

    /// Put the activations (cols) of token `at` of a tile into it.
    fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]);

    /// `x W^T`: the weights are (rows, cols), x holds the tiles of `tokens` tokens. Results go to `out`, each once.
    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>);

    /// `out = weight * x / sqrt(mean(x^2) + eps)`, one row.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);

    /// `out = silu(gate) * up`.
    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]);

    /// Scaled dot-product attention of queries that share one KV head, over `pages`, which are consecutive. A query that
    /// sees nothing in them gets a `sum` of 0, and no numbers for `out`.
    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize);
}

/// What a pass is for. Prompts and generated tokens may take different instructions, and so differ in rounding: which
/// of them a token takes must not depend on how many come with it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Many tokens: each weight is unpacked once, into cache, and used for all of them.
    Prefill,
    /// A few tokens: each weight is used on its way from memory.
    Decode,
}

/// How activations lie: in tiles of so many tokens and so many lines.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Tile {
    pub tokens: usize,
    pub lines: usize,
}

/// Takes results: the token, the first of the weights' rows, and the results of that row and those after it.
pub type Out<'a> = dyn FnMut(usize, usize, &[f32]) + 'a;

/// Rows of a weight matrix as they lie in the file.
#[derive(Copy, Clone)]
pub struct Weights<'a> {
    pub format: Format,
    pub cols: usize,
    /// Whole rows.
    pub bytes: &'a [u8],
}

impl<'a> Weights<'a> {
    pub fn n_rows(self) -> usize {
        self.bytes.len() / self.format.row_bytes(self.cols)
    }

    #[inline(always)]
    pub fn row(self, row: usize) -> Weights<'a> {
        self.rows(row..row + 1)
    }

    #[inline(always)]
    pub fn rows(self, rows: Range<usize>) -> Weights<'a> {
        let row_bytes = self.format.row_bytes(self.cols);
        Weights { bytes: &self.bytes[rows.start * row_bytes..rows.end * row_bytes], ..self }
    }

    /// Some features of a single row, whole blocks of the format.
    #[inline(always)]
    pub fn part(self, cols: Range<usize>) -> Weights<'a> {
        let bytes = self.format.row_bytes(cols.start)..self.format.row_bytes(cols.end);
        Weights { cols: cols.len(), bytes: &self.bytes[bytes], ..self }
    }
}

/// One query head at one position.
pub struct Query<'a> {
    /// (head_dim)
    pub q: &'a [f32],
    /// The absolute positions that it sees.
    pub keys: Range<usize>,
    /// (head_dim)
    pub out: &'a mut [f32],
    /// Set by attention: the greatest score, and the sum of `exp(score - max)` over the keys it saw.
    pub max: f32,
    pub sum: f32,
}

/// The names of every kernel that this CPU can run, the best one last.
pub fn available() -> Vec<&'static str> {
    NAMES.into_iter().filter(|name| by_name(name).is_some()).collect()
}

const NAMES: [&str; 5] = ["portable", "neon", "avx2", "avx512", "amx"];

/// The kernel of this name, if there is one and this CPU can run it.
pub fn by_name(name: &str) -> Option<Box<dyn Kernel>> {
    fn boxed<K: Kernel + 'static>(kernel: K) -> Box<dyn Kernel> {
        Box::new(kernel)
    }
    match name {
        "portable" => Some(boxed(Portable)),
        #[cfg(target_arch = "x86_64")]
        "avx2" => avx2::Avx2::new().map(boxed),
        #[cfg(target_arch = "x86_64")]
        "avx512" => avx512::Avx512::new().map(boxed),
        #[cfg(target_arch = "aarch64")]
        "neon" => neon::neon(),
        #[cfg(target_arch = "x86_64")]
        "amx" => amx::Amx::new().map(boxed),
        _ => None,
    }
}
