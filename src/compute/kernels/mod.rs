//! The CPU kernels: which of them this machine can run, and what a kernel computes.
//!
//! A kernel works on plain slices and knows nothing of models, files or threads: `ops` divides the work into tasks and
//! makes one call per task. `portable` is the specification. The others are compiled for an instruction set and chosen at
//! run time. They share `products` (the loops of a matrix product), `pack` (activations), `float` and `attention` (over
//! the vectors of `simd`). `shapes` checks the arguments of every call.
//!
//! Decisions: docs/design/kernels.md

#![allow(clippy::needless_range_loop)] // loops index several arrays of registers at once

pub mod blocks;
mod cpu;
pub mod kv;
mod pack;
mod portable;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[macro_use]
mod dispatch;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod attention;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod float;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod products;
mod scratch;
mod shapes;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod simd;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86;

// The unit tests share these with the integration tests.
#[cfg(test)]
#[path = "../../../tests/kernels/product.rs"]
mod product;
#[cfg(test)]
#[path = "../../../tests/kernels/random.rs"]
mod random;

use std::ops::Range;

pub use blocks::Format;
pub use cpu::features;
#[cfg(all(target_arch = "aarch64", target_feature = "fp16"))]
pub use cpu::has_fp16;
pub use kv::{KvPage, KvSlice, KvSliceMut, PAGE};
pub use pack::{Line, view, view_mut};
pub use portable::{Portable, dequantize};
pub use scratch::Scratch;

/// One implementation of the computations. A model chooses one when it is opened.
///
/// For one kernel and phase, the result of a token has the same bits however many tokens the call has, and however weights
/// and tokens are divided among calls.
///
/// Every method panics if the lengths of its slices do not fit together; the message has the numbers.
pub trait Kernel: Send + Sync {
    /// The name that `doctor` shows and `CANDLE_PHI_KERNEL` takes.
    fn name(&self) -> &'static str;

    /// The layout of activations of `cols` features for a product with weights of a format.
    fn tile(&self, format: Format, cols: usize, phase: Phase) -> Tile;

    /// Writes the activations (cols) of one token to place `at` of a tile. The other places keep what they have.
    fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]);

    /// What the matrix products of decode cost for 1 to 16 tokens, relative to one: a first estimate for a scheduler. It holds
    /// for weights in Q4_K_M that are read from memory, and was measured (docs/design/kernels.md) or is `LINEAR_COSTS`.
    fn decode_costs(&self) -> &'static [f32; 16];

    /// `x W^T`: the weights are (rows, cols), x holds the tiles of `tokens` tokens. `out` gets each result once.
    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>);

    /// `out = weight * x / sqrt(mean(x^2) + eps)`, one row.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);

    /// `out = silu(gate) * up`.
    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]);

    /// Scaled dot-product attention of queries that share one KV head: adds consecutive pages to what the queries have seen
    /// so far. The bits of a query are the same however its pages are divided among calls, in their order.
    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize);
}

/// A change of it says that the bits of keys and values have changed, so that those of files are computed anew.
pub const NUMERICS: &str = "1";

/// The costs of decode where they were not measured: as if each token had a pass.
pub const LINEAR_COSTS: [f32; 16] =
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0];

/// The purpose of a forward pass. The phases may use different instructions, and so differ in rounding: the phase of a
/// token must not depend on the number of tokens beside it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Many tokens: each weight is unpacked into cache once and used for all of them.
    Prefill,
    /// Few tokens: weights are used as they stream from memory.
    Decode,
}

/// The layout of activations: tiles of `tokens` tokens, each tile `lines` lines long.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Tile {
    pub tokens: usize,
    pub lines: usize,
}

/// Takes results: the token, the first weight row, and the results of that row and the rows after it.
pub type Out<'a> = dyn FnMut(usize, usize, &[f32]) + 'a;

/// Rows of a weight matrix as stored in the file.
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

    /// The features `cols` of a single row, in whole blocks of the format.
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
    /// The absolute positions that it attends to.
    pub keys: Range<usize>,
    /// (head_dim): the sum of the values so far, each times `exp(score - max)`; after `finish` their weighted mean.
    pub out: &'a mut [f32],
    /// The maximum score so far, and the sum of `exp(score - max)` over the keys.
    pub max: f32,
    pub sum: f32,
}

impl<'a> Query<'a> {
    /// A query that has seen no page.
    pub fn new(q: &'a [f32], keys: Range<usize>, out: &'a mut [f32]) -> Self {
        out.fill(0.0);
        Query { q, keys, out, max: f32::NEG_INFINITY, sum: 0.0 }
    }

    /// Ends the attention after the last page. The result of a query that saw no position has `sum` 0 and is NaN.
    pub fn finish(&mut self) {
        let sum = self.sum;
        self.out.iter_mut().for_each(|out| *out /= sum);
    }
}

/// The names of the kernels that this CPU can run, the fastest last.
pub fn available() -> Vec<&'static str> {
    NAMES.into_iter().filter(|name| by_name(name).is_some()).collect()
}

const NAMES: [&str; 5] = ["portable", "neon", "avx2", "avx512", "amx"];

/// The kernel of this name; None if there is none or this CPU cannot run it.
pub fn by_name(name: &str) -> Option<Box<dyn Kernel>> {
    fn boxed<K: Kernel + 'static>(kernel: K) -> Box<dyn Kernel> {
        Box::new(kernel)
    }
    match name {
        "portable" => Some(boxed(Portable)),
        #[cfg(target_arch = "x86_64")]
        "avx2" => x86::avx2(),
        #[cfg(target_arch = "x86_64")]
        "avx512" => x86::Avx512::new().map(boxed),
        #[cfg(target_arch = "aarch64")]
        "neon" => aarch64::neon(),
        #[cfg(target_arch = "x86_64")]
        "amx" => x86::Amx::new().map(boxed),
        _ => None,
    }
}
