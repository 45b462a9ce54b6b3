//! Phi-3 and its family (mini, medium, 3.5-mini, Phi-4, Phi-4-mini), from embedding to head.
//!
//! Where implementations differ, this one does what Hugging Face's `modeling_phi3.py` does: the sliding window is
//! exactly `w` keys, and a LongRoPE sequence that outgrows the original context is computed anew with the long factors.
//!
//! Decisions: docs/design/model.md

mod chunks;
mod config;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Storage, Tensor};

use crate::compute::kernels::{Phase, Weights};
use crate::compute::ops::{AttentionShape, Backend, Matrix, Norm, Ops};
use crate::error::{Error, Result};
use crate::files::gguf::Gguf;
use crate::kv::cache::{KvLayer, KvShape, KvType};
use crate::model::rope::{Angles, Rope};
use crate::model::{Model, Sequence, Want};
use crate::system::memory;
use crate::system::panic;
use crate::system::sync::Cancel;

pub use chunks::Chunks;
pub use config::Config;

/// The weights of a model, and the backend that computes with them.
pub struct Phi3 {
    pub config: Config,
    file: PathBuf,
    backend: Backend,
    kv_type: KvType,
    rope: Rope,
    attention: AttentionShape,
    chunks: Chunks,
    token_embd: Matrix,
    layers: Vec<Layer>,
    output_norm: Norm,
    /// None: `token_embd` is the head too.
    output: Option<Matrix>,
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
        let weights = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
        Ok(Phi3 {
            chunks: Chunks::new(&config, weights),
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
            file: gguf.path().to_owned(),
            config,
            backend,
        })
    }

    /// The first step of a pass: the embeddings and the rope angles of its positions.
    fn embed(&self, ids: &[u32], start: usize, long: bool, buffers: &mut Buffers, ops: Ops<'_>) -> Result<()> {
        self.rope.fill(&mut buffers.angles, start..start + ids.len(), long)?;
        ops.embed(&self.token_embd, ids, &mut buffers.x)
    }

    /// One layer of the pass.
    fn layer(&self, layer: &Layer, kv: &mut KvLayer, buffers: &mut Buffers, ops: Ops<'_>) -> Result<()> {
        let Buffers { angles, x, qkv, heads, gate_up, .. } = buffers;
        let shape = self.attention;
        ops.norm_linear(x, &layer.attn_norm, &layer.attn_qkv, qkv)?;
        ops.rope(angles, shape, qkv)?;
        ops.append(qkv, shape, kv)?;
        ops.attention(qkv, kv, shape, heads)?;
        ops.linear_add(heads, &layer.attn_output, x)?;

        ops.norm_linear(x, &layer.ffn_norm, &layer.ffn_up, gate_up)?;
        ops.swiglu_linear_add(gate_up, &layer.ffn_down, x)?;
        ops.check()
    }

    /// Appends the logits of the last position of the pass, or of each, to `logits`, which has room for them.
    fn head(&self, want: Want, buffers: &mut Buffers, ops: Ops<'_>, logits: &mut Vec<f32>) -> Result<()> {
        let Buffers { x, pass_logits, .. } = buffers;
        let tokens = x.dim(0)?;
        let last; // (1, hidden)
        let x = if want == Want::Last && tokens > 1 {
            last = x.narrow(0, tokens - 1, 1)?;
            &last
        } else {
            x
        };
        if pass_logits.dim(0)? != x.dim(0)? {
            *pass_logits = zeros(x.dim(0)?, self.config.n_vocab, &self.backend, "logits")?;
        }
        ops.norm_linear(x, &self.output_norm, self.output.as_ref().unwrap_or(&self.token_embd), pass_logits)?;
        ops.check()?;
        match &*pass_logits.storage_and_layout().0 {
            Storage::Cpu(storage) => logits.extend_from_slice(storage.as_slice()?),
            _ => logits.extend(pass_logits.flatten_all()?.to_vec1::<f32>()?),
        }
        Ok(())
    }
}

