//! Pages of the KV cache as kernels see them: one head at 128 consecutive positions.
//!
//! Keys are (head_dim, PAGE): a vector of keys is multiplied with one feature of a query. Values are (PAGE, head_dim). In
//! 8-bit pages (`Q8`), each 32 features of a position share an f16 scale, as in ggml's Q8_0.
//!
//! Decisions: docs/design/kv.md

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Positions of a page. Attention accumulates page by page, and pages start at multiples of it: sums are split at the same
/// positions for any chunks of the prompt.
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

/// A [`KvSlice`] to write to.
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
    fn check(&self, at: usize, x: &[f32]) {
        assert!(at < PAGE, "position {at} of a page of {PAGE}");
        let (len, scales) = match self {
            KvSliceMut::F16(x) => (x.len(), None),
            KvSliceMut::F32(x) => (x.len(), None),
            KvSliceMut::Q8 { q, scales } => (q.len(), Some(scales.len())),
        };
        assert!(len == PAGE * x.len(), "{} features for a page of {len}", x.len());
        let shares = PAGE * x.len().div_ceil(SHARED);
        assert!(scales.is_none_or(|scales| scales == shares), "{scales:?} scales for a page that takes {shares}");
    }

    /// Writes the key (head_dim) of position `at` of the page. Panics if there is no such position, or if the page has another
    /// head_dim.
    pub fn store_key(&mut self, at: usize, key: &[f32]) {
        self.check(at, key);
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

    /// Writes the value (head_dim) of position `at` of the page. Panics as `store_key` does.
    pub fn store_value(&mut self, at: usize, value: &[f32]) {
        self.check(at, value);
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

/// NaN or infinite if an element is, so that it shows in the result.
fn scale_of(x: &[f32]) -> f16 {
    // The bits of magnitudes, as integers, are ordered as the magnitudes are; NaN is above all of them.
    let max = f32::from_bits(x.iter().fold(0, |max, x| max.max(x.abs().to_bits())));
    f16::from_f32(max / 127.0)
}

/// By the scale as stored, which makes up for its rounding.
fn quantized(x: f32, scale: f16) -> i8 {
    let scale = scale.to_f32();
    if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 }
}
