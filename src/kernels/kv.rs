//! Pages of the KV cache as kernels see them: what one head holds of 128 consecutive positions.
//!
//! Keys lie (head_dim, PAGE), so that a vector of keys meets one feature of a query; values lie (PAGE, head_dim). As 8 bits
//! (`Q8`), every 32 features of a position share an f16 scale, as in ggml's Q8_0.
//!
//! Decisions: docs/design/kv.md

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Positions in a page. Also the blocks in which attention walks the context: pages start at multiples of it, so that
/// sums are split at the same places however the prompt was chunked.
pub const PAGE: usize = 128;
/// Features of a position that share a scale.
pub const SHARED: usize = 32;

/// The keys and values of one KV head at the absolute positions `start .. start + PAGE`.
#[derive(Copy, Clone)]
pub struct KvPage<'a> {
    pub start: usize,
    /// (head_dim, PAGE)
    pub k: KvSlice<'a>,
    /// (PAGE, head_dim)
    pub v: KvSlice<'a>,
}

#[derive(Copy, Clone)]
pub enum KvSlice<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
    /// Scales: (head_dim / 32, PAGE) of keys, (PAGE, head_dim / 32) of values; rounded up.
    Q8 {
        q: &'a [i8],
        scales: &'a [f16],
    },
}

/// As `KvSlice`, to be written.
pub enum KvSliceMut<'a> {
    F16(&'a mut [f16]),
    F32(&'a mut [f32]),
    Q8 { q: &'a mut [i8], scales: &'a mut [f16] },
}

impl KvSlice<'_> {
    /// Keys as f32, (head_dim, PAGE).
    pub fn widen_keys(self, out: &mut [f32], head_dim: usize) {
        match self {
            KvSlice::F16(k) => k.convert_to_f32_slice(&mut out[..k.len()]),
            KvSlice::F32(k) => out[..k.len()].copy_from_slice(k),
            KvSlice::Q8 { q, scales } => {
                let mut widened = [0f32; PAGE];
                for d in 0..head_dim {
                    scales[d / SHARED * PAGE..][..PAGE].convert_to_f32_slice(&mut widened);
                    let (q, out) = (&q[d * PAGE..][..PAGE], &mut out[d * PAGE..][..PAGE]);
                    for ((out, q), scale) in out.iter_mut().zip(q).zip(&widened) {
                        *out = *q as f32 * scale;
                    }
                }
            }
        }
    }

    /// Values as f32, (PAGE, head_dim).
    pub fn widen_values(self, out: &mut [f32], head_dim: usize) {
        match self {
            KvSlice::F16(v) => v.convert_to_f32_slice(&mut out[..v.len()]),
            KvSlice::F32(v) => out[..v.len()].copy_from_slice(v),
            KvSlice::Q8 { q, scales } => {
                let shares = head_dim.div_ceil(SHARED);
                for (position, (out, q)) in out.chunks_exact_mut(head_dim).zip(q.chunks_exact(head_dim)).enumerate() {
                    let scales = &scales[position * shares..];
                    for ((out, q), scale) in out.chunks_mut(SHARED).zip(q.chunks(SHARED)).zip(scales) {
                        let scale = scale.to_f32();
                        for (out, q) in out.iter_mut().zip(q) {
                            *out = *q as f32 * scale;
                        }
                    }
                }
            }
        }
    }
}

impl KvSliceMut<'_> {
    /// Write the keys (head_dim) of the position `at` of the page.
    pub fn store_key(&mut self, at: usize, key: &[f32]) {
        match self {
            KvSliceMut::F16(k) => {
                for (k, x) in k.iter_mut().skip(at).step_by(PAGE).zip(key) {
                    *k = f16::from_f32(*x);
                }
            }
            KvSliceMut::F32(k) => {
                for (k, x) in k.iter_mut().skip(at).step_by(PAGE).zip(key) {
                    *k = *x;
                }
            }
            KvSliceMut::Q8 { q, scales } => {
                for (share, x) in key.chunks(SHARED).enumerate() {
                    let scale = scale_of(x);
                    scales[share * PAGE + at] = scale;
                    let q = q[share * SHARED * PAGE..].iter_mut().skip(at).step_by(PAGE);
                    q.zip(x).for_each(|(q, x)| *q = quantized(*x, scale));
                }
            }
        }
    }

    /// Write the values (head_dim) of the position `at` of the page.
    pub fn store_value(&mut self, at: usize, value: &[f32]) {
        let head_dim = value.len();
        match self {
            KvSliceMut::F16(v) => v[at * head_dim..][..head_dim].convert_from_f32_slice(value),
            KvSliceMut::F32(v) => v[at * head_dim..][..head_dim].copy_from_slice(value),
            KvSliceMut::Q8 { q, scales } => {
                let scales = &mut scales[at * head_dim.div_ceil(SHARED)..];
                let q = &mut q[at * head_dim..][..head_dim];
                for ((q, x), to) in q.chunks_mut(SHARED).zip(value.chunks(SHARED)).zip(scales) {
                    *to = scale_of(x);
                    q.iter_mut().zip(x).for_each(|(q, x)| *q = quantized(*x, *to));
                }
            }
        }
    }
}

/// Not a number, or infinite, where one of them is: so that it does not vanish.
fn scale_of(x: &[f32]) -> f16 {
    // As integers, magnitudes compare as they do as numbers, and a NaN is the greatest.
    let greatest = f32::from_bits(x.iter().fold(0, |greatest, x| greatest.max(x.abs().to_bits())));
    f16::from_f32(greatest / 127.0)
}

/// Against the scale as it is stored, so that its rounding is made up for.
fn quantized(x: f32, scale: f16) -> i8 {
    let scale = scale.to_f32();
    if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 }
}
