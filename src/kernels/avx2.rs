//! AVX2 with FMA and F16C: 8-bit products for quantized weights, f32 for the others.
//!
//! ```text
//! decode, for each weight row and super-block, 32 weights at a time:
//!     sum32 += scale * (q . x)           vpmaddubsw to 16 bits, vpmaddwd with the scale
//!     out   += dx * (d * sum32 - dmin * (mins . sums of x))
//! prefill, for 32 weight rows unpacked to bytes in cache, each super-block, each 2 rows x 16 tokens:
//!     for each group of a scale:  sum16 = q . x (vpmaddubsw);  sum32 += scale * sum16
//!     out += dx * (d * sum32 - dmin * (mins . sums of x))
//! ```
//! 1. The lanes are features in decode, tokens in prefill, where weights are broadcast.
//! 2. Products of 4-bit weights fit eight times into 16 bits (8 * 2 * 15 * 127 = 30480), of 5-bit weights four times,
//!    of 6-bit weights twice, before they are widened.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::blocks::{self, Block, block, blocks, scales_and_mins};
use super::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use super::pack::{self, RowBlock, SUPER, SmallRow, SmallTile, TILE, TileBlock};
use super::products::{self, Products};
use super::simd::Simd;
use super::x86::{f32_of, prefetch};
use super::{Format, KvPage, Line, Out, Phase, Query, Tile, Weights, attention, float};

/// AVX2, FMA and F16C.
#[derive(Copy, Clone)]
pub struct Avx2(());

impl Avx2 {
    pub fn new() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }
}

kernel!(Avx2, "avx2", "avx2,fma,f16c", __m256, SuperProducts, SmallProducts, pack::pack_row, pack::pack_tile::<4>);

/// The integer parts of a super-block, `w = d * scale * q - dmin * min`.
pub struct Super {
    /// i16, of each group.
    scales: __m256i,
    mins: __m256i,
    d: f32,
    dmin: f32,
}

pub trait SuperBlock: Block {
    const GROUPS: usize;
    /// Products that fit into 16 bits.
    const FIT: usize;

    unsafe fn scales(&self) -> Super;

    /// Weights `32 * i .. 32 * (i + 1)` as bytes.
    unsafe fn quants(&self, i: usize) -> __m256i;
}

#[inline(always)]
unsafe fn bytes_to_i16(bytes: u64) -> __m256i {
    unsafe { _mm256_zextsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(bytes as i64))) }
}

/// Of Q4_K and Q5_K.
#[inline(always)]
unsafe fn unpack_scales(packed: &[u8; 12], d: blocks::Half, dmin: blocks::Half) -> Super {
    unsafe {
        let (scales, mins) = scales_and_mins(packed);
        Super { scales: bytes_to_i16(scales), mins: bytes_to_i16(mins), d: f32_of(d), dmin: f32_of(dmin) }
    }
}

#[inline(always)]
unsafe fn low_or_high_nibbles(qs: *const u8, high: bool) -> __m256i {
    unsafe {
        let q = _mm256_loadu_si256(qs.cast());
        let q = if high { _mm256_srli_epi16(q, 4) } else { q };
        _mm256_and_si256(q, _mm256_set1_epi8(15))
    }
}

impl SuperBlock for blocks::Q4_K {
    const GROUPS: usize = 8;
    const FIT: usize = 8;

    #[inline(always)]
    unsafe fn scales(&self) -> Super {
        unsafe { unpack_scales(&self.scales, self.d, self.dmin) }
    }

    #[inline(always)]
    unsafe fn quants(&self, i: usize) -> __m256i {
        unsafe { low_or_high_nibbles(self.qs.as_ptr().add(i / 2 * 32), i % 2 == 1) }
    }
}

impl SuperBlock for blocks::Q5_K {
    const GROUPS: usize = 8;
    const FIT: usize = 4;

    #[inline(always)]
    unsafe fn scales(&self) -> Super {
        unsafe { unpack_scales(&self.scales, self.d, self.dmin) }
    }

