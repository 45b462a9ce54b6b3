//! Phi-3 and its family (mini, medium, 3.5-mini, Phi-4, Phi-4-mini), read top to bottom like the paper.
//!
//! Where implementations differ, this one does what Hugging Face's `modeling_phi3.py` does: the sliding window is
//! exactly `w` keys, and a LongRoPE sequence that outgrows the original context is computed anew with the long factors.

mod config;

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::cache::{KvLayer, KvShape};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::kernels::Weights;
use crate::model::{Model, Sequence, Want};
use crate::ops::{AttentionShape, Backend, Matrix, Ops};
use crate::rope::Rope;
use crate::threads::Cancel;

pub use config::Config;

/// Prompt tokens that go through the model together. They share one reading of the weights, and their activations
/// stay small: 256 x 16384 floats are 16 MB.
const PREFILL_CHUNK: usize = 256;

/// The model: its weights, and where they are computed.
pub struct Phi3 {
    pub config: Config,
    backend: Backend,
    kv_dtype: DType,
    rope: Rope,
    attention: AttentionShape,
    token_embd: Matrix,
    layers: Vec<Layer>,
    output_norm: Tensor,
    /// None: tied to `token_embd`.
    output: Option<Matrix>,
}

struct Layer {
    attn_norm: Tensor,
    /// q, k and v, one after the other.
    attn_qkv: Matrix,
    attn_output: Matrix,
    ffn_norm: Tensor,
    /// gate, then up.
    ffn_up: Matrix,
    ffn_down: Matrix,
}

impl Phi3 {
    /// Take the weights where they lie. `kv_dtype` is F16 or F32.
    pub fn load(gguf: &Gguf, backend: Backend, kv_dtype: DType) -> Result<Self> {
        let config = Config::read(gguf)?;
        let matrix = |name: &str| Matrix::load(config::tensor(gguf, name)?, &backend);
        let vector = |name: &str| vector(gguf, name, &backend);
        let layers = (0..config.n_layers)
            .map(|i| {
                Ok(Layer {
                    attn_norm: vector(&format!("blk.{i}.attn_norm.weight"))?,
                    attn_qkv: matrix(&format!("blk.{i}.attn_qkv.weight"))?,
                    attn_output: matrix(&format!("blk.{i}.attn_output.weight"))?,
                    ffn_norm: vector(&format!("blk.{i}.ffn_norm.weight"))?,
                    ffn_up: matrix(&format!("blk.{i}.ffn_up.weight"))?,
                    ffn_down: matrix(&format!("blk.{i}.ffn_down.weight"))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Phi3 {
            rope: Rope::new(config.rope_dims, config.rope_base, config.long_rope.as_ref()),
            attention: AttentionShape {
                n_head: config.n_head,
                n_head_kv: config.n_head_kv,
                head_dim: config.head_dim,
                window: config.sliding_window,
            },
            token_embd: matrix("token_embd.weight")?,
            layers,
            output_norm: vector("output_norm.weight")?,
            output: gguf.tensor("output.weight").map(|tensor| Matrix::load(tensor, &backend)).transpose()?,
            kv_dtype,
            config,
            backend,
        })
    }

    /// One pass over the positions `start .. start + ids.len()`; the logits of the last, or of each.
    fn pass(&self, ids: &[u32], cache: &mut Cache, want: Option<Want>, ops: Ops<'_>) -> Result<Option<Tensor>> {
        let (eps, start) = (self.config.rms_eps, cache.len());
        let (cos, sin) = self.rope.table(start..start + ids.len(), cache.long, self.backend.device())?;
        let (q_dim, kv_dim) = (self.config.q_dim(), self.config.kv_dim());
        let head_dim = self.config.head_dim;

        let mut x = ops.embed(&self.token_embd, ids)?; // (tokens, hidden)
        for (layer, kv) in self.layers.iter().zip(&mut cache.layers) {
            let h = ops.rms_norm(&x, &layer.attn_norm, eps)?;
            let qkv = ops.linear(&h, &layer.attn_qkv)?; // (tokens, q ‖ k ‖ v)
            let q = ops.rope(&qkv.narrow(1, 0, q_dim)?, head_dim, &cos, &sin)?;
            let k = ops.rope(&qkv.narrow(1, q_dim, kv_dim)?, head_dim, &cos, &sin)?;
            let v = qkv.narrow(1, q_dim + kv_dim, kv_dim)?;
            ops.append(kv, &k, &v)?;
            let h = ops.attention(&q, kv, self.attention)?;
            x = ops.add(&x, &ops.linear(&h, &layer.attn_output)?)?;

            let h = ops.rms_norm(&x, &layer.ffn_norm, eps)?;
            let h = ops.swiglu(&ops.linear(&h, &layer.ffn_up)?)?; // (tokens, feed_forward)
            x = ops.add(&x, &ops.linear(&h, &layer.ffn_down)?)?;
            ops.check()?;
        }
        let x = match want {
            None => return Ok(None),
            Some(Want::Last) => x.narrow(0, ids.len() - 1, 1)?,
            Some(Want::Every) => x,
        };
        let h = ops.rms_norm(&x, &self.output_norm, eps)?;
        let logits = ops.linear(&h, self.output.as_ref().unwrap_or(&self.token_embd))?;
        ops.check()?;
        Ok(Some(logits))
    }
}

impl Model for Phi3 {
    fn engine(&self) -> &'static str {
        "native"
    }

    fn kernel(&self) -> &'static str {
        self.backend.kernel_name()
    }

    fn device(&self) -> &'static str {
        match self.backend.device() {
            candle_core::Device::Cpu => "cpu",
            candle_core::Device::Cuda(_) => "cuda",
            candle_core::Device::Metal(_) => "metal",
        }
    }

