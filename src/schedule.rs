//! One compute thread for each model, and the work that waits for it.
//!
//! Readers never compute: they hand a job over and wait for what it delivers, so that they can go on watching for
//! signals. The thread takes the jobs in turn, a step at a time, and leaves alone those whose reader is behind. It is
//! started by the first job and leaves when the model is closed or nobody holds it any more.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::panic;
use crate::threads::{Cancel, ForkGuard, lock};

/// Work in steps.
pub trait Job: Send {
    /// Can a step be taken now, or would it only run ahead of the reader? A job that was cancelled is ready.
    fn ready(&self) -> bool;

    /// Take a step; false when there is nothing more to do.
    fn step(&mut self) -> bool;

    /// The job will not be finished: tell its reader.
    fn fail(&mut self, error: Error);

    /// Stops a step that is under way.
    fn cancel(&self) -> Cancel;
}

/// The holder's end: dropping the last clone ends the thread.
#[derive(Clone)]
pub struct Scheduler {
    owner: Arc<Owner>,
}

struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.shared.fork_guard.is_forked() {
            self.shared.close();
        }
    }
}

/// Wakes the thread when a job may have become ready.
#[derive(Clone)]
pub struct Waker {
    shared: Arc<Shared>,
}

impl Waker {
    pub fn wake(&self) {
        if self.shared.fork_guard.is_forked() {
            return;
        }
        // Taking the lock orders this after whatever made the job ready, so that the wake-up is not lost.
        drop(lock(&self.shared.queue));
        self.shared.wake.notify_all();
    }
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    fork_guard: ForkGuard,
}

#[derive(Default)]
struct Queue {
    jobs: Vec<Box<dyn Job>>,
    /// Of the job whose step is under way.
    current: Option<Cancel>,
    running: bool,
    closed: bool,
}

impl Default for Scheduler {
    fn default() -> Self {
        let shared = Shared { queue: Mutex::default(), wake: Condvar::new(), fork_guard: ForkGuard::here() };
        Scheduler { owner: Arc::new(Owner { shared: Arc::new(shared) }) }
    }
}

impl Scheduler {
    pub fn fork_guard(&self) -> ForkGuard {
        self.owner.shared.fork_guard
    }

    pub fn waker(&self) -> Waker {
        Waker { shared: self.owner.shared.clone() }
    }

    /// Hand a job over.
    pub fn submit(&self, job: Box<dyn Job>) -> Result<()> {
        let shared = &self.owner.shared;
        shared.fork_guard.check()?;
        let mut queue = lock(&shared.queue);
        if queue.closed {
            return Err(Error::Closed);
        }
        if !queue.running {
            let worker = shared.clone();
            let thread = std::thread::Builder::new().name("candle-phi".into());
            let started = thread.spawn(move || worker.work());
            started.map_err(|error| Error::Internal(format!("no thread could be started: {error}")))?;
            queue.running = true;
        }
        queue.jobs.push(job);
        shared.wake.notify_all();
        Ok(())
    }

    /// End every job, and take no more. Returns at once. A forked child has nothing to close.
    pub fn close(&self) {
        if !self.owner.shared.fork_guard.is_forked() {
            self.owner.shared.close();
        }
    }
}

impl Shared {
    fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.current.iter().for_each(Cancel::set);
        drop(queue);
        self.wake.notify_all();
    }

    /// The life of the thread.
    fn work(&self) {
        let mut jobs: VecDeque<Box<dyn Job>> = VecDeque::new();
        while let Some(mut job) = self.next(&mut jobs) {
            match catch_unwind(AssertUnwindSafe(|| job.step())) {
                Ok(true) => jobs.push_back(job),
                Ok(false) => {}
                Err(panic) => job.fail(Error::Internal(panic::message(panic))),
            }
        }
        jobs.iter_mut().for_each(|job| job.fail(Error::Closed));
    }

    /// Wait for a job that is ready, and take it out; None when the model is closed.
    fn next(&self, jobs: &mut VecDeque<Box<dyn Job>>) -> Option<Box<dyn Job>> {
        let mut queue = lock(&self.queue);
        queue.current = None;
        loop {
            jobs.extend(queue.jobs.drain(..));
            if queue.closed {
                return None;
            }
            if let Some(i) = jobs.iter().position(|job| job.ready()) {
                let job = jobs.remove(i);
                queue.current = job.as_ref().map(|job| job.cancel());
                return job;
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    struct Counter {
        name: char,
        left: usize,
        out: Sender<String>,
        panics: bool,
    }

    impl Job for Counter {
        fn ready(&self) -> bool {
            true
        }

        fn step(&mut self) -> bool {
            assert!(!self.panics, "job {} was asked to panic", self.name);
            self.out.send(self.name.to_string()).unwrap();
            self.left -= 1;
            self.left > 0
        }

        fn fail(&mut self, error: Error) {
            self.out.send(error.to_string()).unwrap();
        }

        fn cancel(&self) -> Cancel {
            Cancel::default()
        }
    }

    fn job(name: char, left: usize, out: &Sender<String>) -> Box<Counter> {
        Box::new(Counter { name, left, out: out.clone(), panics: false })
    }

    fn take(from: &Receiver<String>, n: usize) -> String {
        from.iter().take(n).collect()
    }

    #[test]
    fn jobs_take_turns_and_a_short_one_overtakes_a_long_one() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        let gate = Arc::new(Mutex::new(()));
        struct Gate(Arc<Mutex<()>>);
        impl Job for Gate {
            fn ready(&self) -> bool {
                true
            }
            fn step(&mut self) -> bool {
                drop(lock(&self.0));
                false
            }
            fn fail(&mut self, _: Error) {}
            fn cancel(&self) -> Cancel {
                Cancel::default()
            }
        }
        let held = lock(&gate);
        scheduler.submit(Box::new(Gate(gate.clone()))).unwrap();
        for (name, left) in [('a', 4), ('b', 2)] {
            scheduler.submit(job(name, left, &out)).unwrap();
        }
        drop(held);
        assert_eq!(take(&results, 6), "ababaa");
    }

    #[test]
    fn a_panic_ends_its_job_alone() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        scheduler.submit(Box::new(Counter { panics: true, ..*job('p', 1, &out) })).unwrap();
        assert_eq!(take(&results, 1), "internal error: job p was asked to panic");
        scheduler.submit(job('q', 2, &out)).unwrap();
        assert_eq!(take(&results, 2), "qq");
    }

    #[test]
    fn closing_ends_what_waits_and_refuses_the_rest() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        scheduler.submit(job('x', usize::MAX, &out)).unwrap();
        assert_eq!(take(&results, 1), "x");
        scheduler.close();
        assert!(results.iter().any(|text| text == "the model is closed"));
        assert_eq!(scheduler.submit(job('y', 1, &out)), Err(Error::Closed));
    }

    #[test]
    fn the_thread_leaves_when_nobody_holds_the_scheduler() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        scheduler.submit(job('x', usize::MAX, &out)).unwrap();
        drop((scheduler, out));
        assert!(results.iter().last().is_some_and(|text| text == "the model is closed"));
    }
}
