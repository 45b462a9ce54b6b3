//! The queue on which one thread waits for many streams.

use std::sync::Arc;

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

    fn take(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        detached(py, || Ok(self.0.take()))
    }
}
