//! 4 floats in a NEON register.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{Simd, instructions};

// SAFETY: each method is the operation of its name on 4 lanes.
unsafe impl Simd for float32x4_t {
    const LANES: usize = 4;
    const REGISTERS: usize = 32;

    instructions! {
        fn splat(x: f32) -> Self { vdupq_n_f32(x) }
        fn load(from: *const f32) -> Self { vld1q_f32(from) }
        fn load_f16(from: *const f16) -> Self { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.cast()))) }
        fn load_bf16(from: *const u16) -> Self { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from))) }
        fn store(self, to: *mut f32) { vst1q_f32(to, self) }
        fn add(self, other: Self) -> Self { vaddq_f32(self, other) }
        fn sub(self, other: Self) -> Self { vsubq_f32(self, other) }
        fn mul(self, other: Self) -> Self { vmulq_f32(self, other) }
        fn div(self, other: Self) -> Self { vdivq_f32(self, other) }
        fn max(self, other: Self) -> Self { vmaxq_f32(self, other) }
        fn min(self, other: Self) -> Self { vminq_f32(self, other) }
        fn mul_add(self, a: Self, b: Self) -> Self { vfmaq_f32(b, self, a) }
        fn round(self) -> Self { vrndnq_f32(self) }
        fn exp2_of_integer(self) -> Self {
            let biased = vaddq_s32(vcvtq_s32_f32(self), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
        }
        fn reduce_sum(self) -> f32 {
            let two = vpaddq_f32(self, self);
            vgetq_lane_f32::<0>(vpaddq_f32(two, two))
        }
        fn reduce_max(self) -> f32 { vmaxvq_f32(self) }
        fn prefetch(at: *const u8) {
            asm!("prfm pldl2keep, [{}]", in(reg) at.addr(), options(nomem, nostack, preserves_flags))
        }
        fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| vld1q_f32(from.add(i * from_stride)));
            // Pairs of columns (0, 2) and (1, 3), then of rows.
            let pairs = |a, b| (vreinterpretq_f64_f32(vtrn1q_f32(a, b)), vreinterpretq_f64_f32(vtrn2q_f32(a, b)));
            let ((ab02, ab13), (cd02, cd13)) = (pairs(a, b), pairs(c, d));
            let rows = [vzip1q_f64(ab02, cd02), vzip1q_f64(ab13, cd13), vzip2q_f64(ab02, cd02), vzip2q_f64(ab13, cd13)];
            for (i, row) in rows.into_iter().enumerate() {
                vst1q_f32(to.add(i * to_stride), vreinterpretq_f32_f64(row));
            }
        }
    }
}
