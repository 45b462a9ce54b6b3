//! AMX: bf16 products in tiles for the prefill of quantized and BF16 weights. Everything else is AVX-512's.
//!
//! ```text
//! for each panel of 256 weight rows, for each block of 256 features:   unpack to bf16, into cache
//!     for each 32 tokens, for each 32 rows:                            sums += w x, in 2 x 2 tiles of 16 x 16
//!     after the last block, for each 16 tokens:                        turn the sums from (row, token) to (token, row)
//! ```
//! 1. Weights are the left operand, 16 rows of 32 features, as unpacking leaves them. Activations are the right one,
//!    16 pairs of features of 16 tokens: they are interleaved once, when they are packed.
//! 2. Sums rest in memory between blocks, each tile in 1 KB of its own: in a strided matrix they cost a quarter more.
//! 3. A 4-bit group has only 16 different weights, a 5-bit group 32: these are computed, then looked up.
//! 4. A K block is a few lines of every row, which no hardware prefetcher follows: unpacking it asks for the next one.
//!
//! Both operands are rounded to bf16, to nearest even; denormal numbers count as 0, as they do in the products.

mod tiles;
mod unpack;

use std::arch::x86_64::{__m512, _mm512_loadu_ps};
use std::sync::OnceLock;

use super::avx512::Avx512;
use super::pack::{Plain, TILE};
use super::simd::Simd;
use super::{Format, Kernel, KvPage, Line, Out, Phase, Query, Scratch, Tile, Weights, cpu, view_mut};
use tiles::{Configured, Hardware, Tiles, permitted};
use unpack::{bf16, unpack};

/// AMX tiles and their bf16 products, AVX-512 with BF16, and what `Avx512` asks for.
pub struct Amx(Avx512);

impl Amx {
    /// None also where the operating system refuses the tile registers, or where they miscalculate.
    pub fn new() -> Option<Self> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        let avx512 = Avx512::new()?;
        let usable = USABLE.get_or_init(|| {
            let (tiles, products) = cpu::amx();
            // SAFETY: the features were found, in the order in which they are asked for.
            tiles && products && is_x86_feature_detected!("avx512bf16") && permitted() && unsafe { works::<Hardware>() }
        });
        usable.then_some(Amx(avx512))
    }
}

/// F32 and F16 weights stay in f32: a bf16 product would cost them accuracy.
fn in_tiles(format: Format, phase: Phase) -> bool {
    phase == Phase::Prefill && !matches!(format, Format::F32 | Format::F16)
}

impl Kernel for Amx {
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
            // SAFETY: a value of this type exists only where its features were found.
            unsafe { pack(x, at, tile) }
        } else {
            self.0.pack(format, phase, x, at, tile)
        }
    }

    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>) {
        if in_tiles(weights.format, phase) {
            // SAFETY: a value of this type exists only where its features were found.
            unsafe { prefill::<Hardware>(weights, x, tokens, out) }
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

/// Weight rows that are unpacked together, and steps of features: 128 KB, which stay in L2 while all tokens pass by.
const PANEL: usize = 256;
const BLOCK: usize = 8;
/// Weight rows that are multiplied together: two tiles, 16 KB with the features of a block, as the tokens have them.
const MR: usize = 32;
/// Features of a tile, of a line of weights, and of 16 lines of tokens.
const STEP: usize = 32;

/// 32 features of 16 tokens: pairs of features, the even one in the low half.
#[derive(Copy, Clone)]
#[repr(C, align(64))]
struct Pairs([[u32; TILE]; STEP / 2]);
// SAFETY: numbers without padding.
unsafe impl Plain for Pairs {}

/// Lines of 16 tokens. Whole blocks of an odd number, where there are several: with a power of two between them, the
/// same features of many tokens would meet in few sets of the cache.
fn tile_lines(cols: usize) -> usize {
    let steps = cols.div_ceil(STEP);
    let padded = if steps > BLOCK { (steps.div_ceil(BLOCK) | 1) * BLOCK } else { steps };
    padded * Line::count(size_of::<Pairs>())
}

/// Token `at` of a tile; the others are left as they are.
///
/// # Safety
/// The CPU has the features.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pack(x: &[f32], at: usize, tile: &mut [Line]) {
    for (x, to) in x.chunks(STEP).zip(view_mut::<Pairs>(tile)) {
        let mut padded = [0f32; STEP];
        padded[..x.len()].copy_from_slice(x);
        // SAFETY: loads inside `padded`; 64 bytes are 16 pairs.
        let pairs: [u32; 16] = unsafe {
            let x = padded.as_ptr();
            std::mem::transmute(bf16(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))))
        };
        for (to, pair) in to.0.iter_mut().zip(pairs) {
            to[at] = pair;
        }
    }
}

