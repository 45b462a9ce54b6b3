//! AVX2 with FMA and F16C: 8-bit products for quantized weights, f32 for the others.
//!
//! ```text
//! decode, for each weight row and super-block, a lane holding four weights of one group:
//!     sum16  = q . x                     vpmaddubsw, as many products as 16 bits hold
//!     sum32 += scale * sum16             vpmaddwd
//!     out   += d * dx * sum32 - (dmin * min) * (dx * sum of x)
//! prefill, for 32 weight rows unpacked to bytes in cache, each super-block, each 2 rows x 16 tokens:
//!     for each group of a scale:  sum16 = q . x (vpmaddubsw);  sum32 += scale * sum16
//!     out += dx * (d * sum32 - dmin * (mins . sums of x))
//! ```
//! 1. The lanes are features in decode. In prefill they are tokens, and weights are broadcast.
//! 2. 16 bits hold the sum of eight products of 4-bit weights (8 * 2 * 15 * 127 = 30480), of four of 5-bit weights, of two
//!    of 6-bit weights.
//!
//! Decisions: docs/design/kernels.md

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::interleave::{self, InterleavedRow};
use super::{d_and_dmin, f32_of, packed_scales, prefetch};
use crate::compute::kernels::blocks::{self, Block, block, blocks, scales_and_mins};
use crate::compute::kernels::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use crate::compute::kernels::pack::{self, Q8Row, Q8Tile, SUPER, TILE, TileBlock, plain};
use crate::compute::kernels::products::{self, Products};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::{Format, KvPage, Line, Out, Phase, Query, Tile, Weights, attention, float, shapes};

/// The kernel. A value exists only on a CPU with AVX2, FMA and F16C.
#[derive(Copy, Clone)]
pub struct Avx2(());

impl Avx2 {
    pub fn new() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }
}

kernel!(Avx2, "avx2", "avx2,fma,f16c", __m256, KQuantProducts, Q8Products, interleave::pack_row, pack::pack_tile::<4>);

/// The scales of a super-block: `w = d * scale * q - dmin * min`.
pub struct Scales {
    /// i16, of each group.
    scales: __m256i,
    mins: __m256i,
    d: f32,
    dmin: f32,
}

