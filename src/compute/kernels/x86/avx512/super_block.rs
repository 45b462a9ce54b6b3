//! The super-blocks of K-quants in AVX-512 registers.

use std::arch::x86_64::*;

use crate::compute::kernels::blocks::{self, Block, scales_and_mins};
use crate::compute::kernels::x86::{d_and_dmin, f32_of, packed_scales};

/// A super-block of 256 weights: `w = d * scale * q - dmin * min` with 8 groups, `w = d * scale * (q - 32)` with 16.
///
/// # Safety
/// For the caller of any method: the instruction set is there, see [`Simd`].
pub unsafe trait SuperBlock: Block + Sized {
    const GROUPS: usize;

    /// In the order of `interleave`.
    unsafe fn quants(&self) -> [__m512i; 4];

    /// `d * scale` of each lane's group; by default, of a block that starts as Q4_K does.
    #[inline(always)]
    unsafe fn scales(&self) -> __m512 {
        // SAFETY: the instruction set is there.
        unsafe {
            let scales = _mm_cvtsi64_si128(scales_and_mins(packed_scales(self)).0 as i64);
            let twice_each = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(scales, scales)));
            _mm512_mul_ps(twice_each, _mm512_broadcastss_ps(d_and_dmin(self)))
        }
    }

    /// Of 8 groups: their mins, a byte each, and dmin; by default as in `scales`.
    #[inline(always)]
    unsafe fn mins(&self) -> Option<(__m128i, f32)> {
        // SAFETY: the instruction set is there.
        unsafe {
            let mins = _mm_cvtsi64_si128(scales_and_mins(packed_scales(self)).1 as i64);
            Some((mins, _mm_cvtss_f32(_mm_movehdup_ps(d_and_dmin(self)))))
        }
    }
}

/// The nibbles of 128 bytes, four runs of 32 bytes (groups 0 and 1, 2 and 3, ...): the low nibbles of the first 16 bytes
/// of each run, the high nibbles of these, then the same of the other 16 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(qs: &[u8; 128]) -> [__m512i; 4] {
    let low = _mm512_set1_epi8(15);
    // SAFETY: the two halves of `qs`.
    let (a, b) = unsafe { (_mm512_loadu_si512(qs.as_ptr().cast()), _mm512_loadu_si512(qs.as_ptr().add(64).cast())) };
    let (first, second) = (_mm512_shuffle_i64x2(a, b, 0b10_00_10_00), _mm512_shuffle_i64x2(a, b, 0b11_01_11_01));
    [
        _mm512_and_si512(first, low),
        _mm512_and_si512(_mm512_srli_epi16(first, 4), low),
        _mm512_and_si512(second, low),
        _mm512_and_si512(_mm512_srli_epi16(second, 4), low),
    ]
}

/// Low and high nibbles to pieces of 8 bytes of the groups 0, 1, 2, ...
#[inline]
#[target_feature(enable = "avx512f")]
fn alternate(q: [__m512i; 4]) -> [__m512i; 4] {
    [
        _mm512_unpacklo_epi64(q[0], q[1]),
        _mm512_unpackhi_epi64(q[0], q[1]),
        _mm512_unpacklo_epi64(q[2], q[3]),
        _mm512_unpackhi_epi64(q[2], q[3]),
    ]
}

/// `q` with bits of `high`: each 32-bit lane of `high` is rotated left by its lane of `rotations`, and masked.
#[inline]
#[target_feature(enable = "avx512f")]
fn with_high_bits(q: __m512i, high: __m512i, rotations: __m512i, mask: __m512i) -> __m512i {
    const A_OR_B_AND_C: i32 = 0xf8;
    _mm512_ternarylogic_epi32(q, _mm512_rolv_epi32(high, rotations), mask, A_OR_B_AND_C)
}

/// One number in the lanes of each 16 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(a: i32, b: i32, c: i32, d: i32) -> __m512i {
    _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d)
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q4_K {
    const GROUPS: usize = 8;

    #[inline(always)]
    unsafe fn quants(&self) -> [__m512i; 4] {
        // SAFETY: the instruction set is there.
        unsafe { alternate(nibbles(&self.qs)) }
    }
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q5_K {
    const GROUPS: usize = 8;

    #[inline(always)]
    unsafe fn quants(&self) -> [__m512i; 4] {
        // SAFETY: the instruction set is there; `qh` has two halves of 16 bytes.
        unsafe {
            let mut q = nibbles(&self.qs);
            // Bit j of every byte belongs to group j: a rotation by 4 - j makes it the fifth bit.
            let (even, odd, mask) = (quarters(4, 2, 0, 30), quarters(3, 1, 31, 29), _mm512_set1_epi8(16));
            for half in 0..2 {
                let high = _mm512_broadcast_i32x4(_mm_loadu_si128(self.qh.as_ptr().add(16 * half).cast()));
                q[2 * half] = with_high_bits(q[2 * half], high, even, mask);
                q[2 * half + 1] = with_high_bits(q[2 * half + 1], high, odd, mask);
            }
            alternate(q)
        }
    }
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q6_K {
    const GROUPS: usize = 16;

    #[inline(always)]
    unsafe fn quants(&self) -> [__m512i; 4] {
        // SAFETY: the instruction set is there; `ql` has two halves of 64 bytes, `qh` two of 32.
        unsafe {
            let mut q = [_mm512_setzero_si512(); 4]; // groups in order, four in each
            let nibble = _mm512_set1_epi8(15);
            for half in 0..2 {
                let low = _mm512_loadu_si512(self.ql.as_ptr().add(64 * half).cast());
                // Every byte has two bits for each of the half's four pairs of groups.
                let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(self.qh.as_ptr().add(32 * half).cast()));
                let mask = _mm512_set1_epi8(48);
                let (a, b) = (_mm512_and_si512(low, nibble), _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble));
                q[2 * half] = with_high_bits(a, high, quarters(4, 4, 2, 2), mask);
                q[2 * half + 1] = with_high_bits(b, high, quarters(0, 0, 30, 30), mask);
            }
            let (a, b) = (_mm512_unpacklo_epi32(q[0], q[1]), _mm512_unpacklo_epi32(q[2], q[3]));
            let (c, d) = (_mm512_unpackhi_epi32(q[0], q[1]), _mm512_unpackhi_epi32(q[2], q[3]));
            [
                _mm512_unpacklo_epi64(a, b),
                _mm512_unpackhi_epi64(a, b),
                _mm512_unpacklo_epi64(c, d),
                _mm512_unpackhi_epi64(c, d),
            ]
        }
    }

    #[inline(always)]
    unsafe fn scales(&self) -> __m512 {
        // SAFETY: the instruction set is there; the block has 16 scales.
        unsafe {
            let by_lane = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let scales = _mm_shuffle_epi8(_mm_loadu_si128(self.scales.as_ptr().cast()), by_lane);
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales)), _mm512_set1_ps(f32_of(self.d)))
        }
    }

    #[inline(always)]
    unsafe fn mins(&self) -> Option<(__m128i, f32)> {
        None
    }
}