/// `x W^T` for `tokens` tokens in tiles.
///
/// # Safety
/// As for `Tiles::configure`, and the CPU has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn prefill<T: Tiles>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
    let tiles = tokens.div_ceil(TILE);
    let lines = x.len() / tiles;
    let (rows, steps) = (weights.n_rows(), weights.cols.div_ceil(STEP));
    let row_bytes = weights.format.row_bytes(weights.cols);
    assert!(lines >= steps * Line::count(size_of::<Pairs>()));
    let mut scratch = Scratch::take(PANEL * BLOCK + PANEL * tiles);
    let (panel, sums) = scratch.split_at_mut(PANEL * BLOCK);
    // A row of the panel is (step, row), a line each; sums are (tile, row), a line for 16 tokens.
    let (panel, sums) = (panel.as_mut_ptr(), sums.as_mut_ptr());
    let mut transposed = [[0f32; PANEL]; TILE];
    // SAFETY: a block has at most BLOCK steps, a panel PANEL rows, of which some behind the last are multiplied too,
    // whatever they hold, but not handed out; activations are as long as was asserted. The rest is the caller's promise.
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
                    // It may lie behind the last row: prefetching never faults, and there the next task's rows lie.
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
#[inline(always)]
unsafe fn transpose(sums: *const f32, rows: usize, to: &mut [[f32; PANEL]; TILE]) {
    for row in (0..rows).step_by(4) {
        for token in (0..TILE).step_by(4) {
            // SAFETY: at most PANEL rows of TILE sums; the rest is as for `Simd`.
            unsafe {
                let to = to.as_mut_ptr().cast::<f32>().add(token * PANEL + row);
                __m512::transpose4(sums.add(row * TILE + token), TILE, to, PANEL);
            }
        }
    }
}

#[inline(always)]
unsafe fn prefetch(from: *const u8, bytes: usize) {
    let before = from.addr() % size_of::<Line>();
    for line in 0..Line::count(before + bytes) {
        // SAFETY: as for `Simd`.
        unsafe { __m512::prefetch(from.wrapping_sub(before).wrapping_add(line * size_of::<Line>())) }
    }
}

/// A row of weight rows with one tile of tokens or, `TWO_TILES`, two that are `lines` apart: 32 rows of sums for each, from
/// `sums` on and from `sums + PANEL`, are added to or, `fresh`, written.
#[inline(always)]
unsafe fn multiply<T: Tiles, const TWO_TILES: bool>(
    w: *const Line,
    x: *const Line,
    lines: usize,
    steps: usize,
    sums: *mut Line,
    fresh: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if fresh {
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

/// Whether a small product, of integers and so exact in any order, comes out right: it has several blocks of features,
/// several strips of rows and an odd number of tiles.
///
/// # Safety
/// As for `prefill`.
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
        // SAFETY: the caller's promise.
        unsafe { pack(&x, token % TILE, &mut packed[token / TILE * lines..][..lines]) };
    }
    let (mut seen, mut right) = (0, true);
    let mut check = |token: usize, first: usize, results: &[f32]| {
        seen += results.len();
        for (row, &result) in (first..).zip(results) {
            right &= result == (0..COLS).map(|col| w(row, col) * x(token, col)).sum::<f32>();
        }
    };
    // SAFETY: the caller's promise.
    unsafe { prefill::<T>(Weights { format: Format::BF16, cols: COLS, bytes: &bytes }, &packed, TOKENS, &mut check) };
    right && seen == ROWS * TOKENS
}

#[cfg(test)]
mod tests;
