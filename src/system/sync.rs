//! Cancellation, locks, and drops in the background.
//!
//! Decisions: docs/design/runtime.md

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A flag that stops work. Any thread may set it, and it counts as set from its deadline on.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    set: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl Cancel {
    pub fn at(deadline: Option<Instant>) -> Self {
        Cancel { set: Arc::default(), deadline }
    }

    pub fn set(&self) {
        self.set.store(true, Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.set.load(Relaxed) || self.is_late()
    }

    /// Whether the deadline has passed.
    pub fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

/// Takes a lock and ignores poisoning: the state that each lock here guards is valid between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops `value` on a thread of its own, for callers that must not wait: unmapping a model of 2.4 GB takes 100 ms. If no
/// thread can be started, the value is dropped here.
pub fn drop_in_background(value: impl Send + 'static) {
    in_background(move || drop(value)); // an error drops the closure, and with it the value
}

/// Frees memory on a thread of its own. If no thread can be started, nothing is done.
pub fn in_background(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().name("candle-phi-drop".into());
    let _ = thread.spawn(work);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_dropped_on_another_thread() {
        struct Note(std::sync::mpsc::Sender<std::thread::ThreadId>);
        impl Drop for Note {
            fn drop(&mut self) {
                self.0.send(std::thread::current().id()).unwrap();
            }
        }
        let (sender, dropped_on) = std::sync::mpsc::channel();
        drop_in_background(Note(sender));
        assert_ne!(dropped_on.recv().unwrap(), std::thread::current().id());
    }
}
