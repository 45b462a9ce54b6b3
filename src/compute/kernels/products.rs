//! The two loops of a matrix product, written once for every fast kernel and format.
//!
//! ```text
//! decode:   for each pair of weight rows, one from each half of the matrix, for each NR = 4 tokens:
//!               for each ROW_SWITCH features, for each row of the pair:  accumulate w x
//!           Two address streams keep more reads in flight than one; the rows share their loads of activations.
//! prefill:  for each panel of 32 weight rows:  unpack it into cache
//!               for each TILES tiles of 16 tokens, for each block of features, for each ROWS rows:  accumulate w x
//!               transpose the sums from (row, token) to (token, row)
//! ```
//! A panel is read from memory once, in order, and used for every token; meanwhile the next one is prefetched. The sum
//! of a row and a token depends on these two alone, not on the number of rows and tokens in the call.
//!
//! Decisions: docs/design/kernels.md

use std::ops::Range;

use super::pack::{Line, Plain, TILE, view};
use super::scratch::Scratch;
use super::simd::Simd;
use super::{Out, Weights};

/// Rows of a panel: 32 rows of 8192 weights are 0.4 MB unpacked, half of an L2 cache.
const PANEL: usize = 32;
/// Sums of one tile with a panel: the distance between tiles in the buffer of sums.
const TILE_STRIDE: usize = PANEL * TILE;
/// Columns of decode's register tile: tokens that share the unpacking of a weight.
pub const NR: usize = 4;
/// `Products::ROW_SWITCH` unless an implementation has its own, and always for fewer than `NR` tokens.
const DEFAULT_ROW_SWITCH: usize = 3072;
/// Rows whose results decode passes on in one call.
const ROW_BLOCK: usize = 64;

/// How weights of one format are multiplied with one instruction set.
///
/// # Safety
/// For the caller of any method: the instruction set is there, see [`Simd`], and the method's own contract holds.
///
/// For the implementer: a method reads and writes what its contract names, and no other memory. `STEP` is a multiple of
/// `ROW`, `ROWS` divides 32, and `TILES` is 1, 2 or 3.
pub unsafe trait Products {
    /// A vector of the instruction set.
    type V: Simd;
    /// Activations of one token for decode, `ROW` features.
    type Row: Plain;
    /// Activations of 16 tokens for prefill, `BLOCK` features.
    type Tile: Plain;
    /// Unpacked weights of one row for prefill, `BLOCK` features.
    type Block: Plain;
    /// The accumulators of one weight row and one token in decode.
    type Sum: Copy;
    /// Features of a `Row`.
    const ROW: usize;
    /// Features of a step of decode.
    const STEP: usize;
    /// Features of one row that decode multiplies with `NR` tokens before it switches to the other row of the pair. With
    /// few, the other row finds the activations in L1. With many, the accumulators of one row stay in registers.
    const ROW_SWITCH: usize = DEFAULT_ROW_SWITCH;
    /// Features of a `Block`.
    const BLOCK: usize;
    /// Rows of prefill's register tile.
    const ROWS: usize;
    /// Activation tiles of prefill's register tile.
    const TILES: usize;

    /// Accumulators of zero.
    ///
    /// # Safety
    /// The contract of the trait.
    unsafe fn zero() -> Self::Sum;

    /// Accumulates step `step` of one weight row with `T` tokens.
    ///
    /// # Safety
    /// `weights` is one row of whole blocks, `step` is less than `cols.div_ceil(STEP)`, and each `x` holds the row's
    /// features: `cols.div_ceil(ROW)` elements.
    unsafe fn accumulate<const T: usize>(
        weights: Weights<'_>,
        step: usize,
        x: [&[Self::Row]; T],
        sums: &mut [Self::Sum; T],
    );

