//! The writes to the columns of a layer, on the CPU.
//!
//! Decisions: docs/design/kv.md

use std::ops::Range;

use candle_core::{Result, Storage, Tensor, bail};
use half::f16;

use super::cpu::{Disjoint, PARALLEL_FROM, Rows};
use super::{AttentionShape, KvBuffer, Piece};
use crate::compute::kernels::KvSliceMut;
use crate::compute::pool::Pool;

/// Cost of storing one feature of a key, in multiplications of a matrix product: each store touches its own cache line.
const KEY_STORE_COST: usize = 64;

/// Writes the keys and values of the rows to the blocks of a layer.
pub fn append(pool: &Pool, qkv: &Tensor, shape: AttentionShape, pieces: Vec<Piece<'_>>) -> Result<()> {
    let (storage, layout) = qkv.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("activations are not on the CPU") };
    let qkv = Rows::of(storage, layout)?;
    let AttentionShape { n_head_kv, head_dim, .. } = shape;
    let work = KEY_STORE_COST * qkv.rows * shape.kv_dim();
    let target = |piece| {
        let Piece { rows, at, block } = piece;
        Ok((rows, at, Heads::new(&mut block.k, n_head_kv)?, Heads::new(&mut block.v, n_head_kv)?))
    };
    let targets = pieces.into_iter().map(target).collect::<Result<Vec<_>>>()?;
    let task = |task: usize| {
        let ((rows, at, k, v), head) = (&targets[task / n_head_kv], task % n_head_kv);
        // SAFETY: each task has one head of one block, and no block is written twice.
        let (mut k, mut v) = unsafe { (k.head(head), v.head(head)) };
        for (i, row) in rows.clone().enumerate() {
            let (_, kv) = qkv.row(row).split_at(shape.q_dim());
            k.store_key(at + i, &kv[head * head_dim..][..head_dim]);
            v.store_value(at + i, &kv[shape.kv_dim() + head * head_dim..][..head_dim]);
        }
    };
    let tasks = targets.len() * n_head_kv;
    if work < PARALLEL_FROM {
        (0..tasks).for_each(task)
    } else {
        pool.run(tasks, task)
    }
    Ok(())
}

/// The heads of a buffer, for tasks that write them side by side.
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
            KvBuffer::Mapped(_) => bail!("a KV block of a file passed to a kernel that writes"),
            KvBuffer::Candle(_) => bail!("a KV block of Candle passed to a kernel"),
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
