//! A generation as its reader sees it: text that arrives, an end, and a way to stop it from any thread.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::generate::{FinishReason, Generation, Piece, Step};
use crate::schedule::{Job, Scheduler};
use crate::threads::{Cancel, lock};

/// Pieces that are computed ahead of the reader.
const AHEAD: usize = 4;
/// How often a waiting reader looks up from waiting.
const POLL: Duration = Duration::from_millis(50);

/// A stream of text. Any thread may read it or cancel it; dropping it cancels it.
pub struct TextStream {
    outbox: Arc<Outbox>,
    scheduler: Scheduler,
    /// Not handed over before the first read.
    unstarted: Mutex<Option<Generation>>,
}

/// What the compute thread delivers.
struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
    cancel: Cancel,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    /// Of the pieces that were read.
    ids: Vec<u32>,
    finish: Option<FinishReason>,
    /// The reader was told. Only then it shows: when it came about depends on who was faster.
    end_read: bool,
    /// Delivered once, after the pieces.
    error: Option<Error>,
    timings: Timings,
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

impl State {
    /// Nothing follows an end.
    fn deliver(&mut self, piece: Option<Piece>) {
        if self.finish.is_none() {
            self.pieces.extend(piece);
        }
    }

    /// The first end counts.
    fn end(&mut self, reason: FinishReason, error: Option<Error>) {
        if self.finish.is_none() {
            self.finish = Some(reason);
            self.error = error;
        }
    }
}

impl TextStream {
    /// Nothing is computed before the first read.
    pub fn new(generation: Generation, scheduler: Scheduler) -> Self {
        let outbox = Outbox { state: Mutex::default(), changed: Condvar::new(), cancel: Cancel::default() };
        TextStream { outbox: Arc::new(outbox), scheduler, unstarted: Mutex::new(Some(generation)) }
    }

    /// The next piece; None at the end. While it waits it asks `keep_waiting` about every 50 ms; a Break cancels the
    /// stream and is passed on.
    pub fn next<B>(&self, mut keep_waiting: impl FnMut() -> ControlFlow<B>) -> Result<ControlFlow<B, Option<Piece>>> {
        self.scheduler.fork_guard().check()?;
        self.start()?;
        let mut state = lock(&self.outbox.state);
        loop {
            if let Some(piece) = state.pieces.pop_front() {
                state.ids.extend(&piece.ids);
                drop(state);
                self.scheduler.waker().wake();
                return Ok(ControlFlow::Continue(Some(piece)));
            }
            if state.finish.is_some() {
                state.end_read = true;
                return state.error.take().map_or(Ok(ControlFlow::Continue(None)), Err);
            }
            let (woken, timeout) =
                self.outbox.changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if timeout.timed_out() {
                drop(state); // `keep_waiting` may take other locks, such as the interpreter's
                if let ControlFlow::Break(reason) = keep_waiting() {
                    self.cancel();
                    return Ok(ControlFlow::Break(reason));
                }
                state = lock(&self.outbox.state);
            }
        }
    }

    fn start(&self) -> Result<()> {
        let Some(generation) = lock(&self.unstarted).take() else { return Ok(()) };
        let job = StreamJob { generation, outbox: self.outbox.clone(), waiting_since: Instant::now(), started: None };
        let submitted = self.scheduler.submit(Box::new(job));
        if submitted.is_err() {
            let mut state = lock(&self.outbox.state);
            state.end(FinishReason::Error, None);
            state.end_read = true;
        }
        submitted
    }

    /// End the stream, from any thread; returns at once. Text that was not read is dropped. A stream that was read to
    /// its end stays as it is.
    pub fn cancel(&self) {
        if self.scheduler.fork_guard().is_forked() {
            return;
        }
        {
            let mut state = lock(&self.outbox.state);
            if state.end_read {
                return;
            }
            state.finish = Some(FinishReason::Cancelled);
            state.end_read = true;
            state.error = None;
            state.pieces.clear();
        }
        self.outbox.cancel.set();
        self.outbox.changed.notify_all();
        drop(lock(&self.unstarted).take()); // it holds the model
        self.scheduler.waker().wake();
    }

    /// None until the end was read.
    pub fn finish_reason(&self) -> Result<Option<FinishReason>> {
        self.scheduler.fork_guard().check()?;
        let state = lock(&self.outbox.state);
        Ok(state.finish.filter(|_| state.end_read))
    }

