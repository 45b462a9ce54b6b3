//! Matrix products.
//!
//! The specification is the product, in f64, of the dequantized weights with the activations. A kernel may differ from it
//! by its rounding of activations (`rounding`, one table for all kernels) and by the rounding of f32 sums.
use candle_phi::compute::kernels::{Format, Kernel, Phase, Weights, dequantize};
use half::{bf16, f16};

use crate::product::{product, product_of_rows};
use crate::random::{Matrix, Random, halves, quants, scales};
use crate::{all, same};

const PHASES: [Phase; 2] = [Phase::Decode, Phase::Prefill];
const FLOATS: [Format; 3] = [Format::F32, Format::F16, Format::BF16];

/// The rounding of activations and weights before the product.
#[derive(Copy, Clone, PartialEq, Debug)]
enum Rounding {
    /// None.
    F32,
    /// Activations become 8-bit integers, with a scale for each 256 features, or 32 where weights are Q8_0.
    Int8,
    /// Activations and weights are rounded to 8 significant bits.
    Bf16,
}

fn rounding(kernel: &str, format: Format, phase: Phase) -> Rounding {
    match (kernel, phase, format) {
        (_, _, Format::F32 | Format::F16) | ("portable", _, _) => Rounding::F32,
        ("amx", Phase::Prefill, _) => Rounding::Bf16,
        (_, _, Format::Q4_K | Format::Q5_K | Format::Q6_K | Format::Q8_0) => Rounding::Int8,
        _ => Rounding::F32,
    }
}

/// The error of f32 sums, relative to the sum of the magnitudes of all products. Each addition rounds by half a unit in the
/// last place (2^-24) of the sum so far; kernels have many accumulators, so that few additions are of a large sum.
const SUMS: f64 = 16.0 / (1 << 24) as f64;
/// Activations below this may be quantized to 0.
const UNDERFLOW: f64 = 1e-30;

/// One result, and the bounds of a kernel's error.
#[derive(Copy, Clone, Default)]
struct Expected {
    value: f64,
    /// The sum of the magnitudes of all terms.
    terms: f64,
    /// Int8: an activation is rounded by at most half a step, which is 1/127 of the maximum of those that share the scale.
    int8: f64,
    /// The rounding errors are uniform, from minus half a step to half a step: their variance is 1/12 of the step squared.
    int8_variance: f64,
    /// Bf16: each factor is rounded by at most 2^-9. Factors, products and sums that are denormal may count as 0.
    bf16: f64,
    bf16_variance: f64,
}

impl Expected {
    fn limit(&self, rounding: Rounding) -> f64 {
        let sums = SUMS * self.terms;
        match rounding {
            Rounding::F32 => sums,
            Rounding::Int8 => sums + 1.0001 * self.int8,
            Rounding::Bf16 => sums + 1.01 * self.bf16,
        }
    }

    fn variance(&self, rounding: Rounding) -> f64 {
        match rounding {
            Rounding::F32 => 0.0,
            Rounding::Int8 => self.int8_variance,
            Rounding::Bf16 => self.bf16_variance,
        }
    }
}

