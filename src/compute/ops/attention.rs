//! Attention on the CPU, and the writes to the pages of a layer's cache.
//!
//! The context is divided into blocks of 1024 positions that start at multiples of it. Each block gives a partial
//! softmax for each query, and the partials are merged in the order of the blocks. If there are tasks enough for all
//! threads, a thread walks through the blocks with some of the tasks of a KV head, which share each block while it is in
//! the cache. Else blocks are computed side by side. Both give the same bits, and the partials that are held at a time do
//! not grow with the context.
//!
//! Decisions: docs/design/kv.md

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Storage, Tensor, bail};
use half::f16;

use super::AttentionShape;
use super::cpu::{Disjoint, PARALLEL_FROM, Rows, RowsMut};
use crate::compute::kernels::{Kernel, KvPage, KvSliceMut, Line, Query, Scratch, view_mut};
use crate::compute::pool::Pool;
use crate::kv::cache::{KvBuffer, KvLayer, PAGE, Page};
use crate::system::panic;
use crate::system::sync::Cancel;

/// Pages of a block of the context.
const PAGES: usize = 8;
const BLOCK: usize = PAGES * PAGE;
/// Queries of a task.
const QUERIES: usize = 16;
/// With this many tasks for each thread the last ones leave few threads idle.
const TASKS_PER_THREAD: usize = 4;
/// Partial softmaxes that are held at a time, in bytes at most.
pub const SCRATCH_BYTES: usize = 4 << 20;

/// Cost of storing one feature of a key, in multiplications of a matrix product: each store touches its own cache line.
const KEY_STORE_COST: usize = 64;
/// Cost of one feature of a key and of a value for one query, in the same unit.
pub const ATTEND_COST: usize = 4;

/// Writes the keys and values of some rows of qkv to a page, from position `at` of the page on.
pub fn append(
    pool: &Pool,
    qkv: &Tensor,
    rows: Range<usize>,
    shape: AttentionShape,
    page: &mut Page,
    at: usize,
) -> Result<()> {
    let (storage, layout) = qkv.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("activations are not on the CPU") };
    let qkv = Rows::of(storage, layout)?;
    let AttentionShape { n_head_kv, head_dim, .. } = shape;
    let (k, v) = (Heads::new(&mut page.k, n_head_kv)?, Heads::new(&mut page.v, n_head_kv)?);
    let work = KEY_STORE_COST * rows.len() * shape.kv_dim();
    let head = |head: usize| {
        // SAFETY: each task has one head.
        let (mut k, mut v) = unsafe { (k.head(head), v.head(head)) };
        for (i, row) in rows.clone().enumerate() {
            let (_, kv) = qkv.row(row).split_at(shape.q_dim());
            k.store_key(at + i, &kv[head * head_dim..][..head_dim]);
            v.store_value(at + i, &kv[shape.kv_dim() + head * head_dim..][..head_dim]);
        }
    };
    if work < PARALLEL_FROM {
        (0..n_head_kv).for_each(head)
    } else {
        pool.run(n_head_kv, head)
    }
    Ok(())
}

/// The heads of a page's buffer, for tasks that write them side by side.
enum Heads<'a> {
    F16(Disjoint<'a, f16>, usize),
    F32(Disjoint<'a, f32>, usize),
    Q8 { q: Disjoint<'a, i8>, scales: Disjoint<'a, f16>, heads: usize },
}

impl<'a> Heads<'a> {
    fn new(buffer: &'a mut KvBuffer, heads: usize) -> Result<Self> {
        Ok(match buffer {
            KvBuffer::F16(x) => Heads::F16(Disjoint::new(x), heads),
            KvBuffer::F32(x) => Heads::F32(Disjoint::new(x), heads),
            KvBuffer::Q8 { q, scales } => Heads::Q8 { q: Disjoint::new(q), scales: Disjoint::new(scales), heads },
            KvBuffer::Candle(_) => bail!("a KV page of Candle passed to a kernel"),
        })
    }

    /// # Safety
    /// No other live slice belongs to this head.
    unsafe fn head(&self, head: usize) -> KvSliceMut<'_> {
        fn share(len: usize, head: usize, heads: usize) -> Range<usize> {
            head * (len / heads)..(head + 1) * (len / heads)
        }
        // SAFETY: the ranges of heads are disjoint.
        unsafe {
            match self {
                Heads::F16(x, heads) => KvSliceMut::F16(x.range(share(x.len(), head, *heads))),
                Heads::F32(x, heads) => KvSliceMut::F32(x.range(share(x.len(), head, *heads))),
                Heads::Q8 { q, scales, heads } => KvSliceMut::Q8 {
                    q: q.range(share(q.len(), head, *heads)),
                    scales: scales.range(share(scales.len(), head, *heads)),
                },
            }
        }
    }
}

