//! Which file of a repository to take if none is named.
//!
//! Decisions: docs/design/hub.md

use std::collections::{BTreeSet, HashSet};

use super::name::{is_glob, matches, parts, split};
use crate::error::{Error, Result};

/// How many files an error lists.
const MAX_LISTED: usize = 20;

/// A well-known repository and its short name.
pub struct Known {
    pub short: &'static str,
    pub repo: &'static str,
    /// The file to take if none is named.
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

/// The repository that a short name stands for. Any other name is returned as it is.
pub fn repo(name: &str) -> &str {
    KNOWN.iter().find(|known| known.short == name).map_or(name, |known| known.repo)
}

/// The file or pattern to look for: the given one, else the default of a well-known repository.
pub fn filename<'a>(repo: &str, given: Option<&'a str>) -> Option<&'a str> {
    given.or_else(|| KNOWN.iter().find(|known| known.repo == repo).map(|known| known.file))
}

/// The parts of the one model among `files` that `wanted` names or matches, in order. `wanted` None: the only GGUF
/// model. `check` is called for every file, and its error ends the work.
///
/// The names come from a server. The cost of a name is its length, not the number of parts that it claims.
pub fn among(
    repo: &str,
    files: &[(String, u64)],
    wanted: Option<&str>,
    check: impl Fn() -> Result<()>,
) -> Result<Vec<String>> {
    let fits = |name: &str| match wanted {
        Some(pattern) => name == pattern || (is_glob(pattern) && matches(pattern, name)),
        None => name.ends_with(".gguf"),
    };
    let (mut names, mut models, mut one) = (HashSet::new(), BTreeSet::new(), None);
    for (name, _) in files {
        check()?;
        names.insert(name.as_str());
        if fits(name) {
            one = Some(name);
            models.insert(split(name).map_or((name.as_str(), None), |(stem, count)| (stem, Some(count))));
        }
    }
    let (1, Some(one)) = (models.len(), one) else {
        let problem = match (wanted, models.len()) {
            (Some(pattern), n) if is_glob(pattern) => format!("{n} models match {pattern:?}"),
            (Some(name), _) => format!("there is no file {name:?}"),
            (None, n) => format!("there are {n} GGUF models"),
        };
        let listed = listing(files);
        return Err(Error::ModelNotFound(format!(
            "{repo}: {problem}; its GGUF files: {listed}; set filename to one of them or to a pattern"
        )));
    };
    let mut found = Vec::new();
    // ends at the first missing part, so there are at most as many steps as files
    for part in parts(one) {
        check()?;
        if !names.contains(part.as_str()) {
            return Err(Error::ModelNotFound(format!("{repo}: {part:?} is missing, and {one:?} needs it")));
        }
        found.push(part);
    }
    Ok(found)
}

/// The first GGUF files and their sizes, on one line.
pub fn listing(files: &[(String, u64)]) -> String {
    let models = || files.iter().filter(|(name, _)| name.ends_with(".gguf"));
    let mut listed: Vec<_> =
        models().take(MAX_LISTED).map(|(name, size)| format!("{name} ({})", bytes(*size))).collect();
    match models().count() {
        0 => return "none".into(),
        n if n > MAX_LISTED => listed.push(format!("and {} more", n - MAX_LISTED)),
        _ => {}
    }
    listed.join(", ")
}

pub use crate::error::human_size as bytes;
