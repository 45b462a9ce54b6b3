//! Which file of a repository is meant, where it was not named.

use super::name::{is_glob, matches, parts};

/// A short name, and what it stands for.
pub struct Known {
    pub short: &'static str,
    pub repo: &'static str,
    /// What is meant where no file is named.
    pub file: &'static str,
}

const fn known(short: &'static str, repo: &'static str, file: &'static str) -> Known {
    Known { short, repo, file }
}

/// The well-known GGUF repositories of the family; the first is what `candle-phi PROMPT` runs.
pub const KNOWN: &[Known] = &[
    known("phi-3-mini-4k", "microsoft/Phi-3-mini-4k-instruct-gguf", "Phi-3-mini-4k-instruct-q4.gguf"),
    known("phi-3-mini-128k", "bartowski/Phi-3.1-mini-128k-instruct-GGUF", "Phi-3.1-mini-128k-instruct-Q4_K_M.gguf"),
    known("phi-3-medium-4k", "bartowski/Phi-3-medium-4k-instruct-GGUF", "Phi-3-medium-4k-instruct-Q4_K_M.gguf"),
    known("phi-3.5-mini", "bartowski/Phi-3.5-mini-instruct-GGUF", "Phi-3.5-mini-instruct-Q4_K_M.gguf"),
    known("phi-4", "bartowski/phi-4-GGUF", "phi-4-Q4_K_M.gguf"),
    known("phi-4-mini", "unsloth/Phi-4-mini-instruct-GGUF", "Phi-4-mini-instruct-Q4_K_M.gguf"),
];

/// The repository that a short name stands for, else what was given.
pub fn repo(name: &str) -> &str {
    KNOWN.iter().find(|known| known.short == name).map_or(name, |known| known.repo)
}

/// What to look for: the file that was named, or that a known repository is known for.
pub fn filename<'a>(repo: &str, given: Option<&'a str>) -> Option<&'a str> {
    given.or_else(|| KNOWN.iter().find(|known| known.repo == repo).map(|known| known.file))
}

/// All parts of the one file that is meant among those that are there, in order; or why there is no such one.
/// `wanted` None: the only GGUF model.
pub fn among(files: &[(String, u64)], wanted: Option<&str>) -> Result<Vec<String>, String> {
    let fits = |name: &str| match wanted {
        Some(pattern) => name == pattern || (is_glob(pattern) && matches(pattern, name)),
        None => name.ends_with(".gguf"),
    };
    let mut found: Vec<Vec<String>> = Vec::new();
    for (name, _) in files.iter().filter(|(name, _)| fits(name)) {
        let parts = parts(name);
        if !found.contains(&parts) {
            found.push(parts);
        }
    }
    if found.len() != 1 {
        let what = match wanted {
            Some(pattern) if is_glob(pattern) => format!("{} files match {pattern:?}", found.len()),
            Some(name) => format!("there is no file {name:?}"),
            None => format!("there are {} GGUF models", found.len()),
        };
        return Err(format!("{what}; its GGUF files: {}", listing(files)));
    }
    let parts = found.remove(0);
    match parts.iter().find(|part| !files.iter().any(|(name, _)| name == *part)) {
        Some(missing) => Err(format!("{missing:?}, one of {} parts, is missing", parts.len())),
        None => Ok(parts),
    }
}

/// The GGUF files and their sizes, on one line.
pub fn listing(files: &[(String, u64)]) -> String {
    let listed: Vec<_> = files
        .iter()
        .filter(|(name, _)| name.ends_with(".gguf"))
        .map(|(name, size)| format!("{name} ({})", bytes(*size)))
        .collect();
    if listed.is_empty() { "none".into() } else { listed.join(", ") }
}

pub use crate::error::human_size as bytes;
