//! Attention on the CPU.
//!
//! Each row of a pass attends to the columns of its own sequence. The context is divided into blocks of 1024 positions that
//! start at multiples of 1024. Each block gives a partial softmax for each query, and the partials are merged in the order
//! of the blocks. If there are tasks enough for all threads, a thread walks through the blocks with some of the tasks of a
//! KV head, which share each block while it is in the cache. Else blocks are computed side by side. Both give the same
//! bits, and the partials that are held at a time do not grow with the context.
//!
//! Sequences that share columns form one part. Its queries that see the same page of a column go to the kernel together, so
//! that the page is read once for all of them. The bits of a query do not depend on the others.
//!
//! Decisions: docs/design/kv.md

use std::ops::Range;
use std::ptr;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result};

use super::cpu::{Disjoint, PARALLEL_FROM, Rows, RowsMut};
use super::{AttentionShape, Cancels, KvBuffer, Segment};
use crate::compute::kernels::{Kernel, KvPage, Line, PAGE, Query, Scratch, view_mut};
use crate::compute::pool::Pool;
use crate::system::panic;

/// Pages of a block of the context.
const PAGES: usize = 8;
const BLOCK: usize = PAGES * PAGE;
/// Queries of a task.
const QUERIES: usize = 16;
/// With this many tasks for each thread the last ones leave few threads idle.
const TASKS_PER_THREAD: usize = 4;
/// Partial softmaxes that are held at a time, in bytes at most.
pub const SCRATCH_BYTES: usize = 4 << 20;

/// Cost of one feature of a key and of a value for one query, in multiplications of a matrix product.
pub const ATTEND_COST: usize = 4;

pub struct Attention<'a> {
    pub kernel: &'a dyn Kernel,
    pub pool: &'a Pool,
    pub(super) cancels: Cancels<'a>,
    pub shape: AttentionShape,
    pub layer: usize,
    pub segments: &'a [Segment<'a>],
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

/// The division of the queries of a part into tasks: a few query heads of one KV head at a few tokens. Tasks of the same
/// heads are neighbours.
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
        let target = Disjoint::new(out.data);
        let parts: Vec<Part<'_>> = self.families().into_iter().map(|family| Part::new(self, family, qkv)).collect();
        let work: usize = parts.iter().map(Part::work).sum();
        let tasks: usize = parts.iter().map(|part| part.tasks.count()).sum();
        let few = work >= PARALLEL_FROM && tasks < TASKS_PER_THREAD * self.pool.n_threads();
        let (spread, walked): (Vec<_>, Vec<_>) =
            parts.iter().partition(|part| few && part.blocks.len() > 1 && part.side_by_side() > 1);
        self.walk(&walked, &target, work);
        spread.into_iter().for_each(|part| part.spread(&target));
        Ok(())
    }
}

impl<'a> Attention<'a> {
    /// The segments, those that share columns together. A segment follows the one that it shares most columns with, so
    /// that segments which share a column are neighbours.
    fn families(&self) -> Vec<Vec<&'a Segment<'a>>> {
        let mut families: Vec<Vec<&Segment<'_>>> = Vec::new();
        for segment in self.segments {
            let shares = |(f, family): (usize, &Vec<&Segment<'_>>)| {
                let shares = family.iter().map(|member| shared(member, segment)).enumerate();
                shares.map(|(place, columns)| (columns, f, place)).collect::<Vec<_>>()
            };
            match families.iter().enumerate().flat_map(shares).max() {
                Some((1.., family, place)) => families[family].insert(place + 1, segment),
                _ => families.push(vec![segment]),
            }
        }
        families
    }

    /// Ranges of tasks of all these parts walk through their blocks.
    fn walk(&self, parts: &[&Part<'_>], target: &Disjoint<'_>, work: usize) {
        let least = TASKS_PER_THREAD * self.pool.n_threads();
        let of_part = |part| Part::ranges(part, least).into_iter().map(move |range| (part, range));
        let ranges: Vec<_> = parts.iter().copied().flat_map(of_part).collect();
        let run = |i: usize| {
            let (part, range) = &ranges[i];
            part.walk(range.clone(), target);
        };
        if work < PARALLEL_FROM { (0..ranges.len()).for_each(run) } else { self.pool.run(ranges.len(), run) }
    }
}

/// The columns that two segments share.
fn shared(a: &Segment<'_>, b: &Segment<'_>) -> usize {
    let held = a.first().max(b.first())..a.end().min(b.end());
    held.step_by(PAGE).filter(|&position| ptr::eq(a.column(position), b.column(position))).count()
}

/// The attention of the segments of a family. Its tokens are their rows, one segment after the other.
struct Part<'a> {
    op: &'a Attention<'a>,
    /// Each with its first token.
    segments: Vec<(usize, &'a Segment<'a>)>,
    /// All rows of the pass.
    qkv: Rows<'a>,
    tasks: Tasks,
    /// The blocks that its tokens see.
    blocks: Range<usize>,
}

