//! A folder of columns that prefill computed, shared by processes and kept over restarts: a file for each column.
//!
//! ```text
//! {hash of the positions before, 32 digits}-{hash of its own, 32 digits}.safetensors
//! ```
//!
//! A hash is a chain over the model's fingerprint, the tree's root and all ids, so a name says what a file holds. There is
//! no index and no lock: a file is created by a rename, found by its name, and evicted by its removal. A process that
//! has mapped it goes on.
//!
//! Decisions: docs/design/kv.md

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::file::{Contents, KvFile};
use super::tree::Root;
use crate::compute::kernels::PAGE;
use crate::compute::ops::{Column, KvShape};
use crate::error::{Error, Result};
use crate::files::new_file::remove_abandoned;
use crate::system::task::Task;

mod queue;
mod room;

pub use queue::Counts;
use queue::Queue;
use room::Room;

/// The largest folder, in bytes: 400 columns of Phi-3-mini in f16.
pub const LIMIT: u64 = 20_000_000_000;
/// Bytes of a file around its column, at most, if the fingerprint is short.
const HEADER: u64 = 8192;
/// The name of the text that has the hash of the positions before a column.
const PARENT: &str = "parent";
/// Files that are opened to find the longest common prefix, the last used ones.
const CANDIDATES: usize = 64;

/// All positions up to the end of a column: what its keys and values depend on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Key {
    hash: [u8; 32],
    positions: usize,
}

impl Key {
    /// No positions.
    pub fn root(fingerprint: &str, root: &Root) -> Self {
        let mut hash = Sha256::new_with_prefix([1, u8::from(root.long)]); // the version of the chain
        for text in [fingerprint, &root.scope] {
            hash.update((text.len() as u64).to_le_bytes()); // so that two texts have one reading
            hash.update(text);
        }
        Key { hash: hash.finalize().into(), positions: 0 }
    }

    /// These positions and those of `ids`.
    pub fn child(&self, ids: &[u32]) -> Self {
        let mut hash = Sha256::new_with_prefix(self.hash);
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        Key { hash: hash.finalize().into(), positions: self.positions + ids.len() }
    }

    pub fn positions(&self) -> usize {
        self.positions
    }

    fn hex(&self) -> String {
        self.hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The start of the names of its children.
    fn prefix(&self) -> String {
        self.hex()[..32].to_owned() + "-"
    }

    fn child_name(&self, child: &Key) -> String {
        format!("{}{}.safetensors", self.prefix(), &child.hex()[..32])
    }
}

pub struct Folder {
    files: Arc<Files>,
    queue: Queue,
}

impl Folder {
    /// Opens the folder, and makes it if there is none. Only its owner may read a new one. A folder that cannot be written
    /// is good for reading.
    ///
    /// # Errors
    ///
    /// `Error::File`: it cannot be made or listed.
    pub fn open(path: &Path, fingerprint: &str, shape: &KvShape) -> Result<Self> {
        Folder::with_limit(path, fingerprint, shape, LIMIT)
    }

    /// The same for at most `limit` bytes of files.
    pub fn with_limit(path: &Path, fingerprint: &str, shape: &KvShape, limit: u64) -> Result<Self> {
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(path).and_then(|()| fs::read_dir(path)).map_err(|error| Error::File {
            message: format!("{}: not a folder for prefixes: {error}", path.display()),
            kind: error.kind(),
        })?;
        remove_abandoned(path, is_column);
        let files = Files { path: path.to_owned(), fingerprint: fingerprint.to_owned(), shape: shape.clone() };
        let files = Arc::new(files);
        Ok(Folder { queue: Queue::new(files.clone(), Room::new(path, limit)), files })
    }

    /// The key of no positions.
    pub fn root(&self, root: &Root) -> Key {
        Key::root(&self.files.fingerprint, root)
    }

    /// The column that has exactly `ids` after the positions of `parent`.
    pub fn find(&self, parent: &Key, ids: &[u32]) -> Option<(Key, Column)> {
        let child = parent.child(ids);
        let (_, column) = self.files.read(parent, &self.files.path.join(parent.child_name(&child)))?;
        Some((child, column))
    }

