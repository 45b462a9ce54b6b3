//! Activations in the layouts of the fast kernels: quantized to 8 bits for quantized weights, f32 for the others; one row
//! per token for decode, tiles of 16 tokens for prefill.
//!
//! ```text
//! K-quants, for each 256 features:   d = max|x| / 127;  q = round(x / d);  sums of q over each group of a scale
//! Q8_0, for each 32 features:        d = max|x| / 127;  q = round(x / d);  the sum of q
//! ```
//! In a tile, tokens are the lanes of a vector: 4 consecutive features of token 0, the same features of token 1, and so
//! on. A weight row meets the tile as broadcast groups of 4 weights and needs no transposition. Instructions that multiply
//! small matrices take runs of 8 features.
//!
//! The code is plain Rust. It is inlined into each kernel and vectorized there.
//!
//! Decisions: docs/design/kernels.md

use super::Format;

/// Tokens of a prefill tile.
pub const TILE: usize = 16;
/// Weights of a super-block; features of a block of activations for them.
pub const SUPER: usize = 256;
/// Features of a block of f32 activations.
pub const FLOATS: usize = 64;

/// A cache line. Buffers of activations and scratch consist of lines, which aligns their contents.
#[derive(Copy, Clone)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

impl Line {
    pub const ZERO: Line = Line([0; 64]);

    pub const fn count(bytes: usize) -> usize {
        bytes.div_ceil(size_of::<Line>())
    }
}

/// The type of activations that weights of a format are multiplied with.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Activations {
    /// For K-quants: 8 bits, a scale for each 256 features. The weights have 8 groups of 32 with scale and min, or 16 groups
    /// of 16 with a scale.
    Q8K { groups: usize },
    /// For Q8_0: 8 bits, a scale for each 32 features.
    Q8,
    /// f32.
    F32,
}

impl Activations {
    pub fn of(format: Format) -> Self {
        match format {
            Format::Q4_K | Format::Q5_K => Activations::Q8K { groups: 8 },
            Format::Q6_K => Activations::Q8K { groups: 16 },
            Format::Q8_0 => Activations::Q8,
            _ => Activations::F32,
        }
    }
}

