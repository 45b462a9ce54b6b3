//! Columns with random keys and values, for tests of their files.
#![allow(dead_code)] // each test uses a part of it

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;
use candle_phi::compute::kernels::{KvSlice, PAGE};
use candle_phi::compute::ops::{Column, KvBuffer, KvShape, KvType, Segment};
use half::f16;

use crate::random::Random;

pub fn shape(kv_type: KvType, n_layers: usize, n_head_kv: usize, head_dim: usize) -> KvShape {
    KvShape { n_layers, n_head_kv, head_dim, kv_type, device: None }
}

/// Columns of every position from `first * PAGE` up to `computed`, with numbers in all of their memory.
pub fn columns(shape: &KvShape, first: usize, computed: usize, seed: u64) -> Vec<Arc<Column>> {
    let mut random = Random::new(seed);
    let starts = (first * PAGE..computed).step_by(PAGE);
    let mut columns: VecDeque<_> = starts.map(|start| Arc::new(Column::new(start, shape))).collect();
    let rows = columns.len() * PAGE;
    let mut segment = Segment::new(0..rows, first * PAGE, &mut columns);
    for layer in 0..shape.n_layers {
        for piece in segment.pieces(layer) {
            let block = piece.expect("columns of its own").block;
            for buffer in [&mut block.k, &mut block.v] {
                match buffer {
                    KvBuffer::F16(x) => x.iter_mut().for_each(|x| *x = half(&mut random)),
                    KvBuffer::F32(x) => x.iter_mut().for_each(|x| *x = half(&mut random).to_f32()),
                    KvBuffer::Q8 { q, scales } => {
                        q.iter_mut().for_each(|x| *x = random.bits() as i8);
                        scales.iter_mut().for_each(|x| *x = half(&mut random));
                    }
                    KvBuffer::Candle(x) => {
                        let numbers: Vec<f32> = (0..x.elem_count()).map(|_| half(&mut random).to_f32()).collect();
                        let numbers =
                            Tensor::from_vec(numbers, x.shape(), x.device()).and_then(|new| new.to_dtype(x.dtype()));
                        x.slice_set(&numbers.unwrap(), 0, 0).unwrap();
                    }
                    KvBuffer::Mapped(_) => unreachable!("they are new"),
                }
            }
        }
    }
    columns.into()
}

fn half(random: &mut Random) -> f16 {
    f16::from_f32(random.below(2001) as f32 / 1000.0 - 1.0)
}

/// The bits of the keys and values of a column at its first `positions`, as attention reads them.
pub fn bits(column: &Column, shape: &KvShape, positions: usize) -> Vec<u32> {
    let mut bits = Vec::new();
    let mut wide = vec![0f32; PAGE * shape.head_dim];
    for layer in 0..shape.n_layers {
        let block = column.layer(layer);
        for head in 0..shape.n_head_kv {
            let head = |buffer: &KvBuffer, read: &mut dyn FnMut(KvSlice<'_>)| {
                read(buffer.head(head, shape.n_head_kv).expect("the kernels compute"));
            };
            head(&block.k, &mut |k| k.widen_keys(&mut wide, shape.head_dim));
            bits.extend(wide.chunks(PAGE).flat_map(|row| &row[..positions]).map(|x| x.to_bits()));
            head(&block.v, &mut |v| v.widen_values(&mut wide, shape.head_dim));
            bits.extend(wide[..positions * shape.head_dim].iter().map(|x| x.to_bits()));
        }
    }
    bits
}
