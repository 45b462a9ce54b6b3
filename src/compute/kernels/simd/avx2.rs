//! 8 floats in an AVX2 register.

use std::arch::x86_64::*;

use half::f16;

use super::{Simd, instructions};
use crate::compute::kernels::x86;

// SAFETY: each method is the operation of its name on 8 lanes.
unsafe impl Simd for __m256 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    instructions! {
        fn splat(x: f32) -> Self { _mm256_set1_ps(x) }
        fn load(from: *const f32) -> Self { _mm256_loadu_ps(from) }
        fn load_f16(from: *const f16) -> Self { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        fn load_bf16(from: *const u16) -> Self {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))
        }
        fn store(self, to: *mut f32) { _mm256_storeu_ps(to, self) }
        fn add(self, other: Self) -> Self { _mm256_add_ps(self, other) }
        fn sub(self, other: Self) -> Self { _mm256_sub_ps(self, other) }
        fn mul(self, other: Self) -> Self { _mm256_mul_ps(self, other) }
        fn div(self, other: Self) -> Self { _mm256_div_ps(self, other) }
        fn max(self, other: Self) -> Self { _mm256_max_ps(self, other) }
        fn min(self, other: Self) -> Self { _mm256_min_ps(self, other) }
        fn mul_add(self, a: Self, b: Self) -> Self { _mm256_fmadd_ps(self, a, b) }
        fn round(self) -> Self { _mm256_round_ps(self, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) }
        fn exp2_of_integer(self) -> Self {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))
        }
        fn reduce_sum(self) -> f32 {
            let four = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps(self, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
        fn reduce_max(self) -> f32 {
            let four = _mm_max_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps(self, 1));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
        fn prefetch(at: *const u8) { _mm_prefetch(at.cast(), _MM_HINT_T1) }
        fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            x86::transpose4(from, from_stride, to, to_stride)
        }
    }
}
