//! What this machine has, and what a model needs of it.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::detached;
use crate::compute::{kernels, pool};
use crate::engine::choose_kernel;
use crate::files::hub;
use crate::model::requirements;
use crate::system::memory;

#[pyfunction]
pub fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
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
    report.set_item("n_threads", pool::count(None)?)?;
    report.set_item("cache_dir", hub::cache_dir().map(|dir| dir.to_string_lossy().into_owned()))?;
    Ok(report)
}

#[pyfunction]
pub fn memory_needed(py: Python<'_>, path: PathBuf, n_ctx: Option<usize>, kv_cache: &str) -> PyResult<(u64, u64, u64)> {
    detached(py, || {
        let needed = requirements::estimate(&path, n_ctx, kv_cache)?;
        Ok((needed.weights, needed.context, needed.activations))
    })
}

#[pyfunction]
pub fn memory_available() -> Option<u64> {
    memory::available()
}