/// What a `[Line]` may be viewed as.
///
/// # Safety
/// Numbers: every bit pattern is valid, and there is no padding, which a write would leave uninitialized.
pub unsafe trait Plain: Copy {}
// SAFETY: a number.
unsafe impl Plain for i8 {}
// SAFETY: a number.
unsafe impl Plain for u8 {}
// SAFETY: a number.
unsafe impl Plain for i16 {}
// SAFETY: a number.
unsafe impl Plain for i32 {}
// SAFETY: a number.
unsafe impl Plain for u32 {}
// SAFETY: a number.
unsafe impl Plain for f32 {}
// SAFETY: arrays have no padding but that of their elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Declares a struct that is `Plain`, and proves it. A struct that alignment makes longer has a field `unused`.
macro_rules! plain {
    (
        $(#[$attribute:meta])*
        $visibility:vis struct $name:ident { $($(#[$comment:meta])* $field_visibility:vis $field:ident: $type:ty,)+ }
    ) => {
        $(#[$attribute])*
        #[derive(Copy, Clone)]
        $visibility struct $name { $($(#[$comment])* $field_visibility $field: $type,)+ }

        // SAFETY: the assertions below: every field is `Plain`, and together they are as long as the struct.
        unsafe impl crate::compute::kernels::pack::Plain for $name {}

        const _: () = {
            const fn is_plain<T: crate::compute::kernels::pack::Plain>() {}
            $(is_plain::<$type>();)+
            assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())+, "the struct has padding");
        };
    };
}
pub(super) use plain;

pub fn view<T: Plain>(lines: &[Line]) -> &[T] {
    const { assert!(align_of::<T>() <= align_of::<Line>()) };
    // SAFETY: `Plain` makes any bytes a `T`, the alignment is asserted, the length is rounded down.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines) / size_of::<T>()) }
}

pub fn view_mut<T: Plain>(lines: &mut [Line]) -> &mut [T] {
    const { assert!(align_of::<T>() <= align_of::<Line>()) };
    // SAFETY: as in `view`. A write through the view leaves bytes, all of them initialized, since `Plain` has no padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines) / size_of::<T>()) }
}

plain! {
    /// 256 features of one token, in order: for NEON. x86 has `interleave::InterleavedRow`.
    #[repr(C, align(64))]
    pub struct RowBlock {
        pub q: [i8; SUPER],
        /// Of each group of 32 (the first 8) or 16.
        pub sums: [i16; 16],
        pub d: f32,
        unused: [u32; 7],
    }
}

plain! {
    /// 32 features of one token.
    #[repr(C)]
    pub struct Q8Row {
        pub q: [i8; 32],
        pub d: f32,
    }
}

plain! {
    /// 256 features of 16 tokens.
    #[repr(C, align(64))]
    pub struct TileBlock {
        /// Features in runs of R: feature `R * i + j` of a token is byte `R * (16 * i + token) + j`.
        pub q: [[i8; 64]; 64],
        /// `sums[i][2 * token + j]` is the sum of group `2 * i + j`.
        pub sums: [[i16; 32]; 8],
        pub d: [f32; TILE],
    }
}

plain! {
    /// 32 features of 16 tokens.
    #[repr(C, align(64))]
    pub struct Q8Tile {
        pub q: [[i8; 64]; 8],
        pub sums: [i32; TILE],
        pub d: [f32; TILE],
    }
}

plain! {
    /// 64 features of 16 tokens; zeros after the last feature.
    #[repr(C, align(64))]
    pub struct FloatTile {
        pub x: [[f32; TILE]; FLOATS],
    }
}

/// Lines of one token for decode. `B` is the block of activations for K-quants.
pub fn row_lines<B: Plain>(format: Format, cols: usize) -> usize {
    Line::count(match Activations::of(format) {
        Activations::Q8K { .. } => cols / SUPER * size_of::<B>(),
        Activations::Q8 => cols / 32 * size_of::<Q8Row>(),
        Activations::F32 => cols * 4,
    })
}

/// Lines of a tile of 16 tokens for prefill.
pub fn tile_lines(format: Format, cols: usize) -> usize {
    Line::count(match Activations::of(format) {
        Activations::Q8K { .. } => cols / SUPER * size_of::<TileBlock>(),
        Activations::Q8 => cols / 32 * size_of::<Q8Tile>(),
        Activations::F32 => cols.div_ceil(FLOATS) * size_of::<FloatTile>(),
    })
}

/// Quantizes to 8 bits and returns the scale. A value that is not finite makes the scale NaN, so that the product is NaN,
/// too. Values below 1e-30 count as 0.
#[inline(always)]
pub fn quantize<const N: usize>(x: &[f32; N], q: &mut [i8; N]) -> f32 {
    // The bits of magnitudes, as integers, are ordered as the magnitudes are; NaN is above all of them.
    let max = f32::from_bits(x.iter().fold(0, |max, x| max.max(x.abs().to_bits())));
    let (d, scale) = if max > 1e-30 { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
    // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits. This vectorizes on every CPU.
    const ROUND: f32 = 12_582_912.0;
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * scale + ROUND).to_bits() as i8;
    }
    if max < f32::INFINITY { d } else { f32::NAN }
}

#[inline(always)]
pub fn sum(q: &[i8]) -> i32 {
    q.iter().map(|&q| q as i32).sum()
}

/// The activations of one token for decode.
#[inline(always)]
pub fn pack_row(format: Format, x: &[f32], row: &mut [Line]) {
    match Activations::of(format) {
        Activations::Q8K { groups } => {
            for (x, block) in x.as_chunks::<SUPER>().0.iter().zip(view_mut::<RowBlock>(row)) {
                block.d = quantize(x, &mut block.q);
                block.sums = [0; 16];
                for (sum_of, q) in block.sums.iter_mut().zip(block.q.chunks_exact(SUPER / groups)) {
                    *sum_of = sum(q) as i16;
                }
            }
        }
        Activations::Q8 => {
            for (x, block) in x.as_chunks::<32>().0.iter().zip(view_mut::<Q8Row>(row)) {
                block.d = quantize(x, &mut block.q);
            }
        }
        Activations::F32 => view_mut(row)[..x.len()].copy_from_slice(x),
    }
}

/// Token `at` of a tile for prefill, 8-bit features in runs of `RUN`. The other tokens of the tile keep what they have.
#[inline(always)]
pub fn pack_tile<const RUN: usize>(format: Format, x: &[f32], at: usize, tile: &mut [Line]) {
    match Activations::of(format) {
        Activations::Q8K { groups } => {
            let mut q = [0; SUPER];
            for (x, block) in x.as_chunks::<SUPER>().0.iter().zip(view_mut::<TileBlock>(tile)) {
                block.d[at] = quantize(x, &mut q);
                scatter::<RUN>(&q, at, &mut block.q);
                for (group, q) in q.chunks_exact(SUPER / groups).enumerate() {
                    block.sums[group / 2][2 * at + group % 2] = sum(q) as i16;
                }
            }
        }
        Activations::Q8 => {
            let mut q = [0; 32];
            for (x, block) in x.as_chunks::<32>().0.iter().zip(view_mut::<Q8Tile>(tile)) {
                block.d[at] = quantize(x, &mut q);
                block.sums[at] = sum(&q);
                scatter::<RUN>(&q, at, &mut block.q);
            }
        }
        Activations::F32 => {
            for (x, block) in x.chunks(FLOATS).zip(view_mut::<FloatTile>(tile)) {
                for (i, to) in block.x.iter_mut().enumerate() {
                    to[at] = x.get(i).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// Runs of one token to their places in a tile.
#[inline(always)]
fn scatter<const RUN: usize>(q: &[i8], at: usize, to: &mut [[i8; 64]]) {
    let runs = to.as_flattened_mut().as_chunks_mut::<RUN>().0;
    for (q, runs) in q.as_chunks::<RUN>().0.iter().zip(runs.as_chunks_mut::<TILE>().0) {
        runs[at] = *q;
    }
}
