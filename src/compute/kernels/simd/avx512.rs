//! 16 floats in an AVX-512 register.

use std::arch::x86_64::*;

use half::f16;

use super::{Simd, instructions};
use crate::compute::kernels::x86;

// SAFETY: each method is the operation of its name on 16 lanes.
unsafe impl Simd for __m512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    instructions! {
        fn splat(x: f32) -> Self { _mm512_set1_ps(x) }
        fn load(from: *const f32) -> Self { _mm512_loadu_ps(from) }
        fn load_f16(from: *const f16) -> Self { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        fn load_bf16(from: *const u16) -> Self {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))
        }
        fn store(self, to: *mut f32) { _mm512_storeu_ps(to, self) }
        fn add(self, other: Self) -> Self { _mm512_add_ps(self, other) }
        fn sub(self, other: Self) -> Self { _mm512_sub_ps(self, other) }
        fn mul(self, other: Self) -> Self { _mm512_mul_ps(self, other) }
        fn div(self, other: Self) -> Self { _mm512_div_ps(self, other) }
        fn max(self, other: Self) -> Self { _mm512_max_ps(self, other) }
        fn min(self, other: Self) -> Self { _mm512_min_ps(self, other) }
        fn mul_add(self, a: Self, b: Self) -> Self { _mm512_fmadd_ps(self, a, b) }
        fn round(self) -> Self { _mm512_roundscale_ps(self, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) }
        fn exp2_of_integer(self) -> Self {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))
        }
        fn reduce_sum(self) -> f32 { _mm256_add_ps(_mm512_castps512_ps256(self), _mm512_extractf32x8_ps(self, 1)).reduce_sum() }
        fn reduce_max(self) -> f32 { _mm256_max_ps(_mm512_castps512_ps256(self), _mm512_extractf32x8_ps(self, 1)).reduce_max() }
        fn prefetch(at: *const u8) { _mm_prefetch(at.cast(), _MM_HINT_T1) }
        fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            x86::transpose4(from, from_stride, to, to_stride)
        }
    }
}
