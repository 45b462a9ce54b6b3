//! Products of bytes with NEON alone, with `sdot` and with `smmla`. All are exact.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Base, DotProd, I8mm};
use crate::compute::kernels::pack::TILE;

/// How bytes are multiplied and their products summed.
///
/// # Safety
/// For the caller of any method: the instruction set is there, see `Simd`.
///
/// For the implementer: a method accesses no memory but what the contract of `multiply` names.
pub unsafe trait Bytes {
    /// Features of a token that are adjacent in a tile.
    const RUN: usize;

    /// Lane k: the sum of `w * x` over the bytes `4 k .. 4 k + 4` of one or two vectors.
    unsafe fn dot<const N: usize>(w: [int8x16_t; N], x: [int8x16_t; N]) -> int32x4_t;

    /// 4 rows with 8 tokens over 16 or 32 features. The order of the results is that of `row_factors`. 16 bits hold the sum
    /// of `I16_PRODUCTS` products.
    ///
    /// # Safety
    /// Each of `w` is valid for reading `features` bytes. `x` is the first token's place in a tile, from which all tokens of
    /// `features` features follow.
    unsafe fn multiply<const I16_PRODUCTS: usize>(w: [*const i8; 4], x: *const i8, features: usize) -> [int32x4_t; 8];

    /// From a factor of each row to the factors of results `2 i` and `2 i + 1` of `multiply`.
    #[inline(always)]
    unsafe fn row_factors(rows: [int32x4_t; 4]) -> [int32x4_t; 4] {
        rows
    }

    /// From the order of `multiply` to: row 0 with tokens 0 to 3, with tokens 4 to 7, row 1, ...
    #[inline(always)]
    unsafe fn by_row(sums: [int32x4_t; 8]) -> [int32x4_t; 8] {
        sums
    }
}

// SAFETY: `multiply` reads `features` bytes of each row and of 8 tokens.
unsafe impl Bytes for Base {
    const RUN: usize = 4;

    #[inline(always)]
    unsafe fn dot<const N: usize>(w: [int8x16_t; N], x: [int8x16_t; N]) -> int32x4_t {
        const { assert!(N == 1 || N == 2) }; // 16 bits hold 2 * 128 * 127
        // SAFETY: the instruction set is there.
        unsafe {
            let mut low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
            let mut high = vmull_high_s8(w[0], x[0]);
            for i in 1..N {
                low = vmlal_s8(low, vget_low_s8(w[i]), vget_low_s8(x[i]));
                high = vmlal_high_s8(high, w[i], x[i]);
            }
            vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))
        }
    }

    #[inline(always)]
    unsafe fn multiply<const I16_PRODUCTS: usize>(w: [*const i8; 4], x: *const i8, features: usize) -> [int32x4_t; 8] {
        // SAFETY: the contract of this method.
        unsafe {
            let mut sums = [vdupq_n_s32(0); 8];
            // Two rows at a time: their 16-bit and 32-bit sums take 16 registers.
            for pair in 0..2 {
                let (mut low32, mut high32) = ([vdupq_n_s32(0); 4], [vdupq_n_s32(0); 4]);
                for start in (0..features / 4).step_by(I16_PRODUCTS) {
                    let (mut low, mut high) = ([vdupq_n_s16(0); 4], [vdupq_n_s16(0); 4]);
                    for step in start..(start + I16_PRODUCTS).min(features / 4) {
                        let x = x.add(4 * TILE * step);
                        let x = [vld1q_s8(x), vld1q_s8(x.add(16))];
                        for r in 0..2 {
                            let w = w[2 * pair + r].cast::<i32>().add(step);
                            let w = vreinterpretq_s8_s32(vld1q_dup_s32(w));
                            for v in 0..2 {
                                low[2 * r + v] = vmlal_s8(low[2 * r + v], vget_low_s8(w), vget_low_s8(x[v]));
                                high[2 * r + v] = vmlal_high_s8(high[2 * r + v], w, x[v]);
                            }
                        }
                    }
                    for i in 0..4 {
                        (low32[i], high32[i]) = (vpadalq_s16(low32[i], low[i]), vpadalq_s16(high32[i], high[i]));
                    }
                }
                for i in 0..4 {
                    sums[4 * pair + i] = vpaddq_s32(low32[i], high32[i]);
                }
            }
            sums
        }
    }
}

