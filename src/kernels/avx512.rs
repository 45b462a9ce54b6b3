//! AVX-512 with VNNI: 8-bit products for quantized weights, f32 for the others.
//!
//! ```text
//! decode, for each weight row and super-block:
//!     sum32 += scale * (q . x)           over 64 weights at once: vpmaddubsw, then vpdpwssd with the integer scales
//!     out   += dx * (d * sum32 - dmin * (mins . sums of x))
//! prefill, for 32 weight rows unpacked to bytes in cache, each super-block, each 4 rows x 32 tokens:
//!     for each group of a scale:  sum32 = q . x (vpdpbusd);  sum += d * scale * sum32
//!     out += dx * (sum - dmin * (mins . sums of x))
//! ```
//! 1. In decode the lanes are features: a row is read once, in order, straight from the file. Q4_K and Q5_K keep groups
//!    0 and 2 (1 and 3) of a half in one 64-byte load, so activations are permuted to match when they are packed.
//! 2. In prefill the lanes are tokens and weights are broadcast: nothing is transposed but the result.
//! 3. Software prefetch about 2 KB ahead: without it decode reads at two thirds of the bandwidth.

use std::arch::x86_64::*;

use std::marker::PhantomData;

use super::blocks::{self, Block, blocks, scales_and_mins};
use super::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use super::pack::{self, RowBlock, SUPER, SmallRow, SmallTile, TILE, TileBlock};
use super::products::{self, Products};
use super::simd::Simd;
use super::x86::{f32_of, prefetch};
use super::{Format, KvPage, Line, Out, Phase, Query, Tile, Weights, attention, float};

/// AVX-512 F, BW, DQ, VL and VNNI.
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
    SuperProducts,
    SmallProducts,
    pack_row,
    pack::pack_tile::<4>
);

/// One token for decode, groups 1 and 2 of each half swapped where weights come so.
#[inline(always)]
fn pack_row(format: Format, x: &[f32], row: &mut [Line]) {
    pack::pack_row(format, x, row);
    if matches!(format, Format::Q4_K | Format::Q5_K) {
        for block in pack::view_mut::<RowBlock>(row) {
            for half in block.q.as_chunks_mut::<128>().0 {
                let (first, second) = half.split_at_mut(64);
                first[32..].swap_with_slice(&mut second[..32]);
            }
        }
    }
}

/// A super-block of 256 weights, `w = d * scale * q - dmin * min`.
pub struct Super {
    /// Bytes: four times 64 weights, in natural order or that of `Q4_K` (`SPLIT`).
    q: [__m512i; 4],
    /// Of each group, i16.
    scales: __m256i,
    mins: __m256i,
    d: f32,
    dmin: f32,
}

pub trait SuperBlock: Block {
    const GROUPS: usize;
    /// Whether the quants come as groups (0, 2), (1, 3), (4, 6), (5, 7).
    const SPLIT: bool;

    unsafe fn unpack(&self) -> Super;
}

#[inline(always)]
unsafe fn bytes_to_i16(bytes: u64) -> __m256i {
    unsafe { _mm256_zextsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(bytes as i64))) }
}

/// Of Q4_K and Q5_K.
#[inline(always)]
unsafe fn with_scales(q: [__m512i; 4], packed: &[u8; 12], d: blocks::Half, dmin: blocks::Half) -> Super {
    unsafe {
        let (scales, mins) = scales_and_mins(packed);
        Super { q, scales: bytes_to_i16(scales), mins: bytes_to_i16(mins), d: f32_of(d), dmin: f32_of(dmin) }
    }
}

impl SuperBlock for blocks::Q4_K {
    const GROUPS: usize = 8;
    const SPLIT: bool = true;