pub struct Attention<'a> {
    pub kernel: &'a dyn Kernel,
    pub pool: &'a Pool,
    pub cancel: &'a Cancel,
    pub layer: &'a KvLayer,
    pub shape: AttentionShape,
}

/// The softmax of a query over some keys: the largest score, and the sum of `exp(score - max)`.
#[derive(Copy, Clone)]
struct SoftmaxPartial {
    max: f32,
    sum: f32,
}

impl SoftmaxPartial {
    /// Over no keys.
    const EMPTY: Self = SoftmaxPartial { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// The division of the queries into tasks: a few query heads of one KV head at a few tokens. Tasks of the same heads are
/// neighbours.
#[derive(Copy, Clone)]
struct Tasks {
    rows: usize,
    n_head_kv: usize,
    /// Query heads of a KV head.
    group: usize,
    heads_per_task: usize,
    tokens_per_task: usize,
}

struct Task {
    kv_head: usize,
    heads: Range<usize>,
    tokens: Range<usize>,
}

impl Tasks {
    fn new(shape: AttentionShape, rows: usize) -> Self {
        let group = shape.n_head / shape.n_head_kv;
        let heads_per_task = group.min(QUERIES);
        Tasks { rows, n_head_kv: shape.n_head_kv, group, heads_per_task, tokens_per_task: QUERIES / heads_per_task }
    }

    /// Tasks of the same heads.
    fn in_a_row(self) -> usize {
        self.rows.div_ceil(self.tokens_per_task)
    }

    /// Parts of the query heads of a KV head.
    fn parts(self) -> usize {
        self.group.div_ceil(self.heads_per_task)
    }

    fn count(self) -> usize {
        self.n_head_kv * self.parts() * self.in_a_row()
    }

    /// Ranges of tasks of the same heads: at least `least` of them, if there are tasks enough.
    fn ranges(self, least: usize) -> Vec<Range<usize>> {
        let rows = self.n_head_kv * self.parts();
        let tasks = self.in_a_row().div_ceil(least.div_ceil(rows).min(self.in_a_row()));
        let row = |row: usize| {
            let all = row * self.in_a_row()..(row + 1) * self.in_a_row();
            all.clone().step_by(tasks).map(move |first| first..all.end.min(first + tasks))
        };
        (0..rows).flat_map(row).collect()
    }

    fn get(self, task: usize) -> Task {
        let (row, token) = (task / self.in_a_row(), task % self.in_a_row() * self.tokens_per_task);
        let (kv_head, part) = (row / self.parts(), row % self.parts());
        let first = kv_head * self.group + part * self.heads_per_task;
        Task {
            kv_head,
            heads: first..((kv_head + 1) * self.group).min(first + self.heads_per_task),
            tokens: token..self.rows.min(token + self.tokens_per_task),
        }
    }
}

impl Task {
    fn len(&self) -> usize {
        self.tokens.len() * self.heads.len()
    }

    /// Token and head of each query.
    fn queries(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.tokens.clone().flat_map(|token| self.heads.clone().map(move |head| (token, head)))
    }
}

impl InplaceOp2 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, qkv: &CpuStorage, qkv_l: &Layout) -> Result<()> {
        let (qkv, out) = (Rows::of(qkv, qkv_l)?, RowsMut::of(out, out_l)?);
        let tasks = Tasks::new(self.shape, qkv.rows);
        let seen = self.sees(qkv.rows, 0).start..self.layer.len();
        let blocks = seen.start / BLOCK..seen.end.div_ceil(BLOCK);
        let (width, n_head) = (self.shape.q_dim(), self.shape.n_head);
        let parallel = ATTEND_COST * qkv.rows * seen.len() * width >= PARALLEL_FROM;
        let many = tasks.count() >= TASKS_PER_THREAD * self.pool.n_threads();
        let side_by_side = SCRATCH_BYTES / (4 * qkv.rows * (width + 2 * n_head) + 1);
        if blocks.len() == 1 || many || !parallel || side_by_side <= 1 {
            self.walk(qkv, out, tasks, blocks, parallel);
        } else {
            self.spread(qkv, out, tasks, blocks, side_by_side);
        }
        Ok(())
    }
}