    /// Accumulates some steps of two weight rows; by default one row after the other.
    ///
    /// # Safety
    /// For both rows and each of the steps: as for `accumulate`.
    #[inline(always)]
    unsafe fn accumulate_pair<const T: usize>(
        rows: [Weights<'_>; 2],
        steps: Range<usize>,
        x: [&[Self::Row]; T],
        sums: &mut [[Self::Sum; T]; 2],
    ) {
        for side in 0..2 {
            let mut accumulators = sums[side];
            for step in steps.clone() {
                // SAFETY: the contract of this method.
                unsafe { Self::accumulate(rows[side], step, x, &mut accumulators) };
            }
            sums[side] = accumulators;
        }
    }

    /// The horizontal sum.
    ///
    /// # Safety
    /// The contract of the trait.
    unsafe fn reduce(sum: Self::Sum) -> f32;

    /// Unpacks one weight row: block i to `to + i * stride`.
    ///
    /// # Safety
    /// `weights` is one row of whole blocks. For each i below `cols.div_ceil(BLOCK)`, `to + i * stride` is valid for
    /// writing a block, and aligned.
    unsafe fn unpack(weights: Weights<'_>, to: *mut Self::Block, stride: usize);

    /// Multiplies `ROWS` rows with `T` tiles, and adds to the 16 sums of row r and tile t at `out + 16 * r + t * tile_stride`.
    ///
    /// # Safety
    /// `rows` is valid for reading `ROWS` blocks, and aligned. For each tile t, `out + t * tile_stride` is valid for reading
    /// and writing `16 * ROWS` floats, and aligned to 64 bytes.
    unsafe fn multiply<const T: usize>(
        rows: *const Self::Block,
        x: [&Self::Tile; T],
        out: *mut f32,
        tile_stride: usize,
    );
}

/// Results of a block of rows from each half of the matrix, for up to `NR` tokens: (half, token, row).
type Results = [[[f32; ROW_BLOCK]; NR]; 2];

/// The product for few tokens. `x` holds them one by one.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and `weights` are whole rows of whole blocks.
#[inline(always)]
pub unsafe fn decode<P: Products>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
    if tokens == 0 {
        return;
    }
    let lines = x.len() / tokens;
    let row = |token: usize| view::<P::Row>(&x[token * lines..(token + 1) * lines]);
    let mut results: Results = [[[0f32; ROW_BLOCK]; NR]; 2];
    let rows = weights.n_rows();
    let half = rows.div_ceil(2);
    for first in (0..half).step_by(ROW_BLOCK) {
        let count = ROW_BLOCK.min(half - first);
        let mut token = 0;
        while token < tokens {
            let batch = match tokens - token {
                1 => 1,
                2 | 3 => 2,
                _ => NR,
            };
            for i in 0..count {
                // The last row of the first half may have no partner. It is paired with the last row, for a second time.
                let pair = [weights.row(first + i), weights.row((half + first + i).min(rows - 1))];
                // SAFETY: the contract of this function; both are rows of the same matrix.
                unsafe {
                    match batch {
                        1 => dot::<P, 1>(pair, [row(token)], &mut results, i),
                        2 => dot::<P, 2>(pair, [row(token), row(token + 1)], &mut results, i),
                        _ => {
                            let x = [row(token), row(token + 1), row(token + 2), row(token + 3)];
                            dot::<P, NR>(pair, x, &mut results, i);
                        }
                    }
                }
            }
            for (side, results) in results.iter().enumerate() {
                let at = side * half + first;
                let count = count.min(rows.saturating_sub(at));
                for (t, results) in results.iter().enumerate().take(batch) {
                    out(token + t, at, &results[..count]);
                }
            }
            token += batch;
        }
    }
}

/// Multiplies two weight rows with `T` tokens. The results go to index `at` of `results`.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and `rows` are two rows of whole blocks, equally long.
#[inline(always)]
unsafe fn dot<P: Products, const T: usize>(
    rows: [Weights<'_>; 2],
    mut x: [&[P::Row]; T],
    results: &mut Results,
    at: usize,
) {
    let cols = rows[0].cols;
    for t in 0..T {
        x[t] = &x[t][..cols.div_ceil(P::ROW)];
    }
    let steps_per_switch = if T == NR { P::ROW_SWITCH } else { DEFAULT_ROW_SWITCH } / P::STEP;
    let steps = cols.div_ceil(P::STEP);
    // SAFETY: the contract of this function; `steps` are the steps of a row, and the slicing above has checked each `x`.
    unsafe {
        let mut sums = [[P::zero(); T]; 2];
        for first in (0..steps).step_by(steps_per_switch) {
            P::accumulate_pair(rows, first..steps.min(first + steps_per_switch), x, &mut sums);
        }
        for side in 0..2 {
            reduce_into::<P, T>(sums[side], &mut results[side], at);
        }
    }
}

/// # Safety
/// The instruction set is there, see [`Simd`].
#[inline(always)]
unsafe fn reduce_into<P: Products, const T: usize>(sums: [P::Sum; T], results: &mut [[f32; ROW_BLOCK]; NR], at: usize) {
    for t in 0..T {
        // SAFETY: the contract of this function.
        results[t][at] = unsafe { P::reduce(sums[t]) };
    }
}

/// The product for many tokens. `x` holds them in tiles of 16.
///
/// # Safety
/// As for [`decode`].
#[inline(always)]
pub unsafe fn prefill<P: Products>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
    const { assert!(PANEL.is_multiple_of(P::ROWS) && P::TILES <= 3 && align_of::<P::Block>() <= align_of::<Line>()) }
    if tokens == 0 {
        return;
    }
    let tiles = tokens.div_ceil(TILE);
    let lines = x.len() / tiles;
    let tile = |tile: usize| view::<P::Tile>(&x[tile * lines..(tile + 1) * lines]);
    let (rows, blocks) = (weights.n_rows(), weights.cols.div_ceil(P::BLOCK));
    let panel_lines = Line::count(blocks * PANEL * size_of::<P::Block>());
    let sums_lines = Line::count(tiles * PANEL * TILE * 4);
    let mut scratch = Scratch::take(panel_lines + sums_lines);
    let (panel, sums) = scratch.split_at_mut(panel_lines);
    let panel = panel.as_mut_ptr().cast::<P::Block>();
    let sums = sums.as_mut_ptr().cast::<f32>();
    for first in (0..rows).step_by(PANEL) {
        let count = PANEL.min(rows - first);
        // SAFETY: the contract of this function. The scratch has room for `blocks * PANEL` blocks, of which row r and
        // block b take number `b * PANEL + r`, and behind them for `tiles * PANEL` rows of 16 sums; both are aligned as
        // `Line` is. Rows past the last of a panel are multiplied, too: `Plain` makes any bytes a block, and their sums
        // are not passed on.
        unsafe {
            for row in 0..count {
                P::unpack(weights.row(first + row), panel.add(row), PANEL);
            }
            std::slice::from_raw_parts_mut(sums, tiles * TILE_STRIDE).fill(0.0);
            let steps = tiles.div_ceil(P::TILES) * blocks * count.div_ceil(P::ROWS);
            let mut prefetcher = Prefetcher::new(weights, first + PANEL, steps);
            for t in (0..tiles).step_by(P::TILES) {
                for block in 0..blocks {
                    for row in (0..count).step_by(P::ROWS) {
                        prefetcher.fetch::<P>();
                        let w = panel.add(block * PANEL + row);
                        let out = sums.add(t * TILE_STRIDE + row * TILE);
                        match P::TILES.min(tiles - t) {
                            1 => P::multiply(w, [&tile(t)[block]], out, TILE_STRIDE),
                            2 => P::multiply(w, [&tile(t)[block], &tile(t + 1)[block]], out, TILE_STRIDE),
                            _ => {
                                let x = [&tile(t)[block], &tile(t + 1)[block], &tile(t + 2)[block]];
                                P::multiply(w, x, out, TILE_STRIDE)
                            }
                        }
                    }
                }
            }
            let mut transposed = [0f32; PANEL * TILE]; // (token, row)
            for t in 0..tiles {
                let sums = sums.add(t * TILE_STRIDE);
                for row in (0..count).step_by(4) {
                    for token in (0..TILE).step_by(4) {
                        let to = transposed.as_mut_ptr().add(token * PANEL + row);
                        P::V::transpose4(sums.add(row * TILE + token), TILE, to, PANEL);
                    }
                }
                for token in 0..TILE.min(tokens - t * TILE) {
                    out(t * TILE + token, first, &transposed[token * PANEL..][..count]);
                }
            }
        }
    }
}

/// Prefetches the next panel of weights, a few cache lines at a time.
struct Prefetcher {
    next: *const u8,
    end: *const u8,
    step: usize,
}

impl Prefetcher {
    fn new(weights: Weights<'_>, row: usize, steps: usize) -> Self {
        let row_bytes = weights.format.row_bytes(weights.cols);
        // Past the last row are the rows of the next task; past the end of the matrix, a prefetch does not fault.
        let next = weights.bytes.as_ptr().wrapping_add(row * row_bytes);
        let bytes = PANEL * row_bytes;
        Prefetcher { next, end: next.wrapping_add(bytes), step: bytes.div_ceil(steps) }
    }

    /// # Safety
    /// The instruction set is there, see [`Simd`].
    #[inline(always)]
    unsafe fn fetch<P: Products>(&mut self) {
        let end = self.next.wrapping_add(self.step).min(self.end);
        while self.next < end {
            // SAFETY: the contract of this function; the address may be invalid.
            unsafe { P::V::prefetch(self.next) };
            self.next = self.next.wrapping_add(64);
        }
    }
}
