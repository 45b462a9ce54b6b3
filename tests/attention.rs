//! Attention of sequences that share columns: each has the bits that it has alone, and a shared column is read once.

mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_core::{Device, Tensor};
use candle_phi::compute::kernels::{self, Format, Kernel, KvPage, Line, Phase, Query, Tile, Weights};
use candle_phi::compute::ops::{AttentionShape, Backend, KvShape, KvType, Segment};
use candle_phi::compute::pool::Pool;
use candle_phi::kv::table::Table;
use candle_phi::system::sync::Cancel;
use random::Random;

/// The specification, and the best for this CPU.
fn two_kernels() -> [&'static str; 2] {
    ["portable", kernels::available().pop().unwrap()]
}

fn backend(kernel: Box<dyn Kernel>, n_threads: usize) -> Backend {
    Backend::Cpu { kernel, pool: Pool::new(n_threads) }
}

fn table(shape: AttentionShape, kv_type: KvType) -> Table {
    let AttentionShape { n_head_kv, head_dim, window, .. } = shape;
    Table::new(&KvShape { n_layers: 1, n_head_kv, head_dim, kv_type, device: None }, window)
}

/// Random queries, keys and values of rows.
fn rows(rows: usize, shape: AttentionShape, random: &mut Random) -> Tensor {
    let features = shape.q_dim() + 2 * shape.kv_dim();
    let mut number = || random.bits() as f32 / u64::MAX as f32 * 4.0 - 2.0;
    let all: Vec<f32> = (0..rows * features).map(|_| number()).collect();
    Tensor::from_vec(all, (rows, features), &Device::Cpu).unwrap()
}

/// Adds random positions.
fn extend(backend: &Backend, table: &mut Table, positions: usize, shape: AttentionShape, random: &mut Random) {
    table.reserve(positions).unwrap();
    let qkv = rows(positions, shape, random);
    let ops = backend.ops(Phase::Prefill, &[]);
    ops.append(&qkv, shape, 0, &mut [table.segment(0..positions)]).unwrap();
    table.commit(positions);
}

/// Sequences that forked from each other at random places, and that have grown since.
fn family(backend: &Backend, shape: AttentionShape, kv_type: KvType, most: usize, random: &mut Random) -> Vec<Table> {
    let mut tables = vec![table(shape, kv_type)];
    extend(backend, &mut tables[0], 1 + random.below(most), shape, random);
    while tables.len() < 6 {
        let from = random.below(tables.len());
        if random.below(2) == 0 {
            tables.push(tables[from].fork());
        }
        extend(backend, &mut tables[from], 1 + random.below(most / 3), shape, random);
    }
    tables.push(table(shape, kv_type)); // it shares nothing
    tables
}

/// The bits of the attention of a pass: of all segments together, and of each alone.
fn attended(
    backend: &Backend,
    tables: &mut [Table],
    counts: &[usize],
    shape: AttentionShape,
    qkv: &Tensor,
) -> [Vec<u32>; 2] {
    let mut first = 0;
    let mut segments = Vec::new();
    for (table, count) in tables.iter_mut().zip(counts) {
        table.reserve(*count).unwrap();
        segments.push(table.segment(first..first + count));
        first += count;
    }
    let go = [Cancel::default()];
    let ops = backend.ops(Phase::Decode, &go);
    ops.append(qkv, shape, 0, &mut segments).unwrap();
    let result = |passes: Vec<&[Segment<'_>]>| {
        let mut out = Tensor::full(f32::NAN, (first, shape.q_dim()), &Device::Cpu).unwrap();
        for segments in passes {
            ops.attention(qkv, shape, 0, segments, &mut out).unwrap();
        }
        let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
        assert!(out.iter().all(|x| x.is_finite()));
        out.into_iter().map(f32::to_bits).collect()
    };
    [result(vec![&segments[..]]), result(segments.chunks(1).collect())]
}

fn shape(n_head: usize, n_head_kv: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape { n_head, n_head_kv, head_dim, window }
}

