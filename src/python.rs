//! The Python module `candle_phi._engine`: classes, exceptions and the interpreter's lock. It holds no logic of its own.
//!
//! Decisions: docs/design/python.md

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::compute::{kernels, pool as threads};
use crate::engine::{Engine, LoadOptions, choose_kernel};
use crate::error::Error;
use crate::files::gguf::Value;
use crate::files::hub;
use crate::model::Want;
use crate::model::requirements;
use crate::runtime::generation::{Piece, Request, TokenLogprob};
use crate::runtime::sampling::Sampling;
use crate::runtime::stream::TextStream;
use crate::runtime::work::FinishReason;
use crate::runtime::{logits, ready, stream};
use crate::system::task::{self, BackgroundTask, Progress};
use crate::system::{memory, panic};
use crate::text::chat::Message;
use crate::text::tokenizer::Tokenizer;

mod raised {
    use pyo3::import_exception;
    import_exception!(candle_phi.errors, BusyError);
    import_exception!(candle_phi.errors, ClosedError);
    import_exception!(candle_phi.errors, ContextLengthError);
    import_exception!(candle_phi.errors, DownloadError);
    import_exception!(candle_phi.errors, ForkError);
    import_exception!(candle_phi.errors, InternalError);
    import_exception!(candle_phi.errors, InvalidModelError);
    import_exception!(candle_phi.errors, ModelNotFoundError);
    import_exception!(candle_phi.errors, NotInThisVersionError);
    import_exception!(candle_phi.errors, OfflineError);
    import_exception!(candle_phi.errors, UnsupportedModelError);
    import_exception!(candle_phi.options, OptionValueError);
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::ModelNotFound(_) => raised::ModelNotFoundError::new_err(message),
            Error::InvalidModel(_) => raised::InvalidModelError::new_err(message),
            Error::UnsupportedModel(_) => raised::UnsupportedModelError::new_err(message),
            Error::NotInThisVersion(_) => raised::NotInThisVersionError::new_err(message),
            Error::ContextLength { prompt_tokens, n_ctx } => {
                raised::ContextLengthError::new_err((message, prompt_tokens, n_ctx))
            }
            Error::Busy(_) => raised::BusyError::new_err(message),
            Error::Download { url, status, host, .. } => raised::DownloadError::new_err((message, url, status, host)),
            Error::Offline(_) => raised::OfflineError::new_err(message),
            Error::Closed => raised::ClosedError::new_err(message),
            Error::Fork(_) => raised::ForkError::new_err(message),
            Error::Value(_) => PyValueError::new_err(message),
            Error::Option { name, problem } => raised::OptionValueError::new_err((name, problem)),
            Error::Memory(_) => PyMemoryError::new_err(message),
            Error::Internal(_) | Error::Cancelled => raised::InternalError::new_err(message),
        }
    }
}

/// Runs `work` without the interpreter's lock. A panic becomes an `InternalError`.
///
/// `work` never calls Python. It waits in pieces of at most 75 ms: between them Python handles signals and calls
/// callbacks. Only the thread that wakes event loops waits longer. A daemon thread that comes back while the interpreter
/// finalizes stays in `PyEval_RestoreThread`: PyO3 parks it there before Python 3.14, and Python itself from then on.
/// Until finalization begins it passes, so that an `atexit` handler can join it.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    Ok(py.detach(|| panic::catch(work))?)
}

/// A progress report: phase, done, total.
type Report = (&'static str, u64, Option<u64>);

fn report(progress: Progress) -> Report {
    (progress.phase.name(), progress.done, progress.total)
}

/// A background task. Its result is converted when Python polls.
#[pyclass(frozen, module = "candle_phi._engine")]
struct Task(BackgroundTask<Convert>);

type Convert = Box<dyn for<'py> FnOnce(Python<'py>) -> PyResult<Bound<'py, PyAny>> + Send>;

impl Task {
    fn start<T>(work: impl FnOnce(&task::Task) -> Result<T, Error> + Send + 'static) -> PyResult<Self>
    where
        T: for<'py> IntoPyObject<'py> + Send + 'static,
    {
        let convert = |value: T| -> Convert { Box::new(move |py| value.into_bound_py_any(py)) };
        Ok(Task(BackgroundTask::start(move |task| work(task).map(convert))?))
    }
}

#[pymethods]
impl Task {
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<(bool, Option<Bound<'py, PyAny>>)> {
        match detached(py, || self.0.poll())? {
            Poll::Ready(convert) => Ok((true, Some(convert(py)?))),
            Poll::Pending => Ok((false, None)),
        }
    }

    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.wait())
    }

    fn progress(&self, end: bool) -> PyResult<[Report; 1]> {
        let _ = end; // every call returns a report
        Ok([report(self.0.progress()?)])
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.cancel();
            Ok(())
        })
    }
}

#[pyclass(frozen, module = "candle_phi._engine")]
struct Model(Engine);

