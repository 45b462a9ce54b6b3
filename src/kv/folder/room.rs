//! The size of a folder of columns is bounded: the files whose last use is the longest ago are removed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result, human_size};

/// After this number of files, the folder is counted anew: other processes write to it, too.
const RECOUNT: u32 = 32;

#[derive(Clone)]
pub(super) struct Room {
    folder: PathBuf,
    limit: u64,
    /// Bytes of the files at the last count, and those added since.
    used: Option<u64>,
    /// Files added since the last count.
    added: u32,
}

/// A file of a column.
pub(super) struct Listed {
    pub path: PathBuf,
    pub bytes: u64,
    /// Its last use.
    pub used: SystemTime,
}

impl Room {
    pub fn new(folder: &Path, limit: u64) -> Self {
        Room { folder: folder.to_owned(), limit, used: None, added: 0 }
    }

    /// Makes room for `bytes` more: within the limit, and within half of what the disk would have free without the folder.
    pub fn make(&mut self, bytes: u64) -> Result<()> {
        if self.added >= RECOUNT {
            self.used = None;
        }
        let used = self.used.unwrap_or_else(|| self.count());
        self.used = Some(used);
        let free = fs4::available_space(&self.folder).unwrap_or(u64::MAX);
        let limit = self.limit.min(free.saturating_add(used) / 2);
        if used.saturating_add(bytes) <= limit {
            return Ok(());
        }
        let mut files = list(&self.folder, super::is_column);
        files.sort_by_key(|file| file.used);
        let mut used: u64 = files.iter().map(|file| file.bytes).sum();
        for file in files {
            if used.saturating_add(bytes) <= limit {
                break;
            }
            if fs::remove_file(&file.path).is_ok() {
                used -= file.bytes;
            }
        }
        (self.used, self.added) = (Some(used), 0);
        if used.saturating_add(bytes) <= limit {
            return Ok(());
        }
        let (folder, bytes, limit) = (self.folder.display(), human_size(bytes), human_size(limit));
        let message = format!("{folder}: no room for a column of {bytes}; the limit is {limit}");
        Err(Error::File { message, kind: ErrorKind::StorageFull })
    }

    pub fn add(&mut self, bytes: u64) {
        self.used = self.used.map(|used| used + bytes);
        self.added += 1;
    }

    fn count(&mut self) -> u64 {
        self.added = 0;
        list(&self.folder, super::is_column).iter().map(|file| file.bytes).sum()
    }
}

/// The files of columns whose name `select` returns true for.
pub(super) fn list(folder: &Path, select: impl Fn(&str) -> bool) -> Vec<Listed> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_wanted = |name: &str| super::is_column(name) && select(name);
    let entries = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_wanted));
    let listed = entries.filter_map(|entry| {
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        Some(Listed { path: entry.path(), bytes: metadata.len(), used: metadata.modified().ok()? })
    });
    listed.collect()
}
