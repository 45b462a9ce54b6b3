//! AVX-512 with VNNI: 8-bit products for quantized weights, f32 for the others.
//!
//! ```text
//! decode, for each weight row and super-block, a lane holding four weights of one group:
//!     sum32 = q . x                      all 256 weights into 16 lanes: four times vpdpbusd
//!     out  += (d * scale * dx) * sum32 - (dmin * min) * (dx * sum of x)
//! prefill, for 32 weight rows unpacked to bytes in cache, each super-block, each 4 rows x 32 tokens:
//!     for each group of a scale:  sum32 = q . x (vpdpbusd);  sum += d * scale * sum32
//!     out += dx * (sum - dmin * (mins . sums of x))
//! ```
//! 1. In decode the lanes are features: a row is read once, in order, from the file's bytes. Quants are interleaved so that
//!    a lane has the same group in all four vectors; the scales are applied once, to the sum.
//! 2. In prefill the lanes are tokens, and weights are broadcast: only the result is transposed.
//! 3. With 16 groups there are no mins: `sum32` starts at the difference between products with `q - 32` and with `q`.
//! 4. Vector instructions are the bottleneck, so scales and mins are unpacked in general registers.
//! 5. Software prefetch goes to L1 for up to three tokens, to L2 for more. Without it decode reaches two thirds of the bandwidth.
//!
//! Decisions: docs/design/kernels.md

mod q8;
mod super_block;

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use super::interleave::{self, InterleavedRow};
use super::{prefetch, prefetch_ahead};
use crate::compute::kernels::blocks::{self, block, blocks};
use crate::compute::kernels::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use crate::compute::kernels::pack::{self, SUPER, TILE, TileBlock, plain};
use crate::compute::kernels::products::{self, Products, for_each_token};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::{Format, KvPage, Line, Out, Phase, Query, Tile, Weights, attention, float, shapes};
use q8::Q8Products;
use super_block::SuperBlock;

/// The kernel. A value exists only on a CPU with AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C.
#[derive(Copy, Clone)]
pub struct Avx512(());

impl Avx512 {
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx512(()))
    }
}

kernel!(
    Avx512,
    "avx512",
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c",
    __m512,
    KQuantProducts,
    Q8Products,
    interleave::pack_row,
    pack::pack_tile::<4>,
    &COSTS
);

/// One token takes 36 ms for the weights of Phi-3-mini in Q4_K_M. Measured on 30 November 2026, on 2 cores of an AMD EPYC
/// (Zen 5).
const COSTS: [f32; 16] = [1.0, 1.2, 1.46, 1.51, 1.82, 2.11, 2.38, 2.57, 2.95, 3.15, 3.4, 3.7, 3.94, 4.22, 4.4, 4.66];

plain! {
    /// 256 unpacked weights of one row.
    #[repr(C, align(64))]
    pub struct PanelBlock {
        /// In the order of `SuperBlock::quants`.
        q: [u8; SUPER],
        /// In the order of `SuperBlock::scales`.
        scales: [f32; 16],
        /// Of 8 groups.
        mins: [i16; 8],
        dmin: f32,
        unused: [u32; 11],
    }
}

/// Tokens from which on decode alternates between two rows.
const MANY: usize = 4;

