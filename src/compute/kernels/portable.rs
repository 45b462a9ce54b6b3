//! Plain Rust: the specification for the tests of every other kernel, and the fallback.
//!
//! ```text
//! for each weight row:  w = dequantize(row)                      (cols)
//!     for each token:   out[token, row] = dot(w, x[token])       16 partial sums, added pairwise
//! attention, for each query and each page of the context, in order:
//!     s = q . k / sqrt(d);  m' = max(m, s);  acc = acc * exp(m - m') + exp(s - m') * v;  the sum likewise
//! ```
//! The bits are the same on every platform: Rust never contracts `a * b + c`, this code determines the order of every sum,
//! and `exp` is that of the `libm` crate. The compiler may vectorize within that order.
//!
//! Decisions: docs/design/kernels.md

use half::slice::HalfFloatSliceExt;

use super::blocks::{self, Format, blocks};
use super::{
    Kernel, KvPage, LINEAR_COSTS, Line, Out, PAGE, Phase, Query, Scratch, Tile, Weights, shapes, view, view_mut,
};

/// Plain Rust.
pub struct Portable;

/// Weight rows that share one pass over the activations: 8 rows of 8192 floats are 256 KB, about a core's L2 cache.
const ROWS: usize = 8;
/// Partial sums of a dot product.
const LANES: usize = 16;

impl Kernel for Portable {
    fn name(&self) -> &'static str {
        "portable"
    }

    fn tile(&self, _: Format, cols: usize, _: Phase) -> Tile {
        Tile { tokens: 1, lines: Line::count(4 * cols) }
    }

    fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]) {
        shapes::pack(self, format, phase, x, at, tile);
        view_mut(tile)[..x.len()].copy_from_slice(x);
    }

    fn decode_costs(&self) -> &'static [f32; 16] {
        &LINEAR_COSTS
    }

    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>) {
        shapes::matmul(self, weights, phase, x, tokens);
        if tokens == 0 {
            return;
        }
        let (rows, cols) = (weights.n_rows(), weights.cols);
        let mut panel = Scratch::take(Line::count(4 * ROWS * cols));
        let panel = view_mut::<f32>(&mut panel);
        for first in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - first);
            for row in 0..count {
                dequantize(weights.row(first + row), &mut panel[row * cols..][..cols]);
            }
            for (token, x) in x.chunks_exact(x.len() / tokens).enumerate() {
                let mut sums = [0f32; ROWS];
                for row in 0..count {
                    sums[row] = dot(&panel[row * cols..][..cols], &view(x)[..cols]);
                }
                out(token, first, &sums[..count]);
            }
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        shapes::rms_norm(x, weight, out);
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = w * (x * scale);
        }
    }

    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        shapes::swiglu(gate, up, out);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + libm::expf(-gate)) * up;
        }
    }

    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
        shapes::attention(queries, pages, head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let page_len = PAGE * head_dim;
        let mut scratch = Scratch::take(Line::count(4 * 3 * page_len));
        let (transposed, rest) = view_mut::<f32>(&mut scratch).split_at_mut(page_len);
        let (k, v) = rest.split_at_mut(page_len);
        for page in pages {
            page.k.widen_keys(transposed, head_dim);
            for (position, k) in k.chunks_exact_mut(head_dim).enumerate() {
                for (k, features) in k.iter_mut().zip(transposed.chunks_exact(PAGE)) {
                    *k = features[position];
                }
            }
            page.v.widen_values(v, head_dim);
            for query in queries.iter_mut() {
                let keys = query.keys.start.max(page.start)..query.keys.end.min(page.start + PAGE);
                if keys.is_empty() {
                    continue;
                }
                let (from, to) = (keys.start - page.start, keys.end - page.start);
                let mut scores = [0f32; PAGE];
                let scores = &mut scores[from..to];
                for (score, k) in scores.iter_mut().zip(k[from * head_dim..].chunks_exact(head_dim)) {
                    *score = dot(query.q, k) * scale;
                }
                softmax(query, scores, &v[from * head_dim..to * head_dim]);
            }
        }
    }
}

