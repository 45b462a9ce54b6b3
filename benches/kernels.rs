//! The speed of the kernels on one thread: `cargo bench --bench kernels`, or `-- avx2 avx512` for some of them.
//!
//! Decode is memory-bound: gigabytes of weights per second. Prefill is compute-bound: billions of multiplications and
//! additions per second. The weights of a matrix exceed the caches; activations are packed beforehand. Each figure is the
//! best of at least three passes, and of half a second.
use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_phi::compute::kernels::{self, Format, Kernel, Line, Phase, Weights};

#[path = "../tests/kernels/random.rs"]
mod random;
use random::{Matrix, Random};

const FORMATS: [Format; 6] = [Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::Q8_0, Format::F16, Format::F32];
const COLS: usize = 3072;
const BYTES: usize = 128 << 20;
/// Rows of the matrix in prefill: few enough for the slowest kernel.
const PREFILL_ROWS: usize = 512;
const LONG_ENOUGH: Duration = Duration::from_millis(500);

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let names: Vec<_> = kernels::available().into_iter().filter(|name| chosen(&wanted, name)).collect();
    if names.is_empty() {
        eprintln!("unknown kernel {}; this CPU has {}", wanted.join(", "), kernels::available().join(", "));
        std::process::exit(1);
    }
    println!("{:24}{:>16}{:>24}", "", "decode, GB/s", "prefill, GOP/s");
    println!("{:10}{:6}{:>12}{:>12}{:>12}{:>12}", "kernel", "", "1 token", "4 tokens", "32 tokens", "512 tokens");
    for format in FORMATS {
        let part = Matrix::random(format, 64, COLS, &mut Random::new(1));
        let part = part.weights().bytes;
        let bytes = part.repeat(BYTES.div_ceil(part.len()));
        let weights = Weights { format, cols: COLS, bytes: &bytes };
        for kernel in names.iter().filter_map(|name| kernels::by_name(name)) {
            let decode = [1, 4].map(|tokens| bytes.len() as f64 / seconds(&*kernel, weights, Phase::Decode, tokens));
            let prefill = [32, 512].map(|tokens| {
                let operations = 2 * PREFILL_ROWS * COLS * tokens;
                operations as f64 / seconds(&*kernel, weights.rows(0..PREFILL_ROWS), Phase::Prefill, tokens)
            });
            print!("{:10}{:6}", kernel.name(), format!("{format:?}"));
            decode.iter().chain(&prefill).for_each(|speed| print!("{:12.1}", speed / 1e9));
            println!();
        }
    }
}

fn chosen(wanted: &[String], name: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|wanted| wanted == name)
}

/// The time of the fastest pass.
fn seconds(kernel: &dyn Kernel, weights: Weights<'_>, phase: Phase, tokens: usize) -> f64 {
    let tile = kernel.tile(weights.format, weights.cols, phase);
    let mut x = vec![Line::ZERO; tokens.div_ceil(tile.tokens) * tile.lines];
    let mut random = Random::new(2);
    for token in 0..tokens {
        let lines = &mut x[token / tile.tokens * tile.lines..][..tile.lines];
        kernel.pack(weights.format, phase, &random.normals(weights.cols), token % tile.tokens, lines);
    }
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut passes = 0;
    while passes < 3 || start.elapsed() < LONG_ENOUGH {
        passes += 1;
        let pass = Instant::now();
        kernel.matmul(weights, phase, &x, tokens, &mut |_, _, results| {
            black_box(results);
        });
        best = best.min(pass.elapsed().as_secs_f64());
    }
    best
}