    #[inline(always)]
    unsafe fn quants(&self, i: usize) -> __m256i {
        unsafe {
            let low = low_or_high_nibbles(self.qs.as_ptr().add(i / 2 * 32), i % 2 == 1);
            // Bit i of every byte is the fifth bit of group i.
            let high = _mm256_loadu_si256(self.qh.as_ptr().cast());
            let by = _mm_cvtsi32_si128(if i < 4 { 4 - i as i32 } else { i as i32 - 4 });
            let high = if i < 4 { _mm256_sll_epi16(high, by) } else { _mm256_srl_epi16(high, by) };
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(16)))
        }
    }
}

impl SuperBlock for blocks::Q6_K {
    const GROUPS: usize = 16;
    const FIT: usize = 2;

    #[inline(always)]
    unsafe fn scales(&self) -> Super {
        unsafe {
            let scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(self.scales.as_ptr().cast()));
            let d = f32_of(self.d);
            // w = d * scale * (q - 32)
            Super { scales, mins: _mm256_slli_epi16(scales, 5), d, dmin: d }
        }
    }

    #[inline(always)]
    unsafe fn quants(&self, i: usize) -> __m256i {
        unsafe {
            let (half, group) = (i / 4, i % 4);
            let low = low_or_high_nibbles(self.ql.as_ptr().add(half * 64 + group % 2 * 32), group >= 2);
            // Two bits of every byte belong to each of the half's four groups of 32.
            let high = _mm256_loadu_si256(self.qh.as_ptr().add(half * 32).cast());
            let high = match group {
                0 => _mm256_slli_epi16(high, 4),
                1 => _mm256_slli_epi16(high, 2),
                2 => high,
                _ => _mm256_srli_epi16(high, 2),
            };
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(48)))
        }
    }
}

/// The scale of each 32 weights, spread over the i16 lanes of a vector: of groups of 16, one in each half.
#[inline(always)]
unsafe fn spread_scale<B: SuperBlock>(scales: __m256i, i: usize) -> __m256i {
    unsafe {
        if B::GROUPS == 8 {
            let both = _mm256_broadcastsi128_si256(_mm256_castsi256_si128(scales));
            _mm256_shuffle_epi8(both, _mm256_set1_epi16((0x0100 + 0x0202 * i) as i16))
        } else {
            let half = if i < 4 { _mm256_castsi256_si128(scales) } else { _mm256_extracti128_si256(scales, 1) };
            let (first, second) = ((0x0100 + 0x0404 * (i % 4)) as i16, (0x0302 + 0x0404 * (i % 4)) as i16);
            let index = _mm256_inserti128_si256(_mm256_set1_epi16(first), _mm_set1_epi16(second), 1);
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), index)
        }
    }
}

/// 256 unpacked weights of one row.
#[derive(Copy, Clone)]
#[repr(C, align(64))]
pub struct PanelBlock {
    q: [u8; SUPER],
    /// The scale of each group, twice: a pair of products takes both.
    scales: [[i16; 2]; 16],
    mins: [i16; 16],
    d: f32,
    dmin: f32,
}

/// Products with super-blocks of `B`.
pub struct SuperProducts<B>(PhantomData<B>);

// SAFETY: pointers stay inside blocks, and in `multiply` where the trait says.
unsafe impl<B: SuperBlock> Products for SuperProducts<B> {
    type V = __m256;
    type Row = RowBlock;
    type Tile = TileBlock;
    type Block = PanelBlock;
    type Sum = __m256;
    const ROW: usize = SUPER;
    const STEP: usize = SUPER;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 2;
    const TILES: usize = 1;