    #[inline(always)]
    unsafe fn unpack(&self) -> Super {
        unsafe {
            let low = _mm512_set1_epi8(15);
            let a = _mm512_loadu_si512(self.qs.as_ptr().cast());
            let b = _mm512_loadu_si512(self.qs.as_ptr().add(64).cast());
            let q = [
                _mm512_and_si512(a, low),
                _mm512_and_si512(_mm512_srli_epi16(a, 4), low),
                _mm512_and_si512(b, low),
                _mm512_and_si512(_mm512_srli_epi16(b, 4), low),
            ];
            with_scales(q, &self.scales, self.d, self.dmin)
        }
    }
}

/// The low nibbles of `q`, and those bits of `high` that come to lie in `mask` when it is turned left by `turns.0` bits
/// in the lower half, by `turns.1` in the upper.
#[inline(always)]
unsafe fn with_high_bits(q: __m512i, high: __m512i, turns: (i32, i32), mask: __m512i) -> __m512i {
    unsafe {
        let turns = _mm512_inserti64x4(_mm512_set1_epi32(turns.0), _mm256_set1_epi32(turns.1), 1);
        let low = _mm512_and_si512(q, _mm512_set1_epi8(15));
        const A_OR_B_AND_C: i32 = 0xf8;
        _mm512_ternarylogic_epi32(low, _mm512_rolv_epi32(high, turns), mask, A_OR_B_AND_C)
    }
}

impl SuperBlock for blocks::Q5_K {
    const GROUPS: usize = 8;
    const SPLIT: bool = true;

    #[inline(always)]
    unsafe fn unpack(&self) -> Super {
        unsafe {
            let a = _mm512_loadu_si512(self.qs.as_ptr().cast());
            let b = _mm512_loadu_si512(self.qs.as_ptr().add(64).cast());
            // Bit j of every byte belongs to group j: turning by 4 - j puts it where the fifth bit goes.
            let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(self.qh.as_ptr().cast()));
            let fifth = _mm512_set1_epi8(16);
            let q = [
                with_high_bits(a, high, (4, 2), fifth),
                with_high_bits(_mm512_srli_epi16(a, 4), high, (3, 1), fifth),
                with_high_bits(b, high, (0, 30), fifth),
                with_high_bits(_mm512_srli_epi16(b, 4), high, (31, 29), fifth),
            ];
            with_scales(q, &self.scales, self.d, self.dmin)
        }
    }
}

impl SuperBlock for blocks::Q6_K {
    const GROUPS: usize = 16;
    const SPLIT: bool = false;

    #[inline(always)]
    unsafe fn unpack(&self) -> Super {
        unsafe {
            let mut q = [_mm512_setzero_si512(); 4];
            for half in 0..2 {
                let low = _mm512_loadu_si512(self.ql.as_ptr().add(64 * half).cast());
                // Two bits of every byte belong to each of the half's four groups of 32.
                let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(self.qh.as_ptr().add(32 * half).cast()));
                let mask = _mm512_set1_epi8(48);
                q[2 * half] = with_high_bits(low, high, (4, 2), mask);
                q[2 * half + 1] = with_high_bits(_mm512_srli_epi16(low, 4), high, (0, 30), mask);
            }
            let scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(self.scales.as_ptr().cast()));
            let d = f32_of(self.d);
            // w = d * scale * (q - 32)
            Super { q, scales, mins: _mm256_slli_epi16(scales, 5), d, dmin: d }
        }
    }
}

/// The scales of 64 weights, spread over the i16 lanes of vector `i` of a super-block.
#[inline(always)]
unsafe fn spread_scales<B: SuperBlock>(scales: __m256i, i: usize) -> __m512i {
    unsafe {
        let index = if B::SPLIT {
            let first = (i / 2 * 4 + i % 2) as i16; // groups 0 and 2, 1 and 3, 4 and 6, 5 and 7
            _mm512_inserti64x4(_mm512_set1_epi16(first), _mm256_set1_epi16(first + 2), 1)
        } else {
            let (a, b, c, d) = (0, 0x0001_0001_0001_0001, 0x0002_0002_0002_0002, 0x0003_0003_0003_0003);
            _mm512_add_epi16(_mm512_set_epi64(d, d, c, c, b, b, a, a), _mm512_set1_epi16(4 * i as i16))
        };
        _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(scales))
    }
}

