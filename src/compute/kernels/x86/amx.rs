//! AMX: bf16 products in tiles for the prefill of quantized and BF16 weights. Everything else is AVX-512's.
//!
//! ```text
//! for each panel of 256 weight rows, for each block of 256 features:   unpack to bf16, into cache
//!     for each 32 tokens, for each MR = 32 rows:                       sums += w x, in 2 x 2 tiles of 16 x 16
//!     after the last block, for each 16 tokens:                        transpose the sums to (token, row)
//! ```
//! 1. Weights are the left operand, 16 rows of 32 features, in the order of unpacking. Activations are the right operand,
//!    16 pairs of features of 16 tokens; packing interleaves them, once.
//! 2. Between blocks the sums are in memory, each tile in 1 KB. In a strided matrix they would take 25% longer.
//! 3. A 4-bit group has 16 different weights, a 5-bit group 32: these are computed once and looked up.
//! 4. A block of features is a few cache lines of each row, which hardware prefetchers do not follow: unpacking prefetches
//!    the next block.
//!
//! Both operands are rounded to bf16, to nearest even. Denormal numbers count as 0, also in the products.
//!
//! Decisions: docs/design/kernels.md

mod tiles;
mod unpack;

use std::arch::x86_64::{__m512, _mm512_loadu_ps};
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::avx512::Avx512;
use crate::compute::kernels::pack::{TILE, plain};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::{
    Format, Kernel, KvPage, Line, Out, Phase, Query, Scratch, Tile, Weights, cpu, shapes, view_mut,
};
use tiles::{Configured, Hardware, Tiles, permitted};
use unpack::{bf16, unpack};

/// The kernel. A value exists only on a CPU with AMX tiles and their bf16 products, AVX-512 BF16, and the features of `Avx512`.
/// The tests emulate the tiles.
pub struct Amx<T = Hardware>(Avx512, PhantomData<T>);

impl Amx {
    /// None also if the operating system refuses the tile registers, or if a known product comes out wrong.
    pub fn new() -> Option<Self> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        let avx512 = Avx512::new()?;
        let usable = USABLE.get_or_init(|| {
            let (tiles, products) = cpu::amx();
            // SAFETY: the features were found; `permitted` has asked the system.
            tiles && products && is_x86_feature_detected!("avx512bf16") && permitted() && unsafe { works::<Hardware>() }
        });
        usable.then_some(Amx(avx512, PhantomData))
    }
}

/// F32 and F16 weights stay in f32: bf16 products would be less accurate.
fn in_tiles(format: Format, phase: Phase) -> bool {
    phase == Phase::Prefill && !matches!(format, Format::F32 | Format::F16)
}

impl<T: Tiles> Kernel for Amx<T> {
    fn name(&self) -> &'static str {
        "amx"
    }

    fn tile(&self, format: Format, cols: usize, phase: Phase) -> Tile {
        if in_tiles(format, phase) {
            Tile { tokens: TILE, lines: tile_lines(cols) }
        } else {
            self.0.tile(format, cols, phase)
        }
    }

    fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]) {
        if in_tiles(format, phase) {
            shapes::pack(self, format, phase, x, at, tile);
            // SAFETY: a value of this type exists only on a CPU that has the features.
            unsafe { pack(x, at, tile) }
        } else {
            self.0.pack(format, phase, x, at, tile)
        }
    }

    fn decode_costs(&self) -> &'static [f32; 16] {
        self.0.decode_costs()
    }

    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>) {
        if in_tiles(weights.format, phase) {
            shapes::matmul(self, weights, phase, x, tokens);
            // SAFETY: a value of this type exists only on a CPU that has the features; the shapes were checked.
            unsafe { prefill::<T>(weights, x, tokens, out) }
        } else {
            self.0.matmul(weights, phase, x, tokens, out)
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        self.0.rms_norm(x, weight, eps, out)
    }

    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        self.0.swiglu(gate, up, out)
    }

    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
        self.0.attention(queries, pages, head_dim)
    }
}

/// Weight rows of a panel.
const PANEL: usize = 256;
/// Steps of a block of features: with 256 rows 128 KB, which stay in L2 for all tokens.
const BLOCK: usize = 8;
/// Rows of the register tile: two AMX tiles. A block of their features is 16 KB, and so is that of the tokens.
const MR: usize = 32;
/// Features of a step: of an AMX tile, of a line of weights, of 16 lines of activations.
const STEP: usize = 32;

plain! {
    /// 32 features of 16 tokens, in pairs: the even feature of a pair is the low half of a number.
    #[repr(C, align(64))]
    struct Pairs {
        of_tokens: [[u32; TILE]; STEP / 2],
    }
}