#[test]
fn sequences_that_share_columns_have_the_bits_that_each_has_alone() {
    // A head for each KV head, groups, and a group that exceeds a task.
    let shapes = [(4, 4, 96), (6, 2, 32), (20, 1, 16)];
    let mut seed = 0;
    for kernel in two_kernels() {
        for kv_type in [KvType::F16, KvType::F32, KvType::Q8_0] {
            for window in [None, Some(150), Some(1100)] {
                // Few threads walk through the blocks, many compute them side by side.
                for n_threads in [1, 2, 40] {
                    seed += 1;
                    let (n_head, n_head_kv, head_dim) = shapes[seed as usize % shapes.len()];
                    let shape = shape(n_head, n_head_kv, head_dim, window);
                    let backend = backend(kernels::by_name(kernel).unwrap(), n_threads);
                    let mut random = Random::new(seed);
                    let mut tables = family(&backend, shape, kv_type, [500, 1600][seed as usize % 2], &mut random);
                    for i in (1..tables.len()).rev() {
                        tables.swap(i, random.below(i + 1));
                    }
                    let counts: Vec<usize> = tables.iter().map(|_| [1, 1, 1, 2, 5, 30][random.below(6)]).collect();
                    let qkv = rows(counts.iter().sum(), shape, &mut random);
                    let [together, alone] = attended(&backend, &mut tables, &counts, shape, &qkv);
                    let same = together.iter().zip(&alone).filter(|(a, b)| a == b).count();
                    let case = format!("{kernel}, {kv_type:?}, {shape:?}, {n_threads} threads, rows {counts:?}");
                    assert!(same == alone.len(), "{case}: {same} of {} are the same", alone.len());
                }
            }
        }
    }
}

/// A kernel that counts the pages which attention reads.
struct Counting {
    kernel: Box<dyn Kernel>,
    pages: Arc<AtomicUsize>,
}

impl Kernel for Counting {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }
    fn decode_costs(&self) -> &'static [f32; 16] {
        self.kernel.decode_costs()
    }
    fn tile(&self, format: Format, cols: usize, phase: Phase) -> Tile {
        self.kernel.tile(format, cols, phase)
    }
    fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]) {
        self.kernel.pack(format, phase, x, at, tile);
    }
    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut kernels::Out<'_>) {
        self.kernel.matmul(weights, phase, x, tokens, out);
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        self.kernel.rms_norm(x, weight, eps, out);
    }
    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        self.kernel.swiglu(gate, up, out);
    }
    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
        self.pages.fetch_add(pages.len(), SeqCst);
        self.kernel.attention(queries, pages, head_dim);
    }
}

#[test]
fn a_shared_column_is_read_once_for_all_sequences() {
    const HEADS: usize = 2;
    for window in [None, Some(1100)] {
        let shape = shape(2 * HEADS, HEADS, 32, window);
        for n_threads in [1, 2] {
            let pages = Arc::new(AtomicUsize::new(0));
            let kernel = kernels::by_name(two_kernels()[1]).unwrap();
            let backend = backend(Box::new(Counting { kernel, pages: pages.clone() }), n_threads);
            let mut random = Random::new(9);
            let mut base = table(shape, KvType::F16);
            extend(&backend, &mut base, 1000, shape, &mut random);
            let mut tables: Vec<Table> = (0..8).map(|_| base.fork()).collect();
            for table in &mut tables {
                extend(&backend, table, 500, shape, &mut random);
            }
            let qkv = rows(tables.len(), shape, &mut random);
            pages.store(0, SeqCst);
            let [together, alone] = attended(&backend, &mut tables, &[1; 8], shape, &qkv);
            assert!(together == alone);
            // Of 12 columns, 7 are shared; a window of 1100 has moved past 3 of them.
            let shared = if window.is_none() { 7 } else { 4 };
            let (once, each) = (HEADS * (shared + 8 * 5), HEADS * 8 * (shared + 5));
            assert_eq!(pages.load(SeqCst), once + each, "{window:?}, {n_threads} threads");
        }
    }
}