impl Attention<'_> {
    /// The positions that the query of a token sees, of `tokens` newest.
    fn sees(&self, tokens: usize, token: usize) -> Range<usize> {
        let position = self.layer.len() - tokens + token;
        self.shape.window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1
    }

    /// Ranges of tasks walk through the blocks.
    fn walk(&self, qkv: Rows<'_>, out: RowsMut<'_>, tasks: Tasks, blocks: Range<usize>, parallel: bool) {
        let (n_head, head_dim) = (self.shape.n_head, self.shape.head_dim);
        let ranges = tasks.ranges(TASKS_PER_THREAD * self.pool.n_threads());
        let target = Disjoint::new(out.data);
        let run = |range: usize| {
            let range = ranges[range].clone();
            let mut scratch = Scratch::take(Line::count(4 * QUERIES * (head_dim + 2 * range.len())));
            let (means, merged) = view_mut::<f32>(&mut scratch).split_at_mut(QUERIES * head_dim);
            let merged = merged.as_chunks_mut().0;
            merged.fill([SoftmaxPartial::EMPTY.max, SoftmaxPartial::EMPTY.sum]);
            for block in blocks.clone() {
                for (task, merged) in range.clone().zip(merged.chunks_exact_mut(QUERIES)) {
                    if self.cancel.is_set() {
                        return;
                    }
                    let task = tasks.get(task);
                    let partials = self.attend(qkv, &task, block, means.chunks_exact_mut(head_dim));
                    let results = means.chunks_exact(head_dim).zip(partials);
                    for (((token, head), (mean, partial)), merged) in task.queries().zip(results).zip(merged) {
                        let place = token * n_head + head;
                        // SAFETY: each token and head belong to one task.
                        let out = unsafe { target.range(place * head_dim..(place + 1) * head_dim) };
                        let so_far = SoftmaxPartial { max: merged[0], sum: merged[1] };
                        let so_far = merge(so_far, out, partial, mean);
                        *merged = [so_far.max, so_far.sum];
                    }
                }
            }
        };
        if parallel { self.pool.run(ranges.len(), run) } else { (0..ranges.len()).for_each(run) }
    }

    /// Some blocks are computed side by side, then merged, then the next ones.
    fn spread(&self, qkv: Rows<'_>, out: RowsMut<'_>, tasks: Tasks, blocks: Range<usize>, side_by_side: usize) {
        let AttentionShape { n_head, head_dim, .. } = self.shape;
        let (queries, count) = (qkv.rows * n_head, tasks.count());
        let held = side_by_side.min(blocks.len());
        // (blocks, tokens, heads, head_dim); (blocks, tokens, heads, 2); (tokens, heads, 2)
        let mut scratch = Scratch::take(Line::count(4 * queries * (held * (head_dim + 2) + 2)));
        let (means, sums) = view_mut::<f32>(&mut scratch).split_at_mut(held * queries * head_dim);
        let (sums, merged) = sums.split_at_mut(held * queries * 2);
        for merged in merged.as_chunks_mut().0 {
            *merged = [SoftmaxPartial::EMPTY.max, SoftmaxPartial::EMPTY.sum];
        }
        let (means, sums, merged) = (Disjoint::new(means), Disjoint::new(sums), Disjoint::new(merged));
        let target = Disjoint::new(out.data);
        for first in blocks.clone().step_by(held) {
            let now = first..blocks.end.min(first + held);
            self.pool.run(now.len() * count, |i| {
                if self.cancel.is_set() {
                    return;
                }
                let (block, task) = (i / count, tasks.get(i % count));
                let place = |(token, head)| (block * qkv.rows + token) * n_head + head;
                // SAFETY: each block, token and head belong to one task.
                let means = task
                    .queries()
                    .map(|query| unsafe { means.range(place(query) * head_dim..(place(query) + 1) * head_dim) });
                let partials = self.attend(qkv, &task, now.start + block, means);
                for (query, partial) in task.queries().zip(partials) {
                    // SAFETY: as above.
                    let sums = unsafe { sums.range(2 * place(query)..2 * place(query) + 2) };
                    sums.copy_from_slice(&[partial.max, partial.sum]);
                }
            });
            self.pool.run(queries, |query| {
                // SAFETY: each query belongs to one task, and the tasks that wrote the partials have ended.
                let (out, merged) = unsafe {
                    (target.range(query * head_dim..(query + 1) * head_dim), merged.range(2 * query..2 * query + 2))
                };
                let mut so_far = SoftmaxPartial { max: merged[0], sum: merged[1] };
                for block in 0..now.len() {
                    let place = block * queries + query;
                    // SAFETY: as above.
                    let (mean, sums) = unsafe {
                        (means.range(place * head_dim..(place + 1) * head_dim), sums.range(2 * place..2 * place + 2))
                    };
                    so_far = merge(so_far, out, SoftmaxPartial { max: sums[0], sum: sums[1] }, mean);
                }
                merged.copy_from_slice(&[so_far.max, so_far.sum]);
            });
        }
    }

    /// The softmax of the queries of a task over one block. Their weighted means of the values go to `outs`; a query
    /// that sees no key of the block leaves its own as it is.
    fn attend<'a>(
        &'a self,
        qkv: Rows<'a>,
        task: &Task,
        block: usize,
        outs: impl Iterator<Item = &'a mut [f32]>,
    ) -> [SoftmaxPartial; QUERIES] {
        let AttentionShape { n_head_kv, head_dim, .. } = self.shape;
        let block = block * BLOCK..(block + 1) * BLOCK;
        let mut queries: [Query; QUERIES] =
            std::array::from_fn(|_| Query { q: &[], keys: 0..0, out: &mut [], max: 0.0, sum: 0.0 });
        for ((query, (token, head)), out) in queries.iter_mut().zip(task.queries()).zip(outs) {
            let seen = self.sees(qkv.rows, token);
            let keys = seen.start.max(block.start)..seen.end.min(block.end).max(block.start);
            *query = Query { q: &qkv.row(token)[head * head_dim..][..head_dim], keys, out, max: 0.0, sum: 0.0 };
        }
        let queries = &mut queries[..task.len()];
        let first = queries.iter().filter(|query| !query.keys.is_empty()).map(|query| query.keys.start).min();
        let mut partials = [SoftmaxPartial::EMPTY; QUERIES];
        let Some(first) = first else { return partials };
        let end = queries.iter().map(|query| query.keys.end).max().unwrap_or(first);
        let first = first / PAGE * PAGE;
        let mut pages = [const { None }; PAGES];
        for (start, page) in (first..end).step_by(PAGE).zip(&mut pages) {
            let Page { start, k, v } = self.layer.page_of(start);
            let head = |buffer: &'a KvBuffer| {
                buffer.head(task.kv_head, n_head_kv).unwrap_or_else(|error| panic::resume(error))
            };
            *page = Some(KvPage { start: *start, k: head(k), v: head(v) });
        }
        let Some(any) = pages[0] else { return partials };
        let pages = pages.map(|page| page.unwrap_or(any));
        self.kernel.attention(queries, &pages[..(end - first).div_ceil(PAGE)], head_dim);
        for (partial, query) in partials.iter_mut().zip(queries.iter()) {
            if !query.keys.is_empty() {
                *partial = SoftmaxPartial { max: query.max, sum: query.sum };
            }
        }
        partials
    }
}

/// Adds the partial of one more block to a mean. The first that has any key is copied.
fn merge(so_far: SoftmaxPartial, out: &mut [f32], more: SoftmaxPartial, mean: &[f32]) -> SoftmaxPartial {
    if more.sum == 0.0 {
        return so_far;
    }
    if so_far.sum == 0.0 {
        out.copy_from_slice(mean);
        return more;
    }
    let max = so_far.max.max(more.max);
    let (a, b) = (so_far.sum * libm::expf(so_far.max - max), more.sum * libm::expf(more.max - max));
    for (out, mean) in out.iter_mut().zip(mean) {
        *out = (*out * a + mean * b) / (a + b);
    }
    SoftmaxPartial { max, sum: a + b }
}
