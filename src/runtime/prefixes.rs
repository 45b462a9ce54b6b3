//! The prefixes of a model: what was computed once and is not computed again.
//!
//! A lock around the tree of columns, its budget, and counts. The budget is for columns that no sequence uses. It gives way
//! when memory is short. A folder may have columns of other processes and of earlier ones.
//!
//! Decisions: docs/design/runtime.md

use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::compute::kernels::PAGE;
use crate::compute::ops::Column;
use crate::error::{Error, Result};
use crate::kv::file::KvFile;
use crate::kv::folder::{Folder, Key};
use crate::kv::phases::Phases;
use crate::kv::tree::{Holder, Path, Root, Tree};
use crate::model::Sequence;
use crate::system::memory;
use crate::system::sync::lock;

/// Without a limit of the caller: this part of the available memory, and at most `MOST` bytes.
const PART: u64 = 8;
const MOST: u64 = 2 << 30;
/// Idle columns may take this part of the memory that would be free without them.
const PART_OF_FREE: u64 = 2;
/// Columns of fewer bytes are held without a look at the available memory.
const SMALL: u64 = 16 << 20;
/// The last column of a prompt goes to the folder if it has this number of ids: computing fewer takes less time than it
/// takes to read a column.
const LEAST_TAIL: usize = 16;

/// Threads that verify the columns of a folder at most.
const READERS: usize = 4;

/// Shared by the threads that open, read and compute a model.
#[derive(Default)]
pub struct Prefixes {
    /// Bytes. 0: nothing is held.
    limit: AtomicU64,
    folder: Option<Folder>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// None until the first sequence, which has the shape of the columns.
    tree: Option<Tree>,
    hits: u64,
    misses: u64,
    chats: Vec<Weak<()>>,
}

/// What is held, and how often it was of use.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Info {
    /// Of columns that no sequence uses.
    pub bytes: u64,
    pub limit: u64,
    pub positions: usize,
    /// Sequences that found a prefix, and those that found none.
    pub hits: u64,
    pub misses: u64,
    /// Chats that are open.
    pub chats: usize,
}

impl Prefixes {
    /// `limit`: bytes of columns that no sequence uses; 0: nothing is held. None: a part of the available memory.
    pub fn new(limit: Option<u64>, folder: Option<Folder>) -> Self {
        let limit = limit.unwrap_or_else(|| default_limit(memory::available()));
        Prefixes { limit: AtomicU64::new(limit), folder, state: Mutex::default() }
    }

    fn limit(&self) -> u64 {
        self.limit.load(Relaxed)
    }

    /// Whether anything is held.
    pub fn is_on(&self) -> bool {
        self.limit() > 0
    }

    fn is_on_for(&self, sequence: &Sequence) -> bool {
        self.is_on() && sequence.kv.shape().position_bytes() > 0
    }

    /// Gives a sequence without keys and values the longest prefix that is held: positions that get no logits. Returns
    /// their number. An error if the file of a chat is damaged, which is then used no more.
    pub fn resume(&self, sequence: &mut Sequence) -> Result<usize> {
        if !self.is_on_for(sequence) {
            return Ok(0);
        }
        let (root, most) = (root(sequence), sequence.logits_from);
        let find = || lock(&self.state).tree(sequence).find(path(&root, sequence), most);
        let mut hit = find()?;
        if let Some(folder) = &self.folder {
            // Without the lock: checksums take time.
            let found = read(folder, path(&root, sequence), hit.as_ref().map_or(0, |hit| hit.length), most);
            if !found.is_empty() {
                for found in found {
                    let (length, phases) = (found.ids.len(), Phases::prefill(found.ids.len()));
                    let path = Path { root: &root, ids: &found.ids, phases: &phases };
                    lock(&self.state).tree(sequence).insert(path, length, [found.column].iter(), &Holder::Anyone);
                }
                hit = find()?;
            }
        }
        let mut state = lock(&self.state);
        *(if hit.is_some() { &mut state.hits } else { &mut state.misses }) += 1;
        drop(state);
        Ok(hit.map_or(0, |hit| {
            sequence.kv.adopt(hit.columns, hit.length);
            hit.length
        }))
    }

    /// Holds the full columns of a sequence that goes on. `Holder::Anyone` has no use for decoded positions, nor for those
    /// after them. `from`: full columns that it was called with before.
    pub fn keep(&self, sequence: &Sequence, holder: &Holder, from: usize) {
        if self.is_on_for(sequence) {
            self.insert(sequence, holder, from, false);
            self.trim();
        }
    }

