//! A loaded model with all that it takes to talk to it: file, tokenizer, chat template, weights, and its compute thread.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::Device;
use sha2::{Digest, Sha256};

use crate::bandwidth;
use crate::cache::KvType;
use crate::chat::{Message, Template};
use crate::error::{Error, Result};
use crate::generate::{Generation, Request};
use crate::gguf::Gguf;
use crate::kernels::{self, Kernel};
use crate::logits::Logits;
use crate::model::{self, Model, Want};
use crate::ops::Backend;
use crate::phi3::Phi3;
use crate::schedule::Scheduler;
use crate::stock::Stock;
use crate::stream::{Stream, TextStream};
use crate::task::{Phase, Task};
use crate::threads::{self, Cancel, Pool, lock};
use crate::tokenizer::{Special, Tokenizer};

/// How to load. The names and defaults are the Python API's.
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
        }
    }
}

/// One model, usable from any thread.
pub struct Engine {
    pub info: Info,
    scheduler: Scheduler,
    /// None once it is closed.
    parts: Mutex<Option<Arc<Parts>>>,
}

/// What stays known after closing.
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
    pub system_fingerprint: String,
}

/// What holds the file.
pub struct Parts {
    pub gguf: Gguf,
    pub tokenizer: Arc<Tokenizer>,
    template: Template,
    model: Arc<dyn Model>,
}

impl Engine {
    /// Open a file. `task` is told of bytes, and asked whether to go on.
    pub fn load(path: &Path, options: &LoadOptions, task: &Task) -> Result<Self> {
        task.report(Phase::Load, 0, None);
        let gguf = Gguf::open_for(task, path, options.mmap)?;
        let model = load_model(&gguf, options, task)?; // first: it says what kind of file this is
        task.check()?;
        let tokenizer = match &options.tokenizer {
            Some(json) => Tokenizer::from_json(json, &gguf)?,
            None => Tokenizer::from_gguf(&gguf)?,
        };
        task.check()?;
        let tokenizer = Arc::new(tokenizer);
        let template = Template::new(options.chat_template.as_deref(), &gguf, tokenizer.clone())?;
        if tokenizer.n_vocab() > model.n_vocab() {
            return Err(Error::InvalidModel(format!(
                "{}: the tokenizer has {} tokens, the model {}",
                path.display(),
                tokenizer.n_vocab(),
                model.n_vocab()
            )));
        }
        let most = model.context_length();
        let n_ctx = options.n_ctx.unwrap_or(most);
        if !(1..=most).contains(&n_ctx) {
            return Err(Error::Value(format!(
                "n_ctx must be from 1 to {most}, the context length of the file, not {n_ctx}"
            )));
        }
        let info = Info {
            path: path.to_owned(),
            n_ctx,
            n_vocab: model.n_vocab(),
            chat_template: template.source().to_owned(),
            bos_token_id: tokenizer.bos_id(),
            stop_ids: tokenizer.stop_ids().to_vec(),
            device: model.device(),
            engine: model.engine(),
            kernel: model.kernel(),
            n_threads: model.n_threads(),
            system_fingerprint: fingerprint(&gguf, model.as_ref(), &options.kv_cache),
        };
        task.check()?;
        let size = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
        task.report(Phase::Load, size, Some(size));
        // Candle's loop keeps its one cache with the weights.
        let slots = if info.engine == "candle" { Some(1) } else { options.max_concurrent };
        let scheduler = Scheduler::new(slots.unwrap_or(usize::MAX));
        let parts = Parts { gguf, tokenizer, template, model };
        Ok(Engine { info, scheduler, parts: Mutex::new(Some(Arc::new(parts))) })
    }

    /// The parts, unless the model is closed or this is a forked child.
    pub fn parts(&self) -> Result<Arc<Parts>> {
        self.scheduler.fork_guard().check()?;
        lock(&self.parts).clone().ok_or(Error::Closed)
    }