    /// The column after the positions of `parent` that has the longest common prefix with `ids`, and the ids that it has.
    /// None if no column begins with the first id.
    pub fn tail(&self, parent: &Key, ids: &[u32]) -> Option<(Vec<u32>, Column)> {
        let prefix = parent.prefix();
        let mut files = room::list(&self.files.path, |name| name.starts_with(&prefix));
        files.sort_by_key(|file| std::cmp::Reverse(file.used));
        let mut best: Option<(usize, PathBuf)> = None;
        for file in files.into_iter().take(CANDIDATES) {
            let Some(open) = self.files.open(parent, &file.path) else { continue };
            let common = open.ids().iter().zip(ids).take_while(|(a, b)| a == b).count();
            if common > best.as_ref().map_or(0, |(common, _)| *common) {
                best = Some((common, file.path));
            }
        }
        self.files.read(parent, &best?.1)
    }

    /// Has a thread write the column of `ids` after the positions of `parent`, unless there is one. False if it is dropped,
    /// because the thread is behind or because a write failed in the last minute.
    pub fn put(&self, parent: &Key, ids: &[u32], column: Arc<Column>) -> bool {
        self.queue.add(queue::Item { parent: parent.clone(), ids: ids.to_vec(), column })
    }

    /// Waits until all columns are written, or until the time is over. Returns whether they are.
    pub fn flush(&self, most: Duration) -> bool {
        self.queue.flush(most)
    }

    pub fn counts(&self) -> Counts {
        self.queue.counts()
    }
}

/// The files, for reading and writing them.
struct Files {
    path: PathBuf,
    fingerprint: String,
    shape: KvShape,
}

impl Files {
    /// A file of a column after `parent`. A damaged one is removed.
    fn open(&self, parent: &Key, path: &Path) -> Option<KvFile> {
        File::open(path).ok()?; // if it is not ours to read, it is not damaged
        match KvFile::open(path) {
            Ok(file) if self.is_sound(&file, parent) => Some(file),
            Ok(_) | Err(Error::InvalidModel(_) | Error::UnsupportedModel(_)) => {
                let _ = fs::remove_file(path);
                None
            }
            Err(_) => None,
        }
    }

    fn is_sound(&self, file: &KvFile, parent: &Key) -> bool {
        let (start, ids) = (parent.positions, file.ids());
        let name = parent.child_name(&parent.child(ids));
        file.path().file_name().is_some_and(|found| found == name.as_str())
            && file.fingerprint() == self.fingerprint
            && file.metadata().get(PARENT) == Some(&parent.hex())
            && (file.start(), file.computed()) == (start, start + ids.len())
            && file.runs() == [ids.len()]
            && file.columns() == (start / PAGE..start / PAGE + 1)
    }

    /// The ids and the column of a file after `parent`. A damaged file is removed.
    fn read(&self, parent: &Key, path: &Path) -> Option<(Vec<u32>, Column)> {
        let file = self.open(parent, path)?;
        match file.column(parent.positions / PAGE, &self.shape) {
            Ok(column) => {
                touch(path, parent.positions);
                Some((file.ids().to_vec(), column))
            }
            Err(_) => {
                let _ = fs::remove_file(path);
                None
            }
        }
    }

    /// Writes a column, unless there is one of this name. Returns its size.
    fn write(&self, item: &queue::Item, room: &mut Room) -> Result<Option<u64>> {
        let queue::Item { parent, ids, column } = item;
        let path = self.path.join(parent.child_name(&parent.child(ids)));
        if path.exists() {
            return Ok(None);
        }
        room.make((PAGE * self.shape.position_bytes()) as u64 + HEADER)?;
        let contents = Contents {
            fingerprint: &self.fingerprint,
            start: parent.positions,
            ids,
            runs: &[ids.len()],
            columns: std::slice::from_ref(column),
            computed: parent.positions + ids.len(),
            metadata: &BTreeMap::from([(PARENT.to_owned(), parent.hex())]),
        };
        let size = super::file::write(&path, &contents, &Task::default())?;
        touch(&path, parent.positions);
        room.add(size);
        Ok(Some(size))
    }
}

/// Whether this is the name of a file of a column.
fn is_column(name: &str) -> bool {
    let is_hash = |hash: &str| hash.len() == 32 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    let hashes = name.strip_suffix(".safetensors").and_then(|name| name.split_once('-'));
    hashes.is_some_and(|(parent, own)| is_hash(parent) && is_hash(own))
}

/// Records the use of a file, in its time of modification. The oldest is evicted first, so a column counts as older than
/// those before it, without which it is of no use: prefill takes less than 5 s for a column.
fn touch(path: &Path, position: usize) {
    let age = Duration::from_secs(5 * (position / PAGE) as u64);
    if let Ok(file) = File::options().write(true).open(path)
        && let Some(time) = SystemTime::now().checked_sub(age)
    {
        let _ = file.set_modified(time);
    }
}
