//! The hyperparameters of a file, with documented defaults for the keys that Microsoft's files leave out. They are checked
//! against each other and against the shape of every tensor before anything is computed.

use std::ops::RangeInclusive;

use crate::compute::kernels::Weights;
use crate::compute::ops::KvType;
use crate::error::{Error, Result, excerpt};
use crate::files::gguf::{Gguf, Tensor};
use crate::model::chunks::Sizes;
use crate::model::rope::{LongRope, default_attn_factor};
use crate::system::memory;

/// The window of the 4k models, whose files have no key for it (the rule of llama.cpp's pull request 8931).
const WINDOW_OF_4K: usize = 2047;
const VOCABULARY_OF_4K: usize = 32064;

/// The format has no bounds for sizes. These are far above every published model. They keep the activations of a token and
/// the scratch of a thread below 100 MB, whatever a file states.
const MOST_LAYERS: usize = 4096;
const MOST_HIDDEN: usize = 1 << 16;
const MOST_FEED_FORWARD: usize = 1 << 18;
const MOST_HEADS: usize = 4096;
const MOST_HEAD_DIM: usize = 8192;
const MOST_TOKENS: usize = 1 << 24;
const MOST_CONTEXT: usize = 1 << 28;

#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub n_layers: usize,
    pub hidden: usize,
    pub feed_forward: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub n_vocab: usize,
    pub context_length: usize,
    pub rms_eps: f32,
    pub rope_base: f32,
    /// Rotated features of each head; the others pass through.
    pub rope_dims: usize,
    pub long_rope: Option<LongRope>,
    /// Keys that a query sees, its own included; None: all before it.
    pub sliding_window: Option<usize>,
    /// The file has no `output.weight`: the embedding table is the head too.
    pub tied: bool,
}

#[cfg(test)]
impl Config {
    /// Phi-3-mini's sizes, without a sliding window and LongRoPE.
    pub fn phi3_mini(context_length: usize) -> Self {
        Config {
            n_layers: 32,
            hidden: 3072,
            feed_forward: 8192,
            n_head: 32,
            n_head_kv: 32,
            head_dim: 96,
            n_vocab: 32064,
            context_length,
            rms_eps: 1e-5,
            rope_base: 10_000.0,
            rope_dims: 96,
            long_rope: None,
            sliding_window: None,
            tied: false,
        }
    }
}

impl Config {
    pub fn q_dim(&self) -> usize {
        self.n_head * self.head_dim
    }

    pub fn kv_dim(&self) -> usize {
        self.n_head_kv * self.head_dim
    }

    /// Bytes of the keys and values of one position, in all layers.
    pub fn kv_bytes(&self, kv_type: KvType) -> usize {
        2 * self.n_layers * kv_type.bytes(self.n_head_kv, self.head_dim)
    }

    /// What decides the lengths of chunks.
    pub fn sizes(&self) -> Sizes {
        let &Config { hidden, feed_forward, n_vocab, rope_dims, .. } = self;
        let (q, kv) = (self.q_dim(), self.kv_dim());
        Sizes {
            activations: hidden + (q + 2 * kv) + q + 2 * feed_forward + rope_dims,
            widest: hidden.max(feed_forward).max(q),
            n_vocab,
            layer_cost: (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * feed_forward) as u64,
            q_dim: q,
            head_cost: (hidden * n_vocab) as u64,
            window: self.sliding_window,
        }
    }

