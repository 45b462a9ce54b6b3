//! Long work on a thread of its own, such as a load or a download. Its caller waits in short pieces, sees the progress and
//! may leave at any time.
//!
//! Decisions: docs/design/runtime.md

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::system::fork::ForkGuard;
use crate::system::panic;
use crate::system::sync::{Cancel, lock};

/// The longest wait in one piece. A progress callback is promised at most 20 calls a second.
const POLL_INTERVAL: Duration = Duration::from_millis(60);

/// A phase of a task or a generation. Phases follow each other in this order.
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

/// Progress in tokens for a generation, in bytes for a task.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    pub done: u64,
    pub total: Option<u64>,
}

/// The work's side of a background task: takes progress reports and says whether to go on.
#[derive(Clone)]
pub struct Task {
    cancel: Cancel,
    progress: Arc<Mutex<Progress>>,
    /// Wakes work that waits for something else, such as a socket.
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

    /// `Error::Cancelled` once the caller has left.
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_set() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Sleeps until the time is over or the caller has left.
    pub fn sleep(&self, duration: Duration) -> Result<()> {
        let until = Instant::now() + duration;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(POLL_INTERVAL));
        }
    }

    /// Calls `interrupt` once the caller has left: at once if that was before.
    pub fn on_cancel(&self, interrupt: impl FnOnce() + Send + 'static) {
        *lock(&self.interrupt) = Some(Box::new(interrupt));
        if self.cancel.is_set() {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        let interrupt = lock(&self.interrupt).take();
        if let Some(interrupt) = interrupt {
            interrupt();
        }
    }
}

/// The caller's side of a background task. Dropping it cancels the work, which ends at its next `Task::check`.
pub struct BackgroundTask<T> {
    task: Task,
    outcome: Arc<Outcome<T>>,
    fork_guard: ForkGuard,
}

struct Outcome<T> {
    result: Mutex<Option<Result<T>>>,
    changed: Condvar,
}

impl<T: Send + 'static> BackgroundTask<T> {
    pub fn start(work: impl FnOnce(&Task) -> Result<T> + Send + 'static) -> Result<Self> {
        let task = Task::default();
        let outcome = Arc::new(Outcome { result: Mutex::default(), changed: Condvar::new() });
        let (inner_task, inner_outcome) = (task.clone(), outcome.clone());
        std::thread::Builder::new()
            .name("candle-phi-task".into())
            .spawn(move || {
                let result = panic::catch(|| work(&inner_task));
                *lock(&inner_outcome.result) = Some(result);
                inner_outcome.changed.notify_all();
            })
            .map_err(|error| Error::Memory(format!("the system refused to start a thread: {error}")))?;
        Ok(BackgroundTask { task, outcome, fork_guard: ForkGuard::here() })
    }

    /// The result, once, or pending. Never waits.
    pub fn poll(&self) -> Result<Poll<T>> {
        self.fork_guard.check()?;
        let result = lock(&self.outcome.result).take();
        result.map_or(Ok(Poll::Pending), |result| result.map(Poll::Ready))
    }

    /// Waits until `poll` has a result, for at most 60 ms: the caller has signals and callbacks to handle.
    pub fn wait(&self) -> Result<()> {
        self.fork_guard.check()?;
        let result = lock(&self.outcome.result);
        if result.is_none() {
            drop(self.outcome.changed.wait_timeout(result, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner));
        }
        Ok(())
    }

    pub fn progress(&self) -> Result<Progress> {
        self.fork_guard.check()?;
        Ok(*lock(&self.task.progress))
    }
}

impl<T> BackgroundTask<T> {
    /// Cancels the work, from any thread. Returns at once.
    pub fn cancel(&self) {
        if self.fork_guard.is_forked() {
            return;
        }
        self.task.cancel.set();
        self.task.interrupt();
    }
}

impl<T> Drop for BackgroundTask<T> {
    fn drop(&mut self) {
        self.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{RecvTimeoutError, channel};

    fn result<T: Send + 'static>(task: &BackgroundTask<T>) -> Result<T> {
        loop {
            match task.poll()? {
                Poll::Ready(value) => return Ok(value),
                Poll::Pending => task.wait()?,
            }
        }
    }

    #[test]
    fn the_result_comes_once_and_progress_is_the_last_report() {
        let (go, gate) = channel();
        let task = BackgroundTask::start(move |task| {
            task.report(Phase::Load, 1, Some(3));
            task.report(Phase::Load, 2, Some(3));
            gate.recv().unwrap();
            Ok(7)
        })
        .unwrap();
        assert_eq!(task.poll(), Ok(Poll::Pending));
        task.wait().unwrap(); // returns, though there is no result
        go.send(()).unwrap();
        assert_eq!(result(&task), Ok(7));
        assert_eq!(task.progress(), Ok(Progress { phase: Phase::Load, done: 2, total: Some(3) }));
        assert_eq!(task.poll(), Ok(Poll::Pending), "it was taken");
    }

    #[test]
    fn errors_and_panics_are_results() {
        let failed = BackgroundTask::start(|_| Err::<(), _>(Error::Value("no".into()))).unwrap();
        assert_eq!(result(&failed), Err(Error::Value("no".into())));
        let panicked = BackgroundTask::start(|_| -> Result<()> { panic!("number {}", 7) }).unwrap();
        assert_eq!(result(&panicked), Err(Error::Internal("number 7".into())));
    }

    #[test]
    fn cancelling_ends_a_sleep_and_so_does_dropping() {
        let (done, ended) = channel();
        for drops in [false, true] {
            let done = done.clone();
            let hour = Duration::from_secs(3600);
            let task = BackgroundTask::start(move |task| {
                done.send(task.sleep(hour)).unwrap();
                task.check()
            })
            .unwrap();
            if drops {
                drop(task);
            } else {
                task.cancel();
                assert_eq!(result(&task), Err(Error::Cancelled));
            }
            assert_eq!(ended.recv(), Ok(Err(Error::Cancelled)));
        }
        assert_eq!(Task::default().sleep(Duration::ZERO), Ok(()));
    }

    #[test]
    fn cancelling_interrupts_once_whichever_came_first() {
        for cancel_first in [false, true] {
            let (go, gate) = channel();
            let (interrupt, interrupted) = channel();
            let task = BackgroundTask::start(move |task| {
                if cancel_first {
                    gate.recv().unwrap();
                }
                task.on_cancel(move || interrupt.send(()).unwrap());
                if !cancel_first {
                    gate.recv().unwrap();
                }
                Ok(())
            })
            .unwrap();
            if cancel_first {
                task.cancel();
                go.send(()).unwrap();
                assert_eq!(interrupted.recv(), Ok(()));
            } else {
                go.send(()).unwrap();
                assert_eq!(result(&task), Ok(())); // `on_cancel` was called
                task.cancel();
                assert_eq!(interrupted.recv(), Ok(()));
            }
            task.cancel();
            assert_eq!(interrupted.recv_timeout(Duration::from_secs(60)), Err(RecvTimeoutError::Disconnected));
        }
    }
}
