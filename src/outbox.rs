//! Where the compute thread leaves what it makes, and a reader finds it: the one state that both look at.
//!
//! Decisions: docs/design/runtime.md

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::task::{Phase, Progress};
use crate::threads::{Cancel, lock};
use crate::work::{FinishReason, Status, Step};

/// Items that are computed ahead of the reader.
const AHEAD: usize = 4;

/// Called once, from whatever thread, when there may be something to read.
pub type Hook = Box<dyn FnOnce() + Send>;

pub struct Outbox<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    pub cancel: Cancel,
}

struct State<T> {
    items: VecDeque<T>,
    /// Token ids of the items that were read.
    ids: Vec<u32>,
    finish: Option<FinishReason>,
    /// The reader was told. Only then it shows: when it came about depends on who was faster.
    end_read: bool,
    /// Delivered once, after the items.
    error: Option<Error>,
    /// None until the first step.
    status: Option<Status>,
    queue: Duration,
    first_token: Option<Duration>,
    /// Threads that wait for something to read.
    readers: usize,
    /// Of readers that want to be called.
    hooks: Vec<Hook>,
    /// When a reader was here last.
    read_at: Instant,
}

/// Where the time went.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Timings {
    /// From the first read to the first step.
    pub queue: Duration,
    pub prefill: Duration,
    pub decode: Duration,
    /// From the first read to the first id.
    pub first_token: Option<Duration>,
    /// Passes that `decode` took.
    pub decode_passes: usize,
}

impl<T> State<T> {
    /// The first end counts.
    fn end(&mut self, reason: FinishReason, error: Option<Error>) {
        if self.finish.is_none() {
            self.finish = Some(reason);
            self.error = error;
        }
    }

    fn is_readable(&self) -> bool {
        !self.items.is_empty() || self.finish.is_some()
    }

    fn phase(&self) -> Phase {
        match self.status {
            None => Phase::Wait,
            Some(status) if status.generated == 0 => Phase::Prefill,
            Some(_) => Phase::Decode,
        }
    }

    fn progress(&self, phase: Phase) -> Progress {
        let status = self.status.unwrap_or_default();
        let (done, total) = match phase {
            Phase::Prefill => (status.prefilled, Some(status.prompt)),
            Phase::Decode => (status.generated, status.limit),
            _ => (0, None),
        };
        Progress { phase, done: done as u64, total: total.map(|n| n as u64) }
    }
}

impl<T> Outbox<T> {
    pub fn new(cancel: Cancel) -> Self {
        let state = State {
            items: VecDeque::new(),
            ids: Vec::new(),
            finish: None,
            end_read: false,
            error: None,
            status: None,
            queue: Duration::ZERO,
            first_token: None,
            readers: 0,
            hooks: Vec::new(),
            read_at: Instant::now(),
        };
        Outbox { state: Mutex::new(state), changed: Condvar::new(), cancel }
    }

    /// Changes the state, and wakes who waits for that.
    fn change<R>(&self, change: impl FnOnce(&mut State<T>) -> R) -> R {
        let mut state = lock(&self.state);
        let result = change(&mut state);
        if state.is_readable() {
            let hooks = std::mem::take(&mut state.hooks);
            drop(state);
            self.changed.notify_all();
            hooks.into_iter().for_each(|hook| hook());
        }
        result
    }

    // The compute thread's side.

    pub fn wants_more(&self) -> bool {
        lock(&self.state).items.len() < AHEAD
    }

    /// The first step is about to be taken.
    pub fn begin(&self, queue: Duration, status: Status) {
        self.change(|state| (state.queue, state.status) = (queue, Some(status)));
    }