    fn n_threads(&self) -> usize {
        self.backend.n_threads()
    }

    fn n_vocab(&self) -> usize {
        self.config.n_vocab
    }

    fn context_length(&self) -> usize {
        self.config.context_length
    }

    fn kv_bytes(&self, positions: usize) -> usize {
        let seen = positions.min(self.config.sliding_window.unwrap_or(positions));
        seen * self.config.kv_values() * self.kv_dtype.size_in_bytes()
    }

    fn sequence(self: Arc<Self>) -> Result<Box<dyn Sequence>> {
        let cache = Cache::new(&self);
        Ok(Box::new(Phi3Sequence { cache, ids: Vec::new(), model: self }))
    }
}

/// The keys and values of every layer, all computed with one set of rope factors.
struct Cache {
    layers: Vec<KvLayer>,
    long: bool,
}

impl Cache {
    fn new(model: &Phi3) -> Self {
        let shape = KvShape {
            n_head_kv: model.config.n_head_kv,
            head_dim: model.config.head_dim,
            dtype: model.kv_dtype,
            window: model.config.sliding_window,
            device: model.backend.device().clone(),
        };
        Cache { layers: model.layers.iter().map(|_| KvLayer::new(shape.clone())).collect(), long: false }
    }

    /// Positions computed so far.
    fn len(&self) -> usize {
        self.layers[0].len()
    }

    fn restart(&mut self, long: bool) {
        self.layers.iter_mut().for_each(KvLayer::clear);
        self.long = long;
    }
}

struct Phi3Sequence {
    model: Arc<Phi3>,
    cache: Cache,
    /// Every id so far: a sequence that outgrows the short rope factors is computed anew.
    ids: Vec<u32>,
}

impl Sequence for Phi3Sequence {
    fn forward(&mut self, ids: &[u32], want: Want, cancel: &Cancel) -> Result<Vec<f32>> {
        let n_vocab = self.model.config.n_vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(Error::Value(format!("token id {id} is outside the vocabulary of {n_vocab}")));
        }
        let ops = self.model.backend.ops(cancel);
        let wanted_from = self.ids.len(); // positions before it are only computed again
        self.ids.extend_from_slice(ids);
        let long = self.model.rope.is_long(self.ids.len());
        if long != self.cache.long {
            self.cache.restart(long);
        }
        let mut logits = Vec::new();
        while self.cache.len() < self.ids.len() {
            let start = self.cache.len();
            let border = if start < wanted_from { wanted_from } else { self.ids.len() };
            let end = border.min(start + PREFILL_CHUNK);
            let wanted = match want {
                Want::Every => start >= wanted_from,
                Want::Last => end == self.ids.len(),
            };
            let chunk = &self.ids[start..end];
            if let Some(tensor) = self.model.pass(chunk, &mut self.cache, wanted.then_some(want), ops)? {
                logits.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        Ok(logits)
    }
}

/// A one-dimensional tensor of the file as f32.
fn vector(gguf: &Gguf, name: &str, backend: &Backend) -> Result<Tensor> {
    let tensor = config::tensor(gguf, name)?;
    let cols = tensor.shape.iter().product();
    let weights = Weights { format: crate::ops::format(tensor)?, cols, bytes: tensor.bytes() };
    let mut values = vec![0f32; cols];
    crate::kernels::dequantize(weights, &mut values);
    Ok(Tensor::from_vec(values, cols, backend.device())?)
}