/// The results of the operations of a pass. Passes over the same number of tokens, as in decoding, use the same memory.
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
    /// (tokens or 1, n_vocab); no rows before the first head.
    pass_logits: Tensor,
}

impl Buffers {
    fn new(model: &Phi3, tokens: usize) -> Result<Self> {
        let Config { hidden, feed_forward, n_vocab, .. } = model.config;
        let (q_dim, kv_dim) = (model.attention.q_dim(), model.attention.kv_dim());
        let zeros = |features, what| zeros(tokens, features, &model.backend, what);
        Ok(Buffers {
            angles: Angles::default(),
            x: zeros(hidden, "hidden states")?,
            qkv: zeros(q_dim + 2 * kv_dim, "queries, keys and values")?,
            heads: zeros(q_dim, "attention outputs")?,
            gate_up: zeros(2 * feed_forward, "feed-forward activations")?,
            pass_logits: self::zeros(0, n_vocab, &model.backend, "logits")?,
        })
    }

    fn tokens(&self) -> Result<usize> {
        Ok(self.x.dim(0)?)
    }
}

/// A tensor for activations.
fn zeros(tokens: usize, features: usize, backend: &Backend, what: &str) -> Result<Tensor> {
    let length = tokens.saturating_mul(features);
    let values = memory::filled(0f32, length, format_args!("{tokens} tokens of {features} {what}"))?;
    Ok(Tensor::from_vec(values, (tokens, features), backend.device())?)
}

