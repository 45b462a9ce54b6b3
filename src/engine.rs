//! A loaded model: file, tokenizer, chat template, weights and compute thread.
//!
//! Decisions: docs/design/engine.md

mod chats;
mod fingerprints;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::Device;

use crate::compute::bandwidth;
use crate::compute::kernels::{self, Kernel};
use crate::compute::ops::{Backend, KvType};
use crate::compute::pool::{self, Pool};
use crate::error::{Error, Result};
use crate::files::gguf::Gguf;
use crate::kv::folder::Folder;
use crate::model::baseline::Baseline;
use crate::model::phi3::Phi3;
use crate::model::{self, Model, Want};
use crate::runtime::generation::{Generation, Request};
use crate::runtime::logits::Logits;
use crate::runtime::prefill::Prefill;
use crate::runtime::prefixes::{self, Prefixes};
use crate::runtime::prompt::Prompt;
use crate::runtime::scheduler::{self, Scheduler};
use crate::runtime::scores::Scores;
use crate::runtime::stream::{Stream, TextStream};
use crate::system::memory;
use crate::system::sync::{Cancel, drop_in_background, lock};
use crate::system::task::{Phase, Task};
use crate::text::chat::{Message, Template};
use crate::text::tokenizer::{Special, Tokenizer};

pub use chats::{Chat, Continuation, SavedChat};

/// Options of loading, with the names and defaults of the Python API.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub n_ctx: Option<usize>,
    pub n_threads: Option<usize>,
    pub device: String,
    pub engine: String,
    pub kernel: Option<String>,
    pub kv_cache: String,
    pub mmap: bool,
    /// Path of a `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    pub chat_template: Option<String>,
    /// Streams that may hold a KV cache at once.
    pub max_concurrent: Option<usize>,
    /// Streams that share a decode pass at most.
    pub max_batch: usize,
    /// Bytes of keys and values that are held for later prompts; 0: none. None: an eighth of the available memory, at most
    /// 2 GiB.
    pub prefix_cache: Option<u64>,
    /// A folder where keys and values of prompts are kept.
    pub prefix_cache_dir: Option<PathBuf>,
    /// Whether generations draft ids, unless they say otherwise.
    pub speculate: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            n_ctx: None,
            n_threads: None,
            device: "auto".into(),
            engine: "native".into(),
            kernel: None,
            kv_cache: "f16".into(),
            mmap: true,
            tokenizer: None,
            chat_template: None,
            max_concurrent: None,
            max_batch: scheduler::MAX_BATCH,
            prefix_cache: None,
            prefix_cache_dir: None,
            speculate: true,
        }
    }
}

/// `close` waits this long at most for columns on their way to the folder.
const LAST_WRITES: Duration = Duration::from_millis(150);

/// One model, for any number of threads.
pub struct Engine {
    pub info: Info,
    scheduler: Scheduler,
    /// None after `close`.
    parts: Mutex<Option<Arc<Parts>>>,
}

/// Facts that stay available after `close`.
pub struct Info {
    pub path: PathBuf,
    pub n_ctx: usize,
    pub n_vocab: usize,
    pub chat_template: String,
    pub bos_token_id: Option<u32>,
    pub stop_ids: Vec<u32>,
    pub device: &'static str,
    pub engine: &'static str,
    pub kernel: &'static str,
    pub n_threads: usize,
    /// Whether generations draft ids by default.
    pub speculate: bool,
    pub system_fingerprint: String,
}

/// The parts that hold the file open.
pub struct Parts {
    pub gguf: Gguf,
    pub tokenizer: Arc<Tokenizer>,
    template: Template,
    model: Arc<dyn Model>,
    /// Decides the bits of keys and values.
    kv_fingerprint: String,
}

