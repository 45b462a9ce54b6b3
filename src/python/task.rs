//! A background task, such as a load or a download.

use std::task::Poll;

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;

use super::{Report, detached, report};
use crate::error::Error;
use crate::system::task::{self, BackgroundTask};

/// A background task. Its result is converted when Python polls.
#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Task(BackgroundTask<Convert>);

type Convert = Box<dyn for<'py> FnOnce(Python<'py>) -> PyResult<Bound<'py, PyAny>> + Send>;

impl Task {
    pub fn start<T>(work: impl FnOnce(&task::Task) -> Result<T, Error> + Send + 'static) -> PyResult<Self>
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
