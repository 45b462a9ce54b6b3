//! NEON: 8-bit products for quantized weights, f32 for the others.
//!
//! ```text
//! decode, for each weight row and super-block, 128 weights at a time:
//!     sum32 = q . x                      of each group of a scale, four groups side by side
//!     total += scale * sum32
//!     out   += dx * (d * total - dmin * (mins . sums of x))
//! prefill, for 32 weight rows unpacked to bytes in cache, each super-block, each 4 rows x 8 tokens:
//!     for each group of a scale:  sum32 = q . x;  total += scale * sum32
//!     out += dx * (d * total - dmin * (mins . sums of x))
//! ```
//! 1. The products `q . x` use the best instruction of the CPU: `smmla` (i8mm), `sdot` (dotprod) or `smull`. They are exact,
//!    and everything around them is written once: **the results have the same bits on every CPU.**
//! 2. Integers are signed here, so that `Q6_K`, whose mins are 32 times its scales, is multiplied without mins.
//! 3. Scales are applied to integers, 4 sums at a time: a 32-bit multiplication is slow on most of these CPUs.
//! 4. The intrinsics of `sdot` and `smmla` are not stable yet; `bytes` has them in assembly.
//!
//! Decisions: docs/design/kernels.md

mod bytes;
mod q8;
mod super_block;

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::marker::PhantomData;

use crate::compute::kernels::blocks::{self, Block, block, blocks};
use crate::compute::kernels::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use crate::compute::kernels::pack::{self, RowBlock, SUPER, TILE, TileBlock, plain};
use crate::compute::kernels::products::{self, Products, for_each_token};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::{
    Format, Kernel, KvPage, LINEAR_COSTS, Line, Out, Phase, Query, Tile, Weights, attention, float, shapes,
};
use bytes::Bytes;
use q8::Q8Products;
use super_block::SuperBlock;

/// The kernel with NEON alone, which every aarch64 CPU has.
#[derive(Copy, Clone)]
pub struct Base(());

/// The kernel with dotprod: ARMv8.4, and from Cortex-A55 and A75 on. A value exists only on a CPU that has it.
#[derive(Copy, Clone)]
pub struct DotProd(());

/// The kernel with dotprod and i8mm: ARMv8.6, and from Cortex-A510 and A710 on. A value exists only on a CPU that has them.
#[derive(Copy, Clone)]
pub struct I8mm(());

impl Base {
    pub fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Base(()))
    }
}

impl DotProd {
    pub fn new() -> Option<Self> {
        (is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")).then_some(DotProd(()))
    }
}

impl I8mm {
    pub fn new() -> Option<Self> {
        (DotProd::new().is_some() && is_aarch64_feature_detected!("i8mm")).then_some(I8mm(()))
    }
}

/// The kernel `neon` in its fastest form for this CPU.
pub fn neon() -> Option<Box<dyn Kernel>> {
    if let Some(kernel) = I8mm::new() {
        Some(Box::new(kernel))
    } else if let Some(kernel) = DotProd::new() {
        Some(Box::new(kernel))
    } else {
        Some(Box::new(Base::new()?))
    }
}

type BaseKQuant<B> = KQuantProducts<Base, B>;
type BaseQ8 = Q8Products<Base>;
type DotKQuant<B> = KQuantProducts<DotProd, B>;
type DotQ8 = Q8Products<DotProd>;
type I8mmKQuant<B> = KQuantProducts<I8mm, B>;
type I8mmQ8 = Q8Products<I8mm>;

kernel!(Base, "neon", "neon", float32x4_t, BaseKQuant, BaseQ8, pack::pack_row, pack::pack_tile::<4>, &LINEAR_COSTS);
kernel!(
    DotProd,
    "neon",
    "neon,dotprod",
    float32x4_t,
    DotKQuant,
    DotQ8,
    pack::pack_row,
    pack::pack_tile::<4>,
    &LINEAR_COSTS
);
kernel!(
    I8mm,
    "neon",
    "neon,dotprod,i8mm",
    float32x4_t,
    I8mmKQuant,
    I8mmQ8,
    pack::pack_row,
    pack::pack_tile::<8>,
    &LINEAR_COSTS
);

#[inline]
#[target_feature(enable = "neon")]
fn f32_of(half: blocks::Half) -> f32 {
    vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half.bits()))))
}

/// Prefetches, into L1, the size of a block from 2 KB past its start. Past the end of the weights it does nothing: a
/// prefetch does not fault.
#[inline(always)]
fn prefetch<B: Block>(block: &B) {
    let from = (block as *const B).cast::<u8>().wrapping_add(2048);
    for line in 0..size_of::<B>().div_ceil(64) {
        let line = from.wrapping_add(64 * line);
        // SAFETY: the instruction changes no register and no memory; the address may be invalid.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) line.addr(), options(nomem, nostack, preserves_flags)) };
    }
}

