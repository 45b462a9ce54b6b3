//! Where Hugging Face's tools keep what they downloaded, and what of it is there.

use std::env::{self, VarError};
use std::path::PathBuf;

use hf_hub::{Cache, Repo};

/// The repository and file of the model that `candle-phi PROMPT` runs.
pub const DEFAULT_REPO: &str = "microsoft/Phi-3-mini-4k-instruct-gguf";
pub const DEFAULT_FILE: &str = "Phi-3-mini-4k-instruct-q4.gguf";

/// The cache folder, by the rules of `huggingface_hub`: HF_HUB_CACHE, else `hub` in HF_HOME, else in
/// `XDG_CACHE_HOME/huggingface`, else in `~/.cache/huggingface`. None where there is no home folder either.
pub fn cache_dir() -> Option<PathBuf> {
    let variable = |name| match env::var(name) {
        Ok(value) if !value.is_empty() => Some(expand_home(value)),
        Err(VarError::NotUnicode(value)) => Some(value.into()),
        _ => None,
    };
    variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")).or_else(|| {
        let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")));
        let home = variable("HF_HOME").or_else(|| Some(cache()?.join("huggingface")))?;
        Some(home.join("hub"))
    })
}

/// A file of a repository's main revision, if it is in the cache. Asks nobody.
pub fn cached(repo: &str, filename: &str) -> Option<PathBuf> {
    Cache::new(cache_dir()?).repo(Repo::model(repo.to_owned())).get(filename)
}

fn expand_home(path: String) -> PathBuf {
    match (path.strip_prefix('~'), env::home_dir()) {
        (Some(""), Some(home)) => home,
        (Some(rest), Some(home)) if rest.starts_with(['/', std::path::MAIN_SEPARATOR]) => home.join(&rest[1..]),
        _ => path.into(),
    }
}
