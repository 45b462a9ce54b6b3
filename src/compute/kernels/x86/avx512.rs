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
//! 5. Software prefetch goes to L1 for one token, to L2 for four. Without it decode reaches two thirds of the bandwidth.
//!
//! Decisions: docs/design/kernels.md

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::interleave::{self, InterleavedRow};
use super::{d_and_dmin, f32_of, packed_scales, prefetch, prefetch_ahead};
use crate::compute::kernels::blocks::{self, Block, block, blocks, scales_and_mins};
use crate::compute::kernels::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use crate::compute::kernels::pack::{self, Q8Row, Q8Tile, SUPER, TILE, TileBlock, plain};
use crate::compute::kernels::products::{self, NR, Products};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::{Format, KvPage, Line, Out, Phase, Query, Tile, Weights, attention, float, shapes};

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
    pack::pack_tile::<4>
);

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

/// Products with super-blocks of `B`.
pub struct KQuantProducts<B>(PhantomData<B>);

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<B: SuperBlock> Products for KQuantProducts<B> {
    type V = __m512;
    type Row = InterleavedRow;
    type Tile = TileBlock;
    type Block = PanelBlock;
    /// Of the groups, scaled, and of the mins.
    type Sum = (__m512, __m256);
    const ROW: usize = SUPER;
    const STEP: usize = SUPER;
    const ROW_SWITCH: usize = SUPER;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 4;
    const TILES: usize = 3;

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        // SAFETY: the instruction set is there.
        unsafe { (_mm512_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn accumulate<const T: usize>(
        weights: Weights<'_>,
        step: usize,
        x: [&[InterleavedRow]; T],
        sums: &mut [Self::Sum; T],
    ) {
        // SAFETY: the contract of this method: the row has a block `step`, and so has every `x`.
        unsafe {
            let block = block::<B>(weights.bytes, step);
            // The activations of NR tokens take more than half of L1: weights that arrive early would evict them.
            if T == NR {
                prefetch_ahead::<4096, _MM_HINT_T1, B>(block)
            } else {
                prefetch(block)
            }
            let (q, scales) = (block.quants(), block.scales());
            let mut dmin_mins = _mm256_setzero_ps();
            if let Some((mins, dmin)) = block.mins() {
                dmin_mins = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(mins)), _mm256_set1_ps(dmin));
            }
            for t in 0..T {
                let (x, (sum, mins)) = (x[t].get_unchecked(step), &mut sums[t]);
                let mut sum32 = match B::GROUPS {
                    8 => _mm512_setzero_si512(),
                    _ => _mm512_load_si512(x.starts.as_ptr().cast()),
                };
                for j in 0..4 {
                    sum32 = _mm512_dpbusd_epi32(sum32, q[j], _mm512_load_si512(x.q[j].as_ptr().cast()));
                }
                let scales = _mm512_mul_ps(scales, _mm512_set1_ps(x.d));
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum32), scales, *sum);
                if B::GROUPS == 8 {
                    *mins = _mm256_fmadd_ps(dmin_mins, _mm256_load_ps(x.sums.of_8.as_ptr()), *mins);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn reduce((sum, mins): Self::Sum) -> f32 {
        // SAFETY: the instruction set is there.
        unsafe { _mm512_sub_ps(sum, _mm512_zextps256_ps512(mins)).reduce_sum() }
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
    const ROW_SWITCH: usize = 1024;
    const BLOCK: usize = 32;
    const ROWS: usize = 4;
    const TILES: usize = 3;

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
            for t in 0..T {
                let x = x[t].get_unchecked(step);
                let signed = _mm256_sign_epi8(_mm256_loadu_si256(x.q.as_ptr().cast()), w);
                let sum32 = _mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, signed);
                sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(d * x.d), _mm256_cvtepi32_ps(sum32), sums[t]);
            }
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
