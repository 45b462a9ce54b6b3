//! The log probabilities of given ids.

use std::sync::Arc;
use std::task::Poll;

use pyo3::prelude::*;

use super::stream::to_entry;
use super::{Report, detached, report};
use crate::runtime::{scores, stream};
use crate::text::tokenizer::Tokenizer;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Scores {
    pub(super) stream: stream::Stream<scores::Scores>,
    /// For the texts of the ids.
    pub(super) tokenizer: Arc<Tokenizer>,
}

#[pymethods]
impl Scores {
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<(bool, Option<Vec<Bound<'py, PyAny>>>)> {
        let Poll::Ready(entries) = detached(py, || self.stream.poll())? else { return Ok((false, None)) };
        let entries = entries.map(|entries| entries.iter().map(|entry| to_entry(py, &self.tokenizer, entry)).collect());
        Ok((true, entries.transpose()?))
    }

    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.stream.wait())
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
}
