//! The stream of an answer.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{ReadyQueue, Report, detached, report};
use crate::runtime::generation::Piece;
use crate::runtime::sampling::TokenLogprob;
use crate::runtime::stream::TextStream;
use crate::runtime::work::FinishReason;
use crate::text::tokenizer::Tokenizer;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Stream {
    pub(super) stream: TextStream,
    /// For the texts of log probabilities, if they were asked for.
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) seed: u64,
    pub(super) prompt_tokens: usize,
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
    fn usage(&self) -> PyResult<(usize, usize, usize, usize, usize)> {
        let t = self.stream.timings()?;
        Ok((self.prompt_tokens, self.stream.ids()?.len(), t.cached, t.drafted, t.accepted))
    }

    #[getter]
    fn runs(&self) -> PyResult<Vec<usize>> {
        Ok(self.stream.phases()?.map(|phases| phases.runs()).unwrap_or_default())
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

pub fn to_entry<'py>(py: Python<'py>, tokenizer: &Tokenizer, entry: &TokenLogprob) -> PyResult<Bound<'py, PyAny>> {
    let token = |id: u32, logprob: f32| {
        let bytes = tokenizer.bytes(id);
        (id, String::from_utf8_lossy(bytes).into_owned(), PyBytes::new(py, bytes), logprob)
    };
    let (id, text, bytes, logprob) = token(entry.id, entry.logprob);
    let top: Vec<_> = entry.top.iter().map(|&(id, logprob)| token(id, logprob)).collect();
    (id, text, bytes, logprob, top).into_bound_py_any(py)
}