impl Engine {
    /// Opens a file. Reports bytes to `task`, and ends when it is cancelled.
    pub fn load(path: &Path, options: &LoadOptions, task: &Task) -> Result<Self> {
        task.report(Phase::Load, 0, None);
        let gguf = Gguf::open_for(task, path, options.mmap)?;
        let model = load_model(&gguf, options, task)?; // first: its errors name the kind of file
        task.check()?;
        let tokenizer = match &options.tokenizer {
            Some(json) => Tokenizer::from_json(json, &gguf)?,
            None => Tokenizer::from_gguf(&gguf)?,
        };
        task.check()?;
        let tokenizer = Arc::new(tokenizer);
        let template = Template::new(options.chat_template.as_deref(), &gguf, tokenizer.clone())?;
        if tokenizer.n_vocab() > model.info().n_vocab {
            return Err(Error::InvalidModel(format!(
                "{}: the tokenizer has {} tokens, the model {}",
                path.display(),
                tokenizer.n_vocab(),
                model.info().n_vocab
            )));
        }
        let most = model.info().context_length;
        let n_ctx = options.n_ctx.unwrap_or(most);
        if !(1..=most).contains(&n_ctx) {
            let problem = format!("must be from 1 to {most}, the context length of the file, not {n_ctx}");
            return Err(Error::option("n_ctx", problem));
        }
        let info = Info {
            path: path.to_owned(),
            n_ctx,
            n_vocab: model.info().n_vocab,
            chat_template: template.source().to_owned(),
            bos_token_id: tokenizer.bos_id(),
            stop_ids: tokenizer.stop_ids().to_vec(),
            device: model.info().device,
            engine: model.info().engine,
            kernel: model.info().kernel,
            n_threads: model.info().n_threads,
            speculate: options.speculate,
            system_fingerprint: fingerprints::of_text(&gguf, model.as_ref(), &options.kv_cache),
        };
        task.check()?;
        let size = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
        task.report(Phase::Load, size, Some(size));
        // Candle has one cache, beside the weights.
        let slots = if info.engine == "candle" { Some(1) } else { options.max_concurrent };
        let fingerprint = fingerprints::of_kv(&gguf, model.as_ref(), &options.kv_cache);
        let prefixes = Arc::new(Prefixes::new(options.prefix_cache, folder(model.as_ref(), options, &fingerprint)?));
        let scheduler = Scheduler::new(slots.unwrap_or(usize::MAX), options.max_batch, prefixes);
        let parts = Parts { gguf, tokenizer, template, model, kv_fingerprint: fingerprint };
        Ok(Engine { info, scheduler, parts: Mutex::new(Some(Arc::new(parts))) })
    }

    /// The parts. An error after `close` and in a forked child.
    pub fn parts(&self) -> Result<Arc<Parts>> {
        self.scheduler.fork_guard().check()?;
        lock(&self.parts).clone().ok_or(Error::Closed)
    }

