//! The scheduler: one compute thread for each model, and the jobs that share its passes.
//!
//! Readers never compute. They submit a job and wait for its results, so that they can handle signals meanwhile. The
//! thread takes one turn after the other: a layer of prompts, or a decode pass that all decoding jobs share (`jobs.rs`
//! chooses). It skips jobs whose reader is behind. `slots` jobs have a slot, and with it a KV cache. The others wait for a
//! slot in the order of arrival. The first job starts the thread. The thread ends when the model is closed or the last
//! `Scheduler` is dropped.
//!
//! Decisions: docs/design/runtime.md

mod active;
mod drafts;
mod jobs;
mod pass;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::model::{Batch, Model, Sequence};
use crate::runtime::draft::survival::Survival;
use crate::runtime::prefixes::Prefixes;
use crate::runtime::prompt::Prompt;
use crate::system::fork::ForkGuard;
use crate::system::panic;
use crate::system::sync::{Cancel, lock};

use drafts::DraftRows;
use jobs::{Jobs, Turn};

/// A stream that is unread for this long no longer keeps others waiting for its slot: they fail with `Error::Busy`.
const UNREAD_LIMIT: Duration = Duration::from_secs(10);

/// `max_batch` unless the caller sets it: wider passes gain little (docs/design/runtime.md).
pub const MAX_BATCH: usize = 8;

/// Work as the scheduler sees it.
pub trait Job: Send {
    /// False while a turn would only run ahead of the reader. A cancelled job is ready.
    fn ready(&self) -> bool;

    fn model(&self) -> &Arc<dyn Model>;

    fn prompt(&self) -> &Prompt;

    /// Tokens of a prompt that may share a pass with others; None if it is computed alone.
    fn shared_prompt(&self) -> Option<usize>;

    /// The sequence with the prompt, and with the keys and values of it that are held.
    fn begin(&mut self) -> Result<Sequence>;

    /// Records a turn that gave no logits. `computed`: ids of the sequence so far.
    fn turn(&mut self, sequence: &Sequence, computed: usize, time: Duration);

    /// Takes the logits that the sequence wanted of a pass; false after the last ones.
    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32], time: Duration) -> Result<bool>;

    /// As `Work::draft`.
    fn draft(&mut self, _sequence: &Sequence, _most: usize, _survival: &mut Survival) -> Vec<f32> {
        Vec::new()
    }

    /// As `Work::extend`.
    fn extend(&mut self, _sequence: &mut Sequence, _n: usize) -> Result<()> {
        Ok(())
    }

    /// The sequence is computed no further.
    fn leave(&self, sequence: &mut Sequence);

    /// Tells the reader that the job will not be finished. May be called again.
    fn fail(&mut self, error: Error);

    /// Takes the job out of the current turn.
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
    /// The number of jobs that share a decode pass at most.
    max_batch: usize,
    prefixes: Arc<Prefixes>,
    unread_limit: Duration,
    fork_guard: ForkGuard,
}

#[derive(Default)]
struct Queue {
    arrived: Vec<Box<dyn Job>>,
    /// The jobs of the current turn.
    current: Vec<Cancel>,
    running: bool,
    closed: bool,
}

impl Default for Scheduler {
    fn default() -> Self {
        Scheduler::new(usize::MAX, MAX_BATCH, Arc::default())
    }
}

impl Scheduler {
    /// `slots`: the number of jobs that may hold a KV cache at once; `max_batch`: that share a decode pass at most.
    /// `prefixes`: of the model whose jobs it runs.
    pub fn new(slots: usize, max_batch: usize, prefixes: Arc<Prefixes>) -> Self {
        Scheduler::with(slots, max_batch, prefixes, UNREAD_LIMIT)
    }

    fn with(slots: usize, max_batch: usize, prefixes: Arc<Prefixes>, unread_limit: Duration) -> Self {
        let (queue, wake, fork_guard) = (Mutex::default(), Condvar::new(), ForkGuard::here());
        let shared = Arc::new(Shared { queue, wake, slots, max_batch, prefixes, unread_limit, fork_guard });
        Scheduler { owner: Arc::new(Owner { shared }) }
    }

    pub fn fork_guard(&self) -> ForkGuard {
        self.owner.shared.fork_guard
    }

    pub fn prefixes(&self) -> &Arc<Prefixes> {
        &self.owner.shared.prefixes
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

    /// The main function of the thread. A panic in a turn fails the job that it came from. A panic anywhere else in a job
    /// fails all current jobs, since it may have come from any of them. The thread then runs the jobs that arrive later.
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

    /// Takes turns until the model is closed.
    fn run(&self, jobs: &mut Jobs) {
        let mut batch = Batch::default(); // decode passes keep their memory
        let mut rows = DraftRows::default();
        while let Some(turn) = self.next(jobs) {
            let start = Instant::now();
            match turn {
                Turn::End => jobs.current[0].fail(Error::Cancelled),
                Turn::Prompt(prompts) => {
                    let prompts = pass::prompt(&mut jobs.current, *prompts, &self.prefixes, start);
                    jobs.put_back_prompts(prompts, start.elapsed());
                }
                Turn::Decode => {
                    let prompts = pass::decode(&mut jobs.current, &mut batch, &mut rows, &self.prefixes, start);
                    jobs.put_back_decoders(prompts, start.elapsed());
                }
            }
            jobs.current.clear();
        }
    }

    /// Waits for a job that is ready and makes those of the next turn the current ones; None once the model is closed.
    fn next(&self, jobs: &mut Jobs) -> Option<Turn> {
        let mut queue = lock(&self.queue);
        queue.current.clear();
        loop {
            jobs.waiting.extend(queue.arrived.drain(..));
            if queue.closed {
                return None;
            }
            if let Some(turn) = jobs.choose(self.slots, self.max_batch, &self.prefixes) {
                queue.current.extend(jobs.current.iter().map(|active| active.job.cancel().clone()));
                return Some(turn);
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
mod tests;
