//! The life of a chat: its keys and values are evicted last.

use pyo3::prelude::*;

use super::detached;
use crate::engine;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Chat(pub(super) engine::Chat);

#[pymethods]
impl Chat {
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.close();
            Ok(())
        })
    }
}
