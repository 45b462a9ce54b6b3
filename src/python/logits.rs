//! The logits of token ids.

use std::task::Poll;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{Report, detached, report};
use crate::error::Error;
use crate::runtime::{logits, stream};

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Logits(pub(super) stream::Stream<logits::Logits>);

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