impl<'a> Part<'a> {
    fn new(op: &'a Attention<'a>, family: Vec<&'a Segment<'a>>, qkv: Rows<'a>) -> Self {
        let mut tokens = 0;
        let mut segments = Vec::with_capacity(family.len());
        for segment in family {
            segments.push((tokens, segment));
            tokens += segment.rows.len();
        }
        let mut part = Part { op, segments, qkv, tasks: Tasks::new(op.shape, tokens), blocks: 0..0 };
        let first = part.segments.iter().map(|(token, _)| part.sees(*token).start).min();
        let end = part.segments.iter().map(|(_, segment)| segment.end()).max();
        part.blocks = first.unwrap_or(0) / BLOCK..end.unwrap_or(0).div_ceil(BLOCK);
        part
    }

    /// In multiplications of a matrix product.
    fn work(&self) -> usize {
        let seen = |(token, segment): &(usize, &Segment<'_>)| segment.end() - self.sees(*token).start;
        let pairs: usize = self.segments.iter().map(|part| part.1.rows.len() * seen(part)).sum();
        ATTEND_COST * pairs * self.op.shape.q_dim()
    }

    /// Blocks whose partial results are held at a time.
    fn side_by_side(&self) -> usize {
        let AttentionShape { n_head, .. } = self.op.shape;
        SCRATCH_BYTES / (4 * self.tasks.rows * (self.op.shape.q_dim() + 2 * n_head) + 1)
    }

    fn ranges(&self, least: usize) -> Vec<Range<usize>> {
        self.tasks.ranges(least)
    }

    /// The segment of a token, and the token's row of the pass.
    fn row(&self, token: usize) -> (&'a Segment<'a>, usize) {
        let next = self.segments.partition_point(|(first, _)| *first <= token);
        let (first, segment) = self.segments[next - 1];
        (segment, segment.rows.start + token - first)
    }

    /// The positions that the query of a token sees.
    fn sees(&self, token: usize) -> Range<usize> {
        let (segment, row) = self.row(token);
        let position = segment.position(row);
        self.op.shape.window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1
    }

    /// The place of a query among those of the pass.
    fn place(&self, token: usize, head: usize) -> usize {
        self.row(token).1 * self.op.shape.n_head + head
    }

    /// A range of tasks walks through the blocks.
    fn walk(&self, range: Range<usize>, target: &Disjoint<'_>) {
        let head_dim = self.op.shape.head_dim;
        let mut scratch = Scratch::take(Line::count(4 * QUERIES * (head_dim + 2 * range.len())));
        let (means, merged) = view_mut::<f32>(&mut scratch).split_at_mut(QUERIES * head_dim);
        let merged = merged.as_chunks_mut().0;
        merged.fill([SoftmaxPartial::EMPTY.max, SoftmaxPartial::EMPTY.sum]);
        for block in self.blocks.clone() {
            for (task, merged) in range.clone().zip(merged.chunks_exact_mut(QUERIES)) {
                if self.op.cancels.all_set() {
                    return;
                }
                let task = self.tasks.get(task);
                let partials = self.attend(&task, block, means.chunks_exact_mut(head_dim));
                let results = means.chunks_exact(head_dim).zip(partials);
                for (((token, head), (mean, partial)), merged) in task.queries().zip(results).zip(merged) {
                    let place = self.place(token, head);
                    // SAFETY: each token and head of a part belong to one task.
                    let out = unsafe { target.range(place * head_dim..(place + 1) * head_dim) };
                    let so_far = SoftmaxPartial { max: merged[0], sum: merged[1] };
                    let so_far = merge(so_far, out, partial, mean);
                    *merged = [so_far.max, so_far.sum];
                }
            }
        }
    }

    /// Some blocks are computed side by side, then merged, then the next ones.
    fn spread(&self, target: &Disjoint<'_>) {
        let AttentionShape { n_head, head_dim, .. } = self.op.shape;
        let (pool, rows, blocks) = (self.op.pool, self.tasks.rows, self.blocks.clone());
        let (queries, count) = (rows * n_head, self.tasks.count());
        let held = self.side_by_side().min(blocks.len());
        // (blocks, tokens, heads, head_dim); (blocks, tokens, heads, 2); (tokens, heads, 2)
        let mut scratch = Scratch::take(Line::count(4 * queries * (held * (head_dim + 2) + 2)));
        let (means, sums) = view_mut::<f32>(&mut scratch).split_at_mut(held * queries * head_dim);
        let (sums, merged) = sums.split_at_mut(held * queries * 2);
        for merged in merged.as_chunks_mut().0 {
            *merged = [SoftmaxPartial::EMPTY.max, SoftmaxPartial::EMPTY.sum];
        }
        let (means, sums, merged) = (Disjoint::new(means), Disjoint::new(sums), Disjoint::new(merged));
        for first in blocks.clone().step_by(held) {
            let now = first..blocks.end.min(first + held);
            pool.run(now.len() * count, |i| {
                if self.op.cancels.all_set() {
                    return;
                }
                let (block, task) = (i / count, self.tasks.get(i % count));
                let place = |(token, head)| (block * rows + token) * n_head + head;
                // SAFETY: each block, token and head belong to one task.
                let means = task
                    .queries()
                    .map(|query| unsafe { means.range(place(query) * head_dim..(place(query) + 1) * head_dim) });
                let partials = self.attend(&task, now.start + block, means);
                for (query, partial) in task.queries().zip(partials) {
                    // SAFETY: as above.
                    let sums = unsafe { sums.range(2 * place(query)..2 * place(query) + 2) };
                    sums.copy_from_slice(&[partial.max, partial.sum]);
                }
            });
            pool.run(queries, |query| {
                let place = self.place(query / n_head, query % n_head);
                // SAFETY: each query belongs to one task, and the tasks that wrote the partials have ended.
                let (out, merged) = unsafe {
                    (target.range(place * head_dim..(place + 1) * head_dim), merged.range(2 * query..2 * query + 2))
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
    fn attend<'s>(
        &'s self,
        task: &Task,
        block: usize,
        outs: impl Iterator<Item = &'s mut [f32]>,
    ) -> [SoftmaxPartial; QUERIES] {
        let head_dim = self.op.shape.head_dim;
        let block = block * BLOCK..(block + 1) * BLOCK;
        let mut queries: [Query; QUERIES] = std::array::from_fn(|_| Query::new(&[], 0..0, &mut []));
        for ((query, (token, head)), out) in queries.iter_mut().zip(task.queries()).zip(outs) {
            let seen = self.sees(token);
            let keys = seen.start.max(block.start)..seen.end.min(block.end).max(block.start);
            let q = &self.qkv.row(self.row(token).1)[head * head_dim..][..head_dim];
            *query = Query::new(q, keys, out);
        }
        let queries = &mut queries[..task.len()];
        let seen = |query: &&mut Query<'_>| !query.keys.is_empty();
        let first = queries.iter_mut().filter(seen).map(|query| query.keys.start / PAGE * PAGE).min();
        let mut partials = [SoftmaxPartial::EMPTY; QUERIES];
        let Some(first) = first else { return partials };
        let end = queries.iter().map(|query| query.keys.end).max().unwrap_or(first);
        let heads = task.heads.len();
        let mut page = first;
        while page < end {
            let readers = self.readers(task, queries, page);
            let differ = |next: &usize| self.readers(task, queries, *next) != readers;
            let pages = page..(page..end).step_by(PAGE).skip(1).find(differ).unwrap_or(end);
            page = pages.end;
            let mut token = 0;
            for run in readers.chunk_by(|a, b| a == b) {
                let tokens = token..token + run.len();
                token = tokens.end;
                if run[0] > 0 {
                    let (segment, _) = self.row(task.tokens.start + tokens.start);
                    let queries = &mut queries[tokens.start * heads..tokens.end * heads];
                    let (count, read) = (pages.len().div_ceil(PAGE), self.pages(segment, task.kv_head, pages.clone()));
                    self.op.kernel.attention(queries, &read[..count], head_dim);
                }
            }
        }
        for (partial, query) in partials.iter_mut().zip(queries) {
            if !query.keys.is_empty() {
                query.finish();
                *partial = SoftmaxPartial { max: query.max, sum: query.sum };
            }
        }
        partials
    }
    /// A number for each token of a task: 0 if it sees nothing of the page at a position. Neighbours that see the same
    /// column have the same number.
    fn readers(&self, task: &Task, queries: &[Query<'_>], page: usize) -> [u8; QUERIES] {
        let mut readers = [0; QUERIES];
        let (mut runs, mut last) = (0, None);
        let keys = queries.chunks(task.heads.len()).map(|queries| &queries[0].keys);
        for ((reader, token), keys) in readers.iter_mut().zip(task.tokens.clone()).zip(keys) {
            let sees = keys.start.max(page) < keys.end.min(page + PAGE);
            let column = sees.then(|| ptr::from_ref(self.row(token).0.column(page)));
            if sees {
                runs += u8::from(column != last);
                *reader = runs;
            }
            last = column;
        }
        readers
    }

    /// Consecutive pages of a KV head, as many as the positions reach. The rest of the array repeats the first.
    fn pages<'s>(&'s self, segment: &'s Segment<'_>, kv_head: usize, positions: Range<usize>) -> [KvPage<'s>; PAGES] {
        let page = |position| {
            let column = segment.column(position);
            let block = column.layer(self.op.layer);
            let head = |buffer: &'s KvBuffer| {
                buffer.head(kv_head, self.op.shape.n_head_kv).unwrap_or_else(|error| panic::resume(error))
            };
            KvPage { start: column.start(), k: head(&block.k), v: head(&block.v) }
        };
        let mut pages = [page(positions.start); PAGES];
        for (next, position) in pages.iter_mut().zip(positions.step_by(PAGE)).skip(1) {
            *next = page(position);
        }
        pages
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
