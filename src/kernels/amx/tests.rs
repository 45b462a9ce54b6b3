//! The whole of prefill but the instructions themselves, which few machines have: tiles are emulated as Intel's manual
//! defines them.

use std::cell::RefCell;

use super::*;
use crate::kernels::dequantize;

struct Emulated;

type Registers = [[[u8; 64]; 16]; 8];

thread_local! {
    static REGISTERS: RefCell<Option<Registers>> = const { RefCell::new(None) };
}

fn registers<R>(on: impl FnOnce(&mut Registers) -> R) -> R {
    REGISTERS.with_borrow_mut(|registers| on(registers.as_mut().expect("configured")))
}

fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

// SAFETY: reads and writes 16 lines.
unsafe impl Tiles for Emulated {
    unsafe fn configure() {
        assert!(REGISTERS.replace(Some([[[0; 64]; 16]; 8])).is_none());
    }

    unsafe fn release() {
        assert!(REGISTERS.take().is_some());
    }

    unsafe fn zero<const TILE: usize>() {
        registers(|tiles| tiles[TILE] = [[0; 64]; 16]);
    }

    unsafe fn load<const TILE: usize>(from: *const Line) {
        // SAFETY: the trait asks for 16 lines.
        registers(|tiles| tiles[TILE] = unsafe { from.cast::<[[u8; 64]; 16]>().read() });
    }

    unsafe fn store<const TILE: usize>(to: *mut Line) {
        // SAFETY: the trait asks for 16 lines.
        registers(|tiles| unsafe { to.cast::<[[u8; 64]; 16]>().write(tiles[TILE]) });
    }

    unsafe fn dot<const SUMS: usize, const W: usize, const X: usize>() {
        let half = |row: &[u8; 64], i: usize| flushed(half::bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32());
        registers(|tiles| {
            for m in 0..16 {
                for n in 0..16 {
                    let mut sums = [0f32; 2];
                    for k in 0..16 {
                        for (side, sum) in sums.iter_mut().enumerate() {
                            let (w, x) = (half(&tiles[W][m], 2 * k + side), half(&tiles[X][k], 2 * n + side));
                            *sum = flushed(w.mul_add(x, *sum));
                        }
                    }
                    let to = &mut tiles[SUMS][m].as_chunks_mut::<4>().0[n];
                    *to = flushed(flushed(f32::from_le_bytes(*to)) + flushed(sums[0] + sums[1])).to_le_bytes();
                }
            }
        });
    }
}

/// Whether this CPU can run all but the tiles.
fn runs() -> bool {
    Avx512::new().is_some() && is_x86_feature_detected!("avx512bf16")
}

/// The results (tokens, rows) of a matrix (rows, cols) with activations (tokens, cols).
fn product(weights: Weights<'_>, x: &[f32]) -> Vec<f32> {
    let lines = tile_lines(weights.cols);
    let (tokens, rows) = (x.len() / weights.cols, weights.n_rows());
    let mut packed = vec![Line::ZERO; tokens.div_ceil(TILE) * lines];
    // What must not count is not a number: tokens behind the last, rows behind the last, old sums.
    view_mut::<f32>(&mut packed).fill(f32::NAN);
    view_mut::<f32>(&mut Scratch::take(PANEL * BLOCK + PANEL * tokens)).fill(f32::NAN);
    let mut results = vec![f32::NAN; tokens * rows];
    let mut out = |token: usize, first: usize, sums: &[f32]| {
        results[token * rows + first..][..sums.len()].copy_from_slice(sums);
    };
    // SAFETY: `runs` was asked.
    unsafe {
        for (token, x) in x.chunks_exact(weights.cols).enumerate() {
            pack(x, token % TILE, &mut packed[token / TILE * lines..][..lines]);
        }
        prefill::<Emulated>(weights, &packed, tokens, &mut out);
    }
    results
}

