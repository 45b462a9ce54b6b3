//! The operations on the CPU: Candle custom ops over the kernels and the pool.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, bail};

use super::matrix::Mapped;
use super::{Angles, AttentionShape, Cancels};
use crate::compute::kernels::{self, Kernel, Line, Phase, Scratch, Tile, view_mut};
use crate::compute::pool::Pool;

/// Work below this many multiplications runs on the calling thread: waking another thread costs about as much.
pub const PARALLEL_FROM: usize = 1 << 17;

/// A (rows, cols) tensor whose rows lie end to end.
#[derive(Copy, Clone)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
}

impl<'a> Rows<'a> {
    pub fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (rows, cols) = layout.shape().dims2()?;
        let range = contiguous(layout)?;
        Ok(Rows { data: &storage.as_slice::<f32>()?[range], rows, cols })
    }

    pub fn row(self, row: usize) -> &'a [f32] {
        &self.data[row * self.cols..][..self.cols]
    }
}

/// As `Rows`, writable.
pub struct RowsMut<'a> {
    pub data: &'a mut [f32],
    pub rows: usize,
    pub cols: usize,
}

impl<'a> RowsMut<'a> {
    pub fn of(storage: &'a mut CpuStorage, layout: &Layout) -> Result<Self> {
        let (rows, cols) = layout.shape().dims2()?;
        let range = contiguous(layout)?;
        let CpuStorage::F32(data) = storage else { bail!("activations are f32") };
        Ok(RowsMut { data: &mut data[range], rows, cols })
    }
}

fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor: {:?}, stride {:?}", layout.shape(), layout.stride()),
    }
}

/// A buffer whose disjoint ranges are written by several tasks.
pub struct Disjoint<'a, T = f32> {
    start: *mut T,
    len: usize,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: `range` is unsafe: by its contract no two threads have the same element.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(buffer: &'a mut [T]) -> Self {
        Disjoint { start: buffer.as_mut_ptr(), len: buffer.len(), buffer: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// # Safety
    /// No other live range overlaps this one.
    #[allow(clippy::mut_from_ref)] // the contract above makes it sound
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the buffer, as asserted, and not aliased, by the contract of this function.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

pub struct Embed<'a> {
    pub table: &'a Mapped,
    pub ids: &'a [u32],
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout) -> Result<()> {
        let out = RowsMut::of(out, out_l)?;
        for (&id, out) in self.ids.iter().zip(out.data.chunks_exact_mut(self.table.cols)) {
            kernels::dequantize(self.table.weights().row(id as usize), out);
        }
        Ok(())
    }
}

/// The context of a product with a weight matrix.
pub struct Linear<'a> {
    pub kernel: &'a dyn Kernel,
    pub pool: &'a Pool,
    pub phase: Phase,
    pub(super) cancels: Cancels<'a>,
    pub weights: &'a Mapped,
}

impl Linear<'_> {
    /// `out (+)= input W^T`, where `input` writes the activations (cols) of a token.
    fn run(&self, out: RowsMut<'_>, add: bool, input: impl Fn(usize, &mut [f32]) + Sync) {
        let (tokens, weights) = (out.rows, self.weights.weights());
        let tile = self.kernel.tile(weights.format, weights.cols, self.phase);
        let mut packed = Scratch::take(tokens.div_ceil(tile.tokens) * tile.lines);
        self.pack(&mut packed, tile, tokens, input);
        let (packed, features) = (&packed[..], self.weights.rows);
        let rows_per_task = self.rows_per_task();
        let target = Disjoint::new(out.data);
        let tasks = features.div_ceil(rows_per_task);
        self.spread(tokens * features * weights.cols, tasks, |task| {
            if self.cancels.all_set() {
                return;
            }
            let rows = task * rows_per_task..features.min((task + 1) * rows_per_task);
            self.kernel.matmul(weights.rows(rows.clone()), self.phase, packed, tokens, &mut |token, first, results| {
                let range = task_range(token, first, results.len(), &rows, tokens, features);
                // SAFETY: no other task has these rows, and this one has no other range at a time.
                let out = unsafe { target.range(range) };
                if add {
                    out.iter_mut().zip(results).for_each(|(out, result)| *out += result);
                } else {
                    out.copy_from_slice(results);
                }
            });
        });
    }

    fn pack(&self, packed: &mut [Line], tile: Tile, tokens: usize, input: impl Fn(usize, &mut [f32]) + Sync) {
        let weights = self.weights.weights();
        let target = Disjoint::new(packed);
        let tiles = tokens.div_ceil(tile.tokens);
        self.spread(tokens * weights.cols * 16, tiles, |i| {
            // SAFETY: each tile belongs to one task.
            let lines = unsafe { target.range(i * tile.lines..(i + 1) * tile.lines) };
            let mut row = Scratch::take(Line::count(4 * weights.cols));
            let row = &mut view_mut::<f32>(&mut row)[..weights.cols];
            for token in i * tile.tokens..tokens.min((i + 1) * tile.tokens) {
                input(token, row);
                self.kernel.pack(weights.format, self.phase, row, token % tile.tokens, lines);
            }
        });
    }

    /// Runs the tasks on the calling thread, or on the pool if there is work enough.
    fn spread(&self, work: usize, tasks: usize, task: impl Fn(usize) + Sync) {
        if work < PARALLEL_FROM { (0..tasks).for_each(task) } else { self.pool.run(tasks, task) }
    }

    /// Small enough that the threads end together and a cancellation takes effect soon. Large enough that memory is read
    /// in long runs, and in prefill by whole panels.
    fn rows_per_task(&self) -> usize {
        let share = |parts: usize| self.weights.rows / (parts * self.pool.n_threads());
        match self.phase {
            Phase::Decode => share(32).next_multiple_of(8).clamp(8, 1024),
            Phase::Prefill => share(8).next_multiple_of(64).clamp(64, 256),
        }
    }
}

