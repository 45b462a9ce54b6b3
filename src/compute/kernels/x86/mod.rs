//! The kernels of x86-64, and what AVX2 and AVX-512 share.

mod amx;
mod avx2;
mod avx512;
mod interleave;

use std::arch::asm;
use std::arch::x86_64::*;

use super::blocks::{self, Block};

pub use amx::Amx;
pub use avx2::avx2;
pub use avx512::Avx512;

/// A half float as f32. The move into the register is ours: it writes the whole register, while the compiler's choice,
/// `vpinsrw`, keeps the rest, and so waits for the previous value (11 cycles for each block of Q8_0, where that is the
/// accumulator).
#[inline]
#[target_feature(enable = "avx,f16c")]
pub fn f32_of(half: blocks::Half) -> f32 {
    let bits: __m128i;
    // SAFETY: a move between registers; the instruction is part of AVX.
    unsafe {
        asm!(
            "vmovd {}, {:e}",
            lateout(xmm_reg) bits,
            in(reg) half.bits() as u32,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    _mm_cvtss_f32(_mm_cvtph_ps(bits))
}

/// d and dmin of a block that starts as Q4_K does.
#[inline]
#[target_feature(enable = "f16c")]
pub fn d_and_dmin<B: Block>(block: &B) -> __m128 {
    const { assert!(size_of::<B>() >= 16) };
    // SAFETY: the block has the 16 bytes, as asserted.
    let start = unsafe { _mm_loadu_si128((block as *const B).cast()) };
    _mm_cvtph_ps(start)
}

/// The packed scales and mins of a block that starts as Q4_K does.
#[inline(always)]
pub fn packed_scales<B: Block>(block: &B) -> &[u8; 12] {
    const { assert!(size_of::<B>() >= 16) };
    // SAFETY: the block has the bytes 4 to 16, as asserted, and any bytes will do.
    unsafe { &*(block as *const B).cast::<u8>().add(4).cast() }
}

/// Prefetches, into L1, the size of a block from a bit more than 1 KB past its start.
#[inline(always)]
pub fn prefetch<B: Block>(block: &B) {
    prefetch_ahead::<1280, _MM_HINT_T0, B>(block)
}

/// Prefetches the size of a block from `DISTANCE` bytes past its start. Past the end of the weights it does nothing: a
/// prefetch does not fault.
#[inline(always)]
pub fn prefetch_ahead<const DISTANCE: usize, const HINT: i32, B: Block>(block: &B) {
    let from = (block as *const B).cast::<i8>().wrapping_add(DISTANCE);
    for line in 0..size_of::<B>().div_ceil(64) {
        // SAFETY: SSE is part of x86-64; the address may be invalid.
        unsafe { _mm_prefetch(from.wrapping_add(64 * line), HINT) };
    }
}

/// As `Simd::transpose4`.
///
/// # Safety
/// `from` is valid for reading, and `to` for writing, 4 rows of 4 floats.
#[inline(always)]
pub unsafe fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: the contract of this function; SSE is part of x86-64.
    unsafe {
        let mut rows = [0, 1, 2, 3].map(|i| _mm_loadu_ps(from.add(i * from_stride)));
        let [a, b, c, d] = &mut rows;
        _MM_TRANSPOSE4_PS(a, b, c, d);
        for (i, row) in rows.into_iter().enumerate() {
            _mm_storeu_ps(to.add(i * to_stride), row);
        }
    }
}