/// 256 unpacked weights of one row.
#[derive(Copy, Clone)]
#[repr(C, align(64))]
pub struct PanelBlock {
    q: [u8; SUPER],
    /// `d * scale` of each group.
    scales: [f32; 16],
    mins: [i16; 16],
    dmin: f32,
}

/// Products with super-blocks of `B`.
pub struct SuperProducts<B>(PhantomData<B>);

// SAFETY: pointers stay inside blocks, and in `multiply` where the trait says.
unsafe impl<B: SuperBlock> Products for SuperProducts<B> {
    type V = __m512;
    type Row = RowBlock;
    type Tile = TileBlock;
    type Block = PanelBlock;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 4;
    const TILES: usize = 3;

    #[inline(always)]
    unsafe fn dot<const T: usize>(weights: Weights<'_>, x: [&[RowBlock]; T]) -> [f32; T] {
        unsafe {
            let row = blocks::<B>(weights.bytes);
            assert!(x.iter().all(|x| x.len() >= row.len()));
            let mut sums = [_mm512_setzero_ps(); T];
            let mut min_sums = [_mm256_setzero_ps(); T];
            for (i, block) in row.iter().enumerate() {
                prefetch(block);
                let w = block.unpack();
                let mut scales = [_mm512_setzero_si512(); 4];
                for j in 0..4 {
                    scales[j] = spread_scales::<B>(w.scales, j);
                }
                for t in 0..T {
                    let x = x[t].get_unchecked(i);
                    let mut sum32 = [_mm512_setzero_si512(); 2];
                    for j in 0..4 {
                        let pairs = _mm512_maddubs_epi16(w.q[j], _mm512_load_si512(x.q.as_ptr().add(64 * j).cast()));
                        sum32[j % 2] = _mm512_dpwssd_epi32(sum32[j % 2], pairs, scales[j]);
                    }
                    let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sum32[0], sum32[1]));
                    sums[t] = _mm512_fmadd_ps(_mm512_set1_ps(w.d * x.d), sum, sums[t]);
                    let mins = _mm256_madd_epi16(w.mins, _mm256_load_si256(x.sums.as_ptr().cast()));
                    let dmin = _mm256_set1_ps(w.dmin * x.d);
                    min_sums[t] = _mm256_fmadd_ps(dmin, _mm256_cvtepi32_ps(mins), min_sums[t]);
                }
            }
            let mut out = [0f32; T];
            for t in 0..T {
                out[t] = _mm512_sub_ps(sums[t], _mm512_zextps256_ps512(min_sums[t])).sum();
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut PanelBlock, stride: usize) {
        unsafe {
            for (i, block) in blocks::<B>(weights.bytes).iter().enumerate() {
                prefetch(block);
                let (w, to) = (block.unpack(), to.add(i * stride));
                let q = (&raw mut (*to).q).cast::<u8>();
                if B::SPLIT {
                    for (i, half) in [(0, 0), (2, 128)] {
                        let (a, b) = (w.q[i], w.q[i + 1]);
                        // (0, 2), (1, 3) -> (0, 1), (2, 3)
                        _mm512_store_si512(q.add(half).cast(), _mm512_shuffle_i64x2(a, b, 0b01_00_01_00));
                        _mm512_store_si512(q.add(half + 64).cast(), _mm512_shuffle_i64x2(a, b, 0b11_10_11_10));
                    }
                } else {
                    for i in 0..4 {
                        _mm512_store_si512(q.add(64 * i).cast(), w.q[i]);
                    }
                }
                let scales = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(w.scales));
                _mm512_store_ps((&raw mut (*to).scales).cast(), _mm512_mul_ps(scales, _mm512_set1_ps(w.d)));
                _mm256_store_si256((&raw mut (*to).mins).cast(), w.mins);
                (*to).dmin = w.dmin;
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const PanelBlock, x: [&TileBlock; T], out: *mut f32, stride: usize) {
        const R: usize = 4;
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            for group in 0..B::GROUPS {
                let mut sums32 = [[_mm512_setzero_si512(); T]; R];
                let steps = 64 / B::GROUPS;
                for step in group * steps..(group + 1) * steps {
                    let mut tokens = [_mm512_setzero_si512(); T];
                    for t in 0..T {
                        tokens[t] = _mm512_load_si512(x[t].q.as_ptr().add(step).cast());
                    }
                    for r in 0..R {
                        let w = _mm512_set1_epi32((&raw const (*rows.add(r)).q).cast::<i32>().add(step).read());
                        for t in 0..T {
                            sums32[r][t] = _mm512_dpbusd_epi32(sums32[r][t], w, tokens[t]);
                        }
                    }
                }
                for r in 0..R {
                    let scale = _mm512_set1_ps((*rows.add(r)).scales[group]);
                    for t in 0..T {
                        sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums32[r][t]), scale, sums[r][t]);
                    }
                }
            }
            for r in 0..R {
                let dmin = _mm512_set1_ps((*rows.add(r)).dmin);
                for t in 0..T {
                    let mut mins = _mm512_setzero_si512();
                    for pair in 0..B::GROUPS / 2 {
                        let w = _mm512_set1_epi32((&raw const (*rows.add(r)).mins).cast::<i32>().add(pair).read());
                        mins = _mm512_dpwssd_epi32(mins, w, _mm512_load_si512(x[t].sums.as_ptr().add(pair).cast()));
                    }
                    let sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins), dmin, sums[r][t]);
                    let out = out.add(t * stride + r * TILE);
                    let total = _mm512_fmadd_ps(sum, _mm512_load_ps(x[t].d.as_ptr()), _mm512_load_ps(out));
                    _mm512_store_ps(out, total);
                }
            }
        }
    }
}

