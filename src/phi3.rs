//! Phi-3 and its family (mini, medium, 3.5-mini, Phi-4, Phi-4-mini), read top to bottom like the paper.
//!
//! Where implementations differ, this one does what Hugging Face's `modeling_phi3.py` does: the sliding window is
//! exactly `w` keys, and a LongRoPE sequence that outgrows the original context is computed anew with the long factors.
//!
//! Decisions: docs/design/model.md

mod config;

use std::ops::Range;
use std::path::PathBuf;
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
    file: PathBuf,
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
            file: gguf.path().to_owned(),
            config,
            backend,
        })
    }

    /// A pass over some positions begins with their embeddings.
    fn embed(&self, ids: &[u32], start: usize, long: bool, buffers: &mut Buffers, ops: Ops<'_>) -> Result<()> {
        self.rope.fill(&mut buffers.angles, start..start + ids.len(), long);
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

    /// The logits of its last position, or of each, are added to `logits`.
    fn head(
        &self,
        want: Want,
        Buffers { x, out, .. }: &mut Buffers,
        ops: Ops<'_>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let tokens = x.dim(0)?;
        let last; // (1, hidden)
        let x = if want == Want::Last && tokens > 1 {
            last = x.narrow(0, tokens - 1, 1)?;
            &last
        } else {
            x
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
        let (cache, buffers) = (Cache::new(&self), Buffers::new(&self, 1)?);
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
    asked: Asked,
    /// Under way.
    pass: Option<Pass>,
    logits: Vec<f32>,
}

/// What was last appended.
#[derive(Copy, Clone)]
struct Asked {
    /// Positions before it are only computed again.
    from: usize,
    phase: Phase,
    want: Want,
}

/// Some tokens on their way through the layers.
struct Pass {
    positions: Range<usize>,
    phase: Phase,
    want: Option<Want>,
    /// Layers that are done.
    layers: usize,
}

impl Phi3Sequence {
    /// The next positions that go through the model together.
    fn next_pass(&mut self) -> Result<Pass> {
        let (start, Asked { from, phase, want }) = (self.cache.len(), self.asked);
        let (border, phase) = if start < from { (from, Phase::Prefill) } else { (self.ids.len(), phase) };
        let end = border.min(start + PREFILL_CHUNK);
        let wanted = match want {
            Want::Every => start >= from,
            Want::Last => end == self.ids.len(),
        };
        if self.buffers.tokens()? != end - start {
            self.buffers = Buffers::new(&self.model, end - start)?;
        }
        Ok(Pass { positions: start..end, phase, want: wanted.then_some(want), layers: 0 })
    }
}

impl Sequence for Phi3Sequence {
    fn append(&mut self, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        let n_vocab = self.model.config.n_vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(Error::Value(format!("token id {id} is outside the vocabulary of {n_vocab}")));
        }
        self.asked = Asked { from: self.ids.len(), phase, want };
        self.ids.extend_from_slice(ids);
        let long = self.model.rope.is_long(self.ids.len());
        if long != self.cache.long {
            self.cache.restart(long);
        }
        self.logits.clear();
        Ok(())
    }

    /// A layer of a chunk of the prompt, which is some 200 ms where a token is as much; or a token. What others do in
    /// between changes no bit of it.
    fn advance(&mut self, cancel: &Cancel) -> Result<bool> {
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
