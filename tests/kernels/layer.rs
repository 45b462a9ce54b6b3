//! Norms and activations.
use crate::random::Random;
use crate::{all, same};

const UNIT: f64 = 1.0 / (1 << 24) as f64; // half a unit in the last place, relative to the number

#[test]
fn a_norm_is_within_a_few_units_of_the_formula() {
    let eps = 1e-5;
    for len in (1..=40).chain([96, 1000, 3072, 8192]) {
        for scale in [1e-12, 1e-3, 1.0, 1e3, 1e12] {
            let mut random = Random::new(len as u64);
            let x: Vec<f32> = random.normals(len).iter().map(|x| x * scale).collect();
            let weight = random.normals(len);
            let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / len as f64;
            for kernel in all() {
                let mut out = vec![f32::NAN; len];
                kernel.rms_norm(&x, &weight, eps, &mut out);
                for i in 0..len {
                    let expected = weight[i] as f64 * x[i] as f64 / (mean + eps as f64).sqrt();
                    let error = (out[i] as f64 - expected).abs();
                    assert!(
                        error <= 8.0 * UNIT * expected.abs() + 1e-38,
                        "{} of {len} x {scale:e}: {} is {error:e} off {expected}",
                        kernel.name(),
                        out[i]
                    );
                }
            }
        }
    }
}

#[test]
fn the_norm_of_zeros_is_zero_and_a_value_that_is_not_finite_shows() {
    for kernel in all() {
        for len in [1, 15, 16, 96, 1001] {
            let weight = vec![2.0; len];
            let mut out = vec![f32::NAN; len];
            kernel.rms_norm(&vec![0.0; len], &weight, 1e-5, &mut out);
            assert!(out.iter().all(|out| *out == 0.0), "{}: {out:?}", kernel.name());
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, len / 2, len - 1] {
                    let mut x = vec![1.0; len];
                    x[at] = wrong;
                    kernel.rms_norm(&x, &weight, 1e-5, &mut out);
                    assert!(!out[at].is_finite(), "{}: a {wrong} of {len} becomes {}", kernel.name(), out[at]);
                }
            }
        }
    }
}

#[test]
fn swiglu_is_within_a_few_units_of_the_formula() {
    let mut random = Random::new(1);
    let sweep = (-40_000..=40_000).map(|i| i as f32 / 200.0); // -200 to 200
    let gates: Vec<f32> = sweep.chain((0..1000).map(|_| random.normal() * 1e-6)).collect();
    let ups = random.normals(gates.len());
    for kernel in all() {
        let mut out = vec![f32::NAN; gates.len()];
        kernel.swiglu(&gates, &ups, &mut out);
        for ((gate, up), out) in gates.iter().zip(&ups).zip(out) {
            let (g, u) = (*gate as f64, *up as f64);
            let expected = g / (1.0 + (-g).exp()) * u;
            let error = (out as f64 - expected).abs();
            // From 88 on, e^x of a fast kernel is 0 or infinite, and silu is below 1e-36.
            let limit = 8.0 * UNIT * expected.abs() + 1e-36;
            assert!(error <= limit, "{}: {gate}, {up}: {out} is {error:e} off {expected:e}", kernel.name());
        }
    }
}

#[test]
fn swiglu_of_values_that_are_not_finite_follows_the_formula() {
    let cases = [
        (f32::INFINITY, 2.0, f32::INFINITY),
        (f32::INFINITY, -2.0, f32::NEG_INFINITY),
        (f32::INFINITY, 0.0, f32::NAN),
        (f32::NEG_INFINITY, 1.0, f32::NAN),
        (f32::NAN, 1.0, f32::NAN),
        (1.0, f32::NAN, f32::NAN),
        (1.0, f32::INFINITY, f32::INFINITY),
        (-1.0, f32::INFINITY, f32::NEG_INFINITY),
        (0.0, f32::INFINITY, f32::NAN),
        (f32::MAX, 1.0, f32::MAX),
        (-f32::MAX, 1.0, 0.0),
        (200.0, 0.5, 100.0),
        (-200.0, 0.5, 0.0),
    ];
    for kernel in all() {
        for (gate, up, expected) in cases {
            for (len, at) in [(1, 0), (7, 6), (16, 3), (33, 32), (40, 20)] {
                let (mut gates, mut ups, mut out) = (vec![0.5; len], vec![2.0; len], vec![f32::NAN; len]);
                kernel.swiglu(&gates, &ups, &mut out);
                let usual = out[0];
                (gates[at], ups[at]) = (gate, up);
                kernel.swiglu(&gates, &ups, &mut out);
                let found = out[at];
                let name = kernel.name();
                assert!(found == expected || found.is_nan() && expected.is_nan(), "{name}: {gate}, {up}: {found}");
                assert!(
                    out.iter().enumerate().all(|(i, out)| i == at || *out == usual),
                    "{name}: {gate} spreads: {out:?}"
                );
            }
        }
    }
}

#[test]
fn swiglu_has_the_same_bits_in_any_part_of_a_row() {
    let mut random = Random::new(2);
    let (gates, ups) = (random.normals(200), random.normals(200));
    for kernel in all() {
        let mut whole = vec![0.0; 200];
        kernel.swiglu(&gates, &ups, &mut whole);
        for len in 1..=40 {
            let from = random.below(200 - len);
            let mut part = vec![0.0; len];
            kernel.swiglu(&gates[from..from + len], &ups[from..from + len], &mut part);
            assert!(same(&part, &whole[from..from + len]), "{}: {len} from {from}", kernel.name());
        }
    }
}