/// 32 unpacked weights of one row, 128 added to each.
#[derive(Copy, Clone)]
#[repr(C, align(32))]
pub struct SmallBlock {
    q: [u8; 32],
    d: f32,
}

/// Products with blocks of `Q8_0`.
pub struct SmallProducts;

// SAFETY: as for `SuperProducts`.
unsafe impl Products for SmallProducts {
    type V = __m512;
    type Row = SmallRow;
    type Tile = SmallTile;
    type Block = SmallBlock;
    const BLOCK: usize = 32;
    const ROWS: usize = 4;
    const TILES: usize = 3;

    #[inline(always)]
    unsafe fn dot<const T: usize>(weights: Weights<'_>, x: [&[SmallRow]; T]) -> [f32; T] {
        unsafe {
            let row = blocks::<blocks::Q8_0>(weights.bytes);
            assert!(x.iter().all(|x| x.len() >= row.len()));
            let mut sums = [_mm256_setzero_ps(); T];
            for (i, block) in row.iter().enumerate() {
                prefetch(block);
                let w = _mm256_loadu_si256(block.qs.as_ptr().cast());
                let (magnitude, d) = (_mm256_abs_epi8(w), f32_of(block.d));
                for t in 0..T {
                    let x = x[t].get_unchecked(i);
                    let signed = _mm256_sign_epi8(_mm256_loadu_si256(x.q.as_ptr().cast()), w);
                    let sum32 = _mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, signed);
                    sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(d * x.d), _mm256_cvtepi32_ps(sum32), sums[t]);
                }
            }
            let mut out = [0f32; T];
            for t in 0..T {
                out[t] = _mm512_zextps256_ps512(sums[t]).sum();
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut SmallBlock, stride: usize) {
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
    unsafe fn multiply<const T: usize>(rows: *const SmallBlock, x: [&SmallTile; T], out: *mut f32, stride: usize) {
        const R: usize = 4;
        unsafe {
            let mut sums32 = [[_mm512_setzero_si512(); T]; R];
            for t in 0..T {
                // (w + 128) . x - 128 * (the sum of x)
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