    /// Ends every stream and unmaps the file. Safe from any thread, repeatedly; returns at once.
    pub fn close(&self) {
        if self.scheduler.fork_guard().is_forked() {
            return;
        }
        self.scheduler.close();
        self.prefixes().flush(LAST_WRITES);
        let parts = lock(&self.parts).take();
        drop((parts, self.prefixes().close())); // outside the locks: unmapping takes time
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.parts(), Err(Error::Closed))
    }

    /// The prompt text of a conversation.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        Ok(self.parts()?.template.render(messages)?.text)
    }

    /// The ids of a conversation, as a generation prefills them.
    pub fn tokenize_messages(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let parts = self.parts()?;
        let prompt = parts.template.render(messages)?;
        parts.tokenizer.encode(&prompt.text, Special::Outside(&prompt.user))
    }

    /// The ids of a text without a template.
    pub fn tokenize_text(&self, text: &str, parse_special: bool, add_bos: bool) -> Result<Vec<u32>> {
        let parts = self.parts()?;
        let mut ids = Vec::new();
        if add_bos {
            ids.push(
                parts
                    .tokenizer
                    .bos_id()
                    .ok_or_else(|| Error::option("add_bos", "needs a BOS token, and this tokenizer has none"))?,
            );
        }
        ids.extend(parts.tokenizer.encode(text, if parse_special { Special::All } else { Special::None })?);
        Ok(ids)
    }

    pub fn detokenize(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.parts()?.tokenizer.decode(ids, skip_special)
    }

    /// Starts a generation. `max_tokens` None: up to the end of the context; `timeout` counts from this call. Nothing is
    /// computed before the first read.
    pub fn stream(
        &self,
        mut request: Request,
        max_tokens: Option<usize>,
        timeout: Option<Duration>,
    ) -> Result<TextStream> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let parts = self.parts()?;
        self.check_ids(&request.prompt.ids)?;
        for ids in [Some(&request.prediction), request.replay.as_ref()].into_iter().flatten() {
            if !ids.is_empty() {
                self.check_ids(ids)?;
            }
        }
        let room = self.info.n_ctx.saturating_sub(request.prompt.ids.len());
        if room == 0 {
            return Err(Error::ContextLength { prompt_tokens: request.prompt.ids.len(), n_ctx: self.info.n_ctx });
        }
        // Without `max_tokens`, an engine with a shorter limit raises when it reaches that limit.
        let asked = max_tokens.map_or(1, |n| n.min(room));
        parts.model.check_length(request.prompt.ids.len() + asked - 1)?;
        parts.gguf.check_length()?;
        request.max_tokens = max_tokens.unwrap_or(room).min(room);
        request.limited = max_tokens.is_some();
        let generation = Generation::new(parts.model.clone(), parts.tokenizer.clone(), request);
        Ok(Stream::new(generation, self.scheduler.clone(), deadline))
    }

    /// The logits after the last of `ids`, (n_vocab), or after each, (ids, n_vocab): a stream of one item. It takes a
    /// slot, since it has a KV cache. `Error::Memory` if the logits do not fit the available memory.
    pub fn logits(&self, ids: Vec<u32>, want: Want) -> Result<Stream<Logits>> {
        let parts = self.parts()?;
        self.check_ids(&ids)?;
        self.check_length(&parts, ids.len())?;
        Ok(Stream::new(Logits::new(parts.model.clone(), ids, want)?, self.scheduler.clone(), None))
    }

    /// Computes the keys and values of a prompt, which are held from then on: a stream of one item, which has them if
    /// `wants_table`. It takes a slot.
    pub fn prefill(&self, prompt: Prompt, wants_table: bool) -> Result<Stream<Prefill>> {
        let parts = self.parts()?;
        self.check_ids(&prompt.ids)?;
        self.check_length(&parts, prompt.ids.len())?;
        Ok(Stream::new(Prefill::new(parts.model.clone(), prompt, wants_table), self.scheduler.clone(), None))
    }

    pub fn prefixes(&self) -> &Arc<Prefixes> {
        self.scheduler.prefixes()
    }

    /// What is held of prompts and chats.
    pub fn cache_info(&self) -> Result<prefixes::Info> {
        self.parts()?;
        Ok(self.prefixes().info())
    }

    /// Bytes per second at which `n_threads` threads read the weights. Takes about a second.
    pub fn bandwidth(&self) -> Result<f64> {
        bandwidth::measure(&self.parts()?.gguf, self.info.n_threads)
    }

    /// The log probabilities of the ids from index `start` on, given all before them, with those of the `top` most probable
    /// ids: a stream of their parts, in order. It takes a slot, since it has a KV cache.
    pub fn score(&self, ids: Vec<u32>, start: usize, top: usize) -> Result<Stream<Scores>> {
        let parts = self.parts()?;
        self.check_ids(&ids)?;
        if !(1..ids.len()).contains(&start) {
            let problem = match ids.len() {
                1 => "the prompt has 1 token; a score takes at least 2".to_owned(),
                n => format!("must be from 1 to {}, since the prompt has {n} tokens, not {start}", n - 1),
            };
            return Err(Error::option("start", problem));
        }
        self.check_length(&parts, ids.len())?;
        Ok(Stream::new(Scores::new(parts.model.clone(), ids, start, top), self.scheduler.clone(), None))
    }

    /// Seconds of a decode pass over `tokens` tokens, with the logits of each. Runs at once, outside the scheduler.
    pub fn decode_pass(&self, tokens: usize) -> Result<f64> {
        let model = self.parts()?.model.clone();
        let mut batch = model::single(model.as_ref(), &Cancel::default())?;
        let ids = memory::filled(0u32, tokens, format_args!("{tokens} token ids"))?;
        let mut pass = || -> Result<f64> {
            let start = Instant::now();
            model::compute(model.as_ref(), &mut batch, &ids, model::Phase::Decode, Want::EVERY)?;
            Ok(start.elapsed().as_secs_f64())
        };
        pass()?; // allocates the activations
        pass()
    }

    /// Bytes of weights, and of keys and values, that a decoded token reads at a context of `positions`.
    pub fn bytes_per_token(&self, positions: usize) -> Result<(usize, usize)> {
        let parts = self.parts()?;
        Ok((bandwidth::weight_bytes(&parts.gguf), parts.model.kv_bytes(positions)))
    }

    /// Whether `tokens` can be computed without any after them.
    fn check_length(&self, parts: &Parts, tokens: usize) -> Result<()> {
        if tokens > self.info.n_ctx {
            return Err(Error::ContextLength { prompt_tokens: tokens, n_ctx: self.info.n_ctx });
        }
        parts.model.check_length(tokens)?;
        parts.gguf.check_length()
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Value("the prompt has no tokens; it must have at least one".into()));
        }
        match ids.iter().position(|&id| id as usize >= self.info.n_vocab) {
            Some(i) => Err(Error::Value(format!(
                "id {} at index {i} is outside the vocabulary of {}",
                ids[i], self.info.n_vocab
            ))),
            None => Ok(()),
        }
    }
}

