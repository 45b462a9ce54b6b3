//! The queue on which one thread waits for many streams.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;

use super::detached;
use crate::runtime::ready;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct ReadyQueue(pub(super) Arc<ready::ReadyQueue>);

#[pymethods]
impl ReadyQueue {
    #[new]
    fn new() -> Self {
        ReadyQueue(Arc::default())
    }

    fn put(&self, ticket: u64) {
        self.0.put(ticket);
    }

    fn take(&self, py: Python<'_>, seconds: Option<f64>) -> PyResult<Vec<u64>> {
        // a time too long for a Duration limits nothing
        let limit = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        detached(py, || Ok(self.0.take(limit)))
    }
}
