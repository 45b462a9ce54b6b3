//! Prefill with emulated tiles: few machines have the instructions. The emulation follows their definition in Intel's
//! manual.

use std::cell::RefCell;

use super::*;
use crate::compute::kernels::dequantize;
use crate::compute::kernels::product::product;
use crate::compute::kernels::random::{Matrix, Random};

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

// SAFETY: `load` and `store` access 16 lines.
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
        // SAFETY: 16 lines, by the contract of this method.
        registers(|tiles| tiles[TILE] = unsafe { from.cast::<[[u8; 64]; 16]>().read() });
    }

    unsafe fn store<const TILE: usize>(to: *mut Line) {
        // SAFETY: 16 lines, by the contract of this method.
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

/// Whether this CPU has all features but the tiles.
fn runs() -> bool {
    Avx512::new().is_some() && is_x86_feature_detected!("avx512bf16")
}

fn kernel() -> Amx<Emulated> {
    Amx(Avx512::new().expect("`runs` says so"), PhantomData)
}

/// `x W^T`. What must not count is NaN beforehand: old sums, and the rows of a panel past the last.
fn amx_product(matrix: &Matrix, x: &[f32]) -> Vec<f32> {
    view_mut::<f32>(&mut Scratch::take(PANEL * BLOCK + PANEL * (x.len() / matrix.cols))).fill(f32::NAN);
    product(&kernel(), matrix, Phase::Prefill, x)
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

/// Any half float below 2.
fn any_half(random: &mut Random) -> f32 {
    half::f16::from_bits(random.bits() as u16 & 0xbfff).to_f32()
}

#[test]
fn every_format_is_multiplied_to_the_bit() {
    if !runs() {
        return;
    }
    let mut random = Random::new(1);
    for format in Format::ALL.into_iter().filter(|format| in_tiles(*format, Phase::Prefill)) {
        let cols = match format.block_len() {
            1 => [45, 301],
            32 => [32, 544],
            len => [len, 3 * len],
        };
        let shapes = cols.into_iter().flat_map(|cols| [(cols, 1, 1), (cols, 37, 16), (cols, 270, 35)]);
        for (cols, rows, tokens) in shapes {
            let matrix = Matrix::new(format, rows, cols, &mut random, any_half);
            let x = random.normals(tokens * cols);
            for (i, result) in amx_product(&matrix, &x).into_iter().enumerate() {
                let (token, row) = (i / rows, i % rows);
                let expected = expected(matrix.weights().row(row), &x[token * cols..][..cols]);
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
    let mut random = Random::new(7);
    let (rows, cols, tokens) = (40, 256, 20);
    let mut matrix = Matrix::random(Format::Q4_K, rows, cols, &mut random); // one block a row
    for (row, block) in matrix.blocks_mut().enumerate() {
        match row {
            3 => block[..2].copy_from_slice(&half::f16::NAN.to_le_bytes()),
            5 => block[..4].fill(0),
            _ => (),
        }
    }
    let mut x = random.normals(tokens * cols);
    x[17 * cols + 9] = f32::NAN;
    x[18 * cols + 9] = f32::MAX; // the nearest bf16 is infinite
    x[19 * cols..].fill(1e-40);
    for (i, result) in amx_product(&matrix, &x).into_iter().enumerate() {
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
