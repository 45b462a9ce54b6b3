//! The environment variables of `huggingface_hub`, read as it reads them.

use std::env::{self, VarError};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

const ENDPOINT: &str = "https://huggingface.co";
const TIMEOUT: f64 = 10.0; // seconds

/// The cache folder: HF_HUB_CACHE, else `hub` in HF_HOME, else in `XDG_CACHE_HOME/huggingface`, else in
/// `~/.cache/huggingface`. None: there is no home folder either.
pub fn cache_dir() -> Option<PathBuf> {
    path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(home()?.join("hub")))
}

fn home() -> Option<PathBuf> {
    let cache = || path("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")));
    path("HF_HOME").or_else(|| Some(cache()?.join("huggingface")))
}

/// The URL of the server, without a slash at its end: HF_ENDPOINT, else Hugging Face's.
pub fn endpoint() -> Result<String> {
    let given = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
    let endpoint = given.trim_end_matches('/');
    if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
        return Err(Error::Value(format!("HF_ENDPOINT must begin with https:// or http://, not {given:?}")));
    }
    Ok(endpoint.to_owned())
}

/// The token: HF_TOKEN, else the file that a login with Hugging Face's tools wrote.
pub fn token() -> Option<String> {
    let clean = |token: String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
    let variable = || text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).and_then(clean);
    let file = || path("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")));
    variable().or_else(|| clean(fs::read_to_string(file()?).ok()?))
}

/// Whether to send a token only if the caller asks for it.
pub fn token_is_explicit() -> bool {
    is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN")
}

/// The variable that forbids the network, if one is set.
pub fn offline() -> Option<&'static str> {
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| is_true(name))
}

/// The longest time for the Hub to describe a file.
pub fn etag_timeout() -> Result<Duration> {
    seconds("HF_HUB_ETAG_TIMEOUT")
}

/// The longest time without a byte of a transfer.
pub fn download_timeout() -> Result<Duration> {
    seconds("HF_HUB_DOWNLOAD_TIMEOUT")
}

/// The value of a variable. None: it is not set, or empty.
pub fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The value as a path, with `~` and `$NAME` expanded.
pub fn path(name: &str) -> Option<PathBuf> {
    match env::var(name) {
        Ok(value) if !value.is_empty() => Some(expand_variables(&expand_home(value))),
        Err(VarError::NotUnicode(value)) => Some(value.into()),
        _ => None,
    }
}

fn is_true(name: &str) -> bool {
    text(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str()))
}

fn seconds(name: &str) -> Result<Duration> {
    let Some(value) = text(name) else { return Ok(Duration::from_secs_f64(TIMEOUT)) };
    match value.trim().parse() {
        Ok(seconds) if seconds > 0.0 && seconds < 1e6 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(Error::Value(format!("{name} must be a number of seconds above 0, not {value:?}"))),
    }
}

fn expand_home(path: String) -> String {
    let home = env::home_dir().and_then(|home| home.into_os_string().into_string().ok());
    match (path.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with(['/', std::path::MAIN_SEPARATOR]) => {
            home + rest
        }
        _ => path,
    }
}

/// `$NAME` and `${NAME}`. A variable that is not set stays as it is.
fn expand_variables(path: &str) -> PathBuf {
    let mut expanded = String::new();
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('$') {
        expanded += before;
        let (name, next) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, next)) => (name, next),
            None => after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        match env::var(name) {
            Ok(value) if !name.is_empty() => expanded += &value,
            _ => expanded += &rest[before.len()..rest.len() - next.len()],
        }
        rest = next;
    }
    Path::new(&(expanded + rest)).to_owned()
}