/// `x W^T`, (tokens, rows).
fn expected(matrix: &Matrix, x: &[f32]) -> Vec<Expected> {
    let cols = matrix.cols;
    let share = if matrix.format == Format::Q8_0 { 32 } else { 256 };
    let mut offsets = matrix.clone();
    for block in offsets.blocks_mut() {
        block[quants(matrix.format)].fill(0);
    }
    let (rows, offsets) = (dequantized(matrix.weights()), dequantized(offsets.weights()));
    let mut results = Vec::new();
    for x in x.chunks_exact(cols) {
        for (w, offset) in rows.chunks_exact(cols).zip(offsets.chunks_exact(cols)) {
            let mut sum = Expected::default();
            for start in (0..cols).step_by(share) {
                let end = cols.min(start + share);
                let (mut magnitude, mut squares, mut max) = (0.0, 0.0, 0f64);
                for i in start..end {
                    let (w, offset, x) = (w[i] as f64, offset[i] as f64, x[i] as f64);
                    sum.value += w * x;
                    // `scale * q` and `min`, or 32 * scale, are multiplied separately: they do not cancel as in w.
                    let has_offset = matches!(matrix.format, Format::Q4_K | Format::Q5_K | Format::Q6_K);
                    sum.terms += (w.abs() + if has_offset { 2.0 * offset.abs() } else { 0.0 }) * x.abs();
                    sum.bf16 += (w * x).abs() / 256.0 + f32::MIN_POSITIVE as f64 * (2.0 + w.abs() + x.abs());
                    sum.bf16_variance += (w * x).powi(2) * 2.0 / 12.0 / 65536.0;
                    magnitude += w.abs();
                    squares += w * w;
                    max = max.max(x.abs());
                }
                let step = if max <= UNDERFLOW { 2.0 * max } else { max / 127.0 };
                sum.int8 += step / 2.0 * magnitude;
                sum.int8_variance += step * step / 12.0 * squares;
            }
            results.push(sum);
        }
    }
    results
}

/// (rows, cols)
fn dequantized(weights: Weights<'_>) -> Vec<f32> {
    let mut values = vec![0f32; weights.n_rows() * weights.cols];
    for (row, values) in values.chunks_exact_mut(weights.cols).enumerate() {
        dequantize(weights.row(row), values);
    }
    values
}

/// Asserts that every result is within its limit. Returns the mean square of the errors, each relative to the variance of
/// the rounding.
fn assert_near(kernel: &dyn Kernel, matrix: &Matrix, phase: Phase, x: &[f32], expected: &[Expected]) -> f64 {
    let rounding = rounding(kernel.name(), matrix.format, phase);
    let rows = matrix.weights().n_rows();
    let results = product(kernel, matrix, phase, x);
    assert_eq!(results.len(), expected.len());
    let mut squares = 0.0;
    for (i, (result, expected)) in results.iter().zip(expected).enumerate() {
        let (error, limit) = ((*result as f64 - expected.value).abs(), expected.limit(rounding));
        assert!(
            error <= limit,
            "{} {:?} {phase:?}, {} features, token {}, row {}: {result} is {error:e} off {}, limit {limit:e}",
            kernel.name(),
            matrix.format,
            matrix.cols,
            i / rows,
            i % rows,
            expected.value,
        );
        squares += error * error / expected.variance(rounding).max(f64::MIN_POSITIVE);
    }
    squares / results.len() as f64
}

/// Row lengths of a format.
fn widths(format: Format) -> Vec<usize> {
    let any = [1, 7, 20, 33, 100, 32, 64, 96, 256, 512, 1024, 3072, 8192];
    let most = if cfg!(miri) { 256 } else { usize::MAX };
    any.into_iter().filter(|cols| cols % format.block_len() == 0 && *cols <= most).collect()
}

/// Every kernel in each of its phases.
fn runs() -> Vec<(Box<dyn Kernel>, Phase)> {
    PHASES.into_iter().flat_map(|phase| all().map(move |kernel| (kernel, phase))).collect()
}

#[test]
fn products_are_as_near_as_the_rounding_of_activations_allows() {
    let rows = if cfg!(miri) { 3 } else { 35 };
    for format in Format::ALL {
        let runs = runs();
        let mut means = vec![0.0; runs.len()];
        let widths = widths(format);
        for cols in widths.iter().copied() {
            let mut random = Random::new(cols as u64);
            let tokens = if cols > 1024 { 17 } else { rows };
            let matrix = Matrix::random(format, rows, cols, &mut random);
            let mut x = random.normals(tokens * cols);
            // As in the real model, some features are much larger than the others.
            x.iter_mut().step_by(397).for_each(|x| *x *= 50.0);
            let expected = expected(&matrix, &x);
            for ((kernel, phase), mean) in runs.iter().zip(&mut means) {
                let tokens = if *phase == Phase::Decode { tokens.min(8) } else { tokens };
                let (x, expected) = (&x[..tokens * cols], &expected[..tokens * rows]);
                *mean += assert_near(&**kernel, &matrix, *phase, x, expected) / widths.len() as f64;
            }
        }
        for ((kernel, phase), mean) in runs.iter().zip(means) {
            let name = kernel.name();
            if rounding(name, format, *phase) != Rounding::F32 {
                assert!(mean.sqrt() < 1.1, "{name} {format:?} {phase:?}: {} times the error of rounding", mean.sqrt());
                assert!(mean.sqrt() > 0.4, "{name} {format:?} {phase:?}: more exact than `rounding` says");
            }
        }
    }
}

