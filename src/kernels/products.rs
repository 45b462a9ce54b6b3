//! The two shapes of a matrix product, written once for every fast kernel and format.
//!
//! ```text
//! decode:   for each two weight rows, one of either half of the matrix, for each 4 tokens:
//!               for each few features, for each of the rows:  sums += w x
//!           two runs of addresses in turn keep more reads under way than one, and share what they load of activations
//! prefill:  for each panel of 32 weight rows:         unpack it, into cache
//!               for each few tiles of 16 tokens, for each block of features, for each few rows:  sums += w x
//!               turn the sums from (row, token) to (token, row)
//! ```
//! A panel is read once from memory, in order, and used for every token. While it is multiplied, the next one is
//! prefetched. A sum depends on nothing but its row and its token: not on how many of either there are.
//!
//! Decisions: docs/design/kernels.md

use std::ops::Range;

use super::pack::{Line, Plain, TILE, view};
use super::scratch::Scratch;
use super::simd::Simd;
use super::{Out, Weights};

/// Rows of a panel: 32 rows of 8192 weights are 0.4 MB unpacked, half of an L2 cache.
const PANEL: usize = 32;
/// Sums of one tile with a panel.
const TILE_STRIDE: usize = PANEL * TILE;
/// Tokens that share the unpacking of a weight in decode.
pub const TOGETHER: usize = 4;
/// Features of one row before it is the other's turn, as far as `Products::TURN` does not say otherwise.
const STRETCH: usize = 3072;
/// Rows whose results decode hands out together.
const STRIP: usize = 64;

/// How weights of one format are multiplied with one instruction set.
///
/// # Safety
/// As for [`Simd`]: whoever calls a method does so on a CPU that has the instructions, in a function compiled for them.
pub unsafe trait Products {
    /// Any vector of the instruction set.
    type V: Simd;
    /// Activations of one token for decode, a block of features.
    type Row: Plain;
    /// Activations of 16 tokens for prefill, a block of features.
    type Tile: Plain;
    /// Unpacked weights of one row, a block of features.
    type Block: Copy;
    /// What decode has summed up of one weight row and one token.
    type Sum: Copy;
    /// Features of a `Row`.
    const ROW: usize;
    /// Features that decode takes at a time: a multiple of `ROW`.
    const STEP: usize;
    /// Features of one row that decode multiplies with `TOGETHER` tokens before it is the other's turn. Few: the other finds
    /// the activations in the first cache. Many: the sums of one row, and not of two, stay in registers.
    const TURN: usize = STRETCH;
    /// Features of a `Block`.
    const BLOCK: usize;
    /// Rows that are multiplied together: a divisor of 32.
    const ROWS: usize;
    /// Tiles that are: at most 3.
    const TILES: usize;

    unsafe fn nothing() -> Self::Sum;