    /// Takes all columns of a sequence, which is computed no further: the last one too.
    pub fn take(&self, sequence: &mut Sequence, holder: &Holder, from: usize) {
        if self.is_on_for(sequence) {
            self.insert(sequence, holder, from, true);
            sequence.kv.release();
            self.trim();
        }
    }

    fn insert(&self, sequence: &Sequence, holder: &Holder, from: usize, ended: bool) {
        let prompt = sequence.kv.len().min(sequence.phases.prefilled());
        let length = match holder {
            Holder::Chat(_) => sequence.kv.len(),
            Holder::Anyone | Holder::Pin => prompt,
        };
        let (length, root) = (if ended { length } else { length / PAGE * PAGE }, root(sequence));
        lock(&self.state).tree(sequence).insert(path(&root, sequence), length, sequence.kv.columns(), holder);
        if let Some(folder) = &self.folder {
            write(folder, sequence, from, prompt.min(length));
        }
    }

    /// Holds the positions of a file, which begin as those of `sequence` do.
    pub fn keep_file(&self, sequence: &Sequence, file: &Arc<KvFile>, holder: &Holder) {
        if self.is_on_for(sequence) {
            let root = root(sequence);
            lock(&self.state).tree(sequence).insert_file(path(&root, sequence), file, holder);
        }
    }

    /// Brings the columns that no sequence uses within the budget.
    pub fn trim(&self) {
        if let Some(tree) = &mut lock(&self.state).tree {
            self.trim_tree(tree);
        }
    }

    /// Returns the bytes of the columns that are left. One that a sequence drops meanwhile is of the next trim.
    fn trim_tree(&self, tree: &mut Tree) -> u64 {
        if tree.held_bytes() > self.limit().min(SMALL) {
            return tree.trim(allowed(self.limit(), tree.idle_bytes(), memory::available()));
        }
        tree.idle_bytes()
    }

    /// Does work that takes memory. If it is short, the idle columns are dropped and the work is done once more.
    pub fn give_way_to<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        match work() {
            Err(Error::Memory(_)) if self.give_way() => work(),
            outcome => outcome,
        }
    }

    /// Drops all idle columns. False if there are none.
    fn give_way(&self) -> bool {
        let mut state = lock(&self.state);
        let Some(tree) = &mut state.tree else { return false };
        let before = tree.held_bytes();
        tree.trim(0);
        tree.held_bytes() < before
    }

    /// Counts a chat until it is dropped.
    pub fn add_chat(&self, chat: &Arc<()>) {
        let mut state = lock(&self.state);
        state.chats.retain(|chat| chat.strong_count() > 0);
        state.chats.push(Arc::downgrade(chat));
    }

    /// Drops what only chats that have ended had a use for.
    pub fn drop_ended_chats(&self) {
        if let Some(tree) = &mut lock(&self.state).tree {
            tree.drop_ended_chats();
        }
    }

    /// Ends the cache. Dropping the tree takes time.
    pub fn close(&self) -> Option<Tree> {
        self.limit.store(0, Relaxed);
        lock(&self.state).tree.take()
    }

    pub fn info(&self) -> Info {
        let mut state = lock(&self.state);
        let chats = state.chats.iter().filter(|chat| chat.strong_count() > 0).count();
        let (bytes, positions) = match &mut state.tree {
            Some(tree) => (self.trim_tree(tree), tree.positions()),
            None => (0, 0),
        };
        Info { bytes, limit: self.limit(), positions, hits: state.hits, misses: state.misses, chats }
    }

    /// Waits until the folder has what it was given, for at most this time.
    pub fn flush(&self, most: std::time::Duration) -> bool {
        self.folder.as_ref().is_none_or(|folder| folder.flush(most))
    }
}

/// The limit if the caller sets none, of the available memory, which may be unknown.
fn default_limit(available: Option<u64>) -> u64 {
    available.map_or(MOST, |available| (available / PART).min(MOST))
}

/// Bytes that idle columns may have, when they have `idle` and `available` bytes are free besides.
fn allowed(limit: u64, idle: u64, available: Option<u64>) -> u64 {
    available.map_or(limit, |available| limit.min(available.saturating_add(idle) / PART_OF_FREE))
}

impl State {
    fn tree(&mut self, sequence: &Sequence) -> &mut Tree {
        let (window, shape) = (sequence.kv.window(), sequence.kv.shape());
        self.tree.get_or_insert_with(|| Tree::new(window, shape.clone()))
    }
}

/// A column of the folder.
struct Found {
    /// All ids up to its end.
    ids: Vec<u32>,
    column: Arc<Column>,
}

