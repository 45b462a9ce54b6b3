//! AVX2 with FMA and F16C, and AVX-VNNI where the CPU has it: 8-bit products for quantized weights, f32 for the others.
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
//! 2. With AVX-VNNI `bytes` multiplies the bytes of Q4_K and Q8_0: the same integers, and so the same bits.
//! 3. 16 bits hold the sum of eight products of 4-bit weights (8 * 2 * 15 * 127 = 30480), of four of 5-bit weights, of two
//!    of 6-bit weights.
//!
//! Decisions: docs/design/kernels.md

mod bytes;
mod q8;
mod super_block;

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::interleave::{self, InterleavedRow};
use super::{prefetch, prefetch_ahead};
use crate::compute::kernels::blocks::{self, block, blocks};
use crate::compute::kernels::float::{Float, StoredBf16, StoredBlocks, StoredF16, StoredF32};
use crate::compute::kernels::pack::{self, SUPER, TILE, TileBlock, plain};
use crate::compute::kernels::products::{self, Products, for_each_token};
use crate::compute::kernels::simd::Simd;
use crate::compute::kernels::{
    Format, Kernel, KvPage, Line, Out, Phase, Query, Tile, Weights, attention, float, shapes,
};
use bytes::Bytes;
use q8::Q8Products;
use super_block::{SuperBlock, interleave_quants, interleave_scales};

/// The kernel with AVX2, FMA and F16C. A value exists only on a CPU that has them.
#[derive(Copy, Clone)]
pub struct Avx2(());

/// The kernel with AVX-VNNI, too: Intel from Alder Lake on, AMD from Zen 5 on. A value exists only on a CPU that has it.
#[derive(Copy, Clone)]
pub struct AvxVnni(());

impl Avx2 {
    pub fn new() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }
}

impl AvxVnni {
    pub fn new() -> Option<Self> {
        (Avx2::new().is_some() && is_x86_feature_detected!("avxvnni")).then_some(AvxVnni(()))
    }
}

/// The kernel `avx2` in its fastest form for this CPU.
pub fn avx2() -> Option<Box<dyn Kernel>> {
    if let Some(kernel) = AvxVnni::new() { Some(Box::new(kernel)) } else { Some(Box::new(Avx2::new()?)) }
}

type BaseKQuant<B> = KQuantProducts<Avx2, B>;
type BaseQ8 = Q8Products<Avx2>;
type VnniKQuant<B> = KQuantProducts<AvxVnni, B>;
type VnniQ8 = Q8Products<AvxVnni>;

kernel!(Avx2, "avx2", "avx2,fma,f16c", __m256, BaseKQuant, BaseQ8, interleave::pack_row, pack::pack_tile::<4>, &COSTS);
kernel!(
    AvxVnni,
    "avx2",
    "avx2,fma,f16c,avxvnni",
    __m256,
    VnniKQuant,
    VnniQ8,
    interleave::pack_row,
    pack::pack_tile::<4>,
    &VNNI_COSTS
);

/// One token takes 43 ms for the weights of Phi-3-mini in Q4_K_M. Measured without AVX-VNNI on 30 November 2026, on 2 cores
/// of an AMD EPYC (Zen 5).
const COSTS: [f32; 16] = [1.0, 1.38, 1.78, 2.0, 2.33, 2.61, 2.99, 3.23, 4.17, 4.44, 4.77, 4.99, 5.4, 5.68, 5.98, 6.25];
/// As `COSTS`, with AVX-VNNI.
const VNNI_COSTS: [f32; 16] =
    [1.0, 1.34, 1.62, 1.79, 2.11, 2.51, 2.82, 3.1, 3.74, 4.03, 4.42, 4.77, 5.05, 5.45, 5.73, 6.02];

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

/// Vectors of products whose sum 16 bits hold, at most `most`.
#[inline(always)]
const fn fit<D: Bytes, B: SuperBlock>(most: usize) -> usize {
    let fit = 2 * B::I16_PAIRS / D::PRODUCTS;
    if fit < most { fit } else { most }
}

/// Tokens from which on decode fetches weights further ahead.
const MANY: usize = 4;

/// Products with super-blocks of `B`; `D` multiplies the bytes.
pub struct KQuantProducts<D, B>(PhantomData<(D, B)>);

// SAFETY: the methods access the blocks of their arguments, and what their contracts name.
unsafe impl<D: Bytes, B: SuperBlock> Products for KQuantProducts<D, B> {
    type V = __m256;
    type Row = InterleavedRow;
    type Tile = TileBlock;
    type Block = PanelBlock;
    type Sum = __m256;
    const ROW: usize = SUPER;
    const STEP: usize = SUPER;
    const BLOCK: usize = SUPER;
    const ROWS: usize = 2;
    const TILES: usize = 1;

