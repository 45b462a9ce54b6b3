//! An open model.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use super::{Logits, Scores, Stream, Task, detached};
use crate::engine::{Engine, LoadOptions};
use crate::error::Error;
use crate::files::gguf::Value;
use crate::model::Want;
use crate::runtime::generation::Request;
use crate::runtime::sampling::Sampling;
use crate::text::chat::Message;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Model(Engine);

#[pymethods]
impl Model {
    #[staticmethod]
    #[pyo3(signature = (path, *, n_ctx, n_threads, device, engine, kernel, kv_cache, mmap, tokenizer, chat_template,
        max_concurrent, max_batch))]
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
        whole))]
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
        whole: bool,
    ) -> PyResult<Stream> {
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
            let request = Request { prompt, sampling, seed, stop, ignore_eos, top_logprobs, ..Request::default() };
            let stream = self.0.stream(request, max_tokens, timeout)?;
            if whole {
                stream.read_whole();
            }
            let tokenizer = if logprobs { Some(self.0.parts()?.tokenizer.clone()) } else { None };
            Ok(Stream { stream, tokenizer, seed, prompt_tokens })
        })
    }
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