/// What the folder has of a prompt beyond `known` positions, of which `most` are of use.
fn read(folder: &Folder, path: Path<'_>, known: usize, most: usize) -> Vec<Found> {
    let prompt = path.ids.len().min(path.phases.prefilled());
    let mut pages = path.ids[..most.min(prompt) / PAGE * PAGE].chunks(PAGE);
    let mut key = pages.by_ref().take(known / PAGE).fold(folder.root(path.root), |key, ids| key.child(ids));
    let (mut start, mut all) = (known / PAGE * PAGE, Vec::new());
    for (child, column) in find(folder, &key, pages.collect()) {
        start += PAGE;
        all.push(Found { ids: path.ids[..start].to_vec(), column: Arc::new(column) });
        key = child;
    }
    if start < most.min(prompt)
        && let ids = &path.ids[start..prompt.min(start + PAGE)]
        && let Some((tail, column)) = folder.tail(&key, ids)
        && start + tail.iter().zip(ids).take_while(|(a, b)| a == b).count() > known
    {
        all.push(Found { ids: [&path.ids[..start], &tail].concat(), column: Arc::new(column) });
    }
    all
}

/// The full columns of these consecutive pages after the positions of `parent`, up to the first that the folder lacks. Several
/// threads verify their checksums, which takes most of the time.
fn find(folder: &Folder, parent: &Key, pages: Vec<&[u32]>) -> VecDeque<(Key, Column)> {
    let mut keys = vec![parent.clone()];
    keys.extend(pages.iter().scan(parent.clone(), |key, ids| {
        *key = key.child(ids);
        Some(key.clone())
    }));
    let (next, end) = (AtomicUsize::new(0), AtomicUsize::new(pages.len()));
    let found: Vec<Mutex<Option<(Key, Column)>>> = pages.iter().map(|_| Mutex::default()).collect();
    let read = || {
        while let page = next.fetch_add(1, Relaxed)
            && page < end.load(Relaxed)
        {
            let column = folder.find(&keys[page], pages[page]);
            if column.is_none() {
                end.fetch_min(page, Relaxed);
            }
            *lock(&found[page]) = column;
        }
    };
    std::thread::scope(|scope| {
        let others = std::thread::available_parallelism().map_or(1, NonZero::get).min(READERS).min(pages.len());
        for _ in 1..others {
            // Without the thread the others do its part.
            let _ = std::thread::Builder::new().name("candle-phi-read".into()).spawn_scoped(scope, read);
        }
        read();
    });
    let columns = found.into_iter().map(|column| column.into_inner().unwrap_or_else(PoisonError::into_inner));
    columns.map_while(|column| column).collect()
}

/// Gives the folder the columns of the first `length` positions, which are a prompt. It has had `from` columns of the
/// sequence, or all full ones of the prompt.
fn write(folder: &Folder, sequence: &Sequence, from: usize, length: usize) {
    let (mut key, from) = (folder.root(&root(sequence)), from.min(length / PAGE));
    let mut columns = sequence.kv.columns().peekable();
    for (number, start) in (0..length).step_by(PAGE).enumerate() {
        let ids = &sequence.ids[start..length.min(start + PAGE)];
        while columns.next_if(|column| column.start() < start).is_some() {}
        let column = columns.next_if(|column| column.start() == start);
        if let Some(column) = column.filter(|_| number >= from && ids.len() >= LEAST_TAIL) {
            folder.put(&key, ids, column.clone());
        }
        key = key.child(ids);
    }
}

fn root(sequence: &Sequence) -> Root {
    Root { long: sequence.long, scope: sequence.scope.clone() }
}

fn path<'a>(root: &'a Root, sequence: &'a Sequence) -> Path<'a> {
    Path { root, ids: &sequence.ids, phases: &sequence.phases }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1 << 30;

    #[test]
    fn the_default_is_a_part_of_the_available_memory() {
        assert_eq!(default_limit(Some(6 * GB)), 768 << 20, "a machine of 8 GB that runs other things");
        assert_eq!((default_limit(Some(64 * GB)), default_limit(None)), (2 * GB, 2 * GB));
    }

    #[test]
    fn idle_columns_leave_as_much_free_as_they_take() {
        assert_eq!(allowed(2 * GB, GB, Some(9 * GB)), 2 * GB);
        assert_eq!(allowed(2 * GB, 2 * GB, Some(0)), GB, "other programs took what was free");
        assert_eq!(allowed(2 * GB, GB, Some(GB / 2)), 3 * GB / 4);
        assert_eq!((allowed(7, GB, Some(GB)), allowed(7, GB, None)), (7, 7));
    }
}
