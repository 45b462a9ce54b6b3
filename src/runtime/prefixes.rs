//! The prefixes of a model: what was computed once and is not computed again.
//!
//! A lock around the tree of columns, its budget, and counts. The budget is for columns that no sequence uses. It gives way
//! when memory is short.
//!
//! Decisions: docs/design/runtime.md

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

use crate::compute::kernels::PAGE;
use crate::kv::tree::{Holder, Path, Root, Tree};
use crate::model::Sequence;
use crate::system::memory;
use crate::system::sync::lock;

/// Without a limit of the caller: this part of the available memory, and at most `MOST` bytes.
const PART: u64 = 8;
const MOST: u64 = 2 << 30;
/// Idle columns may take this part of the memory that would be free without them.
const PART_OF_FREE: u64 = 2;

/// Shared by the threads that open, read and compute a model.
#[derive(Default)]
pub struct Prefixes {
    /// Bytes. 0: nothing is held.
    limit: AtomicU64,
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
    pub fn new(limit: Option<u64>) -> Self {
        let limit = limit.unwrap_or_else(|| memory::available().map_or(MOST, |available| (available / PART).min(MOST)));
        Prefixes { limit: AtomicU64::new(limit), state: Mutex::default() }
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
    /// their number.
    pub fn resume(&self, sequence: &mut Sequence) -> usize {
        if !self.is_on_for(sequence) {
            return 0;
        }
        let mut state = lock(&self.state);
        let hit = state.tree(sequence).find(path(&root(sequence), sequence), sequence.logits_from);
        match hit {
            Some(hit) => {
                state.hits += 1;
                drop(state);
                sequence.kv.adopt(hit.columns, hit.length);
                hit.length
            }
            None => {
                state.misses += 1;
                0
            }
        }
    }

    /// Holds computed positions. `Holder::Anyone` has no use for decoded ones, nor for those after them. `ended`: the last
    /// column too, which the sequence writes no more.
    pub fn keep(&self, sequence: &Sequence, holder: &Holder, ended: bool) {
        if !self.is_on_for(sequence) {
            return;
        }
        let length = match holder {
            Holder::Chat(_) => sequence.kv.len(),
            Holder::Anyone | Holder::Pin => sequence.kv.len().min(sequence.phases.prefilled()),
        };
        let length = if ended { length } else { length / PAGE * PAGE };
        let mut state = lock(&self.state);
        let tree = state.tree(sequence);
        tree.insert(path(&root(sequence), sequence), length, sequence.kv.columns(), holder);
        self.trim(tree);
    }

    /// Brings the idle columns within the budget.
    fn trim(&self, tree: &mut Tree) {
        let limit = match memory::available() {
            Some(available) if tree.held_bytes() > 0 => {
                self.limit().min(available.saturating_add(tree.idle_bytes()) / PART_OF_FREE)
            }
            _ => self.limit(),
        };
        tree.trim(limit);
    }

    /// Drops all idle columns, since memory is short. False if there are none.
    pub fn give_way(&self) -> bool {
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
        let state = lock(&self.state);
        let chats = state.chats.iter().filter(|chat| chat.strong_count() > 0).count();
        let (bytes, positions) = state.tree.as_ref().map_or((0, 0), |tree| (tree.idle_bytes(), tree.positions()));
        Info { bytes, limit: self.limit(), positions, hits: state.hits, misses: state.misses, chats }
    }
}

impl State {
    fn tree(&mut self, sequence: &Sequence) -> &mut Tree {
        let (window, shape) = (sequence.kv.window(), sequence.kv.shape());
        self.tree.get_or_insert_with(|| Tree::new(window, (PAGE * shape.position_bytes()) as u64))
    }
}

fn root(sequence: &Sequence) -> Root {
    Root { long: sequence.long, scope: sequence.scope.clone() }
}

fn path<'a>(root: &'a Root, sequence: &'a Sequence) -> Path<'a> {
    Path { root, ids: &sequence.ids, phases: &sequence.phases }
}
