//! Phi-3 and its family (mini, medium, 3.5-mini, Phi-4, Phi-4-mini): the layers, over the operations.
//!
//! Where implementations differ, this one does what Hugging Face's `modeling_phi3.py` does: the sliding window is
//! exactly `w` keys, and a LongRoPE sequence that outgrows the original context is computed anew with the long factors.
//!
//! Decisions: docs/design/model.md

mod config;

use candle_core::Tensor;

use super::batch::Activations;
use super::rope::Rope;
use super::runner::{Architecture, Runner, Shared, norm};
use crate::compute::ops::{AttentionShape, Backend, KvType, Matrix, Norm, Ops, Segment};
use crate::error::Result;
use crate::files::gguf::Gguf;

pub use config::Config;

/// The layers of a model.
pub struct Phi3 {
    attention: AttentionShape,
    feed_forward: usize,
    layers: Vec<Layer>,
}

struct Layer {
    attn_norm: Norm,
    /// Rows of q, then k, then v.
    attn_qkv: Matrix,
    attn_output: Matrix,
    ffn_norm: Norm,
    /// Rows of gate, then up.
    ffn_up: Matrix,
    ffn_down: Matrix,
}

impl Phi3 {
    /// Uses the weights in place, in the mapped file.
    pub fn load(gguf: &Gguf, backend: Backend, kv_type: KvType) -> Result<Runner<Self>> {
        let config = Config::read(gguf)?;
        let matrix = |name: &str| Matrix::load(config::tensor(gguf, name)?, &backend);
        let norm = |name: &str| norm(config::tensor(gguf, name)?, config.rms_eps, &backend);
        let layers = (0..config.n_layers)
            .map(|i| {
                Ok(Layer {
                    attn_norm: norm(&format!("blk.{i}.attn_norm.weight"))?,
                    attn_qkv: matrix(&format!("blk.{i}.attn_qkv.weight"))?,
                    attn_output: matrix(&format!("blk.{i}.attn_output.weight"))?,
                    ffn_norm: norm(&format!("blk.{i}.ffn_norm.weight"))?,
                    ffn_up: matrix(&format!("blk.{i}.ffn_up.weight"))?,
                    ffn_down: matrix(&format!("blk.{i}.ffn_down.weight"))?,
                })
            })
            .collect::<Result<_>>()?;
        let attention = AttentionShape {
            n_head: config.n_head,
            n_head_kv: config.n_head_kv,
            head_dim: config.head_dim,
            window: config.sliding_window,
        };
        let shared = Shared {
            hidden: config.hidden,
            n_vocab: config.n_vocab,
            context_length: config.context_length,
            window: config.sliding_window,
            kv_type,
            n_head_kv: config.n_head_kv,
            head_dim: config.head_dim,
            sizes: config.sizes(),
            rope: Rope::new(config.rope_dims, config.rope_base, config.long_rope.as_ref()),
            token_embd: matrix("token_embd.weight")?,
            output_norm: norm("output_norm.weight")?,
            output: gguf.tensor("output.weight").map(|tensor| Matrix::load(tensor, &backend)).transpose()?,
        };
        Ok(Runner::new(Phi3 { attention, feed_forward: config.feed_forward, layers }, shared, gguf, backend))
    }
}

impl Architecture for Phi3 {
    fn n_layers(&self) -> usize {
        self.layers.len()
    }

    fn buffers(&self) -> Vec<(usize, &'static str)> {
        let (q_dim, kv_dim) = (self.attention.q_dim(), self.attention.kv_dim());
        vec![
            (q_dim + 2 * kv_dim, "queries, keys and values"),
            (q_dim, "attention outputs"),
            (2 * self.feed_forward, "feed-forward activations"),
        ]
    }

    fn layer(
        &self,
        i: usize,
        pass: &mut Activations,
        buffers: &mut [Tensor],
        segments: &mut [Segment<'_>],
        ops: Ops<'_>,
    ) -> Result<()> {
        let (layer, shape) = (&self.layers[i], self.attention);
        let Activations { x, angles, .. } = pass;
        let [qkv, heads, gate_up] = buffers else { unreachable!("they are those of `buffers`") };
        ops.norm_linear(x, &layer.attn_norm, &layer.attn_qkv, qkv)?;
        ops.rope(angles, shape, qkv)?;
        ops.append(qkv, shape, i, segments)?;
        ops.attention(qkv, shape, i, segments, heads)?;
        ops.linear_add(heads, &layer.attn_output, x)?;

        ops.norm_linear(x, &layer.ffn_norm, &layer.ffn_up, gate_up)?;
        ops.swiglu_linear_add(gate_up, &layer.ffn_down, x)
    }
}
