//! Phi-3 and its family (mini, medium, 3.5-mini, Phi-4, Phi-4-mini), read top to bottom like the paper.
//!
//! Where implementations differ, this one does what Hugging Face's `modeling_phi3.py` does: the sliding window is
//! exactly `w` keys, and a LongRoPE sequence that outgrows the original context is computed anew with the long factors.

mod config;

use std::sync::Arc;

use candle_core::{DType, Storage, Tensor};

use crate::cache::{KvLayer, KvShape, KvType};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::kernels::{Phase, Weights};
use crate::model::{Model, Sequence, Want};
use crate::ops::{AttentionShape, Backend, Matrix, Norm, Ops};
use crate::rope::{Angles, Rope};
use crate::threads::Cancel;

pub use config::Config;

/// Prompt tokens that go through the model together. They share one unpacking of the weights, 4 % of the work at 256 and
/// 2 % at 512, and their activations stay small: 512 x 16384 floats are 34 MB.
const PREFILL_CHUNK: usize = 512;

/// The model: its weights, and where they are computed.
pub struct Phi3 {
    pub config: Config,
    backend: Backend,
    kv_type: KvType,
    rope: Rope,
    attention: AttentionShape,
    token_embd: Matrix,
    layers: Vec<Layer>,
    output_norm: Norm,
    /// None: tied to `token_embd`.
    output: Option<Matrix>,
}

struct Layer {
    attn_norm: Norm,
    /// q, k and v, one after the other.
    attn_qkv: Matrix,
    attn_output: Matrix,
    ffn_norm: Norm,
    /// gate, then up.
    ffn_up: Matrix,
    ffn_down: Matrix,
}

impl Phi3 {
    /// Take the weights where they lie.
    pub fn load(gguf: &Gguf, backend: Backend, kv_type: KvType) -> Result<Self> {
        let config = Config::read(gguf)?;
        let matrix = |name: &str| Matrix::load(config::tensor(gguf, name)?, &backend);
        let norm = |name: &str| Ok::<_, Error>(Norm { weight: vector(gguf, name, &backend)?, eps: config.rms_eps });
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
            output_norm: norm("output_norm.weight")?,
            output: gguf.tensor("output.weight").map(|tensor| Matrix::load(tensor, &backend)).transpose()?,
            kv_type,
            config,
            backend,
        })
    }

    /// One pass over the positions `start .. start + ids.len()`. The logits of the last of them, or of each, are added
    /// to `logits`.
    fn pass(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        Buffers { angles, x, qkv, heads, gate_up, out }: &mut Buffers,
        want: Option<Want>,
        ops: Ops<'_>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let (start, shape) = (cache.len(), self.attention);
        self.rope.fill(angles, start..start + ids.len(), cache.long);
        ops.embed(&self.token_embd, ids, x)?;
        for (layer, kv) in self.layers.iter().zip(&mut cache.layers) {
            ops.norm_linear(x, &layer.attn_norm, &layer.attn_qkv, qkv)?;
            ops.rope(angles, shape, qkv)?;
            ops.append(qkv, shape, kv)?;
            ops.attention(qkv, kv, shape, heads)?;
            ops.linear_add(heads, &layer.attn_output, x)?;

            ops.norm_linear(x, &layer.ffn_norm, &layer.ffn_up, gate_up)?;
            ops.swiglu_linear_add(gate_up, &layer.ffn_down, x)?;
            ops.check()?;
        }
        let last; // (1, hidden)
        let x = match want {
            None => return Ok(()),
            Some(Want::Last) if ids.len() > 1 => {
                last = x.narrow(0, ids.len() - 1, 1)?;
                &last
            }
            Some(_) => x,
        };
        if out.dim(0)? != x.dim(0)? {
            *out = Tensor::zeros((x.dim(0)?, self.config.n_vocab), DType::F32, x.device())?;
        }
        ops.norm_linear(x, &self.output_norm, self.output.as_ref().unwrap_or(&self.token_embd), out)?;
        ops.check()?;
        match &*out.storage_and_layout().0 {
            Storage::Cpu(storage) => logits.extend_from_slice(storage.as_slice()?),
            _ => logits.extend(out.flatten_all()?.to_vec1::<f32>()?),
        }
        Ok(())
    }
}

/// What the operations of a pass write to. Passes over as many tokens, as those of decoding are, use the same memory.
struct Buffers {
    angles: Angles,
    /// (tokens, hidden)
    x: Tensor,
    /// (tokens, q, k and v)
    qkv: Tensor,
    /// (tokens, n_head * head_dim)
    heads: Tensor,
    /// (tokens, 2 * feed_forward)
    gate_up: Tensor,
    /// Logits: (tokens or 1, n_vocab)
    out: Tensor,
}

impl Buffers {
    fn new(model: &Phi3, tokens: usize) -> Result<Self> {
        let Config { hidden, feed_forward, n_vocab, .. } = model.config;
        let (q_dim, kv_dim) = (model.attention.q_dim(), model.attention.kv_dim());
        let zeros = |features| Tensor::zeros((tokens, features), DType::F32, model.backend.device());
        Ok(Buffers {
            angles: Angles::default(),
            x: zeros(hidden)?,
            qkv: zeros(q_dim + 2 * kv_dim)?,
            heads: zeros(q_dim)?,
            gate_up: zeros(2 * feed_forward)?,
            out: Tensor::zeros((1, n_vocab), DType::F32, model.backend.device())?,
        })
    }

    fn tokens(&self) -> Result<usize> {
        Ok(self.x.dim(0)?)
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
        seen * self.config.kv_bytes(self.kv_type)
    }

    fn sequence(self: Arc<Self>) -> Result<Box<dyn Sequence>> {
        let (cache, buffers) = (Cache::new(&self), Buffers::new(&self, 1)?);
        Ok(Box::new(Phi3Sequence { cache, buffers, ids: Vec::new(), logits: Vec::new(), model: self }))
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
            kv_type: model.kv_type,
            window: model.config.sliding_window,
            device: match &model.backend {
                Backend::Cpu { .. } => None,
                Backend::Candle(device) => Some(device.clone()),
            },
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
    buffers: Buffers,
    /// Every id so far: a sequence that outgrows the short rope factors is computed anew.
    ids: Vec<u32>,
    logits: Vec<f32>,
}

impl Sequence for Phi3Sequence {
    fn forward(&mut self, ids: &[u32], phase: Phase, want: Want, cancel: &Cancel) -> Result<&[f32]> {
        let n_vocab = self.model.config.n_vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(Error::Value(format!("token id {id} is outside the vocabulary of {n_vocab}")));
        }
        let wanted_from = self.ids.len(); // positions before it are only computed again
        self.ids.extend_from_slice(ids);
        let long = self.model.rope.is_long(self.ids.len());
        if long != self.cache.long {
            self.cache.restart(long);
        }
        self.logits.clear();
        while self.cache.len() < self.ids.len() {
            let start = self.cache.len();
            let (border, phase) =
                if start < wanted_from { (wanted_from, Phase::Prefill) } else { (self.ids.len(), phase) };
            let end = border.min(start + PREFILL_CHUNK);
            let wanted = match want {
                Want::Every => start >= wanted_from,
                Want::Last => end == self.ids.len(),
            };
            if self.buffers.tokens()? != end - start {
                self.buffers = Buffers::new(&self.model, end - start)?;
            }
            let ops = self.model.backend.ops(phase, cancel);
            let (chunk, want) = (&self.ids[start..end], wanted.then_some(want));
            self.model.pass(chunk, &mut self.cache, &mut self.buffers, want, ops, &mut self.logits)?;
        }
        Ok(&self.logits)
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
