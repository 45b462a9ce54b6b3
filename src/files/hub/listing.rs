//! The Hub's list of a repository's files, in JSON.

use serde_json::Value;

use super::checksum::Checksum;
use super::name::{is_commit, is_inside};
use crate::error::{Result, excerpt};

/// A repository at a commit.
#[derive(Debug)]
pub struct Listing {
    pub commit: String,
    /// Sorted by name.
    pub files: Vec<ListedFile>,
}

#[derive(Debug)]
pub struct ListedFile {
    pub name: String,
    pub size: u64,
    /// None: the Hub does not say.
    pub checksum: Option<Checksum>,
}

impl Listing {
    /// Reads a response. `check` is called for every file, and its error ends the work. The inner error says what is
    /// wrong with the list.
    pub fn parse(body: &[u8], check: impl Fn() -> Result<()>) -> Result<Result<Self, String>> {
        let Ok(json) = serde_json::from_slice::<Value>(body) else { return Ok(Err("it is not JSON".into())) };
        let Some(commit) = json["sha"].as_str().filter(|sha| is_commit(sha)) else {
            return Ok(Err("its `sha` is not a commit".into()));
        };
        let Some(entries) = json["siblings"].as_array() else { return Ok(Err("it has no `siblings`".into())) };
        let mut files = Vec::new();
        for entry in entries {
            check()?;
            let Some(name) = entry["rfilename"].as_str() else {
                return Ok(Err("a file in it has no `rfilename`".into()));
            };
            if !is_inside(name) {
                return Ok(Err(format!("the file name \"{}\" leads out of the cache", excerpt(name))));
            }
            let hash = entry["lfs"]["sha256"].as_str().or_else(|| entry["blobId"].as_str());
            let size = entry["size"].as_u64().or_else(|| entry["lfs"]["size"].as_u64()).unwrap_or_default();
            files.push(ListedFile { name: name.to_owned(), size, checksum: hash.and_then(Checksum::parse) });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Ok(Listing { commit: commit.to_owned(), files }))
    }

    pub fn sizes(&self) -> Vec<(String, u64)> {
        self.files.iter().map(|file| (file.name.clone(), file.size)).collect()
    }
}
