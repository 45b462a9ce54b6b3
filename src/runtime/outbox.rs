//! The queue between the compute thread and a reader: the one state that both share.
//!
//! Decisions: docs/design/runtime.md

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::kv::phases::Phases;
use crate::runtime::work::{FinishReason, Status, Step};
use crate::system::sync::{Cancel, lock};
use crate::system::task::{Phase, Progress};

/// The number of items computed ahead of a reader that takes them one by one.
const AHEAD: usize = 4;

/// Called once, on any thread, when there may be something to read.
pub type Hook = Box<dyn FnOnce() + Send>;

pub struct Outbox<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    pub cancel: Cancel,
}

struct State<T> {
    /// True if the reader wants all items at once: they are computed without being read, and readable at the end.
    whole: bool,
    items: VecDeque<T>,
    /// Token ids of the items that were read.
    ids: Vec<u32>,
    finish: Option<FinishReason>,
    /// True once the reader has seen the end. Until then `finish_reason` is None, so that it does not depend on timing.
    end_read: bool,
    /// Delivered once, after the items.
    error: Option<Error>,
    /// None until the first step.
    status: Option<Status>,
    /// The phases of the computed ids, once all are.
    phases: Option<Phases>,
    queue: Duration,
    first_token: Option<Duration>,
    /// Threads inside `wait`.
    readers: usize,
    /// Hooks of readers that poll.
    hooks: Vec<Hook>,
    /// The time of the last read.
    read_at: Instant,
}

/// Durations of the phases.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Timings {
    /// From the first read to the first step.
    pub queue: Duration,
    pub prefill: Duration,
    pub decode: Duration,
    /// From the first read to the first id.
    pub first_token: Option<Duration>,
    /// Passes within `decode`.
    pub decode_passes: usize,
    /// Drafts that were computed in those passes, and those of them that were accepted.
    pub drafted: usize,
    pub accepted: usize,
    /// Positions of the prompt that were held.
    pub cached: usize,
}

impl<T> State<T> {
    /// Sets the end. Only the first one counts.
    fn end(&mut self, reason: FinishReason, error: Option<Error>) {
        if self.finish.is_none() {
            self.finish = Some(reason);
            self.error = error;
        }
    }