    #[inline(always)]
    unsafe fn nothing() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add<const T: usize>(weights: Weights<'_>, step: usize, x: [&[RowBlock]; T], sums: &mut [__m256; T]) {
        unsafe {
            let block = block::<B>(weights.bytes, step);
            prefetch(block);
            let w = block.scales();
            let mut sums32 = [_mm256_setzero_si256(); T];
            for j in 0..8 {
                let (q, scale) = (block.quants(j), spread_scale::<B>(w.scales, j));
                for t in 0..T {
                    let x = _mm256_load_si256(x[t].get_unchecked(step).q.as_ptr().add(32 * j).cast());
                    let products = _mm256_madd_epi16(_mm256_maddubs_epi16(q, x), scale);
                    sums32[t] = _mm256_add_epi32(sums32[t], products);
                }
            }
            for t in 0..T {
                let x = x[t].get_unchecked(step);
                let mins = _mm256_madd_epi16(w.mins, _mm256_load_si256(x.sums.as_ptr().cast()));
                let mins = _mm256_mul_ps(_mm256_set1_ps(w.dmin * x.d), _mm256_cvtepi32_ps(mins));
                let sum = _mm256_fmsub_ps(_mm256_set1_ps(w.d * x.d), _mm256_cvtepi32_ps(sums32[t]), mins);
                sums[t] = _mm256_add_ps(sums[t], sum);
            }
        }
    }

    #[inline(always)]
    unsafe fn total(sum: __m256) -> f32 {
        unsafe { sum.sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut PanelBlock, stride: usize) {
        unsafe {
            for (i, block) in blocks::<B>(weights.bytes).iter().enumerate() {
                prefetch(block);
                let (w, to) = (block.scales(), to.add(i * stride));
                for j in 0..8 {
                    _mm256_store_si256((&raw mut (*to).q).cast::<__m256i>().add(j), block.quants(j));
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
        unsafe {
            // 8 tokens at a time: half a tile.
            for t in 0..T {
                multiply_tile::<B>(rows, x[t], out.add(t * stride));
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply_tile<B: SuperBlock>(rows: *const PanelBlock, x: &TileBlock, out: *mut f32) {
    const R: usize = 2;
    unsafe {
        let mut sums32 = [[_mm256_setzero_si256(); 2]; R];
        let steps = 64 / B::GROUPS;
        let fit = if B::FIT < steps { B::FIT } else { steps };
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

/// 32 weights of one row.
#[derive(Copy, Clone)]
#[repr(C, align(32))]
pub struct SmallBlock {
    q: [i8; 32],
    d: f32,
}

/// Products with blocks of `Q8_0`: magnitudes times signed activations, so that the bytes may be signed.
pub struct SmallProducts;

// SAFETY: as for `SuperProducts`.
unsafe impl Products for SmallProducts {
    type V = __m256;
    type Row = SmallRow;
    type Tile = SmallTile;
    type Block = SmallBlock;
    type Sum = __m256;
    const ROW: usize = 32;
    const STEP: usize = 32;
    const BLOCK: usize = 32;
    const ROWS: usize = 2;
    const TILES: usize = 1;

    #[inline(always)]
    unsafe fn nothing() -> Self::Sum {
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add<const T: usize>(weights: Weights<'_>, step: usize, x: [&[SmallRow]; T], sums: &mut [Self::Sum; T]) {
        unsafe {
            let block = block::<blocks::Q8_0>(weights.bytes, step);
            prefetch(block);
            let w = _mm256_loadu_si256(block.qs.as_ptr().cast());
            let (magnitude, d) = (_mm256_abs_epi8(w), f32_of(block.d));
            for t in 0..T {
                let x = x[t].get_unchecked(step);
                let signed = _mm256_sign_epi8(_mm256_loadu_si256(x.q.as_ptr().cast()), w);
                // 2 * 128 * 127 fits into 16 bits.
                let sum32 = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed), _mm256_set1_epi16(1));
                sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(d * x.d), _mm256_cvtepi32_ps(sum32), sums[t]);
            }
        }
    }

    #[inline(always)]
    unsafe fn total(sum: Self::Sum) -> f32 {
        unsafe { sum.sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut SmallBlock, stride: usize) {
        unsafe {
            for (i, block) in blocks::<blocks::Q8_0>(weights.bytes).iter().enumerate() {
                prefetch(block);
                *to.add(i * stride) = SmallBlock { q: block.qs, d: f32_of(block.d) };
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const SmallBlock, x: [&SmallTile; T], out: *mut f32, stride: usize) {
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
