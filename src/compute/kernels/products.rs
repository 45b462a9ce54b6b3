//! The two loops of a matrix product, written once for every fast kernel and format.
//!
//! ```text
//! decode:   for each 64 weight rows of each half of the matrix, for each TOKENS tokens or fewer, for each pair of rows:
//!               for each segment of features, for each row of the pair:  accumulate w x
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
/// Rows whose results decode passes on in one call.
const ROW_BLOCK: usize = 64;

/// The statements once for each token t below `T`, at most 8. A loop of that length stays a loop in the compiled code,
/// and the sums of its tokens in memory.
macro_rules! for_each_token {
    ($T:ident, $t:ident, $body:block) => {{
        macro_rules! token {
            ($i:literal) => {
                if $T > $i {
                    let $t = $i;
                    $body
                }
            };
        }
        token!(0);
        token!(1);
        token!(2);
        token!(3);
        token!(4);
        token!(5);
        token!(6);
        token!(7);
    }};
}
pub(super) use for_each_token;

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
    /// Tokens that share the unpacking of a weight in decode, at most 8.
    const TOKENS: usize = 8;
    /// Features of a `Block`.
    const BLOCK: usize;
    /// Rows of prefill's register tile.
    const ROWS: usize;
    /// Activation tiles of prefill's register tile.
    const TILES: usize;

    /// Features of one row that decode multiplies with `tokens` tokens before it turns to the next row. With few, the next
    /// row finds the activations in L1. With many, the accumulators of one row stay in registers.
    #[inline(always)]
    fn segment(tokens: usize) -> usize {
        if tokens <= 4 { 3072 } else { 1536 }
    }

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
        // SAFETY: the contract of this method.
        unsafe { one_after_the_other::<Self, T>(rows, steps, x, sums) };
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

/// `Products::accumulate_pair`, one row after the other: the accumulators of one row are in registers.
///
/// # Safety
/// As for `Products::accumulate_pair`.
#[inline(always)]
pub unsafe fn one_after_the_other<P: Products + ?Sized, const T: usize>(
    rows: [Weights<'_>; 2],
    steps: Range<usize>,
    x: [&[P::Row]; T],
    sums: &mut [[P::Sum; T]; 2],
) {
    for side in 0..2 {
        // One by one: a copy of the whole array stays a copy in memory.
        let mut accumulators = [sums[side][0]; T];
        for_each_token!(T, t, { accumulators[t] = sums[side][t] });
        for step in steps.clone() {
            // SAFETY: the contract of this function.
            unsafe { P::accumulate(rows[side], step, x, &mut accumulators) };
        }
        for_each_token!(T, t, { sums[side][t] = accumulators[t] });
    }
}

/// Results of a block of rows from each half of the matrix: (half, token, row).
type Results<const T: usize> = [[[f32; ROW_BLOCK]; T]; 2];

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
    let features = weights.cols.div_ceil(P::ROW);
    let row = |token: usize| &view::<P::Row>(&x[token * lines..(token + 1) * lines])[..features];
    let half = weights.n_rows().div_ceil(2);
    for first in (0..half).step_by(ROW_BLOCK) {
        let block = first..half.min(first + ROW_BLOCK);
        let mut token = 0;
        while token < tokens {
            // As few passes as possible, of equal numbers of tokens. All but the first find the rows in L2.
            let count = (tokens - token).div_ceil((tokens - token).div_ceil(P::TOKENS));
            macro_rules! by_count {
                ($($T:literal)*) => {
                    match count {
                        $($T => {
                            let mut x = [row(token); $T];
                            for (t, x) in x.iter_mut().enumerate() {
                                *x = row(token + t);
                            }
                            // SAFETY: the contract of this function; each `x` has been cut to the features of a row.
                            unsafe { pass::<P, $T>(weights, block.clone(), x, token, out) };
                        })*
                        _ => unreachable!("{count} tokens"),
                    }
                };
            }
            by_count!(1 2 3 4 5 6 7 8);
            token += count;
        }
    }
}

/// Rows `block` of each half of the matrix with `T` tokens, the first of which is `token`.
///
/// # Safety
/// As for [`decode`]; each `x` holds the features of a row.
#[inline(always)]
unsafe fn pass<P: Products, const T: usize>(
    weights: Weights<'_>,
    block: Range<usize>,
    x: [&[P::Row]; T],
    token: usize,
    out: &mut Out<'_>,
) {
    let rows = weights.n_rows();
    let half = rows.div_ceil(2);
    let mut results: Results<T> = [[[0f32; ROW_BLOCK]; T]; 2];
    for (i, row) in block.clone().enumerate() {
        // The last row of the first half may have no partner. It is paired with the last row, for a second time.
        let pair = [weights.row(row), weights.row((half + row).min(rows - 1))];
        // SAFETY: the contract of this function; both are rows of one matrix.
        unsafe { dot::<P, T>(pair, x, &mut results, i) };
    }
    for (side, results) in results.iter().enumerate() {
        let first = side * half + block.start;
        let count = block.len().min(rows.saturating_sub(first));
        for (t, results) in results.iter().enumerate() {
            out(token + t, first, &results[..count]);
        }
    }
}

/// Multiplies two weight rows with `T` tokens. The results go to index `at` of `results`.
///
/// # Safety
/// The instruction set is there, see [`Simd`]. The rows have whole blocks and are equally long, and `x` holds as many
/// features.
#[inline(always)]
unsafe fn dot<P: Products, const T: usize>(
    pair: [Weights<'_>; 2],
    x: [&[P::Row]; T],
    results: &mut Results<T>,
    at: usize,
) {
    let steps = pair[0].cols.div_ceil(P::STEP);
    let segment = P::segment(T) / P::STEP;
    // SAFETY: the contract of this function; `steps` are the steps of a row.
    unsafe {
        let mut sums = [[P::zero(); T]; 2];
        for first in (0..steps).step_by(segment) {
            P::accumulate_pair(pair, first..steps.min(first + segment), x, &mut sums);
        }
        for side in 0..2 {
            for t in 0..T {
                results[side][t][at] = P::reduce(sums[side][t]);
            }
        }
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
