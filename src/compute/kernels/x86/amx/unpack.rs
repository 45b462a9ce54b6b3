//! Weights of every format as bf16.

use std::arch::x86_64::*;

use super::{BLOCK, MR, STEP};
use crate::compute::kernels::blocks::scales_and_mins;
use crate::compute::kernels::blocks::{self, blocks};
use crate::compute::kernels::x86::f32_of;
use crate::compute::kernels::{Format, Line, Weights, dequantize};

/// 32 floats to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn bf16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of numbers.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// A part of a row, at most 256 features, to bf16: step i goes to `to + i * MR`. The last step is padded with zeros. The
/// numbers are those of `dequantize`, rounded.
///
/// # Safety
/// The CPU has the features of `prefill`. `weights` is whole blocks, and each step has a line at `to + i * MR`.
#[inline(always)]
pub unsafe fn unpack(weights: Weights<'_>, to: *mut Line) {
    // SAFETY: the contract of this function; loads are inside of blocks, of whole chunks and of buffers.
    unsafe {
        let step = |i: usize| to.add(i * MR).cast::<__m512i>();
        // At most one super-block: it has 256 features.
        match weights.format {
            Format::Q4_K => unpack_q4_k(&blocks(weights.bytes)[0], step),
            Format::Q5_K => unpack_q5_k(&blocks(weights.bytes)[0], step),
            Format::Q6_K => unpack_q6_k(&blocks(weights.bytes)[0], step),
            Format::Q8_0 => {
                for (i, block) in blocks::<blocks::Q8_0>(weights.bytes).iter().enumerate() {
                    // Not `f32_of`: a broadcast does not wait for the previous value of the register.
                    let d = _mm512_cvtph_ps(_mm256_set1_epi16(block.d.bits() as i16));
                    *step(i) = scaled(_mm256_loadu_si256(block.qs.as_ptr().cast()), d, d);
                }
            }
            Format::BF16 => {
                let (whole, rest) = weights.bytes.as_chunks::<{ 2 * STEP }>();
                for (i, bytes) in whole.iter().enumerate() {
                    *step(i) = _mm512_loadu_si512(bytes.as_ptr().cast());
                }
                if !rest.is_empty() {
                    let mut padded = [0; 2 * STEP];
                    padded[..rest.len()].copy_from_slice(rest);
                    *step(whole.len()) = _mm512_loadu_si512(padded.as_ptr().cast());
                }
            }
            _ => {
                let mut w = [0f32; BLOCK * STEP];
                dequantize(weights, &mut w[..weights.cols]);
                for (i, w) in w[..weights.cols.next_multiple_of(STEP)].as_chunks::<STEP>().0.iter().enumerate() {
                    *step(i) = bf16(_mm512_loadu_ps(w.as_ptr()), _mm512_loadu_ps(w.as_ptr().add(16)));
                }
            }
        }
    }
}

/// 32 bytes, each half times its factors.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn scaled(q: __m256i, low: __m512, high: __m512) -> __m512i {
    let scale = |q, d| _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), d);
    bf16(scale(_mm256_castsi256_si128(q), low), scale(_mm256_extracti128_si256(q, 1), high))
}

/// The 16 numbers `scale * (first + i) - min`.
#[inline]
#[target_feature(enable = "avx512f")]
fn table(first: f32, scale: f32, min: f32) -> __m512 {
    let count = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
    let q = _mm512_add_ps(count, _mm512_set1_ps(first));
    // The product of 11, 6 and 5 bits is exact: it may be fused, although `dequantize` rounds it.
    _mm512_fmsub_ps(q, _mm512_set1_ps(scale), _mm512_set1_ps(min))
}

/// Eight bytes times a factor.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn floats(bytes: u64, d: blocks::Half) -> [f32; 8] {
    let wide = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)));
    // SAFETY: both types are 32 bytes of numbers.
    unsafe { std::mem::transmute(_mm256_mul_ps(wide, _mm256_set1_ps(f32_of(d)))) }
}

