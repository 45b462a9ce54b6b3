//! What shared columns save: the time of the attention of 8 streams at position 1500 in one layer of Phi-3-mini, relative to
//! 8 streams that share nothing: `cargo bench --bench attention`, or `-- avx2 avx512` for some of the kernels.
//!
//! The streams share the first 0, 500, 1000 or 1400 positions. All variants take turns in one process, on two threads; each
//! time is the best of 15. The keys and values exceed the caches.
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_phi::compute::kernels::{self, Phase};
use candle_phi::compute::ops::{AttentionShape, Backend, KvShape, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::kv::table::Table;
use candle_phi::system::sync::Cancel;

#[path = "../tests/random/mod.rs"]
mod random;
use random::Random;

const SHAPE: AttentionShape = AttentionShape { n_head: 32, n_head_kv: 32, head_dim: 96, window: None };
const STREAMS: usize = 8;
const POSITIONS: usize = 1500;
const SHARED: [usize; 4] = [0, 500, 1000, 1400];
const ROUNDS: usize = 15;

fn main() {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    println!("{:10}{:8}{:>14}{:>34}", "kernel", "KV", "none, ms", "sharing 500, 1000, 1400 positions");
    for name in kernels::available().into_iter().filter(|name| *name != "portable") {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        let backend = Backend::Cpu { kernel: kernels::by_name(name).expect("it is there"), pool: Pool::new(2) };
        for kv_type in [KvType::F16, KvType::Q8_0] {
            let best = times(&backend, kv_type);
            let ratios: String = best[1..].iter().map(|time| format!("{:8.2}", time / best[0])).collect();
            println!("{name:10}{:8}{:14.2}{ratios:>34}", format!("{kv_type:?}"), 1e3 * best[0]);
        }
    }
}

/// The best times, in seconds, by the number of shared positions.
fn times(backend: &Backend, kv_type: KvType) -> [f64; SHARED.len()] {
    let mut random = Random::new(1);
    let mut variants = SHARED.map(|shared| {
        let mut base = table(kv_type);
        extend(backend, &mut base, shared, &mut random);
        let mut tables: Vec<Table> = (0..STREAMS).map(|_| base.fork()).collect();
        tables.iter_mut().for_each(|table| extend(backend, table, POSITIONS - shared, &mut random));
        tables
    });
    let qkv = rows(STREAMS, &mut random);
    let mut out = Tensor::zeros((STREAMS, SHAPE.q_dim()), candle_core::DType::F32, &Device::Cpu).expect("memory");
    let go = [Cancel::default()];
    let ops = backend.ops(Phase::Decode, &go);
    let mut best = [f64::INFINITY; SHARED.len()];
    for _ in 0..ROUNDS {
        for (tables, best) in variants.iter_mut().zip(&mut best) {
            tables.iter_mut().for_each(|table| table.reserve(1).expect("memory"));
            let rows = tables.iter_mut().enumerate();
            let mut segments: Vec<_> = rows.map(|(row, table)| table.segment(row..row + 1)).collect();
            ops.append(&qkv, SHAPE, 0, &mut segments).expect("columns");
            let start = Instant::now();
            ops.attention(&qkv, SHAPE, 0, &segments, &mut out).expect("attention");
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    best
}

fn table(kv_type: KvType) -> Table {
    let AttentionShape { n_head_kv, head_dim, window, .. } = SHAPE;
    Table::new(&KvShape { n_layers: 1, n_head_kv, head_dim, kv_type, device: None }, window)
}

/// Random queries, keys and values of rows.
fn rows(rows: usize, random: &mut Random) -> Tensor {
    let features = SHAPE.q_dim() + 2 * SHAPE.kv_dim();
    let mut number = || random.bits() as f32 / u64::MAX as f32 - 0.5;
    let all: Vec<f32> = (0..rows * features).map(|_| number()).collect();
    Tensor::from_vec(all, (rows, features), &Device::Cpu).expect("the shape fits")
}

/// Adds random positions.
fn extend(backend: &Backend, table: &mut Table, positions: usize, random: &mut Random) {
    table.reserve(positions).expect("memory");
    let qkv = rows(positions, random);
    let ops = backend.ops(Phase::Prefill, &[]);
    ops.append(&qkv, SHAPE, 0, &mut [table.segment(0..positions)]).expect("columns");
    table.commit(positions);
}
