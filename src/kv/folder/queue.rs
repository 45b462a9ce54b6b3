//! The columns that wait to be written to a folder, and the thread that writes them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::room::Room;
use super::{Files, Key};
use crate::compute::kernels::PAGE;
use crate::compute::ops::Column;
use crate::error::Result;
use crate::system::fork::ForkGuard;
use crate::system::panic;
use crate::system::sync::lock;

/// Bytes of columns that wait: they are held for as long. 20 columns of Phi-3-mini in f16.
const MOST_BYTES: usize = 1 << 30;
/// After a write that failed, such as on a full disk, nothing is written for this long.
const PAUSE: Duration = Duration::from_secs(60);

/// What became of the columns.
#[derive(Copy, Clone, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    pub written: u64,
    pub written_bytes: u64,
    /// There was a file already.
    pub present: u64,
    /// The thread was behind, or paused.
    pub dropped: u64,
    pub failed: u64,
}

pub(super) struct Item {
    pub parent: Key,
    pub ids: Vec<u32>,
    pub column: Arc<Column>,
}

/// The thread starts with the first column and ends with the queue. It keeps no process alive.
pub(super) struct Queue {
    shared: Arc<Shared>,
    /// For the thread, until it starts.
    start: Mutex<Option<(Arc<Files>, Room)>>,
    column_bytes: usize,
    fork_guard: ForkGuard,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    is_writing: bool,
    is_closed: bool,
    paused_until: Option<Instant>,
    counts: Counts,
}

impl Queue {
    pub fn new(files: Arc<Files>, room: Room) -> Self {
        Queue {
            shared: Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() }),
            column_bytes: PAGE * files.shape.position_bytes(),
            start: Mutex::new(Some((files, room))),
            fork_guard: ForkGuard::here(),
        }
    }

    pub fn add(&self, item: Item) -> bool {
        if self.fork_guard.is_forked() || !self.start() {
            return false;
        }
        let mut state = lock(&self.shared.state);
        let is_paused = state.paused_until.is_some_and(|until| Instant::now() < until);
        if is_paused || (state.items.len() + 1).saturating_mul(self.column_bytes) > MOST_BYTES {
            state.counts.dropped += 1;
            return false;
        }
        state.items.push_back(item);
        self.shared.changed.notify_all();
        true
    }

    /// False if the system refuses a thread.
    fn start(&self) -> bool {
        let mut start = lock(&self.start);
        let Some((files, room)) = start.take() else { return true };
        let (shared, its_files, limit) = (self.shared.clone(), files.clone(), room.clone());
        let thread = std::thread::Builder::new().name("candle-phi-prefixes".into());
        let started = thread.spawn(move || shared.run(&files, room)).is_ok();
        if !started {
            *start = Some((its_files, limit));
        }
        started
    }

    pub fn flush(&self, most: Duration) -> bool {
        if self.fork_guard.is_forked() {
            return false;
        }
        let until = Instant::now() + most;
        let mut state = lock(&self.shared.state);
        while state.is_writing || !state.items.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub fn counts(&self) -> Counts {
        if self.fork_guard.is_forked() { Counts::default() } else { lock(&self.shared.state).counts }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.fork_guard.is_forked() {
            return;
        }
        let mut state = lock(&self.shared.state);
        state.is_closed = true;
        state.items.clear();
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// The next column; None once the queue is closed.
    fn next(&self) -> Option<Item> {
        let mut state = lock(&self.state);
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(item) = state.items.pop_front() {
                state.is_writing = true;
                return Some(item);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, files: &Files, mut room: Room) {
        while let Some(item) = self.next() {
            let result: Result<Option<u64>> = panic::catch(|| files.write(&item, &mut room));
            drop(item);
            let mut state = lock(&self.state);
            state.is_writing = false;
            match result {
                Ok(Some(bytes)) => {
                    state.counts.written += 1;
                    state.counts.written_bytes += bytes;
                }
                Ok(None) => state.counts.present += 1,
                Err(_) => {
                    state.counts.failed += 1;
                    state.counts.dropped += state.items.len() as u64;
                    state.items.clear();
                    state.paused_until = Some(Instant::now() + PAUSE);
                }
            }
            self.changed.notify_all();
        }
    }
}
