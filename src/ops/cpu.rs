//! The operations on the CPU: Candle custom ops over the kernels and the pool.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp2, Layout, Result, Shape, Storage, Tensor, bail,
};

use super::matrix::Mapped;
use super::{AttentionShape, Matrix};
use crate::cache::{KvLayer, PAGE};
use crate::kernels::{self, Kernel, KvPage, KvSlice, Query};
use crate::threads::{Cancel, Pool};

/// Work below this many multiplications is done where it is: waking a thread costs about as much.
const PARALLEL_FROM: usize = 1 << 17;
/// Tasks per thread: enough that an unlucky thread does not keep the others waiting.
const TASKS_PER_THREAD: usize = 8;
/// Tokens whose queries share one task of attention.
const QUERY_TOKENS: usize = 16;

/// A (rows, cols) view of a tensor whose rows may lie apart, as those of a narrowed tensor do.
#[derive(Copy, Clone)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    rows: usize,
    cols: usize,
}

impl<'a> Rows<'a> {
    fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (rows, cols) = layout.shape().dims2()?;
        let &[stride, 1] = layout.stride() else { bail!("rows must be contiguous: stride {:?}", layout.stride()) };
        Ok(Rows { data: &storage.as_slice::<f32>()?[layout.start_offset()..], stride, rows, cols })
    }

    fn row(self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.cols]
    }

    /// All of it as one slice, when the rows lie end to end.
    fn whole(self) -> Result<&'a [f32]> {
        if self.stride != self.cols && self.rows > 1 {
            bail!("a contiguous tensor is due: {} columns, stride {}", self.cols, self.stride)
        }
        Ok(&self.data[..self.rows * self.cols])
    }
}

/// A buffer that tasks write disjoint ranges of.
struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: `range` is unsafe, and its contract rules out two threads on one element.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    fn new(buffer: &'a mut [f32]) -> Self {
        Disjoint { start: buffer.as_mut_ptr(), len: buffer.len(), buffer: PhantomData }
    }

    /// # Safety
    /// No other live range overlaps this one.
    #[allow(clippy::mut_from_ref)] // that is its purpose; the contract above makes it sound
    unsafe fn range(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the buffer, as just asserted, and not aliased, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

fn output(data: Vec<f32>, rows: usize, cols: usize) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), Shape::from((rows, cols))))
}

pub fn embed(table: &Matrix, ids: &[u32]) -> Result<Tensor> {
    let Matrix::Mapped(table) = table else { bail!("a matrix of another device met the CPU") };
    let mut out = vec![0f32; ids.len() * table.cols];
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(table.cols)) {
        kernels::dequantize(table.weights().row(id as usize), out);
    }
    Tensor::from_vec(out, (ids.len(), table.cols), &candle_core::Device::Cpu)
}

pub struct RmsNorm<'a> {
    pub kernel: &'a dyn Kernel,
    pub eps: f32,
}

impl CustomOp2 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Rows::of(x, x_l)?;
        let weight = &w.as_slice::<f32>()?[w_l.start_offset()..][..x.cols];
        let mut out = vec![0f32; x.rows * x.cols];
        for (row, out) in out.chunks_exact_mut(x.cols).enumerate() {
            self.kernel.rms_norm(x.row(row), weight, self.eps, out);
        }
        output(out, x.rows, x.cols)
    }
}

pub struct Linear<'a> {
    pub kernel: &'a dyn Kernel,
    pub pool: &'a Pool,
    pub cancel: &'a Cancel,
    pub weights: &'a Mapped,
}

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Rows::of(x, x_l)?;
        let (tokens, features) = (x.rows, self.weights.rows);
        let x = x.whole()?;
        let mut out = vec![0f32; tokens * features];
        let tasks = match self.pool.n_threads() {
            1 => features.div_ceil(64), // only so that a cancellation is seen soon
            n if tokens * features * self.weights.cols >= PARALLEL_FROM => n * TASKS_PER_THREAD.max(features / 512 / n),
            _ => 1,
        };
        let rows_per_task = features.div_ceil(tasks).next_multiple_of(8);
        let target = Disjoint::new(&mut out);
        self.pool.run(features.div_ceil(rows_per_task), |task| {
            if self.cancel.is_set() {
                return;
            }
            let rows = task * rows_per_task..features.min((task + 1) * rows_per_task);
            let weights = self.weights.weights().rows(rows.clone());
            if tokens == 1 {
                // SAFETY: every task has rows of its own.
                return self.kernel.matmul(weights, x, unsafe { target.range(rows) });
            }
            let mut tile = vec![0f32; tokens * rows.len()];
            self.kernel.matmul(weights, x, &mut tile);
            for (token, tile) in tile.chunks_exact(rows.len()).enumerate() {
                let start = token * features;
                // SAFETY: as above, in every token's row.
                unsafe { target.range(start + rows.start..start + rows.end) }.copy_from_slice(tile);
            }
        });
        output(out, tokens, features)
    }
}

pub struct Rope {
    pub head_dim: usize,
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        cos: &CpuStorage,
        cos_l: &Layout,
        sin: &CpuStorage,
        sin_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, cos, sin) = (Rows::of(x, x_l)?, Rows::of(cos, cos_l)?, Rows::of(sin, sin_l)?);
        let half = cos.cols;
        let mut out = Vec::with_capacity(x.rows * x.cols);
        for row in 0..x.rows {
            let (cos, sin) = (cos.row(row), sin.row(row));
            for head in x.row(row).chunks_exact(self.head_dim) {
                let (first, second) = (&head[..half], &head[half..2 * half]);
                out.extend((0..half).map(|i| first[i] * cos[i] - second[i] * sin[i]));
                out.extend((0..half).map(|i| second[i] * cos[i] + first[i] * sin[i]));
                out.extend_from_slice(&head[2 * half..]);
            }
        }
        output(out, x.rows, x.cols)
    }
}

