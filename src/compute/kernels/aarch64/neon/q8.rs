//! Products with Q8_0.

use std::arch::aarch64::*;
use std::marker::PhantomData;

use super::bytes::Bytes;
use super::{f32_of, prefetch};
use crate::compute::kernels::Weights;
use crate::compute::kernels::blocks::{self, block, blocks};
use crate::compute::kernels::pack::{Q8Row, Q8Tile, TILE, plain};
use crate::compute::kernels::products::{Products, for_each_token};
use crate::compute::kernels::simd::Simd;

plain! {
    /// 32 weights of one row.
    #[repr(C, align(16))]
    pub struct Q8Block {
        q: [i8; 32],
        d: f32,
        unused: [u32; 3],
    }
}

/// Products with blocks of `Q8_0`; `D` multiplies the bytes.
pub struct Q8Products<D>(PhantomData<D>);

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<D: Bytes> Products for Q8Products<D> {
    type V = float32x4_t;
    type Row = Q8Row;
    type Tile = Q8Tile;
    type Block = Q8Block;
    type Sum = float32x4_t;
    const ROW: usize = 32;
    const STEP: usize = 32;
    const BLOCK: usize = 32;
    const ROWS: usize = 4;
    const TILES: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        // SAFETY: the instruction set is there.
        unsafe { vdupq_n_f32(0.0) }
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
            let q = [vld1q_s8(block.qs.as_ptr()), vld1q_s8(block.qs.as_ptr().add(16))];
            let d = f32_of(block.d);
            for_each_token!(T, t, {
                let x = x[t].get_unchecked(step);
                let sum32 = D::dot(q, [vld1q_s8(x.q.as_ptr()), vld1q_s8(x.q.as_ptr().add(16))]);
                sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(sum32), d * x.d);
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
        // SAFETY: the contract of this method: 4 blocks at `rows`, 4 rows of 16 sums at `out` for each tile.
        unsafe {
            for t in 0..T {
                for half in 0..2 {
                    let q = x[t].q.as_ptr().cast::<i8>().add(8 * D::RUN * half);
                    let w = [0, 1, 2, 3].map(|r| (&raw const (*rows.add(r)).q).cast::<i8>());
                    // 16 bits hold 2 * 128 * 127.
                    let sums32 = D::by_row(D::multiply::<2>(w, q, 32));
                    for r in 0..4 {
                        for v in 0..2 {
                            let dx = vld1q_f32(x[t].d.as_ptr().add(8 * half + 4 * v));
                            let out = out.add(t * stride + r * TILE + 8 * half + 4 * v);
                            let d = vmulq_n_f32(dx, (*rows.add(r)).d);
                            vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vcvtq_f32_s32(sums32[2 * r + v]), d));
                        }
                    }
                }
            }
        }
    }
}
