//! A whole product of one kernel.
use super::random::Matrix;
use super::{Kernel, Line, Phase, view_mut};

/// `x W^T`, (tokens, rows), of activations (tokens, cols). Asserts that each result comes once.
pub fn product(kernel: &dyn Kernel, matrix: &Matrix, phase: Phase, x: &[f32]) -> Vec<f32> {
    product_of_rows(kernel, matrix, 0..matrix.weights().n_rows(), phase, x)
}

/// As `product`, of some of the rows.
pub fn product_of_rows(
    kernel: &dyn Kernel,
    matrix: &Matrix,
    rows: std::ops::Range<usize>,
    phase: Phase,
    x: &[f32],
) -> Vec<f32> {
    let weights = matrix.weights().rows(rows);
    let (rows, tokens) = (weights.n_rows(), x.len() / weights.cols);
    let lines = packed(kernel, matrix, phase, x);
    let mut results = vec![None; tokens * rows];
    kernel.matmul(weights, phase, &lines, tokens, &mut |token, first, values| {
        let places = &mut results[token * rows..(token + 1) * rows][first..first + values.len()];
        for (place, value) in places.iter_mut().zip(values) {
            assert_eq!(place.replace(*value), None, "{}: token {token}, rows from {first}, twice", kernel.name());
        }
    });
    results.into_iter().map(|value| value.expect("a result for every row and token")).collect()
}

/// Activations (tokens, cols) as the kernel packs them. The unused places of a tile are NaN.
pub fn packed(kernel: &dyn Kernel, matrix: &Matrix, phase: Phase, x: &[f32]) -> Vec<Line> {
    let (format, cols) = (matrix.format, matrix.cols);
    let tile = kernel.tile(format, cols, phase);
    let mut lines = vec![Line::ZERO; (x.len() / cols).div_ceil(tile.tokens) * tile.lines];
    view_mut::<f32>(&mut lines).fill(f32::NAN);
    for (token, x) in x.chunks_exact(cols).enumerate() {
        let tile_lines = &mut lines[token / tile.tokens * tile.lines..][..tile.lines];
        kernel.pack(format, phase, x, token % tile.tokens, tile_lines);
    }
    lines
}
