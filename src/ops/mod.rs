//! The operations that `phi3.rs` is written in, over Candle tensors.
//!
//! Activations are (tokens, features) f32 tensors. On the CPU each operation is a Candle custom op that cuts its work
//! into tasks for our own thread pool and calls a kernel for each; no Candle op that computes runs there, since those
//! use a global pool that neither `n_threads` nor a fork governs. On other devices, and where the tests ask for it on
//! the CPU, each operation is composed of Candle's own (`candle.rs`).

mod candle;
mod cpu;
mod matrix;

use candle_core::{Device, Tensor};

use crate::cache::KvLayer;
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::threads::{Cancel, Pool};

pub use matrix::{Matrix, format};

/// Where a model computes, and with what.
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

    /// The kernel's name; Candle's own operations go by "candle".
    pub fn kernel_name(&self) -> &'static str {
        match self {
            Backend::Cpu { kernel, .. } => kernel.name(),
            Backend::Candle(_) => "candle",
        }
    }

    /// Threads that compute; other devices have their own.
    pub fn n_threads(&self) -> usize {
        match self {
            Backend::Cpu { pool, .. } => pool.n_threads(),
            Backend::Candle(_) => 1,
        }
    }

    /// The operations of one pass. They stop early, with results that mean nothing, once `cancel` is set: the pass asks
    /// it before it uses them.
    pub fn ops<'a>(&'a self, cancel: &'a Cancel) -> Ops<'a> {
        Ops { backend: self, cancel }
    }
}

/// The operations of one pass.
#[derive(Copy, Clone)]
pub struct Ops<'a> {
    backend: &'a Backend,
    cancel: &'a Cancel,
}

/// How the query heads look at the KV heads.
#[derive(Copy, Clone, Debug)]
pub struct AttentionShape {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
    /// A query at position p sees the keys p - window + 1 ..= p; None: all up to p.
    pub window: Option<usize>,
}

impl Ops<'_> {
    /// Rows of the embedding table: (tokens, hidden).
    pub fn embed(&self, table: &Matrix, ids: &[u32]) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { .. } => cpu::embed(table, ids),
            Backend::Candle(_) => candle::embed(table, ids),
        }?)
    }

    /// `weight * x / sqrt(mean(x^2) + eps)`, row by row; `weight` is (features).
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { kernel, .. } => x.apply_op2_no_bwd(weight, &cpu::RmsNorm { kernel: kernel.as_ref(), eps }),
            Backend::Candle(_) => candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps),
        }?)
    }

    /// `x W^T`: (tokens, in) to (tokens, out).
    pub fn linear(&self, x: &Tensor, weights: &Matrix) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { kernel, pool } => x.apply_op1_no_bwd(&cpu::Linear {
                kernel: kernel.as_ref(),
                pool,
                cancel: self.cancel,
                weights: weights.mapped()?,
            }),
            Backend::Candle(_) => candle::linear(x, weights),
        }?)
    }

    /// Rotary embedding, NEOX order, of the first `2 * cos.dim(1)` features of every head of x (tokens, heads *
    /// head_dim); the rest passes through. `cos` and `sin` are (tokens, rotated / 2).
    pub fn rope(&self, x: &Tensor, head_dim: usize, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { .. } => x.apply_op3_no_bwd(cos, sin, &cpu::Rope { head_dim }),
            Backend::Candle(_) => candle::rope(x, head_dim, cos, sin),
        }?)
    }

    /// Append the keys and values (tokens, n_head_kv * head_dim) of the next positions to a layer's cache.
    pub fn append(&self, layer: &mut KvLayer, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = k.dim(0)?;
        layer.forget_behind_window();
        let mut done = 0;
        while done < tokens {
            let (page, at, room) = layer.next_page()?;
            let count = room.min(tokens - done);
            for (source, target) in [(k, &page.k), (v, &page.v)] {
                let rows = source.narrow(0, done, count)?;
                match self.backend {
                    Backend::Cpu { .. } => target.inplace_op2(&rows, &cpu::Store { at })?,
                    Backend::Candle(_) => candle::store(target, &rows, at)?,
                }
            }
            layer.advance(count);
            done += count;
        }
        Ok(())
    }

    /// Causal attention of the newest positions over the cache: q is (tokens, n_head * head_dim), and so is the result.
    pub fn attention(&self, q: &Tensor, layer: &KvLayer, shape: AttentionShape) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { kernel, pool } => {
                q.apply_op1_no_bwd(&cpu::Attention { kernel: kernel.as_ref(), pool, cancel: self.cancel, layer, shape })
            }
            Backend::Candle(_) => candle::attention(q, layer, shape),
        }?)
    }

    /// `silu(gate) * up`, where gate is the first half of x (tokens, 2 * features) and up the second.
    pub fn swiglu(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { kernel, pool } => x.apply_op1_no_bwd(&cpu::SwiGlu { kernel: kernel.as_ref(), pool }),
            Backend::Candle(_) => candle::swiglu(x),
        }?)
    }

    /// `x + y`.
    pub fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::Cpu { .. } => x.apply_op2_no_bwd(y, &cpu::Add),
            Backend::Candle(_) => x + y,
        }?)
    }

    /// Has the pass been cancelled?
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_set() { Err(Error::Cancelled) } else { Ok(()) }
    }
}
