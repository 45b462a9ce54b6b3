//! The operations that models are written in, over Candle tensors.
//!
//! Activations are (rows, features) f32 tensors. A row is a token of one of the sequences of a pass. Results overwrite a tensor of the right shape, so that a decoded token
//! allocates nothing. On the CPU each operation is a Candle custom op that divides its work into tasks for our own thread
//! pool and calls a kernel for each. Candle's own operations do not run there: they use a global pool that ignores
//! `n_threads` and does not survive a fork. On other devices, and on the CPU in tests, each operation is composed of
//! Candle's own (`candle.rs`).
//!
//! Decisions: docs/design/compute.md

#[allow(unsafe_code)] // tasks write disjoint ranges of one buffer
mod append;
#[allow(unsafe_code)] // as above
mod attention;
mod candle;
mod column;
#[allow(unsafe_code)] // as above
mod cpu;
mod mapped;
mod matrix;

use candle_core::{Device, Tensor};

use crate::compute::kernels::{Kernel, Phase};
use crate::compute::pool::Pool;
use crate::error::{Error, Result};
use crate::system::sync::Cancel;

pub use attention::{ATTEND_COST, SCRATCH_BYTES as ATTENTION_SCRATCH};
pub use column::{Column, KvBlock, KvBuffer, KvShape, KvType, Piece, Segment};
pub use mapped::Part;
pub use matrix::{Matrix, format};

/// The device of a model, and its means of computing.
pub enum Backend {
    Cpu { kernel: Box<dyn Kernel>, pool: Pool },
    Candle(Device),
}

impl Backend {
    pub fn device(&self) -> &Device {
        match self {
            Backend::Cpu { .. } => &Device::Cpu,
            Backend::Candle(device) => device,
        }
    }

    /// The kernel's name, or "candle" for Candle's own operations.
    pub fn kernel_name(&self) -> &'static str {
        match self {
            Backend::Cpu { kernel, .. } => kernel.name(),
            Backend::Candle(_) => "candle",
        }
    }

    /// Computing threads; 1 for other devices.
    pub fn n_threads(&self) -> usize {
        match self {
            Backend::Cpu { pool, .. } => pool.n_threads(),
            Backend::Candle(_) => 1,
        }
    }

    /// The time of a decode pass over 1, 2, ... rows, in passes over one row.
    pub fn decode_costs(&self) -> &'static [f32] {
        match self {
            Backend::Cpu { kernel, .. } => kernel.decode_costs(),
            Backend::Candle(_) => &[1.0],
        }
    }

    /// The operations of one pass. Once every one of `cancels` is set they stop early, and their results are invalid: the
    /// pass calls `check` before it uses them.
    pub fn ops<'a>(&'a self, phase: Phase, cancels: &'a [Cancel]) -> Ops<'a> {
        Ops { backend: self, phase, cancels: Cancels(cancels) }
    }
}

/// The operations of one pass. The last argument receives the result.
#[derive(Copy, Clone)]
pub struct Ops<'a> {
    backend: &'a Backend,
    phase: Phase,
    cancels: Cancels<'a>,
}

/// The cancellations of the sequences of a pass.
#[derive(Copy, Clone)]
struct Cancels<'a>(&'a [Cancel]);

impl Cancels<'_> {
    /// True once the pass has no reader left.
    fn all_set(self) -> bool {
        self.0.iter().all(Cancel::is_set)
    }
}

/// The angles of the rows of a pass, for rotary embedding.
#[derive(Default)]
pub struct Angles {
    /// Half the rotated features of a head.
    pub half: usize,
    /// (rows, half)
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

/// Query heads and KV heads. A row of q, k and v has `n_head` heads of q, then `n_head_kv` of k, then `n_head_kv` of v.
#[derive(Copy, Clone, Debug)]
pub struct AttentionShape {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
    /// A query at position p sees the keys p - window + 1 ..= p; None: all up to p.
    pub window: Option<usize>,
}

impl AttentionShape {
    pub fn q_dim(&self) -> usize {
        self.n_head * self.head_dim
    }

    pub fn kv_dim(&self) -> usize {
        self.n_head_kv * self.head_dim
    }
}

/// `weight * x / sqrt(mean(x^2) + eps)`, row by row.
pub struct Norm {
    /// (features)
    pub weight: Tensor,
    pub eps: f32,
}

impl Ops<'_> {
    /// Rows of the embedding table: (tokens, hidden).
    pub fn embed(&self, table: &Matrix, ids: &[u32], out: &mut Tensor) -> Result<()> {
        match self.backend {
            Backend::Cpu { .. } => out.inplace_op1(&cpu::Embed { table: table.mapped()?, ids })?,
            Backend::Candle(_) => *out = candle::embed(table, ids)?,
        }
        Ok(())
    }

