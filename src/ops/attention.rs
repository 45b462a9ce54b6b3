//! Attention on the CPU, and what it attends to: the pages of a layer's cache.
//!
//! The context is walked in blocks of 1024 positions that start at multiples of it. Each block gives a part of the
//! result for each query, and the parts are merged in order: the same bits whether blocks are computed one after the
//! other or side by side.
//!
//! Decisions: docs/design/kv.md

use std::ops::Range;
use std::sync::Mutex;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Storage, Tensor, bail};
use half::f16;

use super::AttentionShape;
use super::cpu::{Disjoint, PARALLEL_FROM, Rows, RowsMut};
use crate::cache::{KvBuffer, KvLayer, PAGE, Page};
use crate::error::Error;
use crate::kernels::{Kernel, KvPage, KvSliceMut, Line, Query, Scratch, view_mut};
use crate::threads::{Cancel, Pool, lock};

/// Pages of a block of the context.
const PAGES: usize = 8;
const BLOCK: usize = PAGES * PAGE;
/// Queries that one task takes together.
const QUERIES: usize = 16;

/// Multiplications that take as long as storing a feature of a key: each lies in a cache line of its own.
const STORE: usize = 64;
/// Multiplications that take as long as what a query does with a feature of a key and of a value.
const GATHER: usize = 4;

/// Write the keys and values of some rows of qkv to a page, from position `at` of the page on.
pub fn append(
    pool: &Pool,
    qkv: &Tensor,
    rows: Range<usize>,
    shape: AttentionShape,
    page: &mut Page,
    at: usize,
) -> Result<()> {
    let (storage, layout) = qkv.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("activations of another device met the CPU") };
    let qkv = Rows::of(storage, layout)?;
    let AttentionShape { n_head_kv, head_dim, .. } = shape;
    let (k, v) = (Heads::new(&mut page.k, n_head_kv)?, Heads::new(&mut page.v, n_head_kv)?);
    let work = STORE * rows.len() * shape.kv_dim();
    let head = |head: usize| {
        // SAFETY: a head a task.
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

/// The heads of a page's buffer, to be written side by side.
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
            KvBuffer::Candle(_) => bail!("a KV page of Candle met the kernels"),
        })
    }

    /// # Safety
    /// Nobody else has this head.
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

/// What a query gathered from some keys: `out` is their weighted mean, `sum` is that of `exp(score - max)`.
#[derive(Copy, Clone)]
struct Gathered {
    max: f32,
    sum: f32,
}

impl InplaceOp2 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, qkv: &CpuStorage, qkv_l: &Layout) -> Result<()> {
        let (qkv, out) = (Rows::of(qkv, qkv_l)?, RowsMut::of(out, out_l)?);
        let AttentionShape { n_head, n_head_kv, head_dim, .. } = self.shape;
        let group = n_head / n_head_kv;
        // A task takes a few query heads of one KV head at a few tokens.
        let heads_per_task = group.min(QUERIES);
        let tokens_per_task = QUERIES / heads_per_task;
        let parts = group.div_ceil(heads_per_task);
        let seen = self.sees(qkv.rows, 0).start..self.layer.len();
        let blocks = seen.start / BLOCK..seen.end.div_ceil(BLOCK);
        let (width, n_blocks) = (n_head * head_dim, blocks.len());
        let tasks = qkv.rows.div_ceil(tokens_per_task) * n_head_kv * parts;