/// Writes rows (tokens, heads * head_dim) into a page (heads, PAGE, head_dim) from position `at` of the page.
pub struct Store {
    pub at: usize,
}

impl InplaceOp2 for Store {
    fn name(&self) -> &'static str {
        "store"
    }

    fn cpu_fwd(&self, page: &mut CpuStorage, page_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        use half::slice::HalfFloatSliceExt;
        let (_, page_len, head_dim) = page_l.shape().dims3()?;
        let x = Rows::of(x, x_l)?;
        for row in 0..x.rows {
            for (head, x) in x.row(row).chunks_exact(head_dim).enumerate() {
                let place = (head * page_len + self.at + row) * head_dim;
                match page {
                    CpuStorage::F16(page) => page[place..][..head_dim].convert_from_f32_slice(x),
                    CpuStorage::F32(page) => page[place..][..head_dim].copy_from_slice(x),
                    _ => bail!("a KV page holds f16 or f32"),
                }
            }
        }
        Ok(())
    }
}

pub struct Attention<'a> {
    pub kernel: &'a dyn Kernel,
    pub pool: &'a Pool,
    pub cancel: &'a Cancel,
    pub layer: &'a KvLayer,
    pub shape: AttentionShape,
}

impl CustomOp1 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, q: &CpuStorage, q_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let AttentionShape { n_head, n_head_kv, head_dim, window } = self.shape;
        let (q, group) = (Rows::of(q, q_l)?, n_head / n_head_kv);
        let first = self.layer.len() - q.rows;
        let guards: Vec<_> =
            self.layer.iter().map(|page| (page.k.storage_and_layout().0, page.v.storage_and_layout().0)).collect();
        let mut out = vec![0f32; q.rows * q.cols];
        let target = Disjoint::new(&mut out);
        let task = |task: usize| -> Result<()> {
            if self.cancel.is_set() {
                return Ok(());
            }
            let (block, kv_head) = (task / n_head_kv, task % n_head_kv);
            let tokens = block * QUERY_TOKENS..q.rows.min((block + 1) * QUERY_TOKENS);
            let sees = |token: usize| {
                let position = first + token;
                window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1
            };
            let mut queries: Vec<Query> = tokens
                .clone()
                .flat_map(|token| (kv_head * group..(kv_head + 1) * group).map(move |head| (token, head)))
                .map(|(token, head)| {
                    let place = token * q.cols + head * head_dim;
                    // SAFETY: each task has tokens and heads of its own.
                    let out = unsafe { target.range(place..place + head_dim) };
                    Query { q: &q.row(token)[head * head_dim..][..head_dim], keys: sees(token), out }
                })
                .collect();
            let seen = sees(tokens.start).start..sees(tokens.end - 1).end;
            let mut pages = Vec::with_capacity(guards.len());
            for (page, (k, v)) in self.layer.iter().zip(&guards) {
                if page.start < seen.end && page.start + PAGE > seen.start {
                    let (k, v) = (head_of(k, kv_head, head_dim)?, head_of(v, kv_head, head_dim)?);
                    pages.push(KvPage { start: page.start, k, v });
                }
            }
            self.kernel.attention(&mut queries, &pages, PAGE, head_dim);
            Ok(())
        };
        let tasks = q.rows.div_ceil(QUERY_TOKENS) * n_head_kv;
        let failure = std::sync::Mutex::new(None);
        let run = |i| {
            if let Err(error) = task(i) {
                *crate::threads::lock(&failure) = Some(error);
            }
        };
        if q.rows * self.layer.len() * q.cols < PARALLEL_FROM {
            (0..tasks).for_each(run)
        } else {
            self.pool.run(tasks, run)
        }
        match failure.into_inner() {
            Ok(None) => output(out, q.rows, q.cols),
            Ok(Some(error)) => Err(error),
            Err(_) => bail!("a task of attention panicked"),
        }
    }
}

/// One head of a page.
fn head_of(storage: &Storage, head: usize, head_dim: usize) -> Result<KvSlice<'_>> {
    let range = head * PAGE * head_dim..(head + 1) * PAGE * head_dim;
    match storage {
        Storage::Cpu(CpuStorage::F16(data)) => Ok(KvSlice::F16(&data[range])),
        Storage::Cpu(CpuStorage::F32(data)) => Ok(KvSlice::F32(&data[range])),
        _ => bail!("a KV page on the CPU holds f16 or f32"),
    }
}

pub struct SwiGlu<'a> {
    pub kernel: &'a dyn Kernel,
    pub pool: &'a Pool,
}

impl CustomOp1 for SwiGlu<'_> {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Rows::of(x, x_l)?;
        let features = x.cols / 2;
        let mut out = vec![0f32; x.rows * features];
        let target = Disjoint::new(&mut out);
        let row = |row: usize| {
            let (gate, up) = x.row(row).split_at(features);
            // SAFETY: a row a task.
            self.kernel.swiglu(gate, up, unsafe { target.range(row * features..(row + 1) * features) });
        };
        if x.rows * features < PARALLEL_FROM {
            (0..x.rows).for_each(row)
        } else {
            self.pool.run(x.rows, row)
        }
        output(out, x.rows, features)
    }
}

pub struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, y: &CpuStorage, y_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (Rows::of(x, x_l)?, Rows::of(y, y_l)?);
        let sum = x.whole()?.iter().zip(y.whole()?).map(|(x, y)| x + y).collect();
        output(sum, x.rows, x.cols)
    }
}
