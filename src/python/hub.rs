//! The Hugging Face Hub and its cache.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::{Task, detached};
use crate::files::hub;

#[pyclass(frozen, module = "candle_phi._engine")]
pub struct Hub(hub::Hub);

type CachedFile = (String, String, String, Vec<String>, PathBuf, u64);

#[pymethods]
impl Hub {
    #[new]
    #[pyo3(signature = (*, revision, cache_dir, token, local_files_only, proxies))]
    fn new(
        revision: Option<String>,
        cache_dir: Option<PathBuf>,
        token: Option<Bound<'_, PyAny>>,
        local_files_only: bool,
        proxies: BTreeMap<String, String>,
    ) -> PyResult<Self> {
        let token = match token {
            None => hub::Token::Environment,
            Some(token) => match token.extract::<bool>() {
                Ok(true) => hub::Token::Required,
                Ok(false) => hub::Token::None,
                Err(_) => hub::Token::Given(token.extract()?),
            },
        };
        Ok(Hub(hub::Hub::new(revision, cache_dir, token, local_files_only, proxies)?))
    }

    fn cached(&self, py: Python<'_>, repo: &str, filename: Option<&str>) -> PyResult<Option<PathBuf>> {
        detached(py, || self.0.cached(repo, filename))
    }

    fn download(&self, repo: String, filename: Option<String>) -> PyResult<Task> {
        let hub = self.0.clone();
        Task::start(move |task| hub.download(&repo, filename.as_deref(), task))
    }

    fn info(&self, repo: String) -> PyResult<Task> {
        let hub = self.0.clone();
        Task::start(move |task| hub.info(&repo, task).map(|info| (info.repo, info.commit, info.files)))
    }

    fn files(&self, py: Python<'_>) -> PyResult<Vec<CachedFile>> {
        detached(py, || Ok(self.0.list())).map(cached_files)
    }

    fn verify(&self, repo: Option<String>, filename: Option<String>) -> PyResult<Task> {
        let hub = self.0.clone();
        Task::start(move |task| hub.verify(repo.as_deref(), filename.as_deref(), task).map(cached_files))
    }

    fn remove(&self, py: Python<'_>, repo: &str, filename: Option<&str>) -> PyResult<u64> {
        detached(py, || self.0.remove(repo, filename))
    }
}

fn cached_files(files: Vec<hub::cache::CachedFile>) -> Vec<CachedFile> {
    files.into_iter().map(|file| (file.repo, file.name, file.commit, file.revisions, file.path, file.size)).collect()
}
