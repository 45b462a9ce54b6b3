//! The f32 computations of the fast kernels, written once over [`Simd`]: products with float weights and with formats that
//! have no integer products, norms, activations.
//!
//! Decisions: docs/design/kernels.md

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use super::pack::{FLOATS, FloatTile, SUPER, TILE};
use super::products::Products;
use super::simd::{self, Simd};
use super::{Weights, dequantize};

/// Products in f32 of weights that are stored as `S`.
pub struct Float<V, S>(PhantomData<(V, S)>);

/// A storage type of weights.
///
/// # Safety
/// For the caller of `load`: the instruction set is there, see [`Simd`], and `LANES` weights of `BYTES` bytes can be read.
pub unsafe trait Stored {
    /// Bytes of a weight; None for types that are dequantized.
    const BYTES: Option<usize>;

    unsafe fn load<V: Simd>(from: *const u8) -> V;
}

pub struct StoredF32;
pub struct StoredF16;
pub struct StoredBf16;
pub struct StoredBlocks;

// SAFETY: it reads `LANES` weights of `BYTES` bytes.
unsafe impl Stored for StoredF32 {
    const BYTES: Option<usize> = Some(4);

    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: the contract of this method.
        unsafe { V::load(from.cast()) }
    }
}

// SAFETY: it reads `LANES` weights of `BYTES` bytes.
unsafe impl Stored for StoredF16 {
    const BYTES: Option<usize> = Some(2);

    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: the contract of this method.
        unsafe { V::load_f16(from.cast::<f16>()) }
    }
}

// SAFETY: it reads `LANES` weights of `BYTES` bytes.
unsafe impl Stored for StoredBf16 {
    const BYTES: Option<usize> = Some(2);

    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: the contract of this method.
        unsafe { V::load_bf16(from.cast()) }
    }
}

// SAFETY: it reads nothing. Types without `BYTES` are dequantized and loaded as f32.
unsafe impl Stored for StoredBlocks {
    const BYTES: Option<usize> = None;

    unsafe fn load<V: Simd>(_: *const u8) -> V {
        unreachable!("blocks are dequantized")
    }
}

/// Features of a step, which are dequantized together: whole blocks of every format.
const STEP: usize = SUPER;
/// Independent accumulators of a dot product. With two rows and four tokens they take 16 registers.
const ACCUMULATORS: usize = 2;

/// `R` weight rows with the tokens `first .. first + N` of `T`, over whole vectors.
///
/// # Safety
/// The instruction set is there, see [`Simd`]. The rows and the activations of each token are valid for reading the features,
/// and `first + N` is at most `T`.
#[inline(always)]
unsafe fn multiply_rows<V: Simd, S: Stored, const T: usize, const R: usize, const N: usize>(
    rows: [*const u8; R],
    features: Range<usize>,
    x: [&[f32]; T],
    first: usize,
    sums: &mut [[[V; ACCUMULATORS]; T]; R],
) {
    let bytes = S::BYTES.unwrap_or(4);
    let ahead = if T >= 4 { 4096 } else { 512 * bytes }; // the fastest distances, measured
    let mut accumulators = [[sums[0][first]; N]; R];
    let mut tokens = [x[0].as_ptr(); N];
    for n in 0..N {
        tokens[n] = x[first + n].as_ptr();
        for r in 0..R {
            accumulators[r][n] = sums[r][first + n];
        }
    }
    for chunk in features.step_by(ACCUMULATORS * V::LANES) {
        // SAFETY: the contract of this function.
        unsafe {
            if first == 0 {
                for row in rows {
                    V::prefetch(row.wrapping_add(chunk * bytes + ahead));
                }
            }
            for c in 0..ACCUMULATORS {
                let i = chunk + c * V::LANES;
                let mut w = [V::splat(0.0); R];
                for r in 0..R {
                    w[r] = S::load::<V>(rows[r].add(i * bytes));
                }
                for n in 0..N {
                    let x = V::load(tokens[n].add(i));
                    for r in 0..R {
                        accumulators[r][n][c] = w[r].mul_add(x, accumulators[r][n][c]);
                    }
                }
            }
        }
    }
    for n in 0..N {
        for r in 0..R {
            sums[r][first + n] = accumulators[r][n];
        }
    }
}

