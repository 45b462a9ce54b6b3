//! The super-blocks of K-quants in AVX2 registers.

use std::arch::x86_64::*;

use super::Avx2;
use super::bytes::Bytes;
use crate::compute::kernels::blocks::{self, Block, scales_and_mins};
use crate::compute::kernels::x86::{d_and_dmin, f32_of, packed_scales};

/// The scales of a super-block: `w = d * scale * q - dmin * min`.
pub struct Scales {
    /// i16, of each group.
    pub scales: __m256i,
    pub mins: __m256i,
    pub d: f32,
    pub dmin: f32,
}

/// # Safety
/// For the caller of any method: the instruction set is there, see [`Simd`].
pub unsafe trait SuperBlock: Block {
    const GROUPS: usize;
    /// Pairs of products whose sum 16 bits hold.
    const I16_PAIRS: usize;
    /// The fastest multiplication on a CPU with `D`. AVX-VNNI takes a scaling for each 16 bits that fill up: with more than 4
    /// bits it has more multiplications than AVX2.
    type Multiply<D: Bytes>: Bytes;

    unsafe fn scales(&self) -> Scales;

    /// As bytes, 16 weights from `16 * a` on and 16 from `16 * b` on.
    ///
    /// # Safety
    /// `a` and `b` are less than 16. They are neighbours or 4 apart: both are low nibbles, or both are high nibbles.
    unsafe fn quants(&self, a: usize, b: usize) -> __m256i;
}

#[inline]
#[target_feature(enable = "avx2")]
fn bytes_to_i16(bytes: u64) -> __m256i {
    _mm256_zextsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(bytes as i64)))
}

/// Of a block that starts as Q4_K does.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn unpack_scales<B: Block>(block: &B) -> Scales {
    let (scales, mins) = scales_and_mins(packed_scales(block));
    let both = d_and_dmin(block);
    let (d, dmin) = (_mm_cvtss_f32(both), _mm_cvtss_f32(_mm_movehdup_ps(both)));
    Scales { scales: bytes_to_i16(scales), mins: bytes_to_i16(mins), d, dmin }
}