        // (blocks, tokens, heads, head_dim) and (blocks, tokens, heads, 2): what each block gives
        let mut scratch = Scratch::take(Line::count(4 * n_blocks * qkv.rows * (width + 2 * n_head)));
        let (means, sums) = view_mut::<f32>(&mut scratch).split_at_mut(n_blocks * qkv.rows * width);
        let (means, sums) = (Disjoint::new(means), Disjoint::new(sums));
        let failure = Mutex::new(None);
        let one = |task: usize| {
            if self.cancel.is_set() {
                return;
            }
            let (block, task) = (task / tasks, task % tasks);
            let (token, head) = (task / (n_head_kv * parts) * tokens_per_task, task % (n_head_kv * parts));
            let (kv_head, part) = (head / parts, head % parts);
            let tokens = token..qkv.rows.min(token + tokens_per_task);
            let first_head = kv_head * group + part * heads_per_task;
            let heads = first_head..((kv_head + 1) * group).min(first_head + heads_per_task);
            let keys = (blocks.start + block) * BLOCK..(blocks.start + block + 1) * BLOCK;
            let place = |token: usize, head: usize| (block * qkv.rows + token) * n_head + head;
            if let Err(error) = self.gather(qkv, tokens, heads, kv_head, keys, |token, head| {
                let place = place(token, head);
                // SAFETY: every block, token and head is one task's.
                unsafe {
                    let mean = means.range(place * head_dim..(place + 1) * head_dim);
                    (mean, sums.range(2 * place..2 * place + 2))
                }
            }) {
                *lock(&failure) = Some(error);
            }
        };
        if GATHER * qkv.rows * seen.len() * width < PARALLEL_FROM {
            (0..n_blocks * tasks).for_each(one)
        } else {
            self.pool.run(n_blocks * tasks, one)
        }
        if let Some(error) = lock(&failure).take() {
            bail!("{error}")
        }
        let target = Disjoint::new(out.data);
        let token = |token: usize| {
            // SAFETY: a token a task; the tasks that wrote the parts are done.
            let out = unsafe { target.range(token * width..(token + 1) * width) };
            for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let mut so_far = Gathered { max: f32::NEG_INFINITY, sum: 0.0 };
                for block in 0..n_blocks {
                    let place = (block * qkv.rows + token) * n_head + head;
                    // SAFETY: as above.
                    let (mean, sum) = unsafe {
                        (means.range(place * head_dim..(place + 1) * head_dim), sums.range(2 * place..2 * place + 2))
                    };
                    so_far = merge(so_far, out, Gathered { max: sum[0], sum: sum[1] }, mean);
                }
            }
        };
        if qkv.rows * width < PARALLEL_FROM {
            (0..qkv.rows).for_each(token)
        } else {
            self.pool.run(qkv.rows, token)
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

    /// What some queries of one KV head gather from one block of the context.
    fn gather<'a>(
        &self,
        qkv: Rows<'a>,
        tokens: Range<usize>,
        heads: Range<usize>,
        kv_head: usize,
        block: Range<usize>,
        target: impl Fn(usize, usize) -> (&'a mut [f32], &'a mut [f32]),
    ) -> std::result::Result<(), Error> {
        let AttentionShape { n_head_kv, head_dim, .. } = self.shape;
        let count = tokens.len() * heads.len();
        let mut sums: [&mut [f32]; QUERIES] = Default::default();
        let mut queries: [Query; QUERIES] = std::array::from_fn(|i| {
            if i >= count {
                return Query { q: &[], keys: 0..0, out: &mut [], max: 0.0, sum: 0.0 };
            }
            let (token, head) = (tokens.start + i / heads.len(), heads.start + i % heads.len());
            let (out, sum) = target(token, head);
            sums[i] = sum;
            let seen = self.sees(qkv.rows, token);
            let keys = seen.start.max(block.start)..seen.end.min(block.end).max(block.start);
            Query { q: &qkv.row(token)[head * head_dim..][..head_dim], keys, out, max: 0.0, sum: 0.0 }
        });
        let queries = &mut queries[..count];
        let from = queries.iter().filter(|q| !q.keys.is_empty()).map(|query| query.keys.start).min();
        let to = queries.iter().map(|query| query.keys.end).max().unwrap_or(0);
        if let Some(from) = from {
            let first = from / PAGE * PAGE;
            let mut pages = [const { None }; PAGES];
            for (i, page) in pages.iter_mut().enumerate().take((to - first).div_ceil(PAGE)) {
                let held = self.layer.page_of(first + i * PAGE);
                let (k, v) = (held.k.head(kv_head, n_head_kv)?, held.v.head(kv_head, n_head_kv)?);
                *page = Some(KvPage { start: held.start, k, v });
            }
            let Some(some) = pages[0] else { return Ok(()) };
            let pages = pages.map(|page| page.unwrap_or(some));
            self.kernel.attention(queries, &pages[..(to - first).div_ceil(PAGE)], head_dim);
        }
        for (query, sums) in queries.iter().zip(&mut sums) {
            let gathered = if query.keys.is_empty() { [f32::NEG_INFINITY, 0.0] } else { [query.max, query.sum] };
            sums.copy_from_slice(&gathered);
        }
        Ok(())
    }
}

/// Adds what one more block gave to a mean. The first that saw any key is taken as it is.
fn merge(so_far: Gathered, out: &mut [f32], more: Gathered, mean: &[f32]) -> Gathered {
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
    Gathered { max, sum: a + b }
}
