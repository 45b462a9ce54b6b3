//! Random weights and activations, the same in every run, for the tests and the benchmark.
#![allow(dead_code)] // each binary uses a part of it

use std::ops::Range;

use half::{bf16, f16};

#[path = "../random/mod.rs"]
mod generator;
pub use generator::Random;

use super::{Format, Weights};

impl Random {
    /// Integers from `-max` to `max`.
    pub fn integer(&mut self, max: i32) -> f32 {
        (self.below(2 * max as usize + 1) as i32 - max) as f32
    }

    /// From -1 to 1.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Approximately normal: bell-shaped, of variance 1, from -3 to 3.
    pub fn normal(&mut self) -> f32 {
        self.uniform() + self.uniform() + self.uniform()
    }

    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
}

/// Offsets of the half floats in a block.
pub fn halves(format: Format) -> &'static [usize] {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => &[],
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
    }
}

/// Offsets of the quants in a block.
pub fn quants(format: Format) -> Range<usize> {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => 0..0,
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => 2..format.block_bytes(),
        Format::Q4_1 | Format::Q5_1 => 4..format.block_bytes(),
        Format::Q2_K => 16..80,
        Format::Q3_K => 0..96,
        Format::Q4_K | Format::Q5_K => 16..format.block_bytes(),
        Format::Q6_K => 0..192,
    }
}

/// Offsets of the integer scales in a block.
pub fn scales(format: Format) -> Range<usize> {
    match format {
        Format::Q2_K => 0..16,
        Format::Q3_K => 96..108,
        Format::Q4_K | Format::Q5_K => 4..16,
        Format::Q6_K => 192..208,
        _ => 0..0,
    }
}

/// A weight matrix whose bytes start at an odd address and end where the allocation ends, as a file's may.
#[derive(Clone)]
pub struct Matrix {
    pub format: Format,
    pub cols: usize,
    bytes: Vec<u8>,
}

impl Matrix {
    pub fn zeros(format: Format, rows: usize, cols: usize) -> Self {
        Matrix { format, cols, bytes: vec![0; 1 + rows * format.row_bytes(cols)] }
    }

    /// Random bytes; `half` gives the half floats of the blocks. Float formats have approximately normal weights.
    pub fn new(format: Format, rows: usize, cols: usize, random: &mut Random, half: fn(&mut Random) -> f32) -> Self {
        let mut matrix = Self::zeros(format, rows, cols);
        for block in matrix.blocks_mut() {
            match format {
                Format::F32 => block.copy_from_slice(&random.normal().to_le_bytes()),
                Format::F16 => block.copy_from_slice(&f16::from_f32(random.normal()).to_le_bytes()),
                Format::BF16 => block.copy_from_slice(&bf16::from_f32(random.normal()).to_le_bytes()),
                _ => block.fill_with(|| random.bits() as u8),
            }
            for at in halves(format) {
                block[*at..at + 2].copy_from_slice(&f16::from_f32(half(random)).to_le_bytes());
            }
        }
        matrix
    }

    /// Scales of either sign and of several magnitudes.
    pub fn random(format: Format, rows: usize, cols: usize, random: &mut Random) -> Self {
        Self::new(format, rows, cols, random, |random| random.uniform() / (16 << random.below(5)) as f32)
    }

    pub fn blocks_mut(&mut self) -> std::slice::ChunksExactMut<'_, u8> {
        self.bytes[1..].chunks_exact_mut(self.format.block_bytes())
    }

    pub fn weights(&self) -> Weights<'_> {
        Weights { format: self.format, cols: self.cols, bytes: &self.bytes[1..] }
    }
}