    /// Reads and checks.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let keys = Keys { gguf };
        keys.architecture()?;
        let hidden = keys.size("phi3.embedding_length", 1..=MOST_HIDDEN)?;
        let n_head = keys.size("phi3.attention.head_count", 1..=MOST_HEADS)?;
        let n_head_kv = keys.size_or("phi3.attention.head_count_kv", 1..=MOST_HEADS, n_head)?;
        let context_length = keys.size("phi3.context_length", 1..=MOST_CONTEXT)?;
        if !hidden.is_multiple_of(n_head) || !n_head.is_multiple_of(n_head_kv) {
            return Err(keys.invalid(format!(
                "phi3.embedding_length {hidden}, phi3.attention.head_count {n_head} and phi3.attention.head_count_kv \
                 {n_head_kv} must each be a multiple of the next"
            )));
        }
        let head_dim = hidden / n_head;
        if head_dim > MOST_HEAD_DIM {
            return Err(keys.invalid(format!(
                "phi3.embedding_length {hidden} and phi3.attention.head_count {n_head} make heads of {head_dim} features; \
                 at most {MOST_HEAD_DIM} are possible"
            )));
        }
        for key in ["phi3.attention.key_length", "phi3.attention.value_length"] {
            if let Some(length) = gguf.metadata().u32(key)?.filter(|&length| length as usize != head_dim) {
                return Err(keys.unsupported(format!(
                    "the key {key} is {length}; this version needs heads of phi3.embedding_length / \
                     phi3.attention.head_count = {head_dim} features"
                )));
            }
        }
        let rope_dims = keys.size_or("phi3.rope.dimension_count", 1..=MOST_HEAD_DIM, head_dim)?;
        if rope_dims > head_dim || !rope_dims.is_multiple_of(2) {
            return Err(keys.invalid(format!(
                "phi3.rope.dimension_count {rope_dims} must be even and at most the head dimension {head_dim}"
            )));
        }
        let token_embd = tensor(gguf, "token_embd.weight")?;
        let &[n_vocab, _] = token_embd.shape.as_slice() else {
            return Err(keys.invalid(format!(
                "tensor `token_embd.weight` has shape {:?}; expected two dimensions",
                token_embd.shape
            )));
        };
        if !(1..=MOST_TOKENS).contains(&n_vocab) {
            return Err(keys.invalid(format!(
                "tensor `token_embd.weight` has {n_vocab} rows, one for each token; it must have 1 to {MOST_TOKENS}"
            )));
        }
        let config = Config {
            n_layers: keys.size("phi3.block_count", 1..=MOST_LAYERS)?,
            hidden,
            feed_forward: keys.size("phi3.feed_forward_length", 1..=MOST_FEED_FORWARD)?,
            n_head,
            n_head_kv,
            head_dim,
            n_vocab,
            context_length,
            rms_eps: keys.positive("phi3.attention.layer_norm_rms_epsilon", 1e-5)?,
            rope_base: keys.positive("phi3.rope.freq_base", 10_000.0)?,
            rope_dims,
            long_rope: keys.long_rope(context_length, rope_dims)?,
            sliding_window: keys.sliding_window(context_length)?,
            tied: gguf.tensor("output.weight").is_none(),
        };
        config.check_tensors(gguf)?;
        Ok(config)
    }

    /// Every tensor of the model exists and has the shape that follows from the keys.
    fn check_tensors(&self, gguf: &Gguf) -> Result<()> {
        let check = |name: &str, shape: &[usize]| {
            let found = tensor(gguf, name)?;
            crate::compute::ops::format(found).map_err(|error| at(gguf, error))?;
            if found.shape == shape {
                return Ok(());
            }
            let message = format!("tensor `{name}` has shape {:?}; the file's keys require {shape:?}", found.shape);
            Err(at(gguf, Error::InvalidModel(message)))
        };
        let (hidden, feed_forward) = (self.hidden, self.feed_forward);
        check("token_embd.weight", &[self.n_vocab, hidden])?;
        for i in 0..self.n_layers {
            check(&format!("blk.{i}.attn_norm.weight"), &[hidden])?;
            check(&format!("blk.{i}.attn_qkv.weight"), &[self.q_dim() + 2 * self.kv_dim(), hidden])?;
            check(&format!("blk.{i}.attn_output.weight"), &[hidden, self.q_dim()])?;
            check(&format!("blk.{i}.ffn_norm.weight"), &[hidden])?;
            check(&format!("blk.{i}.ffn_up.weight"), &[2 * feed_forward, hidden])?;
            check(&format!("blk.{i}.ffn_down.weight"), &[hidden, feed_forward])?;
        }
        check("output_norm.weight", &[hidden])?;
        if self.tied { Ok(()) } else { check("output.weight", &[self.n_vocab, hidden]) }
    }
}

/// A required tensor.
pub fn tensor<'a>(gguf: &'a Gguf, name: &str) -> Result<&'a Tensor> {
    gguf.tensor(name).ok_or_else(|| at(gguf, Error::InvalidModel(format!("there is no tensor `{name}`"))))
}

/// The same error after the file's name.
fn at(gguf: &Gguf, error: Error) -> Error {
    let file = gguf.path().display();
    match error {
        Error::InvalidModel(message) => Error::InvalidModel(format!("{file}: {message}")),
        Error::UnsupportedModel(message) => Error::UnsupportedModel(format!("{file}: {message}")),
        other => other,
    }
}

/// The metadata, with errors that name the file.
struct Keys<'a> {
    gguf: &'a Gguf,
}

