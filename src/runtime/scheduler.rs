//! The scheduler: one compute thread for each model, and the jobs that take turns on it.
//!
//! Readers never compute. They submit a job and wait for its results, so that they can handle signals meanwhile. The
//! thread runs the jobs a step at a time and skips those whose reader is behind. A step is a token, or a layer of a
//! prompt. Steps differ in length, so the next step goes to the job with the least compute time so far. `slots` jobs have
//! a slot, and with it a KV cache. The others wait for a slot in the order of arrival. The first job starts the thread.
//! The thread ends when the model is closed or the last `Scheduler` is dropped.
//!
//! Decisions: docs/design/runtime.md

mod jobs;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::system::fork::ForkGuard;
use crate::system::panic;
use crate::system::sync::{Cancel, lock};

use jobs::{Active, Jobs};

/// A stream that is unread for this long no longer keeps others waiting for its slot: they fail with `Error::Busy`.
const UNREAD_LIMIT: Duration = Duration::from_secs(10);

/// Work in steps, as the scheduler sees it.
pub trait Job: Send {
    /// False while a step would only run ahead of the reader. A cancelled job is ready.
    fn ready(&self) -> bool;

    /// Takes a step. False after the last one, and after the step that finds the job cancelled.
    fn step(&mut self) -> bool;

    /// Tells the reader that the job will not be finished. May be called again.
    fn fail(&mut self, error: Error);

    /// Stops the current step.
    fn cancel(&self) -> &Cancel;

    /// The time of the last read; None while a reader waits.
    fn unread_since(&self) -> Option<Instant>;
}

/// A handle to the compute thread. Dropping the last clone ends the thread.
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
        // The lock orders this after the change that made the job ready, so that the wake-up is not lost.
        drop(lock(&self.shared.queue));
        self.shared.wake.notify_all();
    }
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// The number of jobs that may hold a KV cache at once.
    slots: usize,
    unread_limit: Duration,
    fork_guard: ForkGuard,
}

#[derive(Default)]
struct Queue {
    arrived: Vec<Box<dyn Job>>,
    /// Stops the current step.
    current: Option<Cancel>,
    running: bool,
    closed: bool,
}

impl Default for Scheduler {
    fn default() -> Self {
        Scheduler::new(usize::MAX)
    }
}

impl Scheduler {
    /// `slots`: the number of jobs that may hold a KV cache at once.
    pub fn new(slots: usize) -> Self {
        Scheduler::with(slots, UNREAD_LIMIT)
    }

