//! Products of bytes: with AVX2 alone, or with AVX-VNNI. They are exact, so that the results have the same bits.

use std::arch::x86_64::*;

use super::{Avx2, AvxVnni};

/// # Safety
/// For the caller of any method: the instruction set is there, see [`Simd`](crate::compute::kernels::simd::Simd).
pub unsafe trait Bytes: Copy {
    /// Products of a lane of `add_products`: 2 in 16 bits, or 4 in 32 bits, of which 16 are used.
    const PRODUCTS: usize;

    /// `sums + w . x`, of unsigned and signed bytes.
    unsafe fn add_products(sums: __m256i, w: __m256i, x: __m256i) -> __m256i;

    /// Scales for `add_scaled`, from pairs of 16 bits.
    unsafe fn scales(pairs: __m256i) -> __m256i;

    /// `totals + scales * sums`, where `sums` come from `add_products` and fit 16 bits. Totals have 32 bits.
    unsafe fn add_scaled(totals: __m256i, sums: __m256i, scales: __m256i) -> __m256i;

    /// Sums of one `add_products` in 32 bits.
    unsafe fn widen(sums: __m256i) -> __m256i;
}

// SAFETY: the methods access no memory.
unsafe impl Bytes for Avx2 {
    const PRODUCTS: usize = 2;

    #[inline(always)]
    unsafe fn add_products(sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x)) }
    }

    #[inline(always)]
    unsafe fn scales(pairs: __m256i) -> __m256i {
        pairs
    }

    #[inline(always)]
    unsafe fn add_scaled(totals: __m256i, sums: __m256i, scales: __m256i) -> __m256i {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_add_epi32(totals, _mm256_madd_epi16(sums, scales)) }
    }

    #[inline(always)]
    unsafe fn widen(sums: __m256i) -> __m256i {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) }
    }
}

// SAFETY: the methods access no memory.
unsafe impl Bytes for AvxVnni {
    const PRODUCTS: usize = 4;

    #[inline(always)]
    unsafe fn add_products(sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_dpbusd_avx_epi32(sums, w, x) }
    }

    #[inline(always)]
    unsafe fn scales(pairs: __m256i) -> __m256i {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)) }
    }

    /// The lower halves of the sums count.
    #[inline(always)]
    unsafe fn add_scaled(totals: __m256i, sums: __m256i, scales: __m256i) -> __m256i {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_dpwssd_avx_epi32(totals, sums, scales) }
    }

    #[inline(always)]
    unsafe fn widen(sums: __m256i) -> __m256i {
        sums
    }
}