    fn is_readable(&self) -> bool {
        self.finish.is_some() || (!self.whole && !self.items.is_empty())
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
            whole: false,
            items: VecDeque::new(),
            ids: Vec::new(),
            finish: None,
            end_read: false,
            error: None,
            status: None,
            phases: None,
            queue: Duration::ZERO,
            first_token: None,
            readers: 0,
            hooks: Vec::new(),
            read_at: Instant::now(),
        };
        Outbox { state: Mutex::new(state), changed: Condvar::new(), cancel }
    }

    /// Changes the state and wakes the readers if there is something to read.
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

    // For the compute thread.

    pub fn wants_more(&self) -> bool {
        let state = lock(&self.state);
        state.whole || state.items.len() < AHEAD
    }

    /// Records the start of the first step.
    pub fn begin(&self, queue: Duration, status: Status) {
        self.change(|state| (state.queue, state.status) = (queue, Some(status)));
    }

    /// Records how the ids of the sequence were computed.
    pub fn leave(&self, phases: Phases) {
        lock(&self.state).phases = Some(phases);
    }

    /// Records a step; false after the last one. `elapsed`: since the first read.
    pub fn deliver(&self, step: Step<T>, status: Status, elapsed: Duration) -> bool {
        self.change(|state| {
            state.status = Some(status);
            if status.generated > 0 || matches!(step, Step::End(..)) {
                state.first_token.get_or_insert(elapsed);
            }
            let (item, end) = match step {
                Step::More(item) | Step::Again(item) => (item, None),
                Step::End(item, reason) => (item, Some(reason)),
            };
            if state.finish.is_none() {
                state.items.extend(item);
            }
            if let Some(reason) = end {
                state.end(reason, None);
            }
            state.finish.is_none()
        })
    }

    /// Ends the stream with an error. A cancelled step is the deadline, or else a closed model: a reader that cancels sets
    /// the end itself.
    pub fn fail(&self, error: Error) {
        match error {
            Error::Cancelled if self.cancel.is_late() => self.end(FinishReason::Timeout, None),
            Error::Cancelled => self.end(FinishReason::Error, Some(Error::Closed)),
            error => self.end(FinishReason::Error, Some(error)),
        }
    }

    pub fn end(&self, reason: FinishReason, error: Option<Error>) {
        self.change(|state| state.end(reason, error));
    }

    /// The time of the last read; None while a reader waits, and if no read is needed.
    pub fn unread_since(&self) -> Option<Instant> {
        let state = lock(&self.state);
        Some(state.read_at).filter(|_| state.readers == 0 && state.hooks.is_empty() && !state.whole)
    }

    // For the reader.

    /// Lets everything be computed without a read. There is nothing to read before the end.
    pub fn read_whole(&self) {
        lock(&self.state).whole = true;
    }

    /// The next item, None at the end, or pending. The error comes once, in place of the end.
    pub fn take(&self, ids: impl FnOnce(&T) -> &[u32]) -> Poll<Result<Option<T>>> {
        let mut state = lock(&self.state);
        state.read_at = Instant::now();
        if !state.is_readable() && self.cancel.is_late() {
            state.end(FinishReason::Timeout, None);
        }
        if !state.is_readable() {
            return Poll::Pending;
        }
        if let Some(item) = state.items.pop_front() {
            state.ids.extend(ids(&item));
            return Poll::Ready(Ok(Some(item)));
        }
        state.end_read = true;
        Poll::Ready(state.error.take().map_or(Ok(None), Err))
    }

    /// Ends the stream for its reader and drops unread items; false if the end was read already.
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

    /// Waits until there is something to read, for at most `duration`. The stream does not count as unread meanwhile.
    pub fn wait(&self, duration: Duration) {
        let mut state = lock(&self.state);
        if !state.is_readable() {
            state.readers += 1;
            let (mut state, _) = self.changed.wait_timeout(state, duration).unwrap_or_else(PoisonError::into_inner);
            state.readers -= 1;
            state.read_at = Instant::now();
        }
    }

    /// Calls `hook` once there is something to read, perhaps at once. Until then the stream does not count as unread.
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

    /// None before the end, and after one without it.
    pub fn phases(&self) -> Option<Phases> {
        lock(&self.state).phases.clone()
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
            drafted: status.drafted,
            accepted: status.accepted,
            cached: status.cached,
        }
    }

    /// The progress reports due when phase `reported` was the last one in a report: the end of each phase from that one
    /// on, then the current phase. The end of the wait is not reported.
    pub fn progress(&self, reported: Option<Phase>) -> Vec<Progress> {
        let state = lock(&self.state);
        let (first, current) = (reported.unwrap_or(Phase::Wait), state.phase());
        let is_due = |phase: &Phase| {
            let is_end_of_wait = *phase == Phase::Wait && *phase != current && reported.is_some();
            (first..=current).contains(phase) && !is_end_of_wait
        };
        let phases = [Phase::Wait, Phase::Prefill, Phase::Decode].into_iter();
        phases.filter(is_due).map(|phase| state.progress(phase)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    type Texts = Outbox<&'static str>;

    fn outbox() -> Texts {
        Outbox::new(Cancel::default())
    }

    fn status(prefilled: usize, generated: usize) -> Status {
        Status { prompt: 3, prefilled, generated, limit: Some(9), ..Status::default() }
    }

    fn deliver(outbox: &Texts, step: Step<&'static str>) -> bool {
        outbox.deliver(step, status(3, 1), Duration::from_secs(1))
    }

    fn more(text: &'static str) -> Step<&'static str> {
        Step::More(Some(text))
    }

    fn take(outbox: &Texts) -> Poll<Result<Option<&'static str>>> {
        outbox.take(|_| &[7])
    }

    #[test]
    fn items_come_in_order_and_the_reason_shows_with_the_end() {
        let outbox = outbox();
        assert_eq!(take(&outbox), Poll::Pending);
        assert!(deliver(&outbox, more("a")));
        assert!(deliver(&outbox, Step::More(None)));
        assert!(!deliver(&outbox, Step::End(Some("b"), FinishReason::Stop)));
        for text in ["a", "b"] {
            assert_eq!(take(&outbox), Poll::Ready(Ok(Some(text))));
            assert_eq!(outbox.finish_reason(), None);
        }
        for _ in 0..2 {
            assert_eq!(take(&outbox), Poll::Ready(Ok(None)));
            assert_eq!(outbox.finish_reason(), Some(FinishReason::Stop));
        }
        assert_eq!(outbox.ids(), [7, 7]);
    }

    #[test]
    fn the_first_end_counts_and_its_error_comes_once() {
        let outbox = outbox();
        deliver(&outbox, more("a"));
        outbox.fail(Error::Value("first".into()));
        assert!(!deliver(&outbox, more("late")));
        outbox.end(FinishReason::Stop, Some(Error::Value("second".into())));
        assert_eq!(take(&outbox), Poll::Ready(Ok(Some("a"))));
        assert_eq!(take(&outbox), Poll::Ready(Err(Error::Value("first".into()))));
        assert_eq!(take(&outbox), Poll::Ready(Ok(None)));
        assert_eq!(outbox.finish_reason(), Some(FinishReason::Error));
    }

    #[test]
    fn it_wants_no_more_when_it_is_full() {
        let outbox = outbox();
        for _ in 0..AHEAD {
            assert!(outbox.wants_more());
            deliver(&outbox, more("a"));
        }
        assert!(!outbox.wants_more());
        assert!(take(&outbox).is_ready());
        assert!(outbox.wants_more());
    }

    #[test]
    fn a_whole_text_is_computed_without_a_read_and_comes_at_the_end() {
        let outbox = outbox();
        outbox.read_whole();
        let (sender, called) = channel();
        outbox.on_change(Box::new(move || sender.send(()).unwrap()));
        for _ in 0..2 * AHEAD {
            assert!(outbox.wants_more());
            deliver(&outbox, more("a"));
        }
        assert_eq!((take(&outbox), called.try_iter().count()), (Poll::Pending, 0));
        deliver(&outbox, Step::End(Some("b"), FinishReason::Stop));
        assert_eq!(called.try_iter().count(), 1);
        assert_eq!(outbox.unread_since(), None);
        for text in [["a"; 2 * AHEAD].as_slice(), &["b"]].concat() {
            assert_eq!(take(&outbox), Poll::Ready(Ok(Some(text))));
        }
        assert_eq!(take(&outbox), Poll::Ready(Ok(None)));
        assert_eq!(outbox.finish_reason(), Some(FinishReason::Stop));
    }

    #[test]
    fn the_deadline_of_a_whole_text_keeps_what_was_computed() {
        let outbox = Texts::new(Cancel::at(Some(Instant::now())));
        outbox.read_whole();
        deliver(&outbox, more("a"));
        assert_eq!(take(&outbox), Poll::Ready(Ok(Some("a"))));
        assert!(!deliver(&outbox, more("late")));
        assert_eq!(take(&outbox), Poll::Ready(Ok(None)));
        assert_eq!(outbox.finish_reason(), Some(FinishReason::Timeout));
    }

    #[test]
    fn abandoning_drops_the_items_and_is_too_late_after_the_end() {
        let abandoned = outbox();
        deliver(&abandoned, more("a"));
        abandoned.fail(Error::Value("unread".into()));
        assert!(abandoned.abandon(FinishReason::Cancelled));
        assert_eq!(take(&abandoned), Poll::Ready(Ok(None)));
        assert_eq!(abandoned.finish_reason(), Some(FinishReason::Cancelled));
        let complete = outbox();
        deliver(&complete, Step::End(None, FinishReason::Length));
        assert_eq!(take(&complete), Poll::Ready(Ok(None)));
        assert!(!complete.abandon(FinishReason::Cancelled));
        assert_eq!(complete.finish_reason(), Some(FinishReason::Length));
    }

    #[test]
    fn the_deadline_ends_it_for_the_reader_and_for_the_compute_thread() {
        let late = || Texts::new(Cancel::at(Some(Instant::now())));
        let outbox = late();
        assert_eq!(take(&outbox), Poll::Ready(Ok(None)));
        assert_eq!(outbox.finish_reason(), Some(FinishReason::Timeout));
        let outbox = late();
        deliver(&outbox, more("a"));
        outbox.fail(Error::Cancelled);
        assert_eq!(take(&outbox), Poll::Ready(Ok(Some("a"))));
        assert_eq!(take(&outbox), Poll::Ready(Ok(None)));
        assert_eq!(outbox.finish_reason(), Some(FinishReason::Timeout));
    }

    #[test]
    fn a_step_that_the_reader_did_not_cancel_means_a_closed_model() {
        let outbox = outbox();
        outbox.fail(Error::Cancelled);
        assert_eq!(take(&outbox), Poll::Ready(Err(Error::Closed)));
    }

    #[test]
    fn a_hook_is_called_once_and_counts_as_a_reader_until_then() {
        let outbox = outbox();
        let (sender, called) = channel();
        let hook = || {
            let sender = sender.clone();
            Box::new(move || sender.send(()).unwrap())
        };
        let read_at = outbox.unread_since().expect("no reader waits");
        outbox.on_change(hook());
        assert_eq!(outbox.unread_since(), None);
        deliver(&outbox, Step::More(None));
        assert_eq!(called.try_iter().count(), 0, "there is nothing to read");
        deliver(&outbox, more("a"));
        deliver(&outbox, more("b"));
        assert_eq!(called.try_iter().count(), 1);
        assert_eq!(outbox.unread_since(), Some(read_at));
        outbox.on_change(hook());
        assert_eq!(called.try_iter().count(), 1, "there is something to read");
        assert!(take(&outbox).is_ready());
        assert!(outbox.unread_since() >= Some(read_at));
    }

    #[test]
    fn a_waiting_thread_is_a_reader_and_wakes_for_an_item() {
        let outbox = outbox();
        std::thread::scope(|scope| {
            scope.spawn(|| outbox.wait(Duration::from_secs(3600)));
            while outbox.unread_since().is_some() {
                std::thread::yield_now();
            }
            deliver(&outbox, more("a"));
        });
        assert!(outbox.unread_since().is_some());
        outbox.wait(Duration::from_secs(3600)); // there is something to read
    }

    #[test]
    fn progress_leaves_no_phase_out() {
        let outbox = outbox();
        let of = |phase, done, total| Progress { phase, done, total };
        let wait = of(Phase::Wait, 0, None);
        assert_eq!(outbox.progress(None), [wait]);
        assert_eq!(outbox.progress(Some(Phase::Wait)), [wait]);
        outbox.begin(Duration::from_secs(2), status(0, 0));
        outbox.deliver(Step::More(None), status(2, 0), Duration::from_secs(3));
        assert_eq!(outbox.progress(None), [wait, of(Phase::Prefill, 2, Some(3))]);
        assert_eq!(outbox.progress(Some(Phase::Wait)), [of(Phase::Prefill, 2, Some(3))]);
        assert_eq!(outbox.timings().first_token, None);
        outbox.deliver(more("a"), status(3, 1), Duration::from_secs(4));
        outbox.deliver(more("b"), status(3, 2), Duration::from_secs(5));
        let both = [of(Phase::Prefill, 3, Some(3)), of(Phase::Decode, 2, Some(9))];
        assert_eq!(outbox.progress(Some(Phase::Wait)), both);
        assert_eq!(outbox.progress(Some(Phase::Prefill)), both);
        assert_eq!(outbox.progress(Some(Phase::Decode)), both[1..]);
        let timings = outbox.timings();
        assert_eq!((timings.queue, timings.first_token), (Duration::from_secs(2), Some(Duration::from_secs(4))));
    }
}