    fn with(slots: usize, unread_limit: Duration) -> Self {
        let (queue, wake) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { queue, wake, slots, unread_limit, fork_guard: ForkGuard::here() });
        Scheduler { owner: Arc::new(Owner { shared }) }
    }

    pub fn fork_guard(&self) -> ForkGuard {
        self.owner.shared.fork_guard
    }

    pub fn waker(&self) -> Waker {
        Waker { shared: self.owner.shared.clone() }
    }

    /// Queues a job.
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
            started.map_err(|error| Error::Internal(format!("cannot start the compute thread: {error}")))?;
            queue.running = true;
        }
        queue.arrived.push(job);
        shared.wake.notify_all();
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        lock(&self.owner.shared.queue).closed
    }

    /// Ends every job and refuses new ones. Returns at once. Does nothing in a forked child.
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

    /// The main function of the thread. A panic in a step fails that job. A panic anywhere else in a job fails all
    /// current jobs, since it may have come from any of them. The thread then runs the jobs that arrive later.
    fn work(&self) {
        loop {
            let mut jobs = Jobs::default();
            let end = panic::catch(|| {
                self.run(&mut jobs);
                Ok(())
            });
            jobs.fail(end.as_ref().err().unwrap_or(&Error::Closed));
            if end.is_ok() {
                return;
            }
        }
    }

    /// Runs jobs until the model is closed.
    fn run(&self, jobs: &mut Jobs) {
        while let Some(active) = self.next(jobs) {
            let started = Instant::now();
            match panic::catch(|| Ok(active.job.step())) {
                Ok(true) => jobs.put_back(started.elapsed()),
                Ok(false) => jobs.current = None,
                Err(error) => {
                    active.job.fail(error);
                    jobs.current = None;
                }
            }
        }
    }

    /// Waits for a job that is ready and makes it the current one; None once the model is closed.
    fn next<'a>(&self, jobs: &'a mut Jobs) -> Option<&'a mut Active> {
        let mut queue = lock(&self.queue);
        queue.current = None;
        loop {
            jobs.waiting.extend(queue.arrived.drain(..));
            if queue.closed {
                return None;
            }
            if jobs.choose(self.slots) {
                let active = jobs.current.as_mut()?;
                queue.current = Some(active.job.cancel().clone());
                return Some(active);
            }
            let now = Instant::now();
            if let Some(busy) = jobs.busy(self.unread_limit, now) {
                drop(queue); // `fail` calls the reader's hook
                while let Some(job) = jobs.waiting.front_mut() {
                    job.fail(busy.clone());
                    jobs.waiting.pop_front();
                }
                queue = lock(&self.queue);
                continue;
            }
            queue = match jobs.timeout(self.unread_limit, now) {
                Some(timeout) => self.wake.wait_timeout(queue, timeout).unwrap_or_else(PoisonError::into_inner).0,
                None => self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Sends its name at each step.
    pub(super) struct Counter {
        name: char,
        pub(super) left: usize,
        out: Sender<String>,
        /// The methods that panic.
        panics: &'static [&'static str],
        pub(super) ready: Arc<AtomicBool>,
        /// A step waits for this at its end.
        gate: Option<Receiver<()>>,
        pub(super) cancel: Cancel,
        pub(super) unread_since: Option<Instant>,
    }

    impl Counter {
        fn panic_in(&self, method: &str) {
            assert!(!self.panics.contains(&method), "{method} of {} panics", self.name);
        }
    }

    impl Job for Counter {
        fn ready(&self) -> bool {
            self.panic_in("ready");
            self.ready.load(SeqCst) || self.cancel.is_set()
        }

        fn step(&mut self) -> bool {
            if self.cancel.is_set() {
                return false;
            }
            self.panic_in("step");
            self.out.send(self.name.to_string()).unwrap();
            self.gate.iter().for_each(|gate| gate.recv().unwrap());
            self.left -= 1;
            self.left > 0
        }

        fn fail(&mut self, error: Error) {
            self.out.send(error.to_string()).unwrap();
            self.panic_in("fail");
        }

        fn cancel(&self) -> &Cancel {
            &self.cancel
        }

        fn unread_since(&self) -> Option<Instant> {
            self.unread_since
        }
    }

    impl Drop for Counter {
        fn drop(&mut self) {
            self.panic_in("drop");
        }
    }

    pub(super) fn job(name: char, left: usize, out: &Sender<String>) -> Box<Counter> {
        let (cancel, out, ready) = (Cancel::default(), out.clone(), Arc::new(true.into()));
        Box::new(Counter { name, left, out, panics: &[], ready, gate: None, cancel, unread_since: None })
    }

    /// A job that is not ready.
    pub(super) fn idle(name: char, out: &Sender<String>) -> Box<Counter> {
        let job = job(name, 1, out);
        job.ready.store(false, SeqCst);
        job
    }

    /// A job without end, and one that is not ready.
    fn two(out: &Sender<String>) -> [Box<Counter>; 2] {
        [job('x', usize::MAX, out), idle('w', out)]
    }

    /// Asserts that both have ended: the first perhaps cancelled within a step, the other failed.
    fn assert_closed(results: &Receiver<String>) {
        assert!(results.iter().filter(|text| text == "the model is closed").count() > 0);
    }

    fn take(from: &Receiver<String>, n: usize) -> Vec<String> {
        (0..n).map(|_| from.recv_timeout(Duration::from_secs(60)).expect("the thread goes on")).collect()
    }

    #[test]
    fn waiting_jobs_fail_when_all_slots_are_unread() {
        let (out, results) = channel();
        let scheduler = Scheduler::with(1, Duration::ZERO);
        let mut unread = idle('u', &out);
        unread.unread_since = Some(Instant::now() + Duration::from_secs(3600)); // it counts as 0 s
        scheduler.submit(unread).unwrap();
        for name in ['v', 'w'] {
            scheduler.submit(job(name, 1, &out)).unwrap();
            assert_eq!(take(&results, 1), ["1 slot is held by a stream unread for 0 s; read it or close it"]);
        }
    }

    #[test]
    fn a_deadline_ends_an_unread_job() {
        let (out, results) = channel();
        let scheduler = Scheduler::new(1);
        let mut unread = idle('u', &out);
        unread.cancel = Cancel::at(Some(Instant::now() + Duration::from_millis(100)));
        unread.unread_since = Some(Instant::now());
        scheduler.submit(unread).unwrap();
        scheduler.submit(job('w', 1, &out)).unwrap();
        assert_eq!(take(&results, 1), ["w"]);
    }

    #[test]
    fn a_panic_in_a_step_ends_its_job_alone() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        let mut culprit = job('p', 1, &out);
        culprit.panics = &["step"];
        scheduler.submit(culprit).unwrap();
        assert_eq!(take(&results, 1), ["internal error: step of p panics"]);
        scheduler.submit(job('q', 2, &out)).unwrap();
        assert_eq!(take(&results, 2), ["q", "q"]);
    }

    #[test]
    fn a_panic_outside_of_a_step_fails_the_jobs_at_hand_and_the_thread_goes_on() {
        let cases: [(&[&str], &[&str]); 3] = [
            (&["ready"], &["internal error: ready of p panics"; 2]),
            (&["step", "fail"], &["internal error: step of p panics", "internal error: fail of p panics"]),
            (&["drop"], &["p"]),
        ];
        for (panics, told) in cases {
            let (out, results) = channel();
            let (open, gate) = channel();
            let scheduler = Scheduler::default();
            let mut first = job('g', 1, &out);
            first.gate = Some(gate);
            let mut culprit = job('p', 1, &out);
            culprit.panics = panics;
            scheduler.submit(first).unwrap();
            assert_eq!(take(&results, 1), ["g"]);
            for job in [culprit, idle('w', &out)] {
                scheduler.submit(job).unwrap();
            }
            open.send(()).unwrap();
            assert_eq!(take(&results, told.len()), told);
            if panics != ["ready"] {
                let last = panics[panics.len() - 1];
                assert_eq!(take(&results, 1), [format!("internal error: {last} of p panics")], "the other job");
            }
            scheduler.submit(job('q', 1, &out)).unwrap();
            assert_eq!(take(&results, 1), ["q"]);
        }
    }

    #[test]
    fn closing_fails_the_jobs_at_hand_and_refuses_new_ones() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        two(&out).into_iter().for_each(|job| scheduler.submit(job).unwrap());
        assert_eq!(take(&results, 1), ["x"]);
        scheduler.close();
        assert_eq!(scheduler.submit(job('y', 1, &out)), Err(Error::Closed));
        drop(out);
        assert_closed(&results);
    }

    #[test]
    fn the_thread_ends_with_the_last_scheduler() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        two(&out).into_iter().for_each(|job| scheduler.submit(job).unwrap());
        drop((scheduler, out));
        assert_closed(&results);
    }
}
