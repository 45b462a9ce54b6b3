//! Candle's own `quantized_phi3` behind the same trait: the baseline of tests and benchmarks.
//!
//! It refuses models that it would compute wrongly, and sequences longer than a sliding window. It copies the weights,
//! has one cache, and computes on Candle's global thread pool.
//!
//! Decisions: docs/design/engine.md

use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{AcqRel, Relaxed, Release},
};
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_phi3::ModelWeights;

use crate::compute::kernels;
use crate::compute::ops::KvType;
use crate::error::{Error, Result};
use crate::files::gguf::Gguf;
use crate::kv::table::Table;
use crate::model::phi3::Config;
use crate::model::{Batch, Info, Member, Model, Phase, Sequence, Want};
use crate::system::fork::ForkGuard;
use crate::system::sync::lock;
use crate::system::task::{self, Task};
use crate::system::{memory, panic};

pub struct Baseline {
    config: Config,
    info: Info,
    weights: Mutex<ModelWeights>,
    /// Positions whose keys and values Candle's cache has memory for.
    cached: AtomicUsize,
    taken: Arc<AtomicBool>,
}

impl Baseline {
    /// Copies the weights, as Candle does, until `task` is cancelled.
    pub fn load(gguf: &Gguf, task: &Task) -> Result<Self> {
        /// Candle creates its thread pool once in a process, and a child has none of its threads.
        static POOL: OnceLock<ForkGuard> = OnceLock::new();
        if POOL.get_or_init(ForkGuard::here).is_forked() {
            let message =
                "engine 'candle' was used before a fork(), and its thread pool does not survive a fork: use spawn";
            return Err(Error::Fork(message.into()));
        }
        if kernels::features().contains(&("dotprod", false)) {
            let message =
                "engine 'candle' uses the dotprod instructions, and this CPU has none; engine 'native' runs here";
            return Err(Error::Value(message.into()));
        }
        let file = gguf.path().display();
        let config = Config::read(gguf)?;
        let refusals = [
            (config.long_rope.is_some(), "the LongRoPE factors".to_owned()),
            (config.rope_base != 10_000.0, format!("the rope base {}", config.rope_base)),
            (
                config.rope_dims != config.head_dim,
                format!("rotating {} of {} features", config.rope_dims, config.head_dim),
            ),
            (config.tied, "an embedding table that is also the head".to_owned()),
            (gguf.parts().len() > 1, "a split file".to_owned()),
        ];
        if let Some((_, what)) = refusals.into_iter().find(|(refused, _)| *refused) {
            return Err(Error::UnsupportedModel(format!(
                "{file}: engine 'candle' does not support {what}; engine 'native' does"
            )));
        }
        memory::probe(copied(gguf, &config), format_args!("{file}: the copy of engine 'candle'"))?;
        let load = || {
            let bytes = gguf.parts().next().map_or(&[][..], |(_, bytes)| bytes);
            let content = Content::read(&mut Cursor::new(bytes))?;
            let mut reader = Watched { bytes: Cursor::new(bytes), task };
            ModelWeights::from_gguf(false, content, &mut reader, &Device::Cpu)
        };
        let weights = load();
        task.check()?;
        let weights = weights.map_err(|error: candle_core::Error| {
            Error::UnsupportedModel(format!("{file}: engine 'candle' cannot load it: {error}; engine 'native' can"))
        })?;
        let info = Info {
            engine: "candle",
            kernel: "candle",
            device: "cpu",
            n_threads: candle_core::utils::get_num_threads(),
            file: file.to_string(),
            n_vocab: config.n_vocab,
            context_length: config.context_length,
            width: 1,
            shared_tokens: 0,
            pass_costs: &[1.0],
        };
        Ok(Baseline { config, info, weights: Mutex::new(weights), cached: AtomicUsize::new(0), taken: Arc::default() })
    }
}

/// Bytes of the weights that Candle copies, with the embedding table as f32 and the rope angles of the whole context.
fn copied(gguf: &Gguf, config: &Config) -> u64 {
    let weights: u64 = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
    let embeddings = 4 * config.n_vocab as u64 * config.hidden as u64;
    let angles = 4 * config.context_length as u64 * config.rope_dims as u64; // cos and sin: half of the features each
    weights.saturating_add(embeddings).saturating_add(angles)
}

impl Baseline {
    /// Candle allocates without asking. An error if what it needs for `tokens` more does not fit the memory.
    fn check_memory(&self, held: usize, tokens: usize) -> Result<()> {
        let what = format_args!("engine 'candle' with {tokens} tokens more");
        // The cache of the sequence before is freed as this one starts.
        let freed = if held == 0 { self.cached.load(Relaxed) } else { 0 };
        memory::probe(needed(&self.config, held, tokens, freed), what)?;
        if held > 0 {
            return Ok(());
        }
        // It allocates keys and values of the whole context for every layer, and writes to them as they are used.
        let keys = KvType::F32.bytes(self.config.n_head_kv, self.config.head_dim) as u64;
        let all = keys.saturating_mul(self.config.context_length as u64);
        memory::probe_pieces(2 * self.config.n_layers, all, "a KV cache buffer of engine 'candle'")
    }
}