/// Lane k of `sum` and the products of `w` and `x`, bytes `4 k .. 4 k + 4`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: an operation on registers, of the feature that this function has.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// As `sdot`, with the bytes `4 LANE .. 4 LANE + 4` of `w` for every lane.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_lane<const LANE: usize>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: an operation on registers, of the feature that this function has.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {x:v}.16b, {w:v}.4b[{lane}]",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// `sum` and the products of two rows with two tokens, 8 bytes of each: row 0 with token 0 and 1, row 1 with them.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: an operation on registers, of the feature that this function has.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// 4 rows with 8 tokens over 4 features, those of lane `LANE` of each row.
///
/// # Safety
/// As for `Bytes::multiply` of 16 features.
#[inline(always)]
unsafe fn dot_step<const LANE: usize>(sums: &mut [int32x4_t; 8], w: [int8x16_t; 4], x: *const i8) {
    // SAFETY: the contract of this function; LANE is below 4.
    unsafe {
        let x = x.add(4 * TILE * LANE);
        let x = [vld1q_s8(x), vld1q_s8(x.add(16))];
        for r in 0..4 {
            for v in 0..2 {
                sums[2 * r + v] = sdot_lane::<LANE>(sums[2 * r + v], w[r], x[v]);
            }
        }
    }
}

// SAFETY: `multiply` reads `features` bytes of each row and of 8 tokens.
unsafe impl Bytes for DotProd {
    const RUN: usize = 4;

    #[inline(always)]
    unsafe fn dot<const N: usize>(w: [int8x16_t; N], x: [int8x16_t; N]) -> int32x4_t {
        // SAFETY: the instruction set is there.
        unsafe {
            let mut sum = vdupq_n_s32(0);
            for i in 0..N {
                sum = sdot(sum, w[i], x[i]);
            }
            sum
        }
    }

    #[inline(always)]
    unsafe fn multiply<const I16_PRODUCTS: usize>(w: [*const i8; 4], x: *const i8, features: usize) -> [int32x4_t; 8] {
        // SAFETY: the contract of this method.
        unsafe {
            let mut sums = [vdupq_n_s32(0); 8];
            for k in (0..features).step_by(16) {
                let w = w.map(|w| vld1q_s8(w.add(k)));
                let x = x.add(TILE * k);
                dot_step::<0>(&mut sums, w, x);
                dot_step::<1>(&mut sums, w, x);
                dot_step::<2>(&mut sums, w, x);
                dot_step::<3>(&mut sums, w, x);
            }
            sums
        }
    }
}

/// The first halves of two vectors, and the second halves.
#[inline]
#[target_feature(enable = "neon")]
fn zip_halves(a: int32x4_t, b: int32x4_t) -> (int32x4_t, int32x4_t) {
    let (a, b) = (vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b));
    (vreinterpretq_s32_s64(vzip1q_s64(a, b)), vreinterpretq_s32_s64(vzip2q_s64(a, b)))
}

// SAFETY: `multiply` reads `features` bytes of each row and of 8 tokens.
unsafe impl Bytes for I8mm {
    const RUN: usize = 8;

    #[inline(always)]
    unsafe fn dot<const N: usize>(w: [int8x16_t; N], x: [int8x16_t; N]) -> int32x4_t {
        // SAFETY: the contract of this method; i8mm comes with dotprod here.
        unsafe { DotProd::dot(w, x) }
    }

    /// Rows 0 and 1 with tokens 0 and 1 (row by row), with tokens 2 and 3, ..., rows 2 and 3 likewise.
    #[inline(always)]
    unsafe fn multiply<const I16_PRODUCTS: usize>(w: [*const i8; 4], x: *const i8, features: usize) -> [int32x4_t; 8] {
        // SAFETY: the contract of this method.
        unsafe {
            let mut sums = [vdupq_n_s32(0); 8];
            for k in (0..features).step_by(16) {
                let w = w.map(|w| vreinterpretq_s32_s8(vld1q_s8(w.add(k))));
                let (first, second) = (zip_halves(w[0], w[1]), zip_halves(w[2], w[3]));
                for (i, w) in [[first.0, second.0], [first.1, second.1]].into_iter().enumerate() {
                    let x = x.add(TILE * (k + 8 * i));
                    for tokens in 0..4 {
                        let x = vld1q_s8(x.add(16 * tokens));
                        for r in 0..2 {
                            let sum = &mut sums[4 * r + tokens];
                            *sum = smmla(*sum, vreinterpretq_s8_s32(w[r]), x);
                        }
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn row_factors(rows: [int32x4_t; 4]) -> [int32x4_t; 4] {
        // SAFETY: the instruction set is there.
        unsafe {
            let (first, second) = (zip_halves(rows[0], rows[1]).0, zip_halves(rows[2], rows[3]).0);
            [first, first, second, second]
        }
    }

    #[inline(always)]
    unsafe fn by_row(sums: [int32x4_t; 8]) -> [int32x4_t; 8] {
        // SAFETY: the instruction set is there.
        unsafe {
            let [a, b, c, d, e, f, g, h] = sums;
            let ((a, c), (b, d)) = (zip_halves(a, b), zip_halves(c, d));
            let ((e, g), (f, h)) = (zip_halves(e, f), zip_halves(g, h));
            [a, b, c, d, e, f, g, h]
        }
    }
}