    /// `norm(x) W^T`: (tokens, in) to (tokens, out).
    pub fn norm_linear(&self, x: &Tensor, norm: &Norm, weights: &Matrix, out: &mut Tensor) -> Result<()> {
        match self.backend {
            Backend::Cpu { kernel, pool } => {
                let linear = self.linear(kernel.as_ref(), pool, weights)?;
                out.inplace_op3(x, &norm.weight, &cpu::NormLinear { linear, eps: norm.eps })?
            }
            Backend::Candle(_) => *out = candle::linear(&candle::rms_norm(x, norm)?, weights)?,
        }
        Ok(())
    }

    /// `x += h W^T`.
    pub fn linear_add(&self, h: &Tensor, weights: &Matrix, x: &mut Tensor) -> Result<()> {
        match self.backend {
            Backend::Cpu { kernel, pool } => {
                x.inplace_op2(h, &cpu::LinearAdd(self.linear(kernel.as_ref(), pool, weights)?))?
            }
            Backend::Candle(_) => *x = (&*x + candle::linear(h, weights)?)?,
        }
        Ok(())
    }

    /// `x += (silu(gate) * up) W^T`, where gate is the first half of each row of `gate_up` and up the second.
    pub fn swiglu_linear_add(&self, gate_up: &Tensor, weights: &Matrix, x: &mut Tensor) -> Result<()> {
        match self.backend {
            Backend::Cpu { kernel, pool } => {
                x.inplace_op2(gate_up, &cpu::SwiGluLinearAdd(self.linear(kernel.as_ref(), pool, weights)?))?
            }
            Backend::Candle(_) => *x = (&*x + candle::linear(&candle::swiglu(gate_up)?, weights)?)?,
        }
        Ok(())
    }

    /// Rotary embedding, NEOX order, of the first `2 * angles.half` features of every head of q and k. The others stay as
    /// they are.
    pub fn rope(&self, angles: &Angles, shape: AttentionShape, qkv: &mut Tensor) -> Result<()> {
        match self.backend {
            Backend::Cpu { pool, .. } => qkv.inplace_op1(&cpu::Rope { pool, angles, shape })?,
            Backend::Candle(_) => *qkv = candle::rope(qkv, angles, shape)?,
        }
        Ok(())
    }

    /// Writes the keys and values of the rows to a layer of their sequences' columns.
    pub fn append(
        &self,
        qkv: &Tensor,
        shape: AttentionShape,
        layer: usize,
        segments: &mut [Segment<'_>],
    ) -> Result<()> {
        let pieces = segments.iter_mut().flat_map(|segment| segment.pieces(layer));
        match self.backend {
            Backend::Cpu { pool, .. } => append::append(pool, qkv, shape, pieces.collect::<Result<_>>()?)?,
            Backend::Candle(_) => {
                for piece in pieces {
                    candle::append(qkv, shape, piece?)?;
                }
            }
        }
        Ok(())
    }

    /// Causal attention of the rows, each over the columns of its own sequence: (rows, n_head * head_dim).
    pub fn attention(
        &self,
        qkv: &Tensor,
        shape: AttentionShape,
        layer: usize,
        segments: &[Segment<'_>],
        out: &mut Tensor,
    ) -> Result<()> {
        match self.backend {
            Backend::Cpu { kernel, pool } => {
                let (kernel, cancels) = (kernel.as_ref(), self.cancels);
                out.inplace_op2(qkv, &attention::Attention { kernel, pool, cancels, shape, layer, segments })?
            }
            Backend::Candle(_) => *out = candle::attention(qkv, shape, layer, segments)?,
        }
        Ok(())
    }

    fn linear<'a>(&'a self, kernel: &'a dyn Kernel, pool: &'a Pool, weights: &'a Matrix) -> Result<cpu::Linear<'a>> {
        Ok(cpu::Linear { kernel, pool, phase: self.phase, cancels: self.cancels, weights: weights.mapped()? })
    }

    /// `Error::Cancelled` once every sequence of the pass is cancelled.
    pub fn check(&self) -> Result<()> {
        if self.cancels.all_set() { Err(Error::Cancelled) } else { Ok(()) }
    }
}