impl Model for Phi3 {
    fn engine(&self) -> &'static str {
        "native"
    }

    fn name(&self) -> String {
        self.file.display().to_string()
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
        let (cache, buffers) = (Cache::new(&self), Buffers::new(&self, 0)?);
        let asked = Asked { from: 0, phase: Phase::Prefill, want: Want::Last };
        Ok(Box::new(Phi3Sequence {
            cache,
            buffers,
            ids: Vec::new(),
            asked,
            pass: None,
            logits: Vec::new(),
            model: self,
        }))
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

    /// Computed positions.
    fn len(&self) -> usize {
        self.layers[0].len()
    }

    /// Bytes of the pages that `positions` more would add.
    fn growth(&self, positions: usize) -> u64 {
        self.layers.iter().map(|layer| layer.growth(positions)).fold(0, u64::saturating_add)
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
    /// All ids: a sequence that outgrows the short rope factors is computed anew.
    ids: Vec<u32>,
    asked: Asked,
    /// The current pass, between two of its turns.
    pass: Option<Pass>,
    logits: Vec<f32>,
}

/// The last call of `append`.
#[derive(Copy, Clone)]
struct Asked {
    /// Its first position. Earlier ones are computed again at most.
    from: usize,
    phase: Phase,
    want: Want,
}

/// Tokens that go through the layers together.
struct Pass {
    positions: Range<usize>,
    phase: Phase,
    want: Option<Want>,
    /// Computed layers.
    layers: usize,
}

impl Phi3Sequence {
    /// The next positions that go through the model together, with memory for them.
    fn next_pass(&mut self) -> Result<Pass> {
        let (start, Asked { from, phase, want }) = (self.cache.len(), self.asked);
        let (border, phase) = if start < from { (from, Phase::Prefill) } else { (self.ids.len(), phase) };
        let every = want == Want::Every && start >= from;
        let end = border.min(start + self.model.chunks.length(start, every));
        let wanted = every || want == Want::Last && end == self.ids.len();
        let tokens = end - start;
        let growth = self.cache.growth(tokens);
        if self.buffers.tokens()? != tokens {
            self.buffers = Buffers::new(&self.model, 0)?; // frees the old ones first
            let activations = self.model.chunks.bytes(tokens, every);
            memory::check(
                growth.saturating_add(activations),
                format_args!("a pass over {tokens} tokens at position {start}"),
            )?;
            self.buffers = Buffers::new(&self.model, tokens)?;
        } else {
            memory::check(growth, format_args!("the KV cache at position {start}"))?;
        }
        Ok(Pass { positions: start..end, phase, want: wanted.then_some(want), layers: 0 })
    }

    /// Compares the keys, values and logits of `ids` more tokens with the available memory.
    fn check_memory(&self, ids: usize, want: Want) -> Result<()> {
        let Config { n_vocab, sliding_window, .. } = self.model.config;
        let positions = self.ids.len() + ids;
        let more = positions.saturating_sub(self.cache.len());
        let held = sliding_window.map_or(more, |window| more.min(window + chunks::LONGEST));
        let cache = self.cache.growth(held);
        if want == Want::Last {
            return memory::check(cache, format_args!("the KV cache of {positions} tokens"));
        }
        let logits = (ids as u64).saturating_mul(4 * n_vocab as u64);
        let what = format_args!("the KV cache of {positions} tokens with logits of shape ({ids}, {n_vocab})");
        memory::check(logits.saturating_add(cache), what)
    }

    fn turn(&mut self, cancel: &Cancel) -> Result<bool> {
        let model = self.model.clone();
        let mut pass = match self.pass.take() {
            Some(pass) => pass,
            None if self.cache.len() == self.ids.len() => return Ok(false),
            None => self.next_pass()?,
        };
        let ops = model.backend.ops(pass.phase, cancel);
        if pass.layers == 0 {
            let Range { start, end } = pass.positions;
            model.embed(&self.ids[start..end], start, self.cache.long, &mut self.buffers, ops)?;
        }
        for (layer, kv) in model.layers.iter().zip(&mut self.cache.layers).skip(pass.layers) {
            model.layer(layer, kv, &mut self.buffers, ops)?;
            pass.layers += 1;
            if pass.phase == Phase::Prefill && pass.layers < model.layers.len() {
                self.pass = Some(pass);
                return Ok(true);
            }
        }
        if let Some(want) = pass.want {
            model.head(want, &mut self.buffers, ops, &mut self.logits)?;
        }
        Ok(self.cache.len() < self.ids.len())
    }
}

impl Sequence for Phi3Sequence {
    fn append(&mut self, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        let n_vocab = self.model.config.n_vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(Error::Value(format!("token id {id} is outside the vocabulary of {n_vocab}")));
        }
        self.check_memory(ids.len(), want)?;
        self.logits.clear();
        let rows = if want == Want::Every { ids.len() } else { 1 };
        let what = format_args!("{rows} x {n_vocab} logits");
        memory::reserve(&mut self.logits, rows.saturating_mul(n_vocab), what)?;
        if self.ids.capacity() < self.ids.len() + ids.len() {
            let more = ids.len().max(self.ids.len()); // room for as many again
            memory::reserve(&mut self.ids, more, format_args!("{more} token ids"))?;
        }
        self.asked = Asked { from: self.ids.len(), phase, want };
        self.ids.extend_from_slice(ids);
        let long = self.model.rope.is_long(self.ids.len());
        if long != self.cache.long {
            self.cache.restart(long);
        }
        Ok(())
    }

    /// One turn: one layer of a chunk of the prompt, or one decoded token. The turns of other sequences in between do
    /// not affect the result.
    fn advance(&mut self, cancel: &Cancel) -> Result<bool> {
        panic::catch(|| self.turn(cancel))
    }

    fn computed(&self) -> usize {
        let reached = match &self.pass {
            Some(pass) => pass.positions.start + pass.positions.len() * pass.layers / self.model.layers.len(),
            None => self.cache.len(),
        };
        reached.saturating_sub(self.asked.from)
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn take_logits(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.logits)
    }
}

/// A one-dimensional tensor of the file as f32.
fn vector(gguf: &Gguf, name: &str, backend: &Backend) -> Result<Tensor> {
    let tensor = config::tensor(gguf, name)?;
    let cols = tensor.shape.iter().product();
    let weights = Weights { format: crate::compute::ops::format(tensor)?, cols, bytes: tensor.bytes() };
    let mut values = memory::filled(0f32, cols, format_args!("tensor `{name}`"))?;
    crate::compute::kernels::dequantize(weights, &mut values);
    Ok(Tensor::from_vec(values, cols, backend.device())?)
}
