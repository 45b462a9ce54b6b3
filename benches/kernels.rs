//! The speed of the kernels on one thread: `cargo bench --bench kernels`, or `-- avx2 avx512` for some of them. With
//! `-- --rows avx2`, what decode of 1 to 16 tokens costs relative to one.
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
    let (options, wanted): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|arg| arg.starts_with('-'));
    let names: Vec<_> = kernels::available().into_iter().filter(|name| chosen(&wanted, name)).collect();
    if names.is_empty() {
        eprintln!("unknown kernel {}; this CPU has {}", wanted.join(", "), kernels::available().join(", "));
        std::process::exit(1);
    }
    if options.iter().any(|option| option == "--rows") {
        return names.iter().filter_map(|name| kernels::by_name(name)).for_each(|kernel| decode_costs(&*kernel));
    }
    println!("{:24}{:>16}{:>24}", "", "decode, GB/s", "prefill, GOP/s");
    println!("{:10}{:6}{:>12}{:>12}{:>12}{:>12}", "kernel", "", "1 token", "4 tokens", "32 tokens", "512 tokens");
    for format in FORMATS {
        let bytes = repeated(format, COLS);
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

/// The time of decode of 1 to 16 tokens over that of one. All take turns, so that each meets the same machine.
fn decode_costs(kernel: &dyn Kernel) {
    const ROUNDS: usize = 7;
    println!("{}: time of 1 to 16 tokens over the time of one, best of {ROUNDS}", kernel.name());
    println!("{:14}{}", "tokens", (1..=16).map(|tokens| format!("{tokens:6}")).collect::<String>());
    for format in FORMATS {
        for cols in [COLS, 8192] {
            let bytes = repeated(format, cols);
            let weights = Weights { format, cols, bytes: &bytes };
            let mut best = [f64::INFINITY; 16];
            for _ in 0..ROUNDS {
                for (i, best) in best.iter_mut().enumerate() {
                    *best = best.min(Pass::new(kernel, weights, Phase::Decode, i + 1).seconds());
                }
            }
            let ratios: String = best.iter().map(|seconds| format!("{:6.2}", seconds / best[0])).collect();
            println!("{:14}{ratios}", format!("{format:?} {cols}"));
        }
    }
}

/// A matrix that exceeds the caches, of few random rows.
fn repeated(format: Format, cols: usize) -> Vec<u8> {
    let part = Matrix::random(format, 64, cols, &mut Random::new(1));
    let part = part.weights().bytes;
    part.repeat(BYTES.div_ceil(part.len()))
}

/// A product with its activations.
struct Pass<'a> {
    kernel: &'a dyn Kernel,
    weights: Weights<'a>,
    phase: Phase,
    tokens: usize,
    x: Vec<Line>,
}

impl<'a> Pass<'a> {
    fn new(kernel: &'a dyn Kernel, weights: Weights<'a>, phase: Phase, tokens: usize) -> Self {
        let tile = kernel.tile(weights.format, weights.cols, phase);
        let mut x = vec![Line::ZERO; tokens.div_ceil(tile.tokens) * tile.lines];
        let mut random = Random::new(2);
        for token in 0..tokens {
            let lines = &mut x[token / tile.tokens * tile.lines..][..tile.lines];
            kernel.pack(weights.format, phase, &random.normals(weights.cols), token % tile.tokens, lines);
        }
        Pass { kernel, weights, phase, tokens, x }
    }

    fn seconds(&self) -> f64 {
        let start = Instant::now();
        self.kernel.matmul(self.weights, self.phase, &self.x, self.tokens, &mut |_, _, results| {
            black_box(results);
        });
        start.elapsed().as_secs_f64()
    }
}

/// The time of the fastest pass.
fn seconds(kernel: &dyn Kernel, weights: Weights<'_>, phase: Phase, tokens: usize) -> f64 {
    let measured = Pass::new(kernel, weights, phase, tokens);
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut passes = 0;
    while passes < 3 || start.elapsed() < LONG_ENOUGH {
        passes += 1;
        best = best.min(measured.seconds());
    }
    best
}