/// # Safety
/// The CPU has the features of `prefill`, and `step` gives the address of a line for each of 8 steps.
#[inline(always)]
unsafe fn unpack_q4_k(block: &blocks::Q4_K, step: impl Fn(usize) -> *mut __m512i) {
    // SAFETY: the contract of this function; loads are inside of the block.
    unsafe {
        let (scales, mins) = scales_and_mins(&block.scales);
        let (scales, mins) = (floats(scales, block.d), floats(mins, block.dmin));
        for low in [0, 2, 4, 6] {
            let high = low + 1;
            let values = bf16(table(0., scales[low], mins[low]), table(0., scales[high], mins[high]));
            let q = _mm512_cvtepu8_epi16(_mm256_loadu_si256(block.qs.as_ptr().add(16 * low).cast()));
            *step(low) = _mm512_permutexvar_epi16(_mm512_and_si512(q, _mm512_set1_epi16(15)), values);
            let q = _mm512_or_si512(_mm512_srli_epi16(q, 4), _mm512_set1_epi16(16));
            *step(high) = _mm512_permutexvar_epi16(q, values);
        }
    }
}

/// # Safety
/// The CPU has the features of `prefill`, and `step` gives the address of a line for each of 8 steps.
#[inline(always)]
unsafe fn unpack_q5_k(block: &blocks::Q5_K, step: impl Fn(usize) -> *mut __m512i) {
    // SAFETY: the contract of this function; loads are inside of the block.
    unsafe {
        let (scales, mins) = scales_and_mins(&block.scales);
        let (scales, mins) = (floats(scales, block.d), floats(mins, block.dmin));
        // Bit j belongs to group j: shifted left by 4 here, it is the fifth after a shift right by j.
        let fifths = _mm512_cvtepu8_epi16(_mm256_loadu_si256(block.qh.as_ptr().cast()));
        let fifths = _mm512_slli_epi16(fifths, 4);
        for group in 0..8 {
            let values = bf16(table(0., scales[group], mins[group]), table(16., scales[group], mins[group]));
            let q = _mm512_cvtepu8_epi16(_mm256_loadu_si256(block.qs.as_ptr().add(group / 2 * 32).cast()));
            let q = _mm512_srl_epi16(q, _mm_cvtsi32_si128(group as i32 % 2 * 4));
            let fifth = _mm512_srl_epi16(fifths, _mm_cvtsi32_si128(group as i32));
            // Four bits of the first, the others of the second; the lookup takes the lowest five.
            let q = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), q, fifth, 0xca);
            *step(group) = _mm512_permutexvar_epi16(q, values);
        }
    }
}

/// # Safety
/// The CPU has the features of `prefill`, and `step` gives the address of a line for each of 8 steps.
#[inline(always)]
unsafe fn unpack_q6_k(block: &blocks::Q6_K, step: impl Fn(usize) -> *mut __m512i) {
    // SAFETY: the contract of this function; loads are inside of the block.
    unsafe {
        let d = f32_of(block.d);
        for group in 0..8 {
            let (half, in_half) = (group / 4, group % 4);
            let low = _mm256_loadu_si256(block.ql.as_ptr().add(half * 64 + in_half % 2 * 32).cast());
            let low = _mm256_srl_epi16(low, _mm_cvtsi32_si128(in_half as i32 / 2 * 4));
            let high = _mm256_loadu_si256(block.qh.as_ptr().add(half * 32).cast());
            let high = _mm256_slli_epi16(_mm256_srl_epi16(high, _mm_cvtsi32_si128(in_half as i32 * 2)), 4);
            let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
            let high = _mm256_and_si256(high, _mm256_set1_epi8(48));
            let q = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
            let scale = |i: usize| _mm512_set1_ps(d * block.scales[2 * group + i] as f32);
            *step(group) = scaled(q, scale(0), scale(1));
        }
    }
}