    /// What a step brought; false when it was the last. `elapsed`: since the first read.
    pub fn deliver(&self, step: Result<Step<T>>, status: Status, elapsed: Duration) -> bool {
        self.change(|state| {
            state.status = Some(status);
            if status.generated > 0 || matches!(step, Ok(Step::End(..))) {
                state.first_token.get_or_insert(elapsed);
            }
            let (item, end) = match step {
                Ok(Step::More(item)) => (item, None),
                Ok(Step::End(item, reason)) => (item, Some((reason, None))),
                Err(Error::Cancelled) if self.cancel.is_late() => (None, Some((FinishReason::Timeout, None))),
                // By the reader, who has set the end already, or else because the model was closed.
                Err(Error::Cancelled) => (None, Some((FinishReason::Error, Some(Error::Closed)))),
                Err(error) => (None, Some((FinishReason::Error, Some(error)))),
            };
            if state.finish.is_none() {
                state.items.extend(item); // nothing follows an end
            }
            if let Some((reason, error)) = end {
                state.end(reason, error);
            }
            state.finish.is_none()
        })
    }

    pub fn end(&self, reason: FinishReason, error: Option<Error>) {
        self.change(|state| state.end(reason, error));
    }

    /// Since when nobody has read; None while somebody waits for something to read.
    pub fn unread_since(&self) -> Option<Instant> {
        let state = lock(&self.state);
        Some(state.read_at).filter(|_| state.readers == 0 && state.hooks.is_empty())
    }

    // The reader's side.

    /// The next item, the end, or nothing yet. The error is told once, where the end is.
    pub fn take(&self, ids: impl FnOnce(&T) -> &[u32]) -> Poll<Result<Option<T>>> {
        let mut state = lock(&self.state);
        state.read_at = Instant::now();
        if let Some(item) = state.items.pop_front() {
            state.ids.extend(ids(&item));
            return Poll::Ready(Ok(Some(item)));
        }
        if state.finish.is_none() && self.cancel.is_late() {
            state.end(FinishReason::Timeout, None);
        }
        if state.finish.is_none() {
            return Poll::Pending;
        }
        state.end_read = true;
        Poll::Ready(state.error.take().map_or(Ok(None), Err))
    }

    /// Ends it, with nothing more to read; false where the end was read already.
    pub fn abandon(&self, reason: FinishReason) -> bool {
        self.change(|state| {
            if state.end_read {
                return false;
            }
            state.finish = Some(reason);
            state.end_read = true;
            state.error = None;
            state.items.clear();
            true
        })
    }

    /// Waits until there is something to read, or so long. Meanwhile somebody is reading.
    pub fn wait(&self, duration: Duration) {
        let mut state = lock(&self.state);
        if !state.is_readable() {
            state.readers += 1;
            let (mut state, _) = self.changed.wait_timeout(state, duration).unwrap_or_else(PoisonError::into_inner);
            state.readers -= 1;
            state.read_at = Instant::now();
        }
    }

    /// Calls `hook` once there is something to read, perhaps at once. Until then somebody is reading.
    pub fn on_change(&self, hook: Hook) {
        let mut state = lock(&self.state);
        if state.is_readable() {
            drop(state);
            hook();
        } else {
            state.hooks.push(hook);
        }
    }

    pub fn finish_reason(&self) -> Option<FinishReason> {
        let state = lock(&self.state);
        state.finish.filter(|_| state.end_read)
    }

    pub fn ids(&self) -> Vec<u32> {
        lock(&self.state).ids.clone()
    }

    pub fn timings(&self) -> Timings {
        let state = lock(&self.state);
        let status = state.status.unwrap_or_default();
        Timings {
            queue: state.queue,
            prefill: status.prefill_time,
            decode: status.decode_time,
            first_token: state.first_token,
            decode_passes: status.decode_passes,
        }
    }

    /// How far the phase is that it is in, and before that how those ended that came since the phase `told`, that one
    /// included: of the wait there is nothing to tell twice.
    pub fn progress(&self, told: Option<Phase>) -> Vec<Progress> {
        let state = lock(&self.state);
        let (since, now) = (told.unwrap_or(Phase::Wait), state.phase());
        let phases =
            [Phase::Wait, Phase::Prefill, Phase::Decode].into_iter().filter(|phase| (since..=now).contains(phase));
        let waited = |phase: &Phase| *phase == Phase::Wait && now > Phase::Wait && told.is_some();
        phases.filter(|phase| !waited(phase)).map(|phase| state.progress(phase)).collect()
    }
}