/// Activations that 8 bits represent exactly: integers times a power of two that 256 features share. The maximum of each
/// 32 features is 127 times it.
fn integers(cols: usize, random: &mut Random) -> Vec<f32> {
    let mut x = vec![0f32; cols];
    for share in x.chunks_mut(256) {
        let step = 1.0 / (1 << random.below(2)) as f32;
        for part in share.chunks_mut(32) {
            part.fill_with(|| step * random.integer(15));
            let max = random.below(part.len());
            part[max] = step * if random.below(2) == 0 { 127.0 } else { -127.0 };
        }
    }
    x
}

#[test]
fn integers_are_multiplied_exactly() {
    for format in Format::ALL {
        for cols in widths(format) {
            let mut random = Random::new(cols as u64);
            let mut matrix = Matrix::new(format, 37, cols, &mut random, |random| 1.0 / (1 << random.below(2)) as f32);
            for block in matrix.blocks_mut() {
                let weight = random.integer(127);
                match format {
                    Format::F32 => block.copy_from_slice(&weight.to_le_bytes()),
                    Format::F16 => block.copy_from_slice(&f16::from_f32(weight).to_le_bytes()),
                    Format::BF16 => block.copy_from_slice(&bf16::from_f32(weight).to_le_bytes()),
                    // Small enough for exact sums in f32.
                    Format::Q6_K => {
                        block[scales(format)].iter_mut().for_each(|scale| *scale = (*scale as i8 / 8) as u8)
                    }
                    _ => (),
                }
            }
            let x: Vec<f32> = (0..19).flat_map(|_| integers(cols, &mut random)).collect();
            let expected: Vec<f32> = expected(&matrix, &x).iter().map(|expected| expected.value as f32).collect();
            for (kernel, phase) in runs() {
                if rounding(kernel.name(), format, phase) == Rounding::Bf16 && format != Format::BF16 {
                    continue; // a scale times a quant has more than 8 bits
                }
                let results = product(&*kernel, &matrix, phase, &x);
                assert!(
                    results == expected,
                    "{} {format:?} {phase:?}, {cols} features: {results:?}, expected {expected:?}",
                    kernel.name()
                );
            }
        }
    }
}

