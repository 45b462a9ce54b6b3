//! Work that takes long, in a thread of its own, while the caller waits as a reader of a stream does: looking up now and
//! then, told how far the work is, and free to leave at any time.
//!
//! Decisions: docs/design/runtime.md

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::panic;
use crate::threads::{Cancel, ForkGuard, lock};

/// How often the waiting caller looks up: less than 20 times a second, which is what a progress callback is promised.
const POLL: Duration = Duration::from_millis(60);

/// What is being done. A generation goes through some of these in this order.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Wait,
    Download,
    Verify,
    Load,
    Prefill,
    Decode,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Wait => "wait",
            Phase::Download => "download",
            Phase::Verify => "verify",
            Phase::Load => "load",
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }
}

/// How far it is: in tokens, if it is a generation, else in bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    pub done: u64,
    pub total: Option<u64>,
}

/// What the work sees of its caller: whether to go on, and where to say how far it is.
#[derive(Clone)]
pub struct Task {
    cancel: Cancel,
    progress: Arc<Mutex<Progress>>,
    /// Wakes work that waits for something else than this task, such as a socket.
    #[allow(clippy::type_complexity)] // a callback that is called once
    interrupt: Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>,
}

impl Default for Task {
    fn default() -> Self {
        let progress = Progress { phase: Phase::Wait, done: 0, total: None };
        Task { cancel: Cancel::default(), progress: Arc::new(Mutex::new(progress)), interrupt: Arc::default() }
    }
}

impl Task {
    pub fn report(&self, phase: Phase, done: u64, total: Option<u64>) {
        *lock(&self.progress) = Progress { phase, done, total };
    }

    /// Whether the caller still waits.
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_set() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits, for as long as the caller does.
    pub fn sleep(&self, duration: Duration) -> Result<()> {
        let until = Instant::now() + duration;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(POLL));
        }
    }

    /// What to call, once, when the caller leaves.
    pub fn on_cancel(&self, interrupt: impl FnOnce() + Send + 'static) {
        *lock(&self.interrupt) = Some(Box::new(interrupt));
    }
}

/// Work in a thread of its own, as its caller sees it. Dropping it ends the work at its next look at the task.
pub struct Running<T> {
    task: Task,
    outcome: Arc<Outcome<T>>,
    fork_guard: ForkGuard,
}

struct Outcome<T> {
    result: Mutex<Option<Result<T>>>,
    changed: Condvar,
}

impl<T: Send + 'static> Running<T> {
    pub fn start(work: impl FnOnce(&Task) -> Result<T> + Send + 'static) -> Result<Self> {
        let task = Task::default();
        let outcome = Arc::new(Outcome { result: Mutex::default(), changed: Condvar::new() });
        let (theirs, left) = (task.clone(), outcome.clone());
        std::thread::Builder::new()
            .name("candle-phi-task".into())
            .spawn(move || {
                let caught = catch_unwind(AssertUnwindSafe(|| work(&theirs)));
                let result = caught.unwrap_or_else(|payload| Err(Error::Internal(panic::message(payload))));
                *lock(&left.result) = Some(result);
                left.changed.notify_all();
            })
            .map_err(|error| Error::Internal(format!("no thread to work in: {error}")))?;
        Ok(Running { task, outcome, fork_guard: ForkGuard::here() })
    }

    /// What the work returns, once, or pending. Never waits.
    pub fn poll(&self) -> Result<Poll<T>> {
        self.fork_guard.check()?;
        let result = lock(&self.outcome.result).take();
        result.map_or(Ok(Poll::Pending), |result| result.map(Poll::Ready))
    }

    /// Waits until `poll` has something, but not for longer than 60 ms: who waits has other things to look after.
    pub fn wait(&self) -> Result<()> {
        self.fork_guard.check()?;
        let result = lock(&self.outcome.result);
        if result.is_none() {
            drop(self.outcome.changed.wait_timeout(result, POLL).unwrap_or_else(PoisonError::into_inner));
        }
        Ok(())
    }

    pub fn progress(&self) -> Result<Progress> {
        self.fork_guard.check()?;
        Ok(*lock(&self.task.progress))
    }
}

impl<T> Running<T> {
    /// End the work, from any thread; returns at once.
    pub fn cancel(&self) {
        if self.fork_guard.is_forked() {
            return;
        }
        self.task.cancel.set();
        let interrupt = lock(&self.task.interrupt).take();
        if let Some(interrupt) = interrupt {
            interrupt();
        }
    }
}

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.cancel();
    }
}