impl Drop for Engine {
    /// Returns at once: Python drops its objects with the interpreter's lock held. A forked child starts no threads.
    fn drop(&mut self) {
        if !self.scheduler.fork_guard().is_forked()
            && let Some(parts) = lock(&self.parts).take()
        {
            drop_in_background((parts, self.prefixes().close()));
        }
    }
}

fn load_model(gguf: &Gguf, options: &LoadOptions, task: &Task) -> Result<Arc<dyn Model>> {
    let kv_type = KvType::named(&options.kv_cache)?;
    match options.engine.as_str() {
        "native" => {
            let backend = backend(options)?;
            if kv_type == KvType::Q8_0 && matches!(backend, Backend::Candle(_)) {
                return Err(Error::option("kv_cache", format!("'q8_0' needs device 'cpu', not '{}'", options.device)));
            }
            Ok(Arc::new(Phi3::load(gguf, backend, kv_type)?))
        }
        "candle" => {
            let refused = [
                (options.kernel.is_some(), "kernel", "which has its own kernels"),
                (options.n_threads.is_some(), "n_threads", "which computes on Candle's pool (CANDLE_NUM_THREADS)"),
                (options.kv_cache != LoadOptions::default().kv_cache, "kv_cache", "whose cache is f32"),
                (!matches!(options.device.as_str(), "auto" | "cpu"), "device", "which runs on the CPU"),
            ];
            if let Some((_, name, reason)) = refused.into_iter().find(|(given, ..)| *given) {
                return Err(Error::option(name, format!("cannot be used with engine 'candle', {reason}")));
            }
            Ok(Arc::new(Baseline::load(gguf, task)?))
        }
        other => Err(Error::option("engine", format!("must be 'native' or 'candle', not '{other}'"))),
    }
}

fn backend(options: &LoadOptions) -> Result<Backend> {
    let missing = |device: &str| {
        Error::UnsupportedModel(format!(
            "device '{device}' is not in this build: it needs the cargo feature `{device}`"
        ))
    };
    let found = match options.device.as_str() {
        "auto" if cfg!(feature = "cuda") && candle_core::utils::cuda_is_available() => Device::new_cuda(0),
        "auto" if cfg!(feature = "metal") && candle_core::utils::metal_is_available() => Device::new_metal(0),
        "auto" | "cpu" => Ok(Device::Cpu),
        "cuda" if cfg!(feature = "cuda") => Device::new_cuda(0),
        "metal" if cfg!(feature = "metal") => Device::new_metal(0),
        "cuda" => return Err(missing("cuda")),
        "metal" => return Err(missing("metal")),
        other => {
            let problem = format!("must be 'auto', 'cpu', 'cuda' or 'metal', not '{other}'");
            return Err(Error::option("device", problem));
        }
    };
    let device = found
        .map_err(|error| Error::UnsupportedModel(format!("device '{}' cannot be opened: {error}", options.device)))?;
    let n_threads = pool::count(options.n_threads)?;
    let kernel = choose_kernel(options.kernel.as_deref())?;
    Ok(match device {
        Device::Cpu => Backend::Cpu { kernel, pool: Pool::new(n_threads) },
        device => Backend::Candle(device),
    })
}

