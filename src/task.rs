//! Work that takes long, in a thread of its own, while the caller waits as a reader of a stream does: looking up now and
//! then, told how far the work is, and free to leave at any time.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::panic;
use crate::threads::{Cancel, lock};

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

    fn cancel(&self) {
        self.cancel.set();
        let interrupt = lock(&self.interrupt).take();
        if let Some(interrupt) = interrupt {
            interrupt();
        }
    }
}

/// Does `work` in a thread of its own and returns what it returns. While it waits it asks `watch` every 60 ms and
/// once more when the work went well, and holds no lock then; a Break ends the wait at once, and the work at its next look at the task.
pub fn run<T: Send + 'static, B>(
    work: impl FnOnce(&Task) -> Result<T> + Send + 'static,
    mut watch: impl FnMut(Progress) -> ControlFlow<B>,
) -> Result<ControlFlow<B, T>> {
    let task = Task::default();
    let (sender, receiver) = sync_channel(1);
    let theirs = task.clone();
    std::thread::Builder::new()
        .name("candle-phi-task".into())
        .spawn(move || {
            let caught = catch_unwind(AssertUnwindSafe(|| work(&theirs)));
            let result = caught.unwrap_or_else(|payload| Err(Error::Internal(panic::message(payload))));
            let _ = sender.send(result); // the caller may have left
        })
        .map_err(|error| Error::Internal(format!("no thread to work in: {error}")))?;
    loop {
        match receiver.recv_timeout(POLL) {
            Ok(result) => {
                let result = result?;
                let progress = *lock(&task.progress);
                return Ok(match watch(progress) {
                    ControlFlow::Continue(()) => ControlFlow::Continue(result),
                    ControlFlow::Break(reason) => ControlFlow::Break(reason),
                });
            }
            Err(RecvTimeoutError::Timeout) => {
                let progress = *lock(&task.progress);
                if let ControlFlow::Break(reason) = watch(progress) {
                    task.cancel();
                    return Ok(ControlFlow::Break(reason));
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Internal("the work ended without a word".into())),
        }
    }
}
