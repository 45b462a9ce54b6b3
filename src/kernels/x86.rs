//! What AVX2 and AVX-512 share.

use std::arch::asm;
use std::arch::x86_64::*;

use super::blocks::{self, Block};

/// A move that writes all of the register. The compiler's own choice, `vpinsrw`, keeps what the rest held, and so waits
/// for it: mostly for the sum that grows there from block to block (11 cycles of each block of Q8_0).
#[inline(always)]
pub unsafe fn f32_of(half: blocks::Half) -> f32 {
    let bits: __m128i;
    unsafe {
        asm!(
            "vmovd {}, {:e}",
            lateout(xmm_reg) bits,
            in(reg) half.bits() as u32,
            options(pure, nomem, nostack, preserves_flags)
        );
        _mm_cvtss_f32(_mm_cvtph_ps(bits))
    }
}

/// d and dmin of a block that starts as Q4_K does.
#[inline(always)]
pub unsafe fn d_and_dmin<B: Block>(block: &B) -> __m128 {
    const { assert!(size_of::<B>() >= 16) };
    unsafe { _mm_cvtph_ps(_mm_loadu_si128((block as *const B).cast())) }
}

/// Its scales and mins, which come next.
#[inline(always)]
pub unsafe fn packed_scales<B: Block>(block: &B) -> &[u8; 12] {
    const { assert!(size_of::<B>() >= 16) };
    unsafe { &*(block as *const B).cast::<u8>().add(4).cast() }
}

/// Fetches the lines of a block that lie somewhat more than 1 KB further on into the first cache.
#[inline(always)]
pub unsafe fn prefetch<B: Block>(block: &B) {
    unsafe { prefetch_ahead::<1280, _MM_HINT_T0, B>(block) }
}

/// Fetches the lines of a block that lie about so many bytes further on. Reading ahead of the end is harmless: a prefetch
/// never faults.
#[inline(always)]
pub unsafe fn prefetch_ahead<const BYTES: usize, const HINT: i32, B: Block>(block: &B) {
    unsafe {
        let ahead = (block as *const B).cast::<i8>().wrapping_add(BYTES);
        for line in 0..size_of::<B>().div_ceil(64) {
            _mm_prefetch(ahead.wrapping_add(64 * line), HINT);
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
