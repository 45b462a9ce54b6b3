//! Products with Q8_0.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::bytes::Bytes;
use crate::compute::kernels::Weights;
use crate::compute::kernels::blocks::{self, block, blocks};
use crate::compute::kernels::pack::{Q8Row, Q8Tile, TILE, plain};
use crate::compute::kernels::products::{Products, for_each_token};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::x86::{f32_of, prefetch};

plain! {
    /// 32 weights of one row.
    #[repr(C, align(32))]
    pub struct Q8Block {
        q: [i8; 32],
        d: f32,
        unused: [u32; 7],
    }
}

/// Products with blocks of `Q8_0`. `vpmaddubsw` takes unsigned bytes times signed ones: these are the magnitudes of the
/// weights, and activations with the signs of the weights. `D` multiplies the bytes.
pub struct Q8Products<D>(PhantomData<D>);

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<D: Bytes> Products for Q8Products<D> {
    type V = __m256;
    type Row = Q8Row;
    type Tile = Q8Tile;
    type Block = Q8Block;
    type Sum = __m256;
    const ROW: usize = 32;
    const STEP: usize = 32;
    const BLOCK: usize = 32;
    const ROWS: usize = 2;
    const TILES: usize = 1;

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
                // 16 bits hold 2 * 128 * 127, the products of a lane of AVX2.
                let sum32 = D::widen(D::add_products(_mm256_setzero_si256(), magnitude, signed));
                sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(d * x.d), _mm256_cvtepi32_ps(sum32), sums[t]);
            });
        }
    }

    #[inline(always)]
    unsafe fn reduce(sum: Self::Sum) -> f32 {
        // SAFETY: the instruction set is there.
        unsafe { sum.reduce_sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut Q8Block, stride: usize) {
        // SAFETY: the contract of this method: there is room for block `i` of the row.
        unsafe {
            for (i, block) in blocks::<blocks::Q8_0>(weights.bytes).iter().enumerate() {
                prefetch(block);
                let to = to.add(i * stride);
                ((*to).q, (*to).d) = (block.qs, f32_of(block.d));
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const Q8Block, x: [&Q8Tile; T], out: *mut f32, stride: usize) {
        // SAFETY: the contract of this method: `ROWS` blocks at `rows`, as many rows of 16 sums at `out` for each tile.
        unsafe {
            for t in 0..T {
                for v in 0..2 {
                    let dx = _mm256_load_ps(x[t].d.as_ptr().add(8 * v));
                    for r in 0..Self::ROWS {
                        let row = &*rows.add(r);
                        let mut sum32 = _mm256_setzero_si256();
                        for step in 0..8 {
                            let w = _mm256_set1_epi32(row.q.as_ptr().cast::<i32>().add(step).read());
                            let x = _mm256_load_si256(x[t].q.as_ptr().add(step).cast::<__m256i>().add(v));
                            let zero = _mm256_setzero_si256();
                            let products = D::add_products(zero, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                            sum32 = _mm256_add_epi32(sum32, D::widen(products));
                        }
                        let d = _mm256_mul_ps(dx, _mm256_set1_ps(row.d));
                        let out = out.add(t * stride + r * TILE + 8 * v);
                        _mm256_store_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum32), d, _mm256_load_ps(out)));
                    }
                }
            }
        }
    }
}
