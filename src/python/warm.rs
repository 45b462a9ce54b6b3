//! The keys and values of a prompt, before it is asked.

use std::task::Poll;

use pyo3::prelude::*;

use super::{Report, detached, report};
use crate::error::Error;
use crate::runtime::{prefill, stream};

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Warm {
    pub(super) stream: stream::Stream<prefill::Prefill>,
    /// Ids of the prompt.
    pub(super) length: usize,
}

#[pymethods]
impl Warm {
    fn poll(&self, py: Python<'_>) -> PyResult<(bool, Option<usize>)> {
        let polled = detached(py, || match self.stream.poll()? {
            Poll::Ready(end) => end.map(drop).ok_or(Error::Closed).map(Poll::Ready),
            Poll::Pending => Ok(Poll::Pending),
        })?;
        Ok(match polled {
            Poll::Ready(()) => (true, Some(self.length)),
            Poll::Pending => (false, None),
        })
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
