//! The keys and values of a prompt, before it is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use pyo3::prelude::*;

use super::{Report, detached, report};
use crate::error::Error;
use crate::runtime::prefixes::Prefixes;
use crate::runtime::{prefill, stream};

/// A wait in one piece: Python handles signals between two of them.
const WAIT: Duration = Duration::from_millis(75);

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Warm {
    pub(super) stream: stream::Stream<prefill::Prefill>,
    /// Ids of the prompt.
    pub(super) length: usize,
    pub(super) prefixes: Arc<Prefixes>,
    pub(super) is_computed: AtomicBool,
}

#[pymethods]
impl Warm {
    fn poll(&self, py: Python<'_>) -> PyResult<(bool, Option<usize>)> {
        let is_done = detached(py, || {
            if !self.is_computed.load(Relaxed) {
                let Poll::Ready(end) = self.stream.poll()? else { return Ok(false) };
                end.ok_or(Error::Closed)?;
                self.is_computed.store(true, Relaxed);
            }
            Ok(self.prefixes.flush(WAIT)) // other processes find it once the call has returned
        })?;
        Ok(if is_done { (true, Some(self.length)) } else { (false, None) })
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