/// Adds the keys of one page to an online softmax (Milakov and Gimelshein, 2018; as used by FlashAttention). `scores`
/// become weights, and the query's output the weighted sum of the values so far.
fn softmax(query: &mut Query<'_>, scores: &mut [f32], values: &[f32]) {
    let max = scores.iter().fold(query.max, |max, &s| if s > max { s } else { max });
    if max > query.max && query.sum > 0.0 {
        let rescale = libm::expf(query.max - max);
        query.sum *= rescale;
        query.out.iter_mut().for_each(|o| *o *= rescale);
    }
    query.max = max;
    for (score, value) in scores.iter_mut().zip(values.chunks_exact(query.out.len())) {
        *score = libm::expf(*score - max);
        for (out, value) in query.out.iter_mut().zip(value) {
            *out += *score * value;
        }
    }
    query.sum += scores.iter().sum::<f32>();
}

/// The dot product: 16 interleaved partial sums, then pairwise. The order does not depend on the vector width.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = lane_sums(a, b);
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Not inlined: inlined into `dot`, the sums leave their vector registers and the loop takes 15 times as long.
#[inline(never)]
fn lane_sums(a: &[[f32; LANES]], b: &[[f32; LANES]]) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        sums = std::array::from_fn(|lane| sums[lane] + a[lane] * b[lane]);
    }
    sums
}

/// Weights of any format as f32, exactly as ggml defines them: `w = d * scale * q - dmin * min` and simpler formulas. Panics
/// unless `out` is as long as the weights.
pub fn dequantize(weights: Weights<'_>, out: &mut [f32]) {
    shapes::dequantize(weights, out);
    let bytes = weights.bytes;
    match weights.format {
        Format::F32 => {
            for (out, w) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*w);
            }
        }
        Format::F16 => {
            // By slices: `half` asks once per slice whether the CPU has the conversion.
            for (out, bytes) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                let mut halves = [half::f16::ZERO; 64];
                for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *half = half::f16::from_le_bytes(*bytes);
                }
                halves[..out.len()].convert_to_f32_slice(out);
            }
        }
        Format::BF16 => {
            for (out, w) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = half::bf16::from_le_bytes(*w).to_f32();
            }
        }
        Format::Q4_0 => by_block(bytes, out, q4_0),
        Format::Q4_1 => by_block(bytes, out, q4_1),
        Format::Q5_0 => by_block(bytes, out, q5_0),
        Format::Q5_1 => by_block(bytes, out, q5_1),
        Format::Q8_0 => by_block(bytes, out, q8_0),
        Format::Q2_K => by_block(bytes, out, q2_k),
        Format::Q3_K => by_block(bytes, out, q3_k),
        Format::Q4_K => by_block(bytes, out, q4_k),
        Format::Q5_K => by_block(bytes, out, q5_k),
        Format::Q6_K => by_block(bytes, out, q6_k),
    }
}

fn by_block<B: blocks::Block, const N: usize>(bytes: &[u8], out: &mut [f32], block: fn(&B, &mut [f32; N])) {
    for (b, out) in blocks::<B>(bytes).iter().zip(out.as_chunks_mut::<N>().0) {
        block(b, out);
    }
}

fn q4_0(b: &blocks::Q4_0, out: &mut [f32; 32]) {
    let d = b.d.f32();
    for (i, q) in b.qs.iter().enumerate() {
        out[i] = d * ((q & 15) as f32 - 8.0);
        out[i + 16] = d * ((q >> 4) as f32 - 8.0);
    }
}

fn q4_1(b: &blocks::Q4_1, out: &mut [f32; 32]) {
    let (d, m) = (b.d.f32(), b.m.f32());
    for (i, q) in b.qs.iter().enumerate() {
        out[i] = d * (q & 15) as f32 + m;
        out[i + 16] = d * (q >> 4) as f32 + m;
    }
}

fn q5_0(b: &blocks::Q5_0, out: &mut [f32; 32]) {
    let (d, high) = (b.d.f32(), u32::from_le_bytes(b.qh));
    for (i, q) in b.qs.iter().enumerate() {
        out[i] = d * (((q & 15) as u32 | (high >> i & 1) << 4) as f32 - 16.0);
        out[i + 16] = d * (((q >> 4) as u32 | (high >> (i + 16) & 1) << 4) as f32 - 16.0);
    }
}

fn q5_1(b: &blocks::Q5_1, out: &mut [f32; 32]) {
    let (d, m, high) = (b.d.f32(), b.m.f32(), u32::from_le_bytes(b.qh));
    for (i, q) in b.qs.iter().enumerate() {
        out[i] = d * ((q & 15) as u32 | (high >> i & 1) << 4) as f32 + m;
        out[i + 16] = d * ((q >> 4) as u32 | (high >> (i + 16) & 1) << 4) as f32 + m;
    }
}