    /// End every stream and let go of the file. Any thread, any number of times; returns at once.
    pub fn close(&self) {
        if self.scheduler.fork_guard().is_forked() {
            return;
        }
        self.scheduler.close();
        let parts = lock(&self.parts).take();
        drop(parts); // outside the lock: unmapping takes a moment
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.parts(), Err(Error::Closed))
    }

    /// The prompt text of a conversation.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        Ok(self.parts()?.template.render(messages)?.text)
    }

    /// The ids of a conversation: exactly what would be prefilled.
    pub fn tokenize_messages(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let parts = self.parts()?;
        let prompt = parts.template.render(messages)?;
        parts.tokenizer.encode(&prompt.text, Special::Outside(&prompt.user))
    }

    /// The ids of a text as it stands.
    pub fn tokenize_text(&self, text: &str, parse_special: bool, add_bos: bool) -> Result<Vec<u32>> {
        let parts = self.parts()?;
        let mut ids = Vec::new();
        if add_bos {
            ids.push(
                parts
                    .tokenizer
                    .bos_id()
                    .ok_or_else(|| Error::Value("add_bos: this tokenizer has no BOS token".into()))?,
            );
        }
        ids.extend(parts.tokenizer.encode(text, if parse_special { Special::All } else { Special::None })?);
        Ok(ids)
    }

    pub fn detokenize(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.parts()?.tokenizer.decode(ids, skip_special)
    }

    /// Start a generation. `max_tokens` None: to the context's end; `timeout`: from now on. Nothing is computed before
    /// the first read.
    pub fn stream(
        &self,
        mut request: Request,
        max_tokens: Option<usize>,
        timeout: Option<Duration>,
    ) -> Result<TextStream> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let parts = self.parts()?;
        self.check_ids(&request.prompt)?;
        let room = self.info.n_ctx.saturating_sub(request.prompt.len());
        if room == 0 {
            return Err(Error::ContextLength { prompt_tokens: request.prompt.len(), n_ctx: self.info.n_ctx });
        }
        // Without a limit of the caller's, an engine that cannot go to the end says so when it comes to its own.
        let asked = max_tokens.map_or(1, |n| n.min(room));
        parts.model.check_length(request.prompt.len() + asked - 1)?;
        parts.gguf.check_length()?;
        request.max_tokens = max_tokens.unwrap_or(room).min(room);
        request.limited = max_tokens.is_some();
        let generation = Generation::new(parts.model.clone(), parts.tokenizer.clone(), request);
        Ok(Stream::new(generation, self.scheduler.clone(), deadline))
    }

    /// The logits after the last of `ids`, (n_vocab), or after each, (ids, n_vocab): a stream of one item. It takes a
    /// slot, since it has a KV cache.
    pub fn logits(&self, ids: Vec<u32>, want: Want) -> Result<Stream<Logits>> {
        let parts = self.parts()?;
        self.check_ids(&ids)?;
        if ids.len() > self.info.n_ctx {
            return Err(Error::ContextLength { prompt_tokens: ids.len(), n_ctx: self.info.n_ctx });
        }
        parts.model.check_length(ids.len())?;
        parts.gguf.check_length()?;
        Ok(Stream::new(Logits::new(parts.model.clone(), ids, want), self.scheduler.clone(), None))
    }

    /// Bytes per second at which `n_threads` threads read the weights and do nothing else. Takes about a second.
    pub fn bandwidth(&self) -> Result<f64> {
        bandwidth::measure(&self.parts()?.gguf, self.info.n_threads)
    }

    /// Seconds of a decode pass over so many tokens at once, with the logits of each. It waits for no turn.
    pub fn decode_pass(&self, tokens: usize) -> Result<f64> {
        let mut sequence = self.parts()?.model.clone().sequence()?;
        let mut pass = || -> Result<f64> {
            let start = Instant::now();
            sequence.forward(&vec![0; tokens], model::Phase::Decode, Want::Every, &Cancel::default())?;
            Ok(start.elapsed().as_secs_f64())
        };
        pass()?; // makes room for the activations
        pass()
    }

    /// Bytes that decoding the last of so many positions reads: of weights, and of keys and values.
    pub fn bytes_per_token(&self, positions: usize) -> Result<(usize, usize)> {
        let parts = self.parts()?;
        Ok((bandwidth::weight_bytes(&parts.gguf), parts.model.kv_bytes(positions)))
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Value("the prompt has no tokens; at least one is due".into()));
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