// SAFETY: the methods access their slices, and what their contracts name.
unsafe impl<V: Simd, S: Stored> Products for Float<V, S> {
    type V = V;
    type Row = f32;
    type Tile = FloatTile;
    type Block = [f32; FLOATS];
    type Sum = [V; ACCUMULATORS];
    const ROW: usize = 1;
    const STEP: usize = STEP;
    /// More are faster with 16 registers and halves alone.
    const TOKENS: usize = if V::REGISTERS == 16 && matches!(S::BYTES, Some(2)) { 8 } else { 4 };
    const BLOCK: usize = FLOATS;
    const ROWS: usize = 4;
    const TILES: usize = 1;

    #[inline(always)]
    fn segment(tokens: usize) -> usize {
        match tokens {
            1..=4 => 3072,
            _ => 1024,
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        // SAFETY: the instruction set is there.
        unsafe { [V::splat(0.0); ACCUMULATORS] }
    }

    /// Dequantizes first. The last step may be shorter than `STEP`.
    #[inline(always)]
    unsafe fn accumulate<const T: usize>(weights: Weights<'_>, step: usize, x: [&[f32]; T], sums: &mut [Self::Sum; T]) {
        let start = step * STEP;
        let count = STEP.min(weights.cols - start);
        let (mut w, mut x_end) = ([0f32; STEP], [0f32; STEP]);
        dequantize(weights.part(start..start + count), &mut w[..count]);
        for t in 0..T {
            let mut x = &x[t][start..start + count];
            if count < STEP {
                x_end[..count].copy_from_slice(x);
                x = &x_end;
            }
            for i in (0..count).step_by(V::LANES) {
                let sum = &mut sums[t][i / V::LANES % ACCUMULATORS];
                // SAFETY: the instruction set is there; `w` and `x` have STEP elements, which are whole vectors.
                *sum = unsafe { V::load(w.as_ptr().add(i)).mul_add(V::load(x.as_ptr().add(i)), *sum) };
            }
        }
    }

    /// Both rows at once: they share the loads of activations.
    #[inline(always)]
    unsafe fn accumulate_pair<const T: usize>(
        rows: [Weights<'_>; 2],
        steps: Range<usize>,
        x: [&[f32]; T],
        sums: &mut [[Self::Sum; T]; 2],
    ) {
        let mut done = steps.start;
        if S::BYTES.is_some() {
            done = steps.end.min(rows[0].cols / STEP);
            let features = steps.start * STEP..done * STEP;
            let bytes = rows.map(|row| row.bytes.as_ptr());
            // Four tokens and two rows have 16 accumulators. With as many registers they spill; F32, whose weights are read
            // at half the speed, is slower with one row.
            let mut first = 0;
            while first < T {
                let count = (T - first).div_ceil((T - first).div_ceil(4));
                // SAFETY: the contract of this method; these are whole steps of the rows and of `x`.
                unsafe {
                    macro_rules! tokens {
                        ($N:literal) => {
                            if V::REGISTERS > 16 || $N < 4 || S::BYTES == Some(4) {
                                multiply_rows::<V, S, T, 2, $N>(bytes, features.clone(), x, first, sums)
                            } else {
                                for (row, sums) in bytes.into_iter().zip(sums.iter_mut()) {
                                    let sums = std::array::from_mut(sums);
                                    multiply_rows::<V, S, T, 1, $N>([row], features.clone(), x, first, sums);
                                }
                            }
                        };
                    }
                    match count {
                        1 => tokens!(1),
                        2 => tokens!(2),
                        3 => tokens!(3),
                        _ => tokens!(4),
                    }
                }
                first += count;
            }
        }
        for step in done..steps.end {
            for side in 0..2 {
                // SAFETY: the contract of this method.
                unsafe { Self::accumulate(rows[side], step, x, &mut sums[side]) };
            }
        }
    }

    #[inline(always)]
    unsafe fn reduce([a, b]: Self::Sum) -> f32 {
        // SAFETY: the instruction set is there.
        unsafe { a.add(b).reduce_sum() }
    }

    #[inline(always)]
    unsafe fn unpack(weights: Weights<'_>, to: *mut Self::Block, stride: usize) {
        let mut whole = 0;
        if let Some(bytes) = S::BYTES {
            whole = weights.cols - weights.cols % FLOATS;
            for i in (0..whole).step_by(V::LANES) {
                // SAFETY: a vector of the row, and one of block `i / FLOATS`, for which the caller has room.
                unsafe {
                    let to = to.add(i / FLOATS * stride).cast::<f32>().add(i % FLOATS);
                    S::load::<V>(weights.bytes.as_ptr().add(i * bytes)).store(to);
                }
            }
        }
        let mut buffer = [0f32; STEP];
        for start in (whole..weights.cols).step_by(STEP) {
            let count = STEP.min(weights.cols - start);
            dequantize(weights.part(start..start + count), &mut buffer[..count]);
            buffer[count..].fill(0.0);
            for (i, block) in buffer[..count.next_multiple_of(FLOATS)].as_chunks::<FLOATS>().0.iter().enumerate() {
                // SAFETY: the caller has room for block `start / FLOATS + i` of the row.
                unsafe { *to.add((start / FLOATS + i) * stride) = *block };
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(rows: *const Self::Block, x: [&FloatTile; T], out: *mut f32, stride: usize) {
        // SAFETY: the contract of this method; the 16 tokens of a tile are 16 / LANES vectors.
        unsafe {
            for t in 0..T {
                let vectors = TILE / V::LANES;
                // A tile takes `vectors` of the 4.
                let mut sums = [[V::splat(0.0); 4]; 4];
                for (k, x) in x[t].x.iter().enumerate() {
                    for r in 0..Self::ROWS {
                        let w = V::splat((*rows.add(r))[k]);
                        for v in 0..vectors {
                            sums[r][v] = w.mul_add(V::load(x.as_ptr().add(v * V::LANES)), sums[r][v]);
                        }
                    }
                }
                for r in 0..Self::ROWS {
                    for v in 0..vectors {
                        let out = out.add(t * stride + r * TILE + v * V::LANES);
                        V::load(out).add(sums[r][v]).store(out);
                    }
                }
            }
        }
    }
}

/// `out = weight * x / sqrt(mean(x^2) + eps)`
///
/// # Safety
/// The instruction set is there, see [`Simd`], and the slices are equally long.
#[inline(always)]
pub unsafe fn rms_norm<V: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: the contract of this function; loads and stores end at `whole`.
    unsafe {
        const SUMS: usize = 4;
        let chunk = SUMS * V::LANES;
        let (chunks, whole) = (x.len() - x.len() % chunk, x.len() - x.len() % V::LANES);
        // Independent accumulators: shorter sums are rounded less, and do not wait for each other.
        let mut squares = [V::splat(0.0); SUMS];
        for i in (0..chunks).step_by(chunk) {
            for (vector, squares) in squares.iter_mut().enumerate() {
                let x = V::load(x.as_ptr().add(i + vector * V::LANES));
                *squares = x.mul_add(x, *squares);
            }
        }
        for i in (chunks..whole).step_by(V::LANES) {
            let x = V::load(x.as_ptr().add(i));
            squares[0] = x.mul_add(x, squares[0]);
        }
        let [a, b, c, d] = squares;
        let squares = a.add(b).add(c.add(d)).reduce_sum() + x[whole..].iter().map(|x| x * x).sum::<f32>();
        let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
        for i in (0..whole).step_by(V::LANES) {
            let x = V::load(x.as_ptr().add(i)).mul(V::splat(scale));
            x.mul(V::load(weight.as_ptr().add(i))).store(out.as_mut_ptr().add(i));
        }
        for i in whole..x.len() {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

/// `out = silu(gate) * up`
///
/// # Safety
/// The instruction set is there, see [`Simd`], and the slices are equally long.
#[inline(always)]
pub unsafe fn swiglu<V: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: the contract of this function; loads and stores end at `whole`, or in buffers as long as any vector.
    unsafe {
        let whole = gate.len() - gate.len() % V::LANES;
        for i in (0..whole).step_by(V::LANES) {
            swiglu_vector::<V>(gate.as_ptr().add(i), up.as_ptr().add(i), out.as_mut_ptr().add(i));
        }
        let rest = gate.len() - whole;
        if rest > 0 {
            let (mut g, mut u, mut o) = ([0f32; 16], [0f32; 16], [0f32; 16]);
            g[..rest].copy_from_slice(&gate[whole..]);
            u[..rest].copy_from_slice(&up[whole..]);
            swiglu_vector::<V>(g.as_ptr(), u.as_ptr(), o.as_mut_ptr());
            out[whole..].copy_from_slice(&o[..rest]);
        }
    }
}

/// # Safety
/// The contract of [`Simd`] for each pointer.
#[inline(always)]
unsafe fn swiglu_vector<V: Simd>(gate: *const f32, up: *const f32, out: *mut f32) {
    // SAFETY: the contract of this function.
    unsafe {
        let gate = V::load(gate);
        let silu = gate.div(V::splat(1.0).add(simd::exp(V::splat(0.0).sub(gate))));
        silu.mul(V::load(up)).store(out);
    }
}