#[pymethods]
impl Model {
    #[staticmethod]
    #[pyo3(signature = (path, *, n_ctx, n_threads, device, engine, kernel, kv_cache, mmap, tokenizer, chat_template,
        max_concurrent))]
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
        let want = if every_position { Want::Every } else { Want::Last };
        detached(py, || self.0.logits(ids, want)).map(Logits)
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
        presence_penalty, frequency_penalty, logit_bias, seed, stop, ignore_eos, logprobs, top_logprobs, timeout))]
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

#[pyclass(frozen, module = "candle_phi._engine")]
struct Stream {
    stream: TextStream,
    /// For the texts of log probabilities, if they were asked for.
    tokenizer: Option<Arc<Tokenizer>>,
    seed: u64,
    prompt_tokens: usize,
}

#[pymethods]
impl Stream {
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<(bool, Option<Read<'py>>)> {
        match detached(py, || self.stream.poll())? {
            Poll::Ready(piece) => Ok((true, piece.map(|piece| self.read(py, piece)).transpose()?)),
            Poll::Pending => Ok((false, None)),
        }
    }

    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.stream.wait())
    }

    fn notify(&self, py: Python<'_>, queue: &ReadyQueue, ticket: u64) -> PyResult<()> {
        let queue = queue.0.clone();
        detached(py, || {
            self.stream.on_change(Box::new(move || queue.put(ticket)));
            Ok(())
        })
    }

    #[getter]
    fn time_left(&self) -> Option<f64> {
        self.stream.time_left().map(|left| left.as_secs_f64())
    }

    fn progress(&self, end: bool) -> PyResult<Vec<Report>> {
        Ok(self.stream.progress(end)?.into_iter().map(report).collect())
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.stream.cancel();
            Ok(())
        })
    }

    fn check_process(&self) -> PyResult<()> {
        Ok(self.stream.finish_reason().map(drop)?)
    }

    #[getter]
    fn seed(&self) -> u64 {
        self.seed
    }

    #[getter]
    fn finish_reason(&self) -> PyResult<Option<&'static str>> {
        Ok(self.stream.finish_reason()?.map(FinishReason::name))
    }

    #[getter]
    fn token_ids(&self) -> PyResult<Vec<u32>> {
        Ok(self.stream.ids()?)
    }

    #[getter]
    fn usage(&self) -> PyResult<(usize, usize)> {
        Ok((self.prompt_tokens, self.stream.ids()?.len()))
    }

    #[getter]
    fn timings(&self) -> PyResult<(f64, f64, f64, Option<f64>, usize)> {
        let t = self.stream.timings()?;
        let seconds = Duration::as_secs_f64;
        Ok((
            seconds(&t.queue),
            seconds(&t.prefill),
            seconds(&t.decode),
            t.first_token.as_ref().map(seconds),
            t.decode_passes,
        ))
    }
}

/// Text, its ids and, if asked for, their log probabilities.
type Read<'py> = (String, Vec<u32>, Option<Vec<Bound<'py, PyAny>>>);

impl Stream {
    fn read<'py>(&self, py: Python<'py>, piece: Piece) -> PyResult<Read<'py>> {
        let entries = |tokenizer: &Arc<Tokenizer>| {
            piece.logprobs.iter().map(|entry| to_entry(py, tokenizer, entry)).collect::<PyResult<Vec<_>>>()
        };
        let entries = self.tokenizer.as_ref().map(entries).transpose()?;
        Ok((piece.text, piece.ids, entries))
    }
}

fn to_entry<'py>(py: Python<'py>, tokenizer: &Tokenizer, entry: &TokenLogprob) -> PyResult<Bound<'py, PyAny>> {
    let token = |id: u32, logprob: f32| {
        let bytes = tokenizer.bytes(id);
        (id, String::from_utf8_lossy(bytes).into_owned(), PyBytes::new(py, bytes), logprob)
    };
    let (id, text, bytes, logprob) = token(entry.id, entry.logprob);
    let top: Vec<_> = entry.top.iter().map(|&(id, logprob)| token(id, logprob)).collect();
    (id, text, bytes, logprob, top).into_bound_py_any(py)
}

#[pyclass(frozen, module = "candle_phi._engine")]
struct Logits(stream::Stream<logits::Logits>);

#[pymethods]
impl Logits {
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<(bool, Option<Bound<'py, PyBytes>>)> {
        let Poll::Ready(logits) = detached(py, || self.0.poll())? else { return Ok((false, None)) };
        let logits = logits.ok_or(Error::Closed)?;
        let bytes = PyBytes::new_with(py, logits.len() * size_of::<f32>(), |bytes| {
            for (chunk, logit) in bytes.as_chunks_mut().0.iter_mut().zip(logits) {
                *chunk = logit.to_ne_bytes();
            }
            Ok(())
        })?;
        Ok((true, Some(bytes)))
    }

    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.wait())
    }

    fn progress(&self, end: bool) -> PyResult<Vec<Report>> {
        Ok(self.0.progress(end)?.into_iter().map(report).collect())
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.cancel();
            Ok(())
        })
    }
}

#[pyclass(frozen, module = "candle_phi._engine")]
struct ReadyQueue(Arc<ready::ReadyQueue>);