/// The largest and smallest quants and scales with activations of 127 steps: 16-bit sums of too many products saturate or
/// wrap here. Half floats are 0, denormal, or the largest.
#[test]
fn extreme_blocks_are_multiplied_as_any_other() {
    const TINY: f32 = 1.0 / (1 << 24) as f32; // the smallest half float
    const LARGEST: f32 = 65504.0; // of the half floats
    let pairs = [
        (1.0, 1.0),
        (1.0, -1.0),
        (0.0, 1.0),
        (1.0, 0.0),
        (0.0, 0.0),
        (-0.0, -0.0),
        (TINY, TINY),
        (1023.0 * TINY, -1.0),
        (LARGEST, LARGEST),
        (-LARGEST, LARGEST),
    ];
    let bytes = [0x00, 0xff, 0x7f, 0x80, 0x55, 0xaa];
    for format in Format::ALL.into_iter().filter(|format| !FLOATS.contains(format)) {
        let cols = format.block_len();
        let mut matrix = Matrix::zeros(format, bytes.len() * bytes.len() * pairs.len(), cols);
        for (i, block) in matrix.blocks_mut().enumerate() {
            block[quants(format)].fill(bytes[i % bytes.len()]);
            block[scales(format)].fill(bytes[i / bytes.len() % bytes.len()]);
            let (d, min) = pairs[i / bytes.len() / bytes.len()];
            for (at, half) in halves(format).iter().zip([d, min]) {
                block[*at..at + 2].copy_from_slice(&f16::from_f32(half).to_le_bytes());
            }
        }
        let signs: [fn(usize) -> bool; 7] =
            [|_| false, |_| true, |i| i % 2 == 0, |i| i % 4 < 2, |i| i % 8 < 4, |i| i % 32 < 16, |i| i % 64 < 32];
        let x: Vec<f32> = signs
            .iter()
            .flat_map(|negative| (0..cols).map(move |i| if negative(i) { -127.0 } else { 127.0 }))
            .collect();
        let mut expected = expected(&matrix, &x);
        expected.iter_mut().for_each(|expected| expected.int8 = 0.0); // these activations are represented exactly
        for (kernel, phase) in runs() {
            assert_near(&*kernel, &matrix, phase, &x, &expected);
        }
    }
}

#[test]
fn extreme_activations_are_multiplied_as_any_other() {
    for format in Format::ALL {
        let mut random = Random::new(5);
        let cols = 512;
        let matrix = Matrix::random(format, 33, cols, &mut random);
        let mut x = Vec::new();
        // Zero, denormal, tiny, huge; then blocks of zeros between others, and a single feature.
        for scale in [0.0, -0.0, 1e-44, 1e-39, 1e-35, 1e-29, 1e-20, 1e20, 1e32] {
            x.extend(random.normals(cols).iter().map(|x| x * scale));
        }
        x.extend(random.normals(cols).iter().enumerate().map(|(i, x)| if i / 32 % 2 == 0 { 0.0 } else { *x }));
        x.extend(random.normals(cols).iter().enumerate().map(|(i, x)| if i < 256 { 0.0 } else { *x }));
        x.extend((0..cols).map(|i| if i == 300 { 1.0 } else { 0.0 }));
        let mut expected = expected(&matrix, &x);
        // Products of small numbers are denormal: each is off by up to half of the smallest number.
        expected.iter_mut().for_each(|expected| expected.terms += 1e-36);
        for (kernel, phase) in runs() {
            assert_near(&*kernel, &matrix, phase, &x, &expected);
            let results = product(&*kernel, &matrix, phase, &x);
            assert!(results[..2 * 33].iter().all(|result| *result == 0.0), "{} {format:?}", kernel.name());
        }
    }
}

#[test]
fn a_value_that_is_not_finite_shows_in_its_token_alone() {
    for format in Format::ALL {
        let mut random = Random::new(6);
        let (cols, tokens) = (512, 20);
        let matrix = Matrix::random(format, 33, cols, &mut random);
        let clean = random.normals(tokens * cols);
        for (kernel, phase) in runs() {
            let name = kernel.name();
            let before = product(&*kernel, &matrix, phase, &clean);
            for (token, wrong) in [(0, f32::NAN), (1, f32::INFINITY), (17, f32::NEG_INFINITY), (19, -f32::NAN)] {
                let mut x = clean.clone();
                x[token * cols + random.below(cols)] = wrong;
                let after = product(&*kernel, &matrix, phase, &x);
                for (i, (before, after)) in before.chunks_exact(33).zip(after.chunks_exact(33)).enumerate() {
                    if i == token {
                        let hidden = after.iter().filter(|result| result.is_finite()).count();
                        assert_eq!(hidden, 0, "{name} {format:?} {phase:?}: results that hide a {wrong} of token {i}");
                    } else {
                        assert!(same(before, after), "{name} {format:?} {phase:?}: {wrong} of token {token} is in {i}");
                    }
                }
            }
        }
    }
}