plain! {
    /// 256 unpacked weights of one row.
    #[repr(C, align(16))]
    pub struct PanelBlock {
        q: [i8; SUPER],
        scales: [i32; 16],
        mins: [i16; 8],
        d: f32,
        dmin: f32,
        unused: [u32; 2],
    }
}

/// Products with super-blocks of `B`; `D` multiplies the bytes.
pub struct KQuantProducts<D, B>(PhantomData<(D, B)>);

/// Four horizontal sums: lane k is the sum of the lanes of `sums[k]`.
#[inline]
#[target_feature(enable = "neon")]
fn reduce4(sums: [int32x4_t; 4]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]))
}

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<D: Bytes, B: SuperBlock> Products for KQuantProducts<D, B> {
    type V = float32x4_t;
    type Row = RowBlock;
    type Tile = TileBlock;
    type Block = PanelBlock;
    type Sum = float32x4_t;
    const ROW: usize = SUPER;
    const STEP: usize = SUPER;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 4;
    const TILES: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: the instruction set is there.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn accumulate<const T: usize>(
        weights: Weights<'_>,
        step: usize,
        x: [&[RowBlock]; T],
        sums: &mut [float32x4_t; T],
    ) {
        // SAFETY: the contract of this method: the row has a block `step`, and so has every `x`.
        unsafe {
            let block = block::<B>(weights.bytes, step);
            prefetch(block);
            let w = block.scales();
            let mut totals = [vdupq_n_s32(0); T];
            for half in 0..2 {
                let q = block.quants(half);
                for_each_token!(T, t, {
                    let x = x[t].get_unchecked(step).q.as_ptr().add(128 * half);
                    let at = |j: usize| vld1q_s8(x.add(16 * j));
                    if B::GROUPS == 8 {
                        let group = |j: usize| D::dot([q[2 * j], q[2 * j + 1]], [at(2 * j), at(2 * j + 1)]);
                        let sum32 = reduce4([group(0), group(1), group(2), group(3)]);
                        totals[t] = vmlaq_s32(totals[t], sum32, w.scales[half]);
                    } else {
                        let group = |j: usize| D::dot([q[j]], [at(j)]);
                        let sum32 = reduce4([group(0), group(1), group(2), group(3)]);
                        totals[t] = vmlaq_s32(totals[t], sum32, w.scales[2 * half]);
                        let sum32 = reduce4([group(4), group(5), group(6), group(7)]);
                        totals[t] = vmlaq_s32(totals[t], sum32, w.scales[2 * half + 1]);
                    }
                });
            }
            for_each_token!(T, t, {
                let x = x[t].get_unchecked(step);
                sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(totals[t]), w.d * x.d);
                if B::GROUPS == 8 {
                    let x_sums = vld1q_s16(x.sums.as_ptr());
                    let mins = vmull_s16(vget_low_s16(w.mins), vget_low_s16(x_sums));
                    let mins = vmlal_high_s16(mins, w.mins, x_sums);
                    sums[t] = vfmsq_n_f32(sums[t], vcvtq_f32_s32(mins), w.dmin * x.d);
                }
            });
        }
    }

    #[inline(always)]
    unsafe fn reduce(sum: float32x4_t) -> f32 {
        // SAFETY: the instruction set is there.
        unsafe { sum.reduce_sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut PanelBlock, stride: usize) {
        // SAFETY: the contract of this method: there is room for block `i` of the row.
        unsafe {
            for (i, block) in blocks::<B>(weights.bytes).iter().enumerate() {
                prefetch(block);
                let (w, to) = (block.scales(), to.add(i * stride));
                for half in 0..2 {
                    let q = block.quants(half);
                    for j in 0..8 {
                        vst1q_s8((&raw mut (*to).q).cast::<i8>().add(128 * half + 16 * j), q[j]);
                    }
                }
                for j in 0..B::GROUPS / 4 {
                    vst1q_s32((&raw mut (*to).scales).cast::<i32>().add(4 * j), w.scales[j]);
                }
                vst1q_s16((&raw mut (*to).mins).cast(), w.mins);
                ((*to).d, (*to).dmin) = (w.d, w.dmin);
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const PanelBlock, x: [&TileBlock; T], out: *mut f32, stride: usize) {
        // SAFETY: the contract of this method, for each tile.
        unsafe {
            for t in 0..T {
                for half in 0..2 {
                    multiply_half_tile::<D, B>(rows, x[t], half, out.add(t * stride + 8 * half));
                }
            }
        }
    }
}

/// 4 rows with 8 of the 16 tokens of a tile.
///
/// # Safety
/// As for `Products::multiply` with one tile; `half` is 0 or 1, and `out` is at the first of the 8 tokens.
#[inline(always)]
unsafe fn multiply_half_tile<D: Bytes, B: SuperBlock>(
    rows: *const PanelBlock,
    x: &TileBlock,
    half: usize,
    out: *mut f32,
) {
    const ROWS: [usize; 4] = [0, 1, 2, 3];
    // SAFETY: the contract of this function: 4 blocks at `rows`, 4 rows of 16 sums around `out`. The others are the fields
    // of blocks, of which `group` is below 16.
    unsafe {
        let features = SUPER / B::GROUPS;
        let q = x.q.as_ptr().cast::<i8>().add(8 * D::RUN * half);
        let mut totals = [vdupq_n_s32(0); 8];
        for group in 0..B::GROUPS {
            let w = ROWS.map(|r| (&raw const (*rows.add(r)).q).cast::<i8>().add(group * features));
            // 16 bits hold 8 * 31 * 127 (Q5_K) and 4 * 32 * 127 (Q6_K).
            let sums32 = D::multiply::<8>(w, q.add(group * features * TILE), features);
            let scale = |r| vld1q_dup_s32((&raw const (*rows.add(r)).scales).cast::<i32>().add(group));
            let scales = D::row_factors(ROWS.map(scale));
            for i in 0..8 {
                totals[i] = vmlaq_s32(totals[i], sums32[i], scales[i / 2]);
            }
        }
        let totals = D::by_row(totals);
        let mut min_totals = [vdupq_n_s32(0); 8];
        if B::GROUPS == 8 {
            let mins = ROWS.map(|r| vld1q_s16((*rows.add(r)).mins.as_ptr()));
            let sums = x.sums.as_ptr().cast::<i16>().add(2 * 8 * half);
            mins_step::<0, 1>(&mut min_totals, mins, sums);
            mins_step::<2, 3>(&mut min_totals, mins, sums);
            mins_step::<4, 5>(&mut min_totals, mins, sums);
            mins_step::<6, 7>(&mut min_totals, mins, sums);
        }
        for v in 0..2 {
            let dx = vld1q_f32(x.d.as_ptr().add(8 * half + 4 * v));
            for r in ROWS {
                let row = &*rows.add(r);
                let mut sum = vmulq_n_f32(vcvtq_f32_s32(totals[2 * r + v]), row.d);
                if B::GROUPS == 8 {
                    sum = vfmsq_n_f32(sum, vcvtq_f32_s32(min_totals[2 * r + v]), row.dmin);
                }
                let out = out.add(r * TILE + 4 * v);
                vst1q_f32(out, vfmaq_f32(vld1q_f32(out), sum, dx));
            }
        }
    }
}

/// The mins of groups `G` and `H = G + 1` of 4 rows, times the sums of 8 tokens.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and `sums` is valid for reading 16 numbers from `16 * G` on.
#[inline(always)]
unsafe fn mins_step<const G: i32, const H: i32>(totals: &mut [int32x4_t; 8], mins: [int16x8_t; 4], sums: *const i16) {
    // SAFETY: the contract of this function.
    unsafe {
        let int16x8x2_t(g, h) = vld2q_s16(sums.add(G as usize * TILE));
        for r in 0..4 {
            let low = vmlal_laneq_s16::<G>(totals[2 * r], vget_low_s16(g), mins[r]);
            totals[2 * r] = vmlal_laneq_s16::<H>(low, vget_low_s16(h), mins[r]);
            let high = vmlal_high_laneq_s16::<G>(totals[2 * r + 1], g, mins[r]);
            totals[2 * r + 1] = vmlal_high_laneq_s16::<H>(high, h, mins[r]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::kernels::product::product;
    use crate::compute::kernels::random::{Matrix, Random};

    /// The kernels that this CPU can run: one to three.
    fn kernels() -> Vec<Box<dyn Kernel>> {
        fn boxed<K: Kernel + 'static>(kernel: K) -> Box<dyn Kernel> {
            Box::new(kernel)
        }
        [Base::new().map(boxed), DotProd::new().map(boxed), I8mm::new().map(boxed)].into_iter().flatten().collect()
    }

    #[test]
    fn all_products_have_the_same_bits() {
        let mut random = Random::new(1);
        let (cols, rows, tokens) = (512, 37, 21);
        for format in [Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::Q8_0, Format::F16] {
            let matrix = Matrix::random(format, rows, cols, &mut random);
            let x = random.normals(tokens * cols);
            for phase in [Phase::Prefill, Phase::Decode] {
                let bits = |kernel: &Box<dyn Kernel>| -> Vec<u32> {
                    product(kernel.as_ref(), &matrix, phase, &x).iter().map(|x| x.to_bits()).collect()
                };
                let results: Vec<Vec<u32>> = kernels().iter().map(bits).collect();
                for result in &results {
                    assert!(result.iter().any(|&bits| bits != 0) && *result == results[0], "{format:?} {phase:?}");
                }
            }
        }
    }
}