    /// Adds step `step` of one weight row with `T` tokens, all of which hold it; the last may be shorter than `STEP`.
    unsafe fn add<const T: usize>(weights: Weights<'_>, step: usize, x: [&[Self::Row]; T], sums: &mut [Self::Sum; T]);

    /// Adds some steps of two weight rows. As written here one after the other.
    #[inline(always)]
    unsafe fn add_both<const T: usize>(
        rows: [Weights<'_>; 2],
        steps: Range<usize>,
        x: [&[Self::Row]; T],
        sums: &mut [[Self::Sum; T]; 2],
    ) {
        for side in 0..2 {
            let mut growing = sums[side];
            for step in steps.clone() {
                // SAFETY: the caller's promise.
                unsafe { Self::add(rows[side], step, x, &mut growing) };
            }
            sums[side] = growing;
        }
    }

    unsafe fn total(sum: Self::Sum) -> f32;

    /// Unpack one weight row: block i goes to `to + i * stride`.
    unsafe fn unpack(weights: Weights<'_>, to: *mut Self::Block, stride: usize);

    /// `ROWS` rows with `T` tiles: 16 sums of row r and tile t are added to at `out + 16 * r + t * tile_stride`.
    unsafe fn multiply<const T: usize>(
        rows: *const Self::Block,
        x: [&Self::Tile; T],
        out: *mut f32,
        tile_stride: usize,
    );
}

/// Results of both halves, for some tokens and rows.
type Strips = [[[f32; STRIP]; TOGETHER]; 2];

/// A few tokens, prepared row by row.
///
/// # Safety
/// As for [`Products`].
#[inline(always)]
pub unsafe fn decode<P: Products>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
    assert_eq!(weights.cols % weights.format.block_len(), 0, "features of a row, in whole blocks");
    let lines = x.len() / tokens;
    let row = |token: usize| view::<P::Row>(&x[token * lines..(token + 1) * lines]);
    let mut strips: Strips = [[[0f32; STRIP]; TOGETHER]; 2];
    let rows = weights.n_rows();
    let half = rows.div_ceil(2);
    for first in (0..half).step_by(STRIP) {
        let count = STRIP.min(half - first);
        let mut token = 0;
        while token < tokens {
            let together = match tokens - token {
                1 => 1,
                2 | 3 => 2,
                _ => TOGETHER,
            };
            for i in 0..count {
                // The last row of the first half may have no partner: it gets one that is not handed out.
                let pair = [weights.row(first + i), weights.row((half + first + i).min(rows - 1))];
                // SAFETY: the caller's promise.
                unsafe {
                    match together {
                        1 => dot::<P, 1>(pair, [row(token)], &mut strips, i),
                        2 => dot::<P, 2>(pair, [row(token), row(token + 1)], &mut strips, i),
                        _ => {
                            let x = [row(token), row(token + 1), row(token + 2), row(token + 3)];
                            dot::<P, TOGETHER>(pair, x, &mut strips, i);
                        }
                    }
                }
            }
            for (side, strip) in strips.iter().enumerate() {
                let at = side * half + first;
                let count = count.min(rows.saturating_sub(at));
                for (t, strip) in strip.iter().enumerate().take(together) {
                    out(token + t, at, &strip[..count]);
                }
            }
            token += together;
        }
    }
}

/// Two weight rows with `T` tokens, to place `at` of the strips.
///
/// # Safety
/// As for [`Products`].
#[inline(always)]
unsafe fn dot<P: Products, const T: usize>(
    rows: [Weights<'_>; 2],
    mut x: [&[P::Row]; T],
    strips: &mut Strips,
    at: usize,
) {
    let cols = rows[0].cols;
    for t in 0..T {
        x[t] = &x[t][..cols.div_ceil(P::ROW)];
    }
    let turn = if T == TOGETHER { P::TURN } else { STRETCH } / P::STEP;
    let steps = cols.div_ceil(P::STEP);
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[P::nothing(); T]; 2];
        for first in (0..steps).step_by(turn) {
            P::add_both(rows, first..steps.min(first + turn), x, &mut sums);
        }
        for side in 0..2 {
            keep::<P, T>(sums[side], &mut strips[side], at);
        }
    }
}

/// # Safety
/// As for [`Products`].
#[inline(always)]
unsafe fn keep<P: Products, const T: usize>(sums: [P::Sum; T], strips: &mut [[f32; STRIP]; TOGETHER], at: usize) {
    for t in 0..T {
        // SAFETY: the caller's promise.
        strips[t][at] = unsafe { P::total(sums[t]) };
    }
}

/// Any number of tokens, prepared in tiles of 16.
///
/// # Safety
/// As for [`Products`].
#[inline(always)]
pub unsafe fn prefill<P: Products>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
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
        // SAFETY: panel and sums have room for `blocks * PANEL` blocks and `tiles * PANEL * TILE` sums, aligned as
        // `Line` is; rows behind the last are multiplied too, whatever they hold, but not handed out. The rest is
        // the caller's promise.
        unsafe {
            for row in 0..count {
                P::unpack(weights.row(first + row), panel.add(row), PANEL);
            }
            std::slice::from_raw_parts_mut(sums, tiles * TILE_STRIDE).fill(0.0);
            let steps = tiles.div_ceil(P::TILES) * blocks * count.div_ceil(P::ROWS);
            let mut ahead = Ahead::new(weights, first + PANEL, steps);
            for t in (0..tiles).step_by(P::TILES) {
                for block in 0..blocks {
                    for row in (0..count).step_by(P::ROWS) {
                        ahead.fetch::<P>();
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
            let mut turned = [0f32; PANEL * TILE]; // (token, row)
            for t in 0..tiles {
                let sums = sums.add(t * TILE_STRIDE);
                for row in (0..count).step_by(4) {
                    for token in (0..TILE).step_by(4) {
                        let to = turned.as_mut_ptr().add(token * PANEL + row);
                        P::V::transpose4(sums.add(row * TILE + token), TILE, to, PANEL);
                    }
                }
                for token in 0..TILE.min(tokens - t * TILE) {
                    out(t * TILE + token, first, &turned[token * PANEL..][..count]);
                }
            }
        }
    }
}

/// Prefetches the next panel of weights a few lines at a time.
struct Ahead {
    next: *const u8,
    end: *const u8,
    step: usize,
}

impl Ahead {
    fn new(weights: Weights<'_>, row: usize, steps: usize) -> Self {
        let row_bytes = weights.format.row_bytes(weights.cols);
        // It may lie behind the last row: prefetching never faults, and there the next task's rows lie.
        let next = weights.bytes.as_ptr().wrapping_add(row * row_bytes);
        let bytes = PANEL * row_bytes;
        Ahead { next, end: next.wrapping_add(bytes), step: bytes.div_ceil(steps) }
    }

    /// # Safety
    /// As for [`Products`].
    #[inline(always)]
    unsafe fn fetch<P: Products>(&mut self) {
        let end = self.next.wrapping_add(self.step).min(self.end);
        while self.next < end {
            // SAFETY: the caller's promise.
            unsafe { P::V::prefetch(self.next) };
            self.next = self.next.wrapping_add(64);
        }
    }
}