/// The kernel of this name. None: the kernel that `CANDLE_PHI_KERNEL` names, else the best one for this CPU.
pub fn choose_kernel(name: Option<&str>) -> Result<Box<dyn Kernel>> {
    const VARIABLE: &str = "CANDLE_PHI_KERNEL";
    let variable = std::env::var_os(VARIABLE).filter(|name| !name.is_empty());
    let variable = variable.map(|name| name.to_string_lossy().into_owned());
    let available = kernels::available();
    let chosen = name.or(variable.as_deref()).unwrap_or(available[available.len() - 1]);
    kernels::by_name(chosen).ok_or_else(|| {
        let runs = format!("this CPU can run {}", available.join(", "));
        match name {
            Some(name) => Error::option("kernel", format!("'{name}' is not available: {runs}")),
            None => Error::Value(format!("{VARIABLE} names the kernel '{chosen}', which is not available: {runs}")),
        }
    })
}

/// The folder of keys and values, if the caller gave one.
fn folder(model: &dyn Model, options: &LoadOptions, fingerprint: &str) -> Result<Option<Folder>> {
    let Some(path) = &options.prefix_cache_dir else { return Ok(None) };
    let refused = |reason| Err(Error::option("prefix_cache_dir", reason));
    if options.engine == "candle" {
        return refused("cannot be used with engine 'candle', which holds no prefixes");
    }
    if options.prefix_cache == Some(0) {
        return refused("cannot be used with prefix_cache 0, which holds no prefixes");
    }
    Ok(Some(Folder::open(path, fingerprint, model.sequence()?.kv.shape())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Batch, Phase, Sequence};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::{ThreadId, current};

    /// A model that tells which thread drops it.
    struct Weights(Sender<ThreadId>);

    impl Drop for Weights {
        fn drop(&mut self) {
            self.0.send(current().id()).unwrap();
        }
    }

    impl Model for Weights {
        fn info(&self) -> &model::Info {
            unreachable!("nothing is computed")
        }
        fn kv_bytes(&self, _: usize) -> usize {
            0
        }
        fn sequence(&self) -> Result<Sequence> {
            Err(Error::Closed)
        }
        fn append(&self, _: &mut Sequence, _: &[u32], _: Phase, _: Want) -> Result<()> {
            Ok(())
        }
        fn forward(&self, _: &mut Batch) -> Result<bool> {
            Ok(false)
        }
    }

    fn engine() -> (Engine, Receiver<ThreadId>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain.gguf");
        let mut engine = Engine::load(&path, &LoadOptions::default(), &Task::default()).unwrap();
        let parts = lock(&engine.parts).take().and_then(Arc::into_inner).unwrap();
        let (sender, dropped_on) = channel();
        engine.parts = Mutex::new(Some(Arc::new(Parts { model: Arc::new(Weights(sender)), ..parts })));
        (engine, dropped_on)
    }

    #[test]
    fn closing_unmaps_on_this_thread_and_dropping_on_another() {
        let (closed, dropped_on) = engine();
        closed.close();
        assert_eq!(dropped_on.try_recv(), Ok(current().id()), "it is unmapped when `close` returns");
        let (dropped, dropped_on) = engine();
        drop(dropped);
        assert_ne!(dropped_on.recv().unwrap(), current().id());
    }

    #[test]
    fn a_stream_that_was_never_read_unmaps_on_another_thread() {
        let (engine, dropped_on) = engine();
        let request = Request { prompt: vec![1].into(), ..Request::default() };
        let streams = [engine.stream(request.clone(), None, None), engine.stream(request, None, None)];
        engine.close();
        assert!(dropped_on.try_recv().is_err());
        let [last, first] = streams.map(Result::unwrap);
        first.cancel();
        drop(last);
        assert_ne!(dropped_on.recv().unwrap(), current().id());
    }
}
