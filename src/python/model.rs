//! An open model.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use super::{Chat, Logits, Scores, Stream, Task, Warm, detached};
use crate::engine::{Continuation, Engine, LoadOptions, SavedChat};
use crate::error::Error;
use crate::files::gguf::Value;
use crate::kv::phases::Phases;
use crate::kv::tree::Holder;
use crate::model::Want;
use crate::runtime::generation::Request;
use crate::runtime::prompt::Prompt;
use crate::runtime::sampling::Sampling;
use crate::text::chat::Message;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Model(Engine);

#[pymethods]
impl Model {
    #[staticmethod]
    #[pyo3(signature = (path, *, n_ctx, n_threads, device, engine, kernel, kv_cache, mmap, tokenizer, chat_template,
        max_concurrent, max_batch, prefix_cache, prefix_cache_dir, speculate))]
    #[allow(clippy::too_many_arguments)] // the options of API.md, by name
    fn load(
        path: PathBuf,
        n_ctx: Option<usize>,
        n_threads: Option<usize>,
        device: String,
        engine: String,
        kernel: Option<String>,
        kv_cache: String,
        mmap: bool,
        tokenizer: Option<PathBuf>,
        chat_template: Option<String>,
        max_concurrent: Option<usize>,
        max_batch: usize,
        prefix_cache: Option<u64>,
        prefix_cache_dir: Option<PathBuf>,
        speculate: bool,
    ) -> PyResult<Task> {
        let options = LoadOptions {
            n_ctx,
            n_threads,
            device,
            engine,
            kernel,
            kv_cache,
            mmap,
            tokenizer,
            chat_template,
            max_concurrent,
            max_batch,
            prefix_cache,
            prefix_cache_dir,
            speculate,
        };
        Task::start(move |task| Engine::load(&path, &options, task).map(Model))
    }

    #[getter]
    fn path(&self) -> String {
        self.0.info.path.to_string_lossy().into_owned()
    }

    #[getter]
    fn n_ctx(&self) -> usize {
        self.0.info.n_ctx
    }

    #[getter]
    fn n_vocab(&self) -> usize {
        self.0.info.n_vocab
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let parts = self.0.parts()?;
        let dict = PyDict::new(py);
        for (key, value) in parts.gguf.metadata().iter() {
            dict.set_item(key, to_python(py, value)?)?;
        }
        detached(py, || {
            drop(parts); // the last reference to the file if another thread has closed the model meanwhile
            Ok(())
        })?;
        Ok(dict)
    }

    #[getter]
    fn chat_template(&self) -> &str {
        &self.0.info.chat_template
    }

    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.0.info.bos_token_id
    }

    #[getter]
    fn eos_token_ids(&self) -> Vec<u32> {
        self.0.info.stop_ids.clone()
    }

    #[getter]
    fn device(&self) -> &str {
        self.0.info.device
    }

    #[getter]
    fn engine(&self) -> &str {
        self.0.info.engine
    }

    #[getter]
    fn kernel(&self) -> &str {
        self.0.info.kernel
    }

    #[getter]
    fn n_threads(&self) -> usize {
        self.0.info.n_threads
    }

    #[getter]
    fn closed(&self) -> bool {
        self.0.is_closed()
    }

    #[getter]
    fn system_fingerprint(&self) -> &str {
        &self.0.info.system_fingerprint
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.close();
            Ok(())
        })
    }

    fn render(&self, py: Python<'_>, messages: Vec<(String, String)>) -> PyResult<String> {
        detached(py, || self.0.render(&conversation(messages)))
    }

    fn tokenize_text(&self, py: Python<'_>, text: &str, parse_special: bool, add_bos: bool) -> PyResult<Vec<u32>> {
        detached(py, || self.0.tokenize_text(text, parse_special, add_bos))
    }

    fn tokenize_messages(&self, py: Python<'_>, messages: Vec<(String, String)>) -> PyResult<Vec<u32>> {
        detached(py, || self.0.tokenize_messages(&conversation(messages)))
    }

    fn detokenize(&self, py: Python<'_>, ids: Vec<u32>, skip_special: bool) -> PyResult<String> {
        detached(py, || self.0.detokenize(&ids, skip_special))
    }

    fn logits(&self, py: Python<'_>, ids: Vec<u32>, every_position: bool) -> PyResult<Logits> {
        let want = if every_position { Want::EVERY } else { Want::Last };
        detached(py, || self.0.logits(ids, want)).map(Logits)
    }

    #[pyo3(signature = (ids, *, start, top_logprobs))]
    fn score(&self, py: Python<'_>, ids: Vec<u32>, start: usize, top_logprobs: usize) -> PyResult<Scores> {
        detached(py, || {
            let tokenizer = self.0.parts()?.tokenizer.clone();
            Ok(Scores { stream: self.0.score(ids, start, top_logprobs)?, tokenizer })
        })
    }

    fn continue_messages(
        &self,
        py: Python<'_>,
        messages: Vec<(String, String)>,
        text: &str,
        ids: Vec<u32>,
    ) -> PyResult<(String, Vec<u32>, usize)> {
        detached(py, || {
            let Continuation { text, ids, kept } = self.0.continue_messages(&conversation(messages), text, &ids)?;
            Ok((text, ids, kept))
        })
    }

    fn chat(&self, py: Python<'_>) -> PyResult<Chat> {
        detached(py, || self.0.chat().map(Chat))
    }

    #[pyo3(signature = (ids, *, pin, scope))]
    fn warm(&self, py: Python<'_>, ids: Vec<u32>, pin: bool, scope: Option<&str>) -> PyResult<Warm> {
        let holder = if pin { Holder::Pin } else { Holder::Anyone };
        let (length, scope) = (ids.len(), Arc::from(scope.unwrap_or_default()));
        let prompt = Prompt { ids, scope, holder, ..Prompt::default() };
        detached(py, || {
            let (stream, prefixes) = (self.0.prefill(prompt, false)?, self.0.prefixes().clone());
            Ok(Warm { stream, length, prefixes, is_computed: AtomicBool::default() })
        })
    }

    #[allow(clippy::too_many_arguments)] // those of the Python layer
    fn save_chat(
        &self,
        py: Python<'_>,
        chat: &Chat,
        ids: Vec<u32>,
        runs: Vec<usize>,
        path: PathBuf,
        metadata: BTreeMap<String, String>,
        kv: bool,
    ) -> PyResult<Task> {
        let phases = phases(&runs, ids.len())?;
        let prompt = Prompt { ids, phases, holder: chat.0.holder(), ..Prompt::default() };
        Task::start(detached(py, || self.0.save_chat(path, prompt, metadata, kv))?)
    }

    fn load_chat(&self, py: Python<'_>, path: PathBuf, chat: &Chat, strict: bool) -> PyResult<Task> {
        let load = detached(py, || self.0.load_chat(path, chat.0.holder(), strict))?;
        Task::start(move |task| {
            let SavedChat { ids, runs, texts, note } = load(task)?;
            Ok((ids, runs, texts, note))
        })
    }

    fn cache_info(&self, py: Python<'_>) -> PyResult<(u64, u64, usize, u64, u64, usize)> {
        let info = detached(py, || self.0.cache_info())?;
        Ok((info.bytes, info.limit, info.positions, info.hits, info.misses, info.chats))
    }

    fn bandwidth(&self, py: Python<'_>) -> PyResult<f64> {
        detached(py, || self.0.bandwidth())
    }

    fn decode_pass(&self, py: Python<'_>, tokens: usize) -> PyResult<f64> {
        detached(py, || self.0.decode_pass(tokens))
    }

    fn bytes_per_token(&self, py: Python<'_>, positions: usize) -> PyResult<(usize, usize)> {
        detached(py, || self.0.bytes_per_token(positions))
    }

    #[pyo3(signature = (prompt, *, max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n,
        presence_penalty, frequency_penalty, logit_bias, seed, stop, ignore_eos, logprobs, top_logprobs, timeout,
        cache_scope, speculate, prediction, runs, chat, whole, replay=None))]
    #[allow(clippy::too_many_arguments)] // the options of API.md, by name
    fn stream(
        &self,
        py: Python<'_>,
        prompt: Vec<u32>,
        max_tokens: Option<usize>,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repeat_penalty: f32,
        repeat_last_n: i64,
        presence_penalty: f32,
        frequency_penalty: f32,
        logit_bias: BTreeMap<u32, f32>,
        seed: Option<u64>,
        stop: Vec<String>,
        ignore_eos: bool,
        logprobs: bool,
        top_logprobs: usize,
        timeout: Option<f64>,
        cache_scope: Option<&str>,
        speculate: Option<bool>,
        prediction: Option<Vec<u32>>,
        runs: Option<Vec<usize>>,
        chat: Option<&Chat>,
        whole: bool,
        replay: Option<Vec<u32>>,
    ) -> PyResult<Stream> {
        let phases = phases(&runs.unwrap_or_default(), prompt.len())?;
        let holder = chat.map(|chat| chat.0.holder()).unwrap_or_default();
        let scope = Arc::from(cache_scope.unwrap_or_default());
        let sampling = Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty,
            repeat_last_n: usize::try_from(repeat_last_n).ok(), // -1: all
            presence_penalty,
            frequency_penalty,
            logit_bias: logit_bias.into_iter().collect(),
        };
        let prompt_tokens = prompt.len();
        let top_logprobs = logprobs.then_some(top_logprobs);
        // a timeout too long for a Duration limits nothing
        let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        detached(py, || {
            let seed = seed.map_or_else(random_seed, Ok)?;
            let prompt = Prompt { ids: prompt, phases, scope, holder };
            let request = Request {
                prompt,
                sampling,
                seed,
                stop,
                ignore_eos,
                top_logprobs,
                speculate: speculate.unwrap_or(self.0.info.speculate),
                prediction: prediction.unwrap_or_default(),
                replay,
                ..Request::default()
            };
            let stream = self.0.stream(request, max_tokens, timeout)?;
            if whole {
                stream.read_whole();
            }
            let tokenizer = if logprobs { Some(self.0.parts()?.tokenizer.clone()) } else { None };
            Ok(Stream { stream, tokenizer, seed, prompt_tokens })
        })
    }
}