/// # Safety
/// For the caller of any method: the instruction set is there, see [`Simd`].
pub unsafe trait SuperBlock: Block {
    const GROUPS: usize;
    /// Products whose sum 16 bits hold.
    const I16_PRODUCTS: usize;

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
    const I16_PRODUCTS: usize = 8;

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
    const I16_PRODUCTS: usize = 4;

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
    const I16_PRODUCTS: usize = 2;

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
unsafe fn interleave_quants<B: SuperBlock>(block: &B, half: usize) -> [__m256i; 4] {
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
fn interleave_scales<B: SuperBlock>(scales: __m256i) -> [__m256i; 2] {
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

plain! {
    /// 256 unpacked weights of one row.
    #[repr(C, align(64))]
    pub struct PanelBlock {
        q: [u8; SUPER],
        /// The scale of each group, twice: a pair of products takes both.
        scales: [[i16; 2]; 16],
        mins: [i16; 16],
        d: f32,
        dmin: f32,
        unused: [u32; 6],
    }
}

/// Products with super-blocks of `B`.
pub struct KQuantProducts<B>(PhantomData<B>);

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<B: SuperBlock> Products for KQuantProducts<B> {
    type V = __m256;
    type Row = InterleavedRow;
    type Tile = TileBlock;
    type Block = PanelBlock;
    type Sum = __m256;
    const ROW: usize = SUPER;
    const STEP: usize = SUPER;
    const ROW_SWITCH: usize = 1024;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 2;
    const TILES: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the instruction set is there.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn accumulate<const T: usize>(
        weights: Weights<'_>,
        step: usize,
        x: [&[InterleavedRow]; T],
        sums: &mut [__m256; T],
    ) {
        // SAFETY: the contract of this method: the row has a block `step`, and so has every `x`.
        unsafe {
            let block = block::<B>(weights.bytes, step);
            prefetch(block);
            let w = block.scales();
            let scales = interleave_scales::<B>(w.scales);
            let mins = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(w.mins)));
            let dmin_mins = _mm256_mul_ps(mins, _mm256_set1_ps(w.dmin));
            let fit = if B::I16_PRODUCTS < 4 { B::I16_PRODUCTS } else { 4 };
            let mut sums32 = [_mm256_setzero_si256(); T];
            for half in 0..2 {
                let q = interleave_quants(block, half);
                for t in 0..T {
                    let x = x[t].get_unchecked(step);
                    for part in 0..4 / fit {
                        let mut sums16 = _mm256_setzero_si256();
                        for i in part * fit..(part + 1) * fit {
                            let x = _mm256_load_si256(x.q[i].as_ptr().add(32 * half).cast());
                            sums16 = _mm256_add_epi16(sums16, _mm256_maddubs_epi16(q[i], x));
                        }
                        sums32[t] = _mm256_add_epi32(sums32[t], _mm256_madd_epi16(sums16, scales[half]));
                    }
                }
            }
            for t in 0..T {
                let x = x[t].get_unchecked(step);
                if B::GROUPS == 16 {
                    let mins = _mm256_madd_epi16(w.mins, _mm256_load_si256(x.sums.of_16.as_ptr().cast()));
                    sums32[t] = _mm256_sub_epi32(sums32[t], mins);
                }
                let d = _mm256_mul_ps(_mm256_set1_ps(w.d), _mm256_set1_ps(x.d));
                sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums32[t]), d, sums[t]);
                if B::GROUPS == 8 {
                    sums[t] = _mm256_fnmadd_ps(dmin_mins, _mm256_load_ps(x.sums.of_8.as_ptr()), sums[t]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn reduce(sum: __m256) -> f32 {
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
                for j in 0..8 {
                    _mm256_store_si256((&raw mut (*to).q).cast::<__m256i>().add(j), block.quants(2 * j, 2 * j + 1));
                }
                let (low, high) = (_mm256_castsi256_si128(w.scales), _mm256_extracti128_si256(w.scales, 1));
                for (j, half) in [low, high].into_iter().enumerate() {
                    let to = (&raw mut (*to).scales).cast::<__m128i>().add(2 * j);
                    _mm_store_si128(to, _mm_unpacklo_epi16(half, half));
                    _mm_store_si128(to.add(1), _mm_unpackhi_epi16(half, half));
                }
                _mm256_store_si256((&raw mut (*to).mins).cast(), w.mins);
                ((*to).d, (*to).dmin) = (w.d, w.dmin);
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const PanelBlock, x: [&TileBlock; T], out: *mut f32, stride: usize) {
        // SAFETY: the contract of this method, for each tile.
        unsafe {
            for t in 0..T {
                multiply_tile::<B>(rows, x[t], out.add(t * stride));
            }
        }
    }
}

/// 2 rows with a tile, 8 tokens in each register.
///
/// # Safety
/// As for `Products::multiply` with one tile.
#[inline(always)]
unsafe fn multiply_tile<B: SuperBlock>(rows: *const PanelBlock, x: &TileBlock, out: *mut f32) {
    const R: usize = 2;
    // SAFETY: the contract of this function: R blocks at `rows`, R rows of 16 sums at `out`. The others are the fields of
    // blocks, of which `step` is below 64, `group` below 16 and `pair` below 8.
    unsafe {
        let mut sums32 = [[_mm256_setzero_si256(); 2]; R];
        let steps = 64 / B::GROUPS;
        let fit = if B::I16_PRODUCTS < steps { B::I16_PRODUCTS } else { steps };
        for group in 0..B::GROUPS {
            for part in 0..steps / fit {
                let mut sums16 = [[_mm256_setzero_si256(); 2]; R];
                for i in 0..fit {
                    let step = group * steps + part * fit + i;
                    for r in 0..R {
                        let w = _mm256_set1_epi32((&raw const (*rows.add(r)).q).cast::<i32>().add(step).read());
                        for v in 0..2 {
                            let x = _mm256_load_si256(x.q.as_ptr().add(step).cast::<__m256i>().add(v));
                            let products = _mm256_maddubs_epi16(w, x);
                            sums16[r][v] = if i == 0 { products } else { _mm256_add_epi16(sums16[r][v], products) };
                        }
                    }
                }
                for r in 0..R {
                    let scale = _mm256_set1_epi32((&raw const (*rows.add(r)).scales).cast::<i32>().add(group).read());
                    for v in 0..2 {
                        sums32[r][v] = _mm256_add_epi32(sums32[r][v], _mm256_madd_epi16(sums16[r][v], scale));
                    }
                }
            }
        }
        for v in 0..2 {
            let dx = _mm256_load_ps(x.d.as_ptr().add(8 * v));
            for r in 0..R {
                let row = &*rows.add(r);
                let mut mins = _mm256_setzero_si256();
                for pair in 0..B::GROUPS / 2 {
                    let w = _mm256_set1_epi32(row.mins.as_ptr().cast::<i32>().add(pair).read());
                    let x = _mm256_load_si256(x.sums.as_ptr().add(pair).cast::<__m256i>().add(v));
                    mins = _mm256_add_epi32(mins, _mm256_madd_epi16(w, x));
                }
                let mins = _mm256_mul_ps(_mm256_cvtepi32_ps(mins), _mm256_set1_ps(row.dmin));
                let sum = _mm256_fmsub_ps(_mm256_cvtepi32_ps(sums32[r][v]), _mm256_set1_ps(row.d), mins);
                let out = out.add(r * TILE + 8 * v);
                _mm256_store_ps(out, _mm256_fmadd_ps(sum, dx, _mm256_load_ps(out)));
            }
        }
    }
}

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
/// weights, and activations with the signs of the weights.
pub struct Q8Products;

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl Products for Q8Products {
    type V = __m256;
    type Row = Q8Row;
    type Tile = Q8Tile;
    type Block = Q8Block;
    type Sum = __m256;
    const ROW: usize = 32;
    const STEP: usize = 32;
    const ROW_SWITCH: usize = 1024;
    const BLOCK: usize = 32;
    const ROWS: usize = 2;
    const TILES: usize = 1;

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
                // 16 bits hold 2 * 128 * 127.
                let sum32 = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed), _mm256_set1_epi16(1));
                sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(d * x.d), _mm256_cvtepi32_ps(sum32), sums[t]);
            }
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
                            let products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                            sum32 = _mm256_add_epi32(sum32, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
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
