//! What AVX2 and AVX-512 share.

use std::arch::x86_64::*;

use super::blocks::{self, Block};

/// Scales and mins of Q4_K and Q5_K: 8 of 6 bits each in 12 bytes, to bytes in two u64.
#[inline(always)]
pub fn scales_and_mins(packed: &[u8; 12]) -> (u64, u64) {
    let word = |i: usize| u32::from_le_bytes([packed[i], packed[i + 1], packed[i + 2], packed[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let high_scales = c & 0x0f0f_0f0f | (a >> 6 & 0x0303_0303) << 4;
    let high_mins = c >> 4 & 0x0f0f_0f0f | (b >> 6 & 0x0303_0303) << 4;
    let join = |low: u32, high: u32| (low & 0x3f3f_3f3f) as u64 | (high as u64) << 32;
    (join(a, high_scales), join(b, high_mins))
}

#[inline(always)]
pub unsafe fn f32_of(half: blocks::Half) -> f32 {
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half.bits() as i32))) }
}

/// The lines of a block that lie about 2 KB further on. Reading ahead of the end is harmless: a prefetch never faults.
#[inline(always)]
pub unsafe fn prefetch<B: Block>(block: &B) {
    unsafe {
        let ahead = (block as *const B).cast::<i8>().wrapping_add(2048);
        for line in 0..size_of::<B>().div_ceil(64) {
            _mm_prefetch(ahead.wrapping_add(64 * line), _MM_HINT_T0);
        }
    }
}

/// As `Simd::transpose4`.
///
/// # Safety
/// The pointers are good for 4 rows of 4 floats.
#[inline(always)]
pub unsafe fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller's promise; SSE is part of x86-64.
    unsafe {
        let mut rows = [0, 1, 2, 3].map(|i| _mm_loadu_ps(from.add(i * from_stride)));
        let [a, b, c, d] = &mut rows;
        _MM_TRANSPOSE4_PS(a, b, c, d);
        for (i, row) in rows.into_iter().enumerate() {
            _mm_storeu_ps(to.add(i * to_stride), row);
        }
    }
}
