//! Products with Q8_0.

use std::arch::x86_64::*;

use crate::compute::kernels::Weights;
use crate::compute::kernels::blocks::{self, block, blocks};
use crate::compute::kernels::pack::{Q8Row, Q8Tile, TILE, plain};
use crate::compute::kernels::products::{Products, for_each_token};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::x86::{f32_of, prefetch};

plain! {
    /// 32 unpacked weights of one row, 128 added to each.
    #[repr(C, align(32))]
    pub struct Q8Block {
        q: [u8; 32],
        d: f32,
        unused: [u32; 7],
    }
}

/// Products with blocks of `Q8_0`.
pub struct Q8Products;

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl Products for Q8Products {
    type V = __m512;
    type Row = Q8Row;
    type Tile = Q8Tile;
    type Block = Q8Block;
    type Sum = __m256;
    const ROW: usize = 32;
    const STEP: usize = 32;
    const BLOCK: usize = 32;
    const ROWS: usize = 4;
    const TILES: usize = 3;

    #[inline(always)]
    fn segment(tokens: usize) -> usize {
        match tokens {
            1..=3 => 3072,
            _ => 1024,
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn accumulate<const T: usize>(
        weights: Weights<'_>,
        step: usize,
        x: [&[Q8Row]; T],
        sums: &mut [Self::Sum; T],
    ) {
        // SAFETY: the contract of this method: the row has a block `step`, and so has every `x`.
        unsafe {
            let block = block::<blocks::Q8_0>(weights.bytes, step);
            prefetch(block);
            let w = _mm256_loadu_si256(block.qs.as_ptr().cast());
            let (magnitude, d) = (_mm256_abs_epi8(w), f32_of(block.d));
            for_each_token!(T, t, {
                let x = x[t].get_unchecked(step);
                let signed = _mm256_sign_epi8(_mm256_loadu_si256(x.q.as_ptr().cast()), w);
                let sum32 = _mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, signed);
                sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(d * x.d), _mm256_cvtepi32_ps(sum32), sums[t]);
            });
        }
    }

    #[inline(always)]
    unsafe fn reduce(sum: Self::Sum) -> f32 {
        // SAFETY: the instruction set is there.
        unsafe { _mm512_zextps256_ps512(sum).reduce_sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut Q8Block, stride: usize) {
        // SAFETY: the contract of this method: there is room for block `i` of the row.
        unsafe {
            for (i, block) in blocks::<blocks::Q8_0>(weights.bytes).iter().enumerate() {
                prefetch(block);
                let to = to.add(i * stride);
                let w = _mm256_loadu_si256(block.qs.as_ptr().cast());
                _mm256_store_si256((&raw mut (*to).q).cast(), _mm256_xor_si256(w, _mm256_set1_epi8(-128)));
                (*to).d = f32_of(block.d);
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const Q8Block, x: [&Q8Tile; T], out: *mut f32, stride: usize) {
        const R: usize = 4;
        // SAFETY: the contract of this method: R blocks at `rows`, R rows of 16 sums at `out` for each tile. The others are
        // the fields of blocks, whose indices are constants.
        unsafe {
            let mut sums32 = [[_mm512_setzero_si512(); T]; R];
            for t in 0..T {
                // w . x = (w + 128) . x - 128 * (the sum of x)
                let sums = _mm512_load_si512(x[t].sums.as_ptr().cast());
                let start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
                for r in 0..R {
                    sums32[r][t] = start;
                }
            }
            for step in 0..8 {
                for r in 0..R {
                    let w = _mm512_set1_epi32((&raw const (*rows.add(r)).q).cast::<i32>().add(step).read());
                    for t in 0..T {
                        let tokens = _mm512_load_si512(x[t].q.as_ptr().add(step).cast());
                        sums32[r][t] = _mm512_dpbusd_epi32(sums32[r][t], w, tokens);
                    }
                }
            }
            for t in 0..T {
                let dx = _mm512_load_ps(x[t].d.as_ptr());
                for r in 0..R {
                    let d = _mm512_mul_ps(dx, _mm512_set1_ps((*rows.add(r)).d));
                    let out = out.add(t * stride + r * TILE);
                    _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums32[r][t]), d, _mm512_load_ps(out)));
                }
            }
        }
    }
}