    #[inline(always)]
    fn segment(tokens: usize) -> usize {
        match tokens {
            1..=3 => 3072,
            4 => 1024,
            _ => 1536,
        }
    }

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
            if T >= MANY {
                prefetch_ahead::<4096, _MM_HINT_T0, B>(block)
            } else {
                prefetch(block)
            }
            let w = block.scales();
            let [low, high] = interleave_scales::<B>(w.scales);
            let scales = [B::Multiply::<D>::scales(low), B::Multiply::<D>::scales(high)];
            let mins = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(w.mins)));
            let dmin_mins = _mm256_mul_ps(mins, _mm256_set1_ps(w.dmin));
            let fit = fit::<B::Multiply<D>, B>(4);
            let q = [interleave_quants(block, 0), interleave_quants(block, 1)];
            // Registers are for the quants: LLVM would keep sums there and spill quants.
            let sums = if T >= 6 { std::hint::black_box(sums) } else { sums };
            for_each_token!(T, t, {
                let x = x[t].get_unchecked(step);
                let mut sum32 = _mm256_setzero_si256();
                for half in 0..2 {
                    for part in 0..4 / fit {
                        let mut sums = _mm256_setzero_si256();
                        for i in part * fit..(part + 1) * fit {
                            let x = _mm256_load_si256(x.q[i].as_ptr().add(32 * half).cast());
                            sums = B::Multiply::<D>::add_products(sums, q[half][i], x);
                        }
                        sum32 = B::Multiply::<D>::add_scaled(sum32, sums, scales[half]);
                    }
                }
                if B::GROUPS == 16 {
                    let mins = _mm256_madd_epi16(w.mins, _mm256_load_si256(x.sums.of_16.as_ptr().cast()));
                    sum32 = _mm256_sub_epi32(sum32, mins);
                }
                let d = _mm256_mul_ps(_mm256_set1_ps(w.d), _mm256_set1_ps(x.d));
                sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum32), d, sums[t]);
                if B::GROUPS == 8 {
                    sums[t] = _mm256_fnmadd_ps(dmin_mins, _mm256_load_ps(x.sums.of_8.as_ptr()), sums[t]);
                }
            });
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
                multiply_tile::<D, B>(rows, x[t], out.add(t * stride));
            }
        }
    }
}

/// 2 rows with a tile, 8 tokens in each register.
///
/// # Safety
/// As for `Products::multiply` with one tile.
#[inline(always)]
unsafe fn multiply_tile<D: Bytes, B: SuperBlock>(rows: *const PanelBlock, x: &TileBlock, out: *mut f32) {
    const R: usize = 2;
    // SAFETY: the contract of this function: R blocks at `rows`, R rows of 16 sums at `out`. The others are the fields of
    // blocks, of which `step` is below 64, `group` below 16 and `pair` below 8.
    unsafe {
        let mut sums32 = [[_mm256_setzero_si256(); 2]; R];
        let steps = 64 / B::GROUPS;
        let fit = fit::<B::Multiply<D>, B>(steps);
        for group in 0..B::GROUPS {
            for part in 0..steps / fit {
                let mut sums = [[_mm256_setzero_si256(); 2]; R];
                for i in 0..fit {
                    let step = group * steps + part * fit + i;
                    for r in 0..R {
                        let w = _mm256_set1_epi32((&raw const (*rows.add(r)).q).cast::<i32>().add(step).read());
                        for v in 0..2 {
                            let x = _mm256_load_si256(x.q.as_ptr().add(step).cast::<__m256i>().add(v));
                            sums[r][v] = B::Multiply::<D>::add_products(sums[r][v], w, x);
                        }
                    }
                }
                for r in 0..R {
                    let scale = _mm256_set1_epi32((&raw const (*rows.add(r)).scales).cast::<i32>().add(group).read());
                    for v in 0..2 {
                        sums32[r][v] =
                            B::Multiply::<D>::add_scaled(sums32[r][v], sums[r][v], B::Multiply::<D>::scales(scale));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::kernels::product::product;
    use crate::compute::kernels::random::{Matrix, Random};

    #[test]
    fn avx_vnni_gives_the_same_bits() {
        let (Some(base), Some(vnni)) = (Avx2::new(), AvxVnni::new()) else { return };
        let mut random = Random::new(1);
        let (cols, rows, tokens) = (512, 37, 21);
        for format in [Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::Q8_0, Format::F16] {
            let matrix = Matrix::random(format, rows, cols, &mut random);
            let x = random.normals(tokens * cols);
            for phase in [Phase::Prefill, Phase::Decode] {
                let bits = |kernel: &dyn Kernel| -> Vec<u32> {
                    product(kernel, &matrix, phase, &x).iter().map(|x| x.to_bits()).collect()
                };
                let base = bits(&base);
                assert!(base.iter().any(|&bits| bits != 0) && base == bits(&vnni), "{format:?} {phase:?}");
            }
        }
    }
}