/// One result, from its definition: 32 features at a time, even and odd ones apart.
fn expected(weights: Weights<'_>, x: &[f32]) -> f32 {
    let mut w = vec![0f32; weights.cols];
    dequantize(weights, &mut w);
    let bf16 = |x: f32| half::bf16::from_f32(flushed(x)).to_f32();
    w.chunks(32).zip(x.chunks(32)).fold(0.0, |total, (w, x)| {
        let mut sums = [0f32; 2];
        for (i, (w, x)) in w.iter().zip(x).enumerate() {
            sums[i % 2] += bf16(*w) * bf16(*x); // exact but for the sum
        }
        total + (sums[0] + sums[1])
    })
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn float(&mut self) -> f32 {
        (self.next() % 2001) as f32 / 1000.0 - 1.0
    }

    /// Any bytes, but half floats, which lie at `halves` of each block, below 2.
    fn weights(&mut self, format: Format, halves: &[usize], rows: usize, cols: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..rows * format.row_bytes(cols)).map(|_| (self.next() >> 32) as u8).collect();
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            match format {
                Format::BF16 => block[1] = block[1] & 0x80 | 0x3f,
                _ => halves.iter().for_each(|half| block[half + 1] &= 0xbf),
            }
        }
        bytes
    }
}

const FORMATS: [(Format, &[usize]); 11] = [
    (Format::BF16, &[]),
    (Format::Q4_0, &[0]),
    (Format::Q4_1, &[0, 2]),
    (Format::Q5_0, &[0]),
    (Format::Q5_1, &[0, 2]),
    (Format::Q8_0, &[0]),
    (Format::Q2_K, &[80, 82]),
    (Format::Q3_K, &[108]),
    (Format::Q4_K, &[0, 2]),
    (Format::Q5_K, &[0, 2]),
    (Format::Q6_K, &[208]),
];

#[test]
fn every_format_is_multiplied_to_the_bit() {
    if !runs() {
        return;
    }
    let mut random = Random(88_172_645_463_325_252);
    for (format, halves) in FORMATS {
        let cols = match format.block_len() {
            1 => [45, 301],
            32 => [32, 544],
            len => [len, 3 * len],
        };
        let shapes = cols.into_iter().flat_map(|cols| [(cols, 1, 1), (cols, 37, 16), (cols, 270, 35)]);
        for (cols, rows, tokens) in shapes {
            let bytes = random.weights(format, halves, rows, cols);
            let weights = Weights { format, cols, bytes: &bytes };
            let x: Vec<f32> = (0..tokens * cols).map(|_| random.float()).collect();
            for (i, result) in product(weights, &x).into_iter().enumerate() {
                let (token, row) = (i / rows, i % rows);
                let expected = expected(weights.row(row), &x[token * cols..][..cols]);
                assert!(result.to_bits() == expected.to_bits(), "{format:?} {cols} {token} {row}: {result} {expected}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_token() {
    if !runs() {
        return;
    }
    let mut random = Random(7);
    let (rows, cols, tokens) = (40, 256, 20);
    let mut bytes = random.weights(Format::Q4_K, &[0, 2], rows, cols);
    bytes[3 * 144..][..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    bytes[5 * 144..][..4].fill(0);
    let mut x: Vec<f32> = (0..tokens * cols).map(|_| random.float()).collect();
    x[17 * cols + 9] = f32::NAN;
    x[18 * cols + 9] = f32::MAX; // the nearest bf16 is infinite
    x[19 * cols..].fill(1e-40);
    for (i, result) in product(Weights { format: Format::Q4_K, cols, bytes: &bytes }, &x).into_iter().enumerate() {
        match (i / rows, i % rows) {
            (17, _) | (_, 3) => assert!(result.is_nan(), "{i}"),
            (18, 5) => assert!(result.is_nan(), "0 times infinity: {result}"),
            (18, _) => assert!(!result.is_finite(), "{i}: {result}"),
            (19, _) | (_, 5) => assert_eq!(result, 0.0, "{i}"),
            _ => assert!(result.is_finite() && result != 0.0, "{i}: {result}"),
        }
    }
}

#[test]
fn the_check_at_the_start_passes() {
    if runs() {
        // SAFETY: the features were found.
        assert!(unsafe { works::<Emulated>() });
    }
}