/// 16 bytes from each of two addresses.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and the addresses are valid for reading 16 bytes.
#[inline(always)]
unsafe fn join(a: *const u8, b: *const u8) -> __m256i {
    // SAFETY: the contract of this function.
    unsafe { _mm256_loadu2_m128i(b.cast(), a.cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn low_or_high_nibbles(q: __m256i, high: bool) -> __m256i {
    _mm256_and_si256(if high { _mm256_srli_epi16(q, 4) } else { q }, _mm256_set1_epi8(15))
}

/// Of Q4_K and Q5_K, where two groups, 64 weights, share 32 bytes.
///
/// # Safety
/// As for `SuperBlock::quants`.
#[inline(always)]
unsafe fn nibbles(qs: &[u8; 128], a: usize, b: usize) -> __m256i {
    // SAFETY: the contract of this function; the offsets are at most 3 * 32 + 16 of 128.
    unsafe {
        let qs = qs.as_ptr();
        let q = join(qs.add(a / 4 * 32 + a % 2 * 16), qs.add(b / 4 * 32 + b % 2 * 16));
        low_or_high_nibbles(q, a % 4 >= 2)
    }
}

/// `a` in the lanes of the low half, `b` in those of the high half.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(a: usize, b: usize) -> __m256i {
    _mm256_set_m128i(_mm_set1_epi32(b as i32), _mm_set1_epi32(a as i32))
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q4_K {
    const GROUPS: usize = 8;
    const I16_PAIRS: usize = 8;
    type Multiply<D: Bytes> = D;

    #[inline(always)]
    unsafe fn scales(&self) -> Scales {
        // SAFETY: the instruction set is there.
        unsafe { unpack_scales(self) }
    }

    #[inline(always)]
    unsafe fn quants(&self, a: usize, b: usize) -> __m256i {
        // SAFETY: the contract of this method.
        unsafe { nibbles(&self.qs, a, b) }
    }
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q5_K {
    const GROUPS: usize = 8;
    const I16_PAIRS: usize = 4;
    type Multiply<D: Bytes> = Avx2;

    #[inline(always)]
    unsafe fn scales(&self) -> Scales {
        // SAFETY: the instruction set is there.
        unsafe { unpack_scales(self) }
    }

    #[inline(always)]
    unsafe fn quants(&self, a: usize, b: usize) -> __m256i {
        // SAFETY: the contract of this method; 16 bytes from 0 or 16 of `qh`.
        unsafe {
            // Bit i of every byte is the fifth bit of a weight of group i.
            let high = join(self.qh.as_ptr().add(a % 2 * 16), self.qh.as_ptr().add(b % 2 * 16));
            let high = match a {
                0..8 => _mm256_sllv_epi32(high, halves(4 - a / 2, 4 - b / 2)),
                _ => _mm256_srlv_epi32(high, halves(a / 2 - 4, b / 2 - 4)),
            };
            _mm256_or_si256(nibbles(&self.qs, a, b), _mm256_and_si256(high, _mm256_set1_epi8(16)))
        }
    }
}

// SAFETY: the methods read inside of the block.
unsafe impl SuperBlock for blocks::Q6_K {
    const GROUPS: usize = 16;
    const I16_PAIRS: usize = 2;
    type Multiply<D: Bytes> = Avx2;

    #[inline(always)]
    unsafe fn scales(&self) -> Scales {
        // SAFETY: the instruction set is there; the block has 16 scales.
        unsafe {
            let scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(self.scales.as_ptr().cast()));
            let d = f32_of(self.d);
            // w = d * scale * (q - 32)
            Scales { scales, mins: _mm256_slli_epi16(scales, 5), d, dmin: d }
        }
    }

    #[inline(always)]
    unsafe fn quants(&self, a: usize, b: usize) -> __m256i {
        // SAFETY: the contract of this method; `run` is 0 or 1, so that the offsets are at most 112 in `ql`, 48 in `qh`.
        unsafe {
            let (run, pair) = (a / 8, a / 2 % 4);
            let low = self.ql.as_ptr().add(64 * run + 32 * (pair % 2));
            let low = low_or_high_nibbles(join(low.add(a % 2 * 16), low.add(b % 2 * 16)), pair >= 2);
            // Every byte has two bits for each of the run's four pairs of groups.
            let high = self.qh.as_ptr().add(32 * run);
            let high = join(high.add(a % 2 * 16), high.add(b % 2 * 16));
            let high = match pair {
                0 => _mm256_slli_epi16(high, 4),
                1 => _mm256_slli_epi16(high, 2),
                2 => high,
                _ => _mm256_srli_epi16(high, 2),
            };
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(48)))
        }
    }
}

/// A half of each of the four vectors of `interleave`.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and `half` is 0 or 1.
#[inline(always)]
pub unsafe fn interleave_quants<B: SuperBlock>(block: &B, half: usize) -> [__m256i; 4] {
    // SAFETY: the contract of this function; the places are less than 16, and in pairs as `quants` requires.
    unsafe {
        let mut q = [_mm256_setzero_si256(); 4];
        if B::GROUPS == 8 {
            for part in 0..2 {
                let at = 8 * half + part;
                let (even, odd) = (block.quants(at, at + 4), block.quants(at + 2, at + 6));
                q[2 * part] = _mm256_unpacklo_epi64(even, odd);
                q[2 * part + 1] = _mm256_unpackhi_epi64(even, odd);
            }
        } else {
            for i in 0..4 {
                q[i] = block.quants(4 * i + 2 * half, 4 * i + 2 * half + 1);
            }
            let (a, b) = (_mm256_unpacklo_epi32(q[0], q[1]), _mm256_unpacklo_epi32(q[2], q[3]));
            let (c, d) = (_mm256_unpackhi_epi32(q[0], q[1]), _mm256_unpackhi_epi32(q[2], q[3]));
            q[0] = _mm256_unpacklo_epi64(a, b);
            q[1] = _mm256_unpackhi_epi64(a, b);
            q[2] = _mm256_unpacklo_epi64(c, d);
            q[3] = _mm256_unpackhi_epi64(c, d);
        }
        q
    }
}

/// The scale of each lane's group, twice: a pair of 16-bit sums takes both.
#[inline]
#[target_feature(enable = "avx2")]
pub fn interleave_scales<B: SuperBlock>(scales: __m256i) -> [__m256i; 2] {
    let (low, high) = (_mm256_castsi256_si128(scales), _mm256_extracti128_si256(scales, 1));
    if B::GROUPS == 8 {
        let both = _mm256_broadcastsi128_si256(low);
        let index = |group: i64| {
            let each = |group: i64| 0x0100_0100_0100_0100 + 0x0202_0202_0202_0202 * group;
            _mm256_setr_epi64x(each(group), each(group + 1), each(group + 2), each(group + 3))
        };
        [_mm256_shuffle_epi8(both, index(0)), _mm256_shuffle_epi8(both, index(4))]
    } else {
        // By lane, with lanes 4 to 7 and 8 to 11 exchanged: unpacking works within halves.
        let order = _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
        let scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_packs_epi16(low, high), order));
        [_mm256_unpacklo_epi16(scales, scales), _mm256_unpackhi_epi16(scales, scales)]
    }
}