    /// The ids of the pieces that were read.
    pub fn ids(&self) -> Result<Vec<u32>> {
        self.scheduler.fork_guard().check()?;
        Ok(lock(&self.outbox.state).ids.clone())
    }

    pub fn timings(&self) -> Result<Timings> {
        self.scheduler.fork_guard().check()?;
        Ok(lock(&self.outbox.state).timings)
    }
}

impl Drop for TextStream {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// A generation in the hands of the compute thread.
struct StreamJob {
    generation: Generation,
    outbox: Arc<Outbox>,
    waiting_since: Instant,
    started: Option<Instant>,
}

impl Job for StreamJob {
    fn ready(&self) -> bool {
        self.outbox.cancel.is_set() || lock(&self.outbox.state).pieces.len() < AHEAD
    }

    fn step(&mut self) -> bool {
        if self.outbox.cancel.is_set() {
            return false;
        }
        let started = *self.started.get_or_insert_with(Instant::now);
        let step = self.generation.step(&self.outbox.cancel);
        let mut state = lock(&self.outbox.state);
        state.timings = Timings {
            queue: started - self.waiting_since,
            prefill: self.generation.prefill_time,
            decode: self.generation.decode_time,
            first_token: state.timings.first_token.or_else(|| step.is_ok().then(|| self.waiting_since.elapsed())),
            decode_passes: self.generation.decode_passes,
        };
        let more = match step {
            Ok(Step::Token(piece)) => {
                state.deliver(piece);
                state.finish.is_none()
            }
            Ok(Step::End(piece, reason)) => {
                state.deliver(piece);
                state.end(reason, None);
                false
            }
            // By the reader, who has set the end already, or else because the model was closed.
            Err(Error::Cancelled) => {
                state.end(FinishReason::Error, Some(Error::Closed));
                false
            }
            Err(error) => {
                state.end(FinishReason::Error, Some(error));
                false
            }
        };
        drop(state);
        self.outbox.changed.notify_all();
        more
    }

    fn fail(&mut self, error: Error) {
        lock(&self.outbox.state).end(FinishReason::Error, Some(error));
        self.outbox.changed.notify_all();
    }

    fn cancel(&self) -> Cancel {
        self.outbox.cancel.clone()
    }
}

/// Runs `work` once on the compute thread and waits for it as a reader of a stream does.
pub fn run_once<T: Send + 'static, B>(
    scheduler: &Scheduler,
    work: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
    mut keep_waiting: impl FnMut() -> ControlFlow<B>,
) -> Result<ControlFlow<B, T>> {
    let shared = Arc::new((Mutex::new(None), Condvar::new()));
    let cancel = Cancel::default();
    scheduler.submit(Box::new(Once { work: Some(work), result: shared.clone(), cancel: cancel.clone() }))?;
    let (result, changed) = &*shared;
    let mut state = lock(result);
    loop {
        if let Some(result) = state.take() {
            return result.map(ControlFlow::Continue);
        }
        let (woken, timeout) = changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner);
        state = woken;
        if timeout.timed_out() {
            drop(state);
            if let ControlFlow::Break(reason) = keep_waiting() {
                cancel.set();
                return Ok(ControlFlow::Break(reason));
            }
            state = lock(result);
        }
    }
}

type Delivery<T> = Arc<(Mutex<Option<Result<T>>>, Condvar)>;

struct Once<W, T> {
    work: Option<W>,
    result: Delivery<T>,
    cancel: Cancel,
}

impl<T, W> Once<W, T> {
    fn deliver(&self, result: Result<T>) {
        *lock(&self.result.0) = Some(result);
        self.result.1.notify_all();
    }
}

impl<T: Send, W: FnOnce(&Cancel) -> Result<T> + Send> Job for Once<W, T> {
    fn ready(&self) -> bool {
        true
    }

    fn step(&mut self) -> bool {
        if let Some(work) = self.work.take() {
            let result = work(&self.cancel);
            self.deliver(result.map_err(|error| if error == Error::Cancelled { Error::Closed } else { error }));
        }
        false
    }

    fn fail(&mut self, error: Error) {
        self.deliver(Err(error));
    }

    fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }
}