/// Bytes that Candle writes for `tokens` more after `held`, of which the memory of `freed` positions is there.
fn needed(config: &Config, held: usize, tokens: usize, freed: usize) -> u64 {
    /// Tensors of the widest kind that Candle holds at a time.
    const WIDEST: u64 = 3;
    let &Config { hidden, feed_forward, n_head, n_head_kv, .. } = config;
    let (positions, q_dim) = ((held + tokens) as u64, config.q_dim() as u64);
    let scores = positions.saturating_mul(n_head as u64);
    let row = scores.max(2 * feed_forward as u64).max(hidden as u64 + q_dim);
    let activations = row.saturating_mul(4 * WIDEST * tokens as u64);
    // A layer's keys and values are repeated for each query head of a group.
    let repeated = if n_head == n_head_kv { 0 } else { positions.saturating_mul(2 * 4 * q_dim) };
    let cache = (tokens.saturating_sub(freed) as u64).saturating_mul(config.kv_bytes(KvType::F32) as u64);
    activations.saturating_add(repeated).saturating_add(cache)
}

/// The file for Candle's reader, which reads it tensor by tensor. A read fails once the task is cancelled.
struct Watched<'a> {
    bytes: Cursor<&'a [u8]>,
    task: &'a Task,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.task.check().map_err(io::Error::other)?;
        let n = self.bytes.read(buffer)?;
        self.task.report(task::Phase::Load, self.bytes.position(), Some(self.bytes.get_ref().len() as u64));
        Ok(n)
    }
}

impl Seek for Watched<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(to)
    }
}

impl Model for Baseline {
    fn info(&self) -> &Info {
        &self.info
    }

    fn kv_bytes(&self, positions: usize) -> usize {
        positions * self.config.kv_bytes(KvType::F32)
    }

    fn check_length(&self, positions: usize) -> Result<()> {
        match self.config.sliding_window {
            Some(window) if positions > window => Err(Error::UnsupportedModel(format!(
                "{positions} positions exceed the sliding window of {window}, and engine 'candle' does not support \
                 sliding windows; engine 'native' does"
            ))),
            _ => Ok(()),
        }
    }

    /// Its keys and values are in Candle's own cache, so its table has no layers.
    fn sequence(&self) -> Result<Sequence> {
        if self.taken.swap(true, AcqRel) {
            return Err(Error::Busy(
                "engine 'candle' has 1 slot, and a stream holds it: finish or close that stream first".into(),
            ));
        }
        let mut sequence = Sequence::new(Table::without_layers());
        sequence.held = Some(Box::new(Slot(self.taken.clone())));
        Ok(sequence)
    }

    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        if want.first(ids.len()) + 1 < ids.len() {
            return Err(Error::UnsupportedModel(
                "engine 'candle' computes the logits of the last position only".into(),
            ));
        }
        let held = sequence.ids.len();
        self.check_length(held + ids.len())?;
        self.check_memory(held, ids.len())?;
        memory::reserve(&mut sequence.ids, ids.len(), format_args!("{} token ids", ids.len()))?;
        sequence.append(ids, phase, want);
        Ok(())
    }

    /// One turn for all ids: Candle's loop cannot be interrupted.
    fn forward(&self, batch: &mut Batch) -> Result<bool> {
        let [Member { sequence, cancel, logits }] = &mut batch.members[..] else {
            return Err(Error::Internal("engine 'candle' computes one sequence at a time".into()));
        };
        let start = sequence.kv.len();
        batch.logits = panic::catch(|| {
            let input = Tensor::new(&sequence.ids[start..], &Device::Cpu)?.unsqueeze(0)?; // (1, tokens)
            Ok(lock(&self.weights).forward(&input, start)?.flatten_all()?.to_vec1()?)
        })?;
        *logits = 0..batch.logits.len();
        sequence.kv.commit(sequence.ids.len() - start);
        self.cached.store(sequence.kv.len(), Relaxed);
        if cancel.is_set() { Err(Error::Cancelled) } else { Ok(false) }
    }
}

/// The right to use Candle's cache.
struct Slot(Arc<AtomicBool>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.store(false, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phi3_mini() -> Config {
        Config::phi3_mini(4096)
    }

    #[test]
    fn a_token_after_a_long_conversation_needs_little_memory() {
        let config = phi3_mini();
        assert!(needed(&config, 4000, 1, 0) < 4 << 20);
        let groups = Config { n_head_kv: 8, ..config };
        assert!((98_000_000..102_000_000).contains(&needed(&groups, 4000, 1, 0)), "repeated keys and values");
    }

    #[test]
    fn a_prompt_needs_its_scores_and_its_cache_less_what_the_cache_before_frees() {
        let config = phi3_mini();
        let (scores, position) = (3 * 4 * 32 * 2000 * 2000, config.kv_bytes(KvType::F32) as u64);
        assert_eq!(needed(&config, 0, 2000, 0), scores + 2000 * position);
        assert_eq!(needed(&config, 0, 2000, 1500), scores + 500 * position);
        assert_eq!(needed(&config, 0, 2000, 3000), scores);
        assert_eq!(needed(&config, 0, 1 << 40, 0), u64::MAX);
    }
}