impl Keys<'_> {
    fn invalid(&self, message: String) -> Error {
        at(self.gguf, Error::InvalidModel(message))
    }

    fn unsupported(&self, message: String) -> Error {
        at(self.gguf, Error::UnsupportedModel(message))
    }

    fn architecture(&self) -> Result<()> {
        match self.gguf.metadata().str("general.architecture")? {
            Some("phi3") => {}
            Some("llama") if self.is_old_phi3() => {
                return Err(self.unsupported(
                    "this Phi-3 file is an old conversion (general.architecture `llama`, split q, k and v): download the \
                     file again, its newer revision has architecture `phi3`"
                        .into(),
                ));
            }
            Some(other) => {
                return Err(
                    self.unsupported(format!("general.architecture is `{}`; this library runs `phi3`", excerpt(other)))
                );
            }
            None => return Err(self.invalid("the key general.architecture is missing".into())),
        }
        match self.gguf.metadata().str("phi3.rope.scaling.type")? {
            None | Some("none" | "longrope" | "su") => {}
            Some(other) => {
                return Err(self.unsupported(format!(
                    "phi3.rope.scaling.type is `{}`; only `longrope` is supported",
                    excerpt(other)
                )));
            }
        }
        for (key, because) in [
            ("phi3.expert_count", "mixtures of experts are another architecture"),
            ("phi3.rope.scaling.factor", "Phi-3 does not use linear rope scaling"),
        ] {
            if self.gguf.metadata().f32(key).ok().flatten().is_some_and(|n| n > 1.0) {
                return Err(self.unsupported(format!("the key {key} is set: {because}")));
            }
        }
        Ok(())
    }

    fn is_old_phi3(&self) -> bool {
        let name = self.gguf.metadata().str("general.name").ok().flatten().unwrap_or_default();
        name.to_lowercase().replace(['-', ' '], "").contains("phi3")
    }

    fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let value = self.gguf.metadata().u32(key)?;
        let value = value.ok_or_else(|| self.invalid(format!("the key {key} is missing")))? as usize;
        if range.contains(&value) {
            return Ok(value);
        }
        Err(self.invalid(format!("the key {key} is {value}; it must be from {} to {}", range.start(), range.end())))
    }

    fn size_or(&self, key: &str, range: RangeInclusive<usize>, default: usize) -> Result<usize> {
        if self.gguf.metadata().get(key).is_none() { Ok(default) } else { self.size(key, range) }
    }

    fn positive(&self, key: &str, default: f32) -> Result<f32> {
        let value = self.gguf.metadata().f32(key)?.unwrap_or(default);
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(self.invalid(format!("the key {key} is {value}; it must be a positive number")))
    }

    fn sliding_window(&self, context_length: usize) -> Result<Option<usize>> {
        let metadata = self.gguf.metadata();
        if let Some(window) = metadata.u32("phi3.attention.sliding_window")? {
            return Ok(Some(window as usize).filter(|&w| w > 0));
        }
        let is_spm = metadata.str("tokenizer.ggml.model")? == Some("llama");
        let tokens = metadata.strings("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
        let is_4k = is_spm && tokens == VOCABULARY_OF_4K && context_length <= 4096;
        Ok(is_4k.then_some(WINDOW_OF_4K))
    }

    fn long_rope(&self, context_length: usize, rope_dims: usize) -> Result<Option<LongRope>> {
        let (short, long) = match (
            self.factors("rope_factors_short.weight", rope_dims)?,
            self.factors("rope_factors_long.weight", rope_dims)?,
        ) {
            (Some(short), Some(long)) => (short, long),
            (None, None) => return Ok(None),
            _ => {
                return Err(self.invalid(
                    "one of the tensors `rope_factors_short.weight` and `rope_factors_long.weight` is missing".into(),
                ));
            }
        };
        // From 2: the attention factor divides by its logarithm.
        let key = "phi3.rope.scaling.original_context_length";
        let original_context = self.size_or(key, 2..=MOST_CONTEXT, context_length)?;
        if original_context < 2 {
            return Err(
                self.invalid(format!("the key phi3.context_length is {context_length}; LongRoPE must have at least 2"))
            );
        }
        if original_context > context_length {
            return Err(
                self.invalid(format!("{key} {original_context} is larger than phi3.context_length {context_length}"))
            );
        }
        let default = default_attn_factor(context_length, original_context);
        let attn_factor = self.positive("phi3.rope.scaling.attn_factor", default)?;
        Ok(Some(LongRope { short, long, original_context, attn_factor }))
    }

    fn factors(&self, name: &str, rope_dims: usize) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.gguf.tensor(name) else { return Ok(None) };
        if tensor.shape != [rope_dims / 2] {
            return Err(self.invalid(format!(
                "tensor `{name}` has shape {:?}; phi3.rope.dimension_count requires [{}]",
                tensor.shape,
                rope_dims / 2
            )));
        }
        let format = crate::compute::ops::format(tensor).map_err(|error| at(self.gguf, error))?;
        let mut factors = memory::filled(0f32, rope_dims / 2, format_args!("tensor `{name}`"))?;
        crate::compute::kernels::dequantize(
            Weights { format, cols: factors.len(), bytes: tensor.bytes() },
            &mut factors,
        );
        match factors.iter().find(|f| !f.is_finite() || **f <= 0.0) {
            Some(factor) => {
                Err(self
                    .invalid(format!("tensor `{name}` has the value {factor}; rope factors must be positive numbers")))
            }
            None => Ok(Some(factors)),
        }
    }
}