/// Row lengths of several blocks and of an odd remainder: the order of sums could depend on how the work is divided.
fn odd_widths(format: Format) -> &'static [usize] {
    match format.block_len() {
        1 => &[100, 321],
        32 => &[96, 512],
        _ => &[256, 768],
    }
}

#[test]
fn a_token_has_the_same_bits_among_any_others() {
    for (format, cols) in
        Format::ALL.into_iter().flat_map(|format| odd_widths(format).iter().map(move |c| (format, *c)))
    {
        let mut random = Random::new(7);
        let rows = 9;
        let matrix = Matrix::random(format, rows, cols, &mut random);
        let x = random.normals(100 * cols);
        for (kernel, phase) in runs() {
            let alone: Vec<f32> = x.chunks_exact(cols).flat_map(|x| product(&*kernel, &matrix, phase, x)).collect();
            let most = if phase == Phase::Decode { 17 } else { 33 };
            for count in (1..=most).chain([100]) {
                // From any token on: each takes every place of a tile.
                let first = random.below(101 - count);
                let together = product(&*kernel, &matrix, phase, &x[first * cols..(first + count) * cols]);
                let alone = &alone[first * rows..(first + count) * rows];
                assert!(same(&together, alone), "{} {format:?} {phase:?}: {count} from {first}", kernel.name());
            }
        }
    }
}

/// One row, which decode pairs with itself, odd numbers, and more rows than decode passes on at a time.
#[test]
fn decode_gives_a_token_the_same_bits_with_any_number_of_rows_and_tokens() {
    let most = if cfg!(miri) { 3 } else { 17 };
    for format in Format::ALL {
        let cols = *odd_widths(format).last().expect("two widths");
        let mut random = Random::new(9);
        let x = random.normals(most * cols);
        for rows in [1, 2, 7, 131] {
            let matrix = Matrix::random(format, rows, cols, &mut random);
            for kernel in all() {
                let decode = |x: &[f32]| product(&*kernel, &matrix, Phase::Decode, x);
                let alone: Vec<f32> = x.chunks_exact(cols).flat_map(decode).collect();
                for tokens in 1..=most {
                    let together = decode(&x[..tokens * cols]);
                    let name = kernel.name();
                    assert!(
                        same(&together, &alone[..tokens * rows]),
                        "{name} {format:?}: {tokens} tokens, {rows} rows"
                    );
                }
            }
        }
    }
}

/// A scheduler divides by these.
#[test]
fn decode_costs_more_for_more_tokens_and_less_than_one_after_the_other() {
    for kernel in all() {
        let (name, costs) = (kernel.name(), kernel.decode_costs());
        assert_eq!(costs[0], 1.0, "{name}");
        for tokens in 2..=costs.len() {
            let (fewer, cost) = (costs[tokens - 2], costs[tokens - 1]);
            assert!(fewer <= cost && cost <= tokens as f32, "{name}: {tokens} tokens cost {cost}, one fewer {fewer}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_among_any_others() {
    for (format, cols) in
        Format::ALL.into_iter().flat_map(|format| odd_widths(format).iter().map(move |c| (format, *c)))
    {
        let mut random = Random::new(8);
        let (rows, tokens) = (200, 5);
        let matrix = Matrix::random(format, rows, cols, &mut random);
        let x = random.normals(tokens * cols);
        for (kernel, phase) in runs() {
            let whole = product(&*kernel, &matrix, phase, &x);
            for count in (1..=70).chain([127, 128, 129, 130, 193, 200]) {
                let first = random.below(rows - count + 1);
                let part = product_of_rows(&*kernel, &matrix, first..first + count, phase, &x);
                for (part, whole) in part.chunks_exact(count).zip(whole.chunks_exact(rows)) {
                    let whole = &whole[first..first + count];
                    assert!(same(part, whole), "{} {format:?} {phase:?}: rows {count} from {first}", kernel.name());
                }
            }
        }
    }
}