fn q8_0(b: &blocks::Q8_0, out: &mut [f32; 32]) {
    let d = b.d.f32();
    for (out, q) in out.iter_mut().zip(b.qs) {
        *out = d * q as f32;
    }
}

/// Two halves of 128; in each, four 2-bit planes of 32 bytes; a scale and a min (4 bits each) for every 16 weights.
fn q2_k(b: &blocks::Q2_K, out: &mut [f32; 256]) {
    let (d, dmin) = (b.d.f32(), b.dmin.f32());
    for (group, (out, scale)) in out.as_chunks_mut::<16>().0.iter_mut().zip(b.scales).enumerate() {
        let (half, plane, side) = (group / 8, group % 8 / 2, group % 2);
        let (scale, min) = (d * (scale & 15) as f32, dmin * (scale >> 4) as f32);
        for (out, q) in out.iter_mut().zip(&b.qs[half * 32 + side * 16..]) {
            *out = scale * (q >> (2 * plane) & 3) as f32 - min;
        }
    }
}

/// As Q2_K with a third bit in `hmask` (if clear, 4 is subtracted) and 6-bit signed scales.
fn q3_k(b: &blocks::Q3_K, out: &mut [f32; 256]) {
    let d = b.d.f32();
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, plane, side) = (group / 8, group % 8 / 2, group % 2);
        let low = if group < 8 { b.scales[group] & 15 } else { b.scales[group - 8] >> 4 };
        let high = b.scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let scale = d * ((low | high << 4) as f32 - 32.0);
        for (i, out) in out.iter_mut().enumerate() {
            let low = b.qs[half * 32 + side * 16 + i] >> (2 * plane) & 3;
            let taken = if b.hmask[side * 16 + i] >> (half * 4 + plane) & 1 == 0 { 4.0 } else { 0.0 };
            *out = scale * (low as f32 - taken);
        }
    }
}

/// The eight 6-bit scales and mins of Q4_K and Q5_K, packed into 12 bytes.
fn scales_and_mins(packed: &[u8; 12]) -> [(f32, f32); 8] {
    std::array::from_fn(|j| {
        let (scale, min) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        };
        (scale as f32, min as f32)
    })
}

fn q4_k(b: &blocks::Q4_K, out: &mut [f32; 256]) {
    let (d, dmin) = (b.d.f32(), b.dmin.f32());
    let scales = scales_and_mins(&b.scales);
    for (pair, (out, qs)) in out.as_chunks_mut::<64>().0.iter_mut().zip(b.qs.as_chunks::<32>().0).enumerate() {
        let ((s0, m0), (s1, m1)) = (scales[2 * pair], scales[2 * pair + 1]);
        let (s0, m0, s1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for (i, q) in qs.iter().enumerate() {
            out[i] = s0 * (q & 15) as f32 - m0;
            out[i + 32] = s1 * (q >> 4) as f32 - m1;
        }
    }
}

fn q5_k(b: &blocks::Q5_K, out: &mut [f32; 256]) {
    let (d, dmin) = (b.d.f32(), b.dmin.f32());
    let scales = scales_and_mins(&b.scales);
    for (pair, (out, qs)) in out.as_chunks_mut::<64>().0.iter_mut().zip(b.qs.as_chunks::<32>().0).enumerate() {
        let ((s0, m0), (s1, m1)) = (scales[2 * pair], scales[2 * pair + 1]);
        let (s0, m0, s1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for (i, (q, high)) in qs.iter().zip(b.qh).enumerate() {
            let high = high >> (2 * pair);
            out[i] = s0 * (q & 15 | (high & 1) << 4) as f32 - m0;
            out[i + 32] = s1 * (q >> 4 | (high >> 1 & 1) << 4) as f32 - m1;
        }
    }
}

/// Two halves of 128: four groups of 32 weights whose low nibbles share 64 bytes and whose high bits share 32.
fn q6_k(b: &blocks::Q6_K, out: &mut [f32; 256]) {
    let d = b.d.f32();
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (ql, qh) = (&b.ql[half * 64..][..64], &b.qh[half * 32..][..32]);
        for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                let low = ql[group % 2 * 32 + i] >> (group / 2 * 4) & 15;
                let q = low | (qh[i] >> (2 * group) & 3) << 4;
                let scale = d * b.scales[half * 8 + group * 2 + i / 16] as f32;
                *out = scale * (q as f32 - 32.0);
            }
        }
    }
}
