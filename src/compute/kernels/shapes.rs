//! The shapes that every kernel requires of its arguments.
//!
//! The kernels rely on these checks and index without bounds checks. A call with other shapes panics here, with the
//! numbers in the message, before any of its data is read or written.
//!
//! Decisions: docs/design/kernels.md

use super::kv::SHARED;
use super::{Format, Kernel, KvPage, KvSlice, Line, PAGE, Phase, Query, Weights};

/// Features of a row or of a head, at most. Sizes in bytes stay far from overflow.
const MAX_FEATURES: usize = 1 << 32;

fn features(name: &str, count: usize) {
    assert!((1..=MAX_FEATURES).contains(&count), "{name} must be from 1 to {MAX_FEATURES}, not {count}");
}

fn whole_blocks(format: Format, cols: usize) {
    features("features of a row", cols);
    let block = format.block_len();
    assert!(cols.is_multiple_of(block), "{format:?} weights have rows of whole blocks of {block} features, not {cols}");
}

fn equal_lengths(name: &str, len: usize, expected_name: &str, expected: usize) {
    assert!(len == expected, "{name} has {len} elements, {expected_name} has {expected}");
}

/// Checks the arguments of `Kernel::pack`.
pub fn pack<K: Kernel>(kernel: &K, format: Format, phase: Phase, x: &[f32], at: usize, tile: &[Line]) {
    whole_blocks(format, x.len());
    let shape = kernel.tile(format, x.len(), phase);
    assert!(at < shape.tokens, "token {at} of a tile of {}", shape.tokens);
    assert!(tile.len() == shape.lines, "the tile has {} lines; it takes {}", tile.len(), shape.lines);
}

/// Checks the arguments of `Kernel::matmul`.
pub fn matmul<K: Kernel>(kernel: &K, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize) {
    whole_blocks(weights.format, weights.cols);
    let (bytes, row) = (weights.bytes.len(), weights.format.row_bytes(weights.cols));
    assert!(bytes.is_multiple_of(row), "the weights have {bytes} bytes, not whole rows of {row} bytes");
    let shape = kernel.tile(weights.format, weights.cols, phase);
    let lines = tokens.div_ceil(shape.tokens).checked_mul(shape.lines);
    assert!(lines == Some(x.len()), "the activations have {} lines; {tokens} tokens take {lines:?}", x.len());
}

/// Checks the arguments of `Kernel::rms_norm`.
pub fn rms_norm(x: &[f32], weight: &[f32], out: &[f32]) {
    equal_lengths("weight", weight.len(), "x", x.len());
    equal_lengths("out", out.len(), "x", x.len());
}

/// Checks the arguments of `Kernel::swiglu`.
pub fn swiglu(gate: &[f32], up: &[f32], out: &[f32]) {
    equal_lengths("up", up.len(), "gate", gate.len());
    equal_lengths("out", out.len(), "gate", gate.len());
}

/// Checks the arguments of `Kernel::attention`.
pub fn attention(queries: &[Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
    features("head_dim", head_dim);
    for query in queries {
        equal_lengths("q", query.q.len(), "a head", head_dim);
        equal_lengths("out", query.out.len(), "a head", head_dim);
    }
    for page in pages {
        assert!(page.start <= usize::MAX - PAGE, "a page starts at position {}", page.start);
        kv("k", page.k, head_dim);
        kv("v", page.v, head_dim);
    }
}

fn kv(name: &str, slice: KvSlice<'_>, head_dim: usize) {
    let len = match slice {
        KvSlice::F16(x) => x.len(),
        KvSlice::F32(x) => x.len(),
        KvSlice::Q8 { q, scales } => {
            equal_lengths("scales", scales.len(), "a page", PAGE * head_dim.div_ceil(SHARED));
            q.len()
        }
    };
    equal_lengths(name, len, "a page", PAGE * head_dim);
}

/// Checks the arguments of `dequantize`.
pub fn dequantize(weights: Weights<'_>, out: &[f32]) {
    let (format, bytes) = (weights.format, weights.bytes.len());
    let whole = out.len().is_multiple_of(format.block_len()) && bytes == format.row_bytes(out.len());
    assert!(whole, "{bytes} bytes of {format:?} weights do not make {} numbers", out.len());
}
