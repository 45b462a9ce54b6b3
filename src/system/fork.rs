//! The guard against use after `fork()`.
//!
//! Decisions: docs/design/engine.md

use crate::error::{Error, Result};

/// Detects that the process was forked: threads and locks do not survive a fork.
///
/// A forked child has each lock in the state of that moment, perhaps held by a thread that the child lacks. So code that
/// takes a lock asks here first, `drop` included.
#[derive(Copy, Clone, Debug)]
pub struct ForkGuard {
    /// For the message.
    process: u32,
    forks: u64,
}

impl ForkGuard {
    /// Guards what this process makes now.
    pub fn here() -> Self {
        forks::watch();
        ForkGuard { process: std::process::id(), forks: forks::count() }
    }

    pub fn check(&self) -> Result<()> {
        if !self.is_forked() {
            return Ok(());
        }
        Err(Error::Fork(format!(
            "this model was loaded in process {}, before a fork(): load it in the child, or use spawn or forkserver",
            self.process
        )))
    }

    pub fn is_forked(&self) -> bool {
        forks::count() != self.forks
    }
}

/// Counts the forks that led to this process. A process id does not tell: the first process of every pid namespace has
/// number 1. Miri has no forks.
#[cfg(all(unix, not(miri)))]
mod forks {
    use std::sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    };

    static COUNT: AtomicU64 = AtomicU64::new(0);
    static WATCHED: AtomicBool = AtomicBool::new(false);

    extern "C" fn count_one() {
        COUNT.fetch_add(1, Relaxed);
    }

    /// Counts from now on. Two threads at once may both register: a fork then counts twice, which does no harm, and no
    /// lock is held that a fork could catch.
    pub fn watch() {
        if !WATCHED.load(Acquire) {
            // SAFETY: the handler adds to an atomic and nothing else, which any child of a fork may do.
            let error = unsafe { libc::pthread_atfork(None, None, Some(count_one)) };
            assert_eq!(error, 0, "pthread_atfork: out of memory");
            WATCHED.store(true, Release);
        }
    }

    pub fn count() -> u64 {
        COUNT.load(Relaxed)
    }
}

#[cfg(not(all(unix, not(miri))))]
mod forks {
    pub fn watch() {}

    pub fn count() -> u64 {
        0
    }
}
