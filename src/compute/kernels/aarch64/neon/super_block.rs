//! The super-blocks of K-quants in NEON registers.

use std::arch::aarch64::*;

use super::f32_of;
use crate::compute::kernels::blocks::{self, Block, scales_and_mins};

/// The scales of a super-block: `w = d * scale * q - dmin * min`.
pub struct Scales {
    /// Of groups `4 i .. 4 i + 4`.
    pub scales: [int32x4_t; 4],
    /// Of 8 groups.
    pub mins: int16x8_t,
    pub d: f32,
    pub dmin: f32,
}

/// # Safety
/// For the caller of any method: the instruction set is there, see [`Simd`].
pub unsafe trait SuperBlock: Block {
    /// 8, with mins, or 16, without them.
    const GROUPS: usize;

    unsafe fn scales(&self) -> Scales;

    /// Weights `128 * i .. 128 * (i + 1)` as signed bytes.
    ///
    /// # Safety
    /// `i` is 0 or 1.
    unsafe fn quants(&self, i: usize) -> [int8x16_t; 8];
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_scales(packed: &[u8; 12], d: blocks::Half, dmin: blocks::Half) -> Scales {
    let (scales, mins) = scales_and_mins(packed);
    let bytes_to_i16 = |bytes| vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(bytes)));
    let (scales, mins) = (bytes_to_i16(scales), bytes_to_i16(mins));
    let zero = vdupq_n_s32(0);
    let scales = [vmovl_s16(vget_low_s16(scales)), vmovl_high_s16(scales), zero, zero];
    Scales { scales, mins, d: f32_of(d), dmin: f32_of(dmin) }
}

/// The low nibbles of `16 N` bytes, and the high nibbles.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and `qs` is valid for reading `16 N` bytes.
#[inline(always)]
unsafe fn nibbles<const N: usize>(qs: *const u8) -> ([uint8x16_t; N], [uint8x16_t; N]) {
    // SAFETY: the contract of this function.
    unsafe {
        let (mut low, mut high) = ([vdupq_n_u8(0); N], [vdupq_n_u8(0); N]);
        for i in 0..N {
            let q = vld1q_u8(qs.add(16 * i));
            (low[i], high[i]) = (vandq_u8(q, vdupq_n_u8(15)), vshrq_n_u8::<4>(q));
        }
        (low, high)
    }
}

/// Each byte shifted left, or right if `by` is negative, and masked.
#[inline]
#[target_feature(enable = "neon")]
fn shift_and_mask(bits: uint8x16_t, by: i8, mask: u8) -> uint8x16_t {
    vandq_u8(vshlq_u8(bits, vdupq_n_s8(by)), vdupq_n_u8(mask))
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q4_K {
    const GROUPS: usize = 8;

    #[inline(always)]
    unsafe fn scales(&self) -> Scales {
        // SAFETY: the instruction set is there.
        unsafe { unpack_scales(&self.scales, self.d, self.dmin) }
    }

    #[inline(always)]
    unsafe fn quants(&self, i: usize) -> [int8x16_t; 8] {
        // SAFETY: the contract of this method; `qs` has two halves of 64 bytes.
        unsafe {
            let (low, high) = nibbles::<4>(self.qs.as_ptr().add(64 * i));
            let q = [low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]];
            q.map(|q| vreinterpretq_s8_u8(q))
        }
    }
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q5_K {
    const GROUPS: usize = 8;

    #[inline(always)]
    unsafe fn scales(&self) -> Scales {
        // SAFETY: the instruction set is there.
        unsafe { unpack_scales(&self.scales, self.d, self.dmin) }
    }

    #[inline(always)]
    unsafe fn quants(&self, i: usize) -> [int8x16_t; 8] {
        // SAFETY: the contract of this method; `qs` has two halves of 64 bytes, `qh` two of 16.
        unsafe {
            let (low, high) = nibbles::<4>(self.qs.as_ptr().add(64 * i));
            let mut q = [low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]];
            // Bit j of every byte is the fifth bit of a weight of group j.
            let fifth = [vld1q_u8(self.qh.as_ptr()), vld1q_u8(self.qh.as_ptr().add(16))];
            for group in 0..4 {
                for side in 0..2 {
                    let fifth = shift_and_mask(fifth[side], 4 - (4 * i + group) as i8, 16);
                    q[2 * group + side] = vorrq_u8(q[2 * group + side], fifth);
                }
            }
            q.map(|q| vreinterpretq_s8_u8(q))
        }
    }
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q6_K {
    const GROUPS: usize = 16;

    #[inline(always)]
    unsafe fn scales(&self) -> Scales {
        // SAFETY: the instruction set is there; the block has 16 scales.
        unsafe {
            let scales = vld1q_s8(self.scales.as_ptr());
            let (a, b) = (vmovl_s8(vget_low_s8(scales)), vmovl_high_s8(scales));
            let wide = |half| (vmovl_s16(vget_low_s16(half)), vmovl_high_s16(half));
            let ((a, b), (c, d)) = (wide(a), wide(b));
            Scales { scales: [a, b, c, d], mins: vdupq_n_s16(0), d: f32_of(self.d), dmin: 0.0 }
        }
    }

    #[inline(always)]
    unsafe fn quants(&self, i: usize) -> [int8x16_t; 8] {
        // SAFETY: the contract of this method; `ql` has two halves of 64 bytes, `qh` two of 32.
        unsafe {
            let (low, high) = nibbles::<4>(self.ql.as_ptr().add(64 * i));
            let q = [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]];
            // Every byte has two bits for each of the four groups of 32.
            let bits = [vld1q_u8(self.qh.as_ptr().add(32 * i)), vld1q_u8(self.qh.as_ptr().add(32 * i + 16))];
            let mut signed = [vdupq_n_s8(0); 8];
            for group in 0..4 {
                for side in 0..2 {
                    let bits = shift_and_mask(bits[side], 4 - 2 * group as i8, 48);
                    let q = vreinterpretq_s8_u8(vorrq_u8(q[2 * group + side], bits));
                    // w = d * scale * (q - 32)
                    signed[2 * group + side] = vsubq_s8(q, vdupq_n_s8(32));
                }
            }
            signed
        }
    }
}