/// Products with super-blocks of `B`.
pub struct KQuantProducts<B>(PhantomData<B>);

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<B: SuperBlock> Products for KQuantProducts<B> {
    type V = __m512;
    type Row = InterleavedRow;
    type Tile = TileBlock;
    type Block = PanelBlock;
    type Sum = __m512;
    const ROW: usize = SUPER;
    const STEP: usize = SUPER;
    /// 8 take longer at once than as 4 and 4.
    const TOKENS: usize = 7;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 4;
    const TILES: usize = 3;

    #[inline(always)]
    fn segment(tokens: usize) -> usize {
        if tokens < MANY { 3072 } else { usize::MAX }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the instruction set is there.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn accumulate<const T: usize>(
        weights: Weights<'_>,
        step: usize,
        x: [&[InterleavedRow]; T],
        sums: &mut [__m512; T],
    ) {
        // SAFETY: the contract of this method: the row has a block `step`, and so has every `x`.
        unsafe {
            let block = block::<B>(weights.bytes, step);
            // The activations of many tokens take more than half of L1: weights that arrive early would evict them.
            if T >= MANY {
                prefetch_ahead::<4096, _MM_HINT_T1, B>(block)
            } else {
                prefetch(block)
            }
            let (q, scales) = (block.quants(), block.scales());
            let mut dmin_mins = _mm512_setzero_ps();
            if let Some((mins, dmin)) = block.mins() {
                let twice_each = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(mins, mins)));
                dmin_mins = _mm512_mul_ps(twice_each, _mm512_set1_ps(dmin));
            }
            for_each_token!(T, t, {
                let (x, sum) = (x[t].get_unchecked(step), &mut sums[t]);
                let mut sum32 = match B::GROUPS {
                    8 => _mm512_setzero_si512(),
                    _ => _mm512_load_si512(x.starts.of_16.as_ptr().cast()),
                };
                for j in 0..4 {
                    sum32 = _mm512_dpbusd_epi32(sum32, q[j], _mm512_load_si512(x.q[j].as_ptr().cast()));
                }
                let scales = _mm512_mul_ps(scales, _mm512_set1_ps(x.d));
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum32), scales, *sum);
                if B::GROUPS == 8 {
                    *sum = _mm512_fnmadd_ps(dmin_mins, _mm512_load_ps(x.starts.of_8.as_ptr()), *sum);
                }
            });
        }
    }

    #[inline(always)]
    unsafe fn accumulate_pair<const T: usize>(
        rows: [Weights<'_>; 2],
        steps: Range<usize>,
        x: [&[InterleavedRow]; T],
        sums: &mut [[__m512; T]; 2],
    ) {
        // SAFETY: the contract of this method.
        unsafe {
            if T < MANY {
                return products::one_after_the_other::<Self, T>(rows, steps, x, sums);
            }
            // Both rows in turn: the registers hold their accumulators.
            let (mut a, mut b) = ([sums[0][0]; T], [sums[1][0]; T]);
            for_each_token!(T, t, {
                (a[t], b[t]) = (sums[0][t], sums[1][t]);
            });
            for step in steps {
                Self::accumulate(rows[0], step, x, &mut a);
                Self::accumulate(rows[1], step, x, &mut b);
            }
            for_each_token!(T, t, {
                (sums[0][t], sums[1][t]) = (a[t], b[t]);
            });
        }
    }

    #[inline(always)]
    unsafe fn reduce(sum: __m512) -> f32 {
        // SAFETY: the instruction set is there.
        unsafe { sum.reduce_sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut PanelBlock, stride: usize) {
        // SAFETY: the contract of this method: there is room for block `i` of the row.
        unsafe {
            for (i, block) in blocks::<B>(weights.bytes).iter().enumerate() {
                prefetch(block);
                let to = to.add(i * stride);
                for (j, q) in block.quants().into_iter().enumerate() {
                    _mm512_store_si512((&raw mut (*to).q).cast::<__m512i>().add(j), q);
                }
                _mm512_store_ps((&raw mut (*to).scales).cast(), block.scales());
                if let Some((mins, dmin)) = block.mins() {
                    _mm_store_si128((&raw mut (*to).mins).cast(), _mm_cvtepu8_epi16(mins));
                    (*to).dmin = dmin;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const PanelBlock, x: [&TileBlock; T], out: *mut f32, stride: usize) {
        const R: usize = 4;
        // SAFETY: the contract of this method: R blocks at `rows`, R rows of 16 sums at `out` for each tile. The others are
        // the fields of blocks, whose indices are constants.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            for group in 0..B::GROUPS {
                let (lane, steps) = (interleave::lane(B::GROUPS, group), 64 / B::GROUPS);
                let mut starts = [_mm512_setzero_si512(); T];
                if B::GROUPS == 16 {
                    for t in 0..T {
                        // Even groups are the lower halves. The products are with `q`, not with `q - 32`.
                        let sums = _mm512_load_si512(x[t].sums.as_ptr().add(group / 2).cast());
                        let sums = if group % 2 == 0 { _mm512_slli_epi32(sums, 16) } else { sums };
                        starts[t] = _mm512_sub_epi32(starts[t], _mm512_slli_epi32(_mm512_srai_epi32(sums, 16), 5));
                    }
                }
                let mut sums32 = [starts; R];
                for step in 0..steps {
                    let mut tokens = [_mm512_setzero_si512(); T];
                    for t in 0..T {
                        tokens[t] = _mm512_load_si512(x[t].q.as_ptr().add(group * steps + step).cast());
                    }
                    let at = interleave::lane_of_quad(B::GROUPS, group, step);
                    for r in 0..R {
                        let w = _mm512_set1_epi32((&raw const (*rows.add(r)).q).cast::<i32>().add(at).read());
                        for t in 0..T {
                            sums32[r][t] = _mm512_dpbusd_epi32(sums32[r][t], w, tokens[t]);
                        }
                    }
                }
                for r in 0..R {
                    let scale = _mm512_set1_ps((*rows.add(r)).scales[lane]);
                    for t in 0..T {
                        sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums32[r][t]), scale, sums[r][t]);
                    }
                }
            }
            for r in 0..R {
                let dmin = _mm512_set1_ps((*rows.add(r)).dmin);
                for t in 0..T {
                    if B::GROUPS == 8 {
                        let mut mins = _mm512_setzero_si512();
                        for pair in 0..4 {
                            let w = _mm512_set1_epi32((&raw const (*rows.add(r)).mins).cast::<i32>().add(pair).read());
                            mins = _mm512_dpwssd_epi32(mins, w, _mm512_load_si512(x[t].sums.as_ptr().add(pair).cast()));
                        }
                        sums[r][t] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins), dmin, sums[r][t]);
                    }
                    let out = out.add(t * stride + r * TILE);
                    let total = _mm512_fmadd_ps(sums[r][t], _mm512_load_ps(x[t].d.as_ptr()), _mm512_load_ps(out));
                    _mm512_store_ps(out, total);
                }
            }
        }
    }
}