/// The phases of these runs, of at most `ids` ids.
fn phases(runs: &[usize], ids: usize) -> Result<Phases, Error> {
    let phases = Phases::from_runs(runs).filter(|phases| phases.len() <= ids);
    phases.ok_or_else(|| Error::Value(format!("the runs {runs:?} have more than the {ids} ids")))
}

/// 32 bits are enough to tell runs apart and easy to pass back.
fn random_seed() -> Result<u64, Error> {
    getrandom::u32().map(u64::from).map_err(|error| Error::Internal(format!("no random seed: {error}")))
}

fn conversation(messages: Vec<(String, String)>) -> Vec<Message> {
    messages.into_iter().map(|(role, content)| Message { role, content }).collect()
}

fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::U8(n) => n.into_pyobject(py)?.into_any(),
        Value::I8(n) => n.into_pyobject(py)?.into_any(),
        Value::U16(n) => n.into_pyobject(py)?.into_any(),
        Value::I16(n) => n.into_pyobject(py)?.into_any(),
        Value::U32(n) => n.into_pyobject(py)?.into_any(),
        Value::I32(n) => n.into_pyobject(py)?.into_any(),
        Value::U64(n) => n.into_pyobject(py)?.into_any(),
        Value::I64(n) => n.into_pyobject(py)?.into_any(),
        Value::F32(n) => n.into_pyobject(py)?.into_any(),
        Value::F64(n) => n.into_pyobject(py)?.into_any(),
        Value::Bool(b) => b.into_pyobject(py)?.to_owned().into_any(),
        Value::String(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => text.into_pyobject(py)?.into_any(),
            Err(_) => PyBytes::new(py, bytes).into_any(),
        },
        Value::Array(array) => {
            let items = array.iter().map(|value| to_python(py, &value)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, items)?.into_any()
        }
    })
}