/// Where results of a task go in (tokens, features). Any type may be a `Kernel`: a range outside of the task's own rows,
/// which another thread may be writing, is refused.
fn task_range(
    token: usize,
    first: usize,
    count: usize,
    rows: &Range<usize>,
    tokens: usize,
    features: usize,
) -> Range<usize> {
    let inside = token < tokens && first <= rows.len() && count <= rows.len() - first;
    assert!(inside, "results for token {token} of {tokens}, {count} rows from {first} of a task's {}", rows.len());
    let start = token * features + rows.start + first;
    start..start + count
}

/// `out = norm(x) W^T`
pub struct NormLinear<'a> {
    pub linear: Linear<'a>,
    pub eps: f32,
}

impl InplaceOp3 for NormLinear<'_> {
    fn name(&self) -> &'static str {
        "norm-linear"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_l: &Layout,
        x: &CpuStorage,
        x_l: &Layout,
        weight: &CpuStorage,
        weight_l: &Layout,
    ) -> Result<()> {
        let x = Rows::of(x, x_l)?;
        let weight = &weight.as_slice::<f32>()?[contiguous(weight_l)?];
        self.linear.run(RowsMut::of(out, out_l)?, false, |token, row| {
            self.linear.kernel.rms_norm(x.row(token), weight, self.eps, row);
        });
        Ok(())
    }
}

/// `x += h W^T`
pub struct LinearAdd<'a>(pub Linear<'a>);

impl InplaceOp2 for LinearAdd<'_> {
    fn name(&self) -> &'static str {
        "linear-add"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, h: &CpuStorage, h_l: &Layout) -> Result<()> {
        let h = Rows::of(h, h_l)?;
        self.0.run(RowsMut::of(x, x_l)?, true, |token, row| row.copy_from_slice(h.row(token)));
        Ok(())
    }
}

/// `x += (silu(gate) * up) W^T`
pub struct SwiGluLinearAdd<'a>(pub Linear<'a>);

impl InplaceOp2 for SwiGluLinearAdd<'_> {
    fn name(&self) -> &'static str {
        "swiglu-linear-add"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, h: &CpuStorage, h_l: &Layout) -> Result<()> {
        let h = Rows::of(h, h_l)?;
        self.0.run(RowsMut::of(x, x_l)?, true, |token, row| {
            let (gate, up) = h.row(token).split_at(h.cols / 2);
            self.0.kernel.swiglu(gate, up, row);
        });
        Ok(())
    }
}

/// Rotates q and k in place.
pub struct Rope<'a> {
    pub pool: &'a Pool,
    pub angles: &'a Angles,
    pub shape: AttentionShape,
}

impl InplaceOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, qkv: &mut CpuStorage, qkv_l: &Layout) -> Result<()> {
        let RowsMut { data, rows, cols } = RowsMut::of(qkv, qkv_l)?;
        let (half, turned) = (self.angles.half, self.shape.q_dim() + self.shape.kv_dim());
        assert!(turned <= cols, "q and k are {turned} of {cols} features");
        let target = Disjoint::new(data);
        let row = |row: usize| {
            // SAFETY: each row belongs to one task, and the range is inside of the row.
            let heads = unsafe { target.range(row * cols..row * cols + turned) };
            let cos = &self.angles.cos[row * half..][..half];
            let sin = &self.angles.sin[row * half..][..half];
            for head in heads.chunks_exact_mut(self.shape.head_dim) {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        };
        if rows * turned < PARALLEL_FROM {
            (0..rows).for_each(row)
        } else {
            self.pool.run(rows, row)
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_go_to_the_rows_of_their_task() {
        assert_eq!(task_range(2, 1, 3, &(8..12), 3, 20), 49..52);
        assert_eq!(task_range(0, 4, 0, &(8..12), 3, 20), 12..12);
    }

    #[test]
    fn results_outside_of_a_task_are_refused() {
        for (token, first, count) in
            [(3, 0, 1), (0, 0, 5), (0, 3, 2), (0, 5, 0), (0, usize::MAX, 2), (usize::MAX, 0, 1)]
        {
            let refused = std::panic::catch_unwind(|| task_range(token, first, count, &(8..12), 3, 20));
            assert!(refused.is_err(), "token {token}, {count} rows from {first}");
        }
    }

    #[test]
    fn ranges_of_a_buffer_end_with_it() {
        let mut buffer = [0f32; 4];
        let buffer = Disjoint::new(&mut buffer);
        // SAFETY: no other range is alive.
        unsafe {
            buffer.range(1..4).fill(1.0);
            assert_eq!(buffer.range(0..4), [0.0, 1.0, 1.0, 1.0]);
        }
        for range in [0..5, 4..5, Range { start: 2, end: 1 }, usize::MAX..usize::MAX] {
            // SAFETY: no other range is alive.
            let refused = std::panic::catch_unwind(|| unsafe { buffer.range(range.clone()).len() });
            assert!(refused.is_err(), "{range:?}");
        }
    }
}