#[pymethods]
impl ReadyQueue {
    #[new]
    fn new() -> Self {
        ReadyQueue(Arc::default())
    }

    fn put(&self, ticket: u64) {
        self.0.put(ticket);
    }

    fn take(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        detached(py, || Ok(self.0.take()))
    }
}

#[pyfunction]
fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let cpu = PyDict::new(py);
    cpu.set_item("arch", std::env::consts::ARCH)?;
    cpu.set_item("os", std::env::consts::OS)?;
    for (name, has) in kernels::features() {
        cpu.set_item(name, has)?;
    }
    let report = PyDict::new(py);
    report.set_item("version", env!("CARGO_PKG_VERSION"))?;
    report.set_item("cpu", cpu)?;
    report.set_item("kernels", kernels::available())?;
    report.set_item("kernel", choose_kernel(None)?.name())?;
    report.set_item("n_threads", threads::count(None)?)?;
    report.set_item("cache_dir", hub::cache_dir().map(|dir| dir.to_string_lossy().into_owned()))?;
    Ok(report)
}

#[pyfunction]
fn memory_needed(py: Python<'_>, path: PathBuf, n_ctx: Option<usize>, kv_cache: &str) -> PyResult<(u64, u64, u64)> {
    detached(py, || {
        let needed = requirements::estimate(&path, n_ctx, kv_cache)?;
        Ok((needed.weights, needed.context, needed.activations))
    })
}

#[pyfunction]
fn memory_available() -> Option<u64> {
    memory::available()
}

#[pyclass(frozen, module = "candle_phi._engine")]
struct Hub(hub::Hub);

type CachedFile = (String, String, String, Vec<String>, PathBuf, u64);

#[pymethods]
impl Hub {
    #[new]
    #[pyo3(signature = (*, revision, cache_dir, token, local_files_only, proxies))]
    fn new(
        revision: Option<String>,
        cache_dir: Option<PathBuf>,
        token: Option<Bound<'_, PyAny>>,
        local_files_only: bool,
        proxies: BTreeMap<String, String>,
    ) -> PyResult<Self> {
        let token = match token {
            None => hub::Token::Environment,
            Some(token) => match token.extract::<bool>() {
                Ok(true) => hub::Token::Required,
                Ok(false) => hub::Token::None,
                Err(_) => hub::Token::Given(token.extract()?),
            },
        };
        Ok(Hub(hub::Hub::new(revision, cache_dir, token, local_files_only, proxies)?))
    }

    fn cached(&self, py: Python<'_>, repo: &str, filename: Option<&str>) -> PyResult<Option<PathBuf>> {
        detached(py, || self.0.cached(repo, filename))
    }

    fn download(&self, repo: String, filename: Option<String>) -> PyResult<Task> {
        let hub = self.0.clone();
        Task::start(move |task| hub.download(&repo, filename.as_deref(), task))
    }

    fn info(&self, repo: String) -> PyResult<Task> {
        let hub = self.0.clone();
        Task::start(move |task| hub.info(&repo, task).map(|info| (info.repo, info.commit, info.files)))
    }

    fn files(&self, py: Python<'_>) -> PyResult<Vec<CachedFile>> {
        detached(py, || Ok(self.0.list())).map(cached_files)
    }

    fn verify(&self, repo: Option<String>, filename: Option<String>) -> PyResult<Task> {
        let hub = self.0.clone();
        Task::start(move |task| hub.verify(repo.as_deref(), filename.as_deref(), task).map(cached_files))
    }

    fn remove(&self, py: Python<'_>, repo: &str, filename: Option<&str>) -> PyResult<u64> {
        detached(py, || self.0.remove(repo, filename))
    }
}

fn cached_files(files: Vec<hub::cache::CachedFile>) -> Vec<CachedFile> {
    files.into_iter().map(|file| (file.repo, file.name, file.commit, file.revisions, file.path, file.size)).collect()
}

/// The compiled engine. `candle_phi.Phi` checks options and messages before they come here.
#[pymodule]
mod _engine {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{Hub, Logits, Model, ReadyQueue, Stream, Task, doctor, memory_available, memory_needed};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        #[cfg(all(target_arch = "aarch64", target_feature = "fp16"))]
        if !crate::compute::kernels::has_fp16() {
            return Err(pyo3::exceptions::PyImportError::new_err(
                "candle_phi was built for CPUs with half-precision arithmetic (ARMv8.2, fp16), and this CPU has none. \
                 The published wheels run here: python -m pip install --force-reinstall --only-binary :all: candle-phi. \
                 A build from source does too with RUSTFLAGS='-C target-feature=+neon'.",
            ));
        }
        crate::system::panic::silence();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        let known = crate::files::hub::choice::KNOWN.iter().map(|known| (known.short, known.repo, known.file));
        module.add("KNOWN_MODELS", known.collect::<Vec<_>>())?;
        module.add("DEFAULT_REPO", crate::files::hub::DEFAULT_REPO)?;
        module.add("DEFAULT_FILE", crate::files::hub::DEFAULT_FILE)
    }
}