fn load_model(gguf: &Gguf, options: &LoadOptions, task: &Task) -> Result<Arc<dyn Model>> {
    let kv_type = KvType::named(&options.kv_cache)?;
    match options.engine.as_str() {
        "native" => {
            let backend = backend(options)?;
            if kv_type == KvType::Q8_0 && matches!(backend, Backend::Candle(_)) {
                return Err(Error::Value(format!("kv_cache 'q8_0' is for device 'cpu', not '{}'", options.device)));
            }
            Ok(Arc::new(Phi3::load(gguf, backend, kv_type)?))
        }
        "candle" => {
            let taken = [
                (options.kernel.is_some(), "kernel: it has its own kernels"),
                (options.n_threads.is_some(), "n_threads: it computes on Candle's global pool (CANDLE_NUM_THREADS)"),
                (options.kv_cache != LoadOptions::default().kv_cache, "kv_cache: its cache is f32"),
                (!matches!(options.device.as_str(), "auto" | "cpu"), "device: it runs on the CPU here"),
            ];
            if let Some((_, what)) = taken.into_iter().find(|(given, _)| *given) {
                return Err(Error::Value(format!("engine 'candle' takes no {what}")));
            }
            Ok(Arc::new(Stock::load(gguf, task)?))
        }
        other => Err(Error::Value(format!("engine must be 'native' or 'candle', not {other:?}"))),
    }
}

fn backend(options: &LoadOptions) -> Result<Backend> {
    let missing = |device: &str| {
        Error::UnsupportedModel(format!(
            "device '{device}' is not in this build: it takes the cargo feature `{device}`"
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
        other => return Err(Error::Value(format!("device must be 'auto', 'cpu', 'cuda' or 'metal', not {other:?}"))),
    };
    let device = found
        .map_err(|error| Error::UnsupportedModel(format!("device '{}' does not answer: {error}", options.device)))?;
    let n_threads = threads::count(options.n_threads)?;
    let kernel = choose_kernel(options.kernel.as_deref())?;
    Ok(match device {
        Device::Cpu => Backend::Cpu { kernel, pool: Pool::new(n_threads) },
        device => Backend::Candle(device),
    })
}

/// The kernel of this name; None: what `CANDLE_PHI_KERNEL` names, else the best that this CPU can run.
pub fn choose_kernel(name: Option<&str>) -> Result<Box<dyn Kernel>> {
    const VARIABLE: &str = "CANDLE_PHI_KERNEL";
    let variable = std::env::var_os(VARIABLE).filter(|name| !name.is_empty());
    let variable = variable.map(|name| name.to_string_lossy().into_owned());
    let available = kernels::available();
    let (from, name) = match (name, &variable) {
        (Some(name), _) => ("kernel", name),
        (None, Some(name)) => (VARIABLE, name.as_str()),
        (None, None) => ("kernel", available[available.len() - 1]),
    };
    kernels::by_name(name).ok_or_else(|| {
        Error::Value(format!(
            "{from} is {name:?}; the kernels of this build that this CPU can run are: {}",
            available.join(", ")
        ))
    })
}

/// A short string over what decides the text besides prompt, options and seed: the file, this version, engine, kernel
/// and KV type. The file is known by its size, by its first bytes, where the metadata is, and by those of each tensor.
fn fingerprint(gguf: &Gguf, model: &dyn Model, kv_cache: &str) -> String {
    const HEADER: usize = 1 << 16;
    const SAMPLE: usize = 256;
    let mut hash = Sha256::new();
    for (_, bytes) in gguf.parts() {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes[..bytes.len().min(HEADER)]);
    }
    for tensor in gguf.tensors() {
        let bytes = tensor.bytes();
        hash.update(&bytes[..bytes.len().min(SAMPLE)]);
    }
    for text in [env!("CARGO_PKG_VERSION"), model.engine(), model.kernel(), model.device(), kv_cache] {
        hash.update(text);
    }
    let digits: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("phi_{digits}")
}