/// Lines of 16 tokens: if there are several blocks, an odd number of them. A power of two between tiles would put the same
/// features of many tokens into few cache sets.
fn tile_lines(cols: usize) -> usize {
    let steps = cols.div_ceil(STEP);
    let padded = if steps > BLOCK { (steps.div_ceil(BLOCK) | 1) * BLOCK } else { steps };
    padded * Line::count(size_of::<Pairs>())
}

/// Token `at` of a tile. The other tokens keep what they have.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack(x: &[f32], at: usize, tile: &mut [Line]) {
    for (x, to) in x.chunks(STEP).zip(view_mut::<Pairs>(tile)) {
        let mut padded = [0f32; STEP];
        padded[..x.len()].copy_from_slice(x);
        // SAFETY: the two halves of `padded`; 64 bytes are 16 pairs.
        let pairs: [u32; 16] = unsafe {
            let x = padded.as_ptr();
            std::mem::transmute(bf16(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))))
        };
        for (to, pair) in to.of_tokens.iter_mut().zip(pairs) {
            to[at] = pair;
        }
    }
}

/// `x W^T` for `tokens` tokens in tiles.
///
/// # Safety
/// The contract of `Tiles::configure`, the CPU has the features, and the shapes are those that `shapes::matmul` accepts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn prefill<T: Tiles>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
    if tokens == 0 {
        return;
    }
    let tiles = tokens.div_ceil(TILE);
    let lines = x.len() / tiles;
    let (rows, steps) = (weights.n_rows(), weights.cols.div_ceil(STEP));
    let row_bytes = weights.format.row_bytes(weights.cols);
    assert!(lines >= steps * Line::count(size_of::<Pairs>()));
    let mut scratch = Scratch::take(PANEL * BLOCK + PANEL * tiles);
    let (panel, sums) = scratch.split_at_mut(PANEL * BLOCK);
    // Each MR rows of the panel are (step, row), in lines. Sums are (tile, row), a line for 16 tokens.
    let (panel, sums) = (panel.as_mut_ptr(), sums.as_mut_ptr());
    let mut transposed = [[0f32; PANEL]; TILE];
    // SAFETY: the contract of this function. The scratch has a line for each step of a block and row of a panel, and behind
    // them a line for each row of each tile; activations are as long as asserted. Rows past the last of a panel are
    // multiplied, too: any bytes are numbers, and their sums are not passed on.
    unsafe {
        let _configured = Configured::<T>::new();
        for first in (0..rows).step_by(PANEL) {
            let count = PANEL.min(rows - first);
            for from in (0..steps).step_by(BLOCK) {
                let to = steps.min(from + BLOCK);
                let cols = from * STEP..weights.cols.min(to * STEP);
                let bytes = weights.format.row_bytes(cols.start)..weights.format.row_bytes(cols.end);
                for row in 0..count {
                    let start = (first + row) * row_bytes;
                    // Past the last row are the rows of the next task; past the end, a prefetch does not fault.
                    let next = if to < steps { start + bytes.end } else { start + PANEL * row_bytes };
                    prefetch(weights.bytes.as_ptr().wrapping_add(next), bytes.len());
                    let part = &weights.bytes[start + bytes.start..start + bytes.end];
                    let part = Weights { format: weights.format, cols: cols.len(), bytes: part };
                    unpack(part, panel.add(row / MR * MR * BLOCK + row % MR));
                }
                for tile in (0..tiles).step_by(2) {
                    let x = x.as_ptr().add(tile * lines + from * Line::count(size_of::<Pairs>()));
                    let sums = sums.add(tile * PANEL);
                    for row in (0..count).step_by(MR) {
                        let (w, sums) = (panel.add(row * BLOCK), sums.add(row));
                        if tile + 1 < tiles {
                            multiply::<T, true>(w, x, lines, to - from, sums, from == 0);
                        } else {
                            multiply::<T, false>(w, x, lines, to - from, sums, from == 0);
                        }
                    }
                    if to == steps {
                        for tile in tile..tiles.min(tile + 2) {
                            transpose(sums.add(tile % 2 * PANEL).cast(), count, &mut transposed);
                            for (token, results) in transposed.iter().take(tokens - tile * TILE).enumerate() {
                                out(tile * TILE + token, first, &results[..count]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Sums (row, token) of `rows` rows to (token, row).
///
/// # Safety
/// The CPU has the features, `rows` is at most PANEL, and `sums` is valid for reading a multiple of 4 rows, at least `rows`.
#[inline(always)]
unsafe fn transpose(sums: *const f32, rows: usize, to: &mut [[f32; PANEL]; TILE]) {
    for row in (0..rows).step_by(4) {
        for token in (0..TILE).step_by(4) {
            // SAFETY: the contract of this function; PANEL and TILE are multiples of 4.
            unsafe {
                let to = to.as_mut_ptr().cast::<f32>().add(token * PANEL + row);
                __m512::transpose4(sums.add(row * TILE + token), TILE, to, PANEL);
            }
        }
    }
}

#[inline(always)]
fn prefetch(from: *const u8, bytes: usize) {
    let before = from.addr() % size_of::<Line>();
    for line in 0..Line::count(before + bytes) {
        // SAFETY: SSE is part of x86-64; the address may be invalid.
        unsafe { __m512::prefetch(from.wrapping_sub(before).wrapping_add(line * size_of::<Line>())) }
    }
}

/// MR weight rows with one tile of tokens, or with two that are `lines` lines apart. Their sums are at `sums` and at
/// `sums + PANEL`; in the first block of features, sums start at zero.
///
/// # Safety
/// The thread has configured `T`. `w` is valid for reading `steps * MR` lines, `x` for `steps * 16` of each tile, `sums` for
/// reading and writing MR lines of each tile.
#[inline(always)]
unsafe fn multiply<T: Tiles, const TWO_TILES: bool>(
    w: *const Line,
    x: *const Line,
    lines: usize,
    steps: usize,
    sums: *mut Line,
    first_block: bool,
) {
    // SAFETY: the contract of this function.
    unsafe {
        if first_block {
            T::zero::<0>();
            T::zero::<1>();
            T::zero::<2>();
            T::zero::<3>();
        } else {
            T::load::<0>(sums);
            T::load::<1>(sums.add(16));
            if TWO_TILES {
                T::load::<2>(sums.add(PANEL));
                T::load::<3>(sums.add(PANEL + 16));
            }
        }
        for step in 0..steps {
            let (w, x) = (w.add(step * MR), x.add(step * 16));
            T::load::<4>(w);
            T::load::<5>(w.add(16));
            T::load::<6>(x);
            T::dot::<0, 4, 6>();
            T::dot::<1, 5, 6>();
            if TWO_TILES {
                T::load::<7>(x.add(lines));
                T::dot::<2, 4, 7>();
                T::dot::<3, 5, 7>();
            }
        }
        T::store::<0>(sums);
        T::store::<1>(sums.add(16));
        if TWO_TILES {
            T::store::<2>(sums.add(PANEL));
            T::store::<3>(sums.add(PANEL + 16));
        }
    }
}

/// Whether a small known product comes out right. It has integers, whose sums are exact, several blocks of features, more
/// than MR rows and an odd number of tiles.
///
/// # Safety
/// As for `prefill` and `pack`.
unsafe fn works<T: Tiles>() -> bool {
    const ROWS: usize = MR + 9;
    const COLS: usize = (BLOCK + 1) * STEP + 7;
    const TOKENS: usize = 2 * TILE + 3;
    let w = |row: usize, col: usize| ((3 * row + 5 * col) % 7) as f32 - 3.0;
    let x = |token: usize, col: usize| ((2 * token + 3 * col) % 11) as f32 - 5.0;
    let whole = |i: usize| half::bf16::from_f32(w(i / COLS, i % COLS)).to_le_bytes();
    let bytes: Vec<u8> = (0..ROWS * COLS).flat_map(whole).collect();
    let lines = tile_lines(COLS);
    let mut packed = vec![Line::ZERO; TOKENS.div_ceil(TILE) * lines];
    for token in 0..TOKENS {
        let x: Vec<f32> = (0..COLS).map(|col| x(token, col)).collect();
        // SAFETY: the contract of this function.
        unsafe { pack(&x, token % TILE, &mut packed[token / TILE * lines..][..lines]) };
    }
    let mut seen = 0;
    let mut right = true;
    let mut check = |token: usize, first: usize, results: &[f32]| {
        seen += results.len();
        for (row, &result) in (first..).zip(results) {
            right &= result == (0..COLS).map(|col| w(row, col) * x(token, col)).sum::<f32>();
        }
    };
    // SAFETY: the contract of this function; the shapes are right.
    unsafe { prefill::<T>(Weights { format: Format::BF16, cols: COLS, bytes: &bytes }, &packed, TOKENS, &mut check) };
    right && seen == ROWS * TOKENS
}

#[cfg(test)]
mod tests;
