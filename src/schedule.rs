//! One compute thread for each model, and the work that waits for it.
//!
//! Readers never compute: they hand a job over and wait for what it delivers, so that they can go on watching for
//! signals. The thread takes the jobs in turn, a step at a time, and leaves alone those whose reader is behind. A step is
//! a token, or a layer of a prompt, and these differ in length: the turn is that of the job that had the least time so
//! far. Only so many have a seat, and with it a KV cache; the others wait for one in the order they came. The thread is
//! started by the first job and leaves when the model is closed or nobody holds it any more.
//!
//! Decisions: docs/design/runtime.md

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::panic;
use crate::threads::{Cancel, ForkGuard, lock};

/// For so long a stream that nobody reads may keep others waiting.
const PATIENCE: Duration = Duration::from_secs(10);

/// Work in steps.
pub trait Job: Send {
    /// Can a step be taken now, or would it only run ahead of the reader? A job that was cancelled is ready.
    fn ready(&self) -> bool;

    /// Take a step; false when there is nothing more to do, as at the next step after it was cancelled.
    fn step(&mut self) -> bool;

    /// The job will not be finished: tell its reader.
    fn fail(&mut self, error: Error);

    /// Stops a step that is under way.
    fn cancel(&self) -> &Cancel;

    /// Since when nobody has read what it delivers; None while somebody waits for it.
    fn unread_since(&self) -> Option<Instant>;
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
    /// Jobs that may hold a KV cache at once.
    slots: usize,
    patience: Duration,
    fork_guard: ForkGuard,
}

#[derive(Default)]
struct Queue {
    arrived: Vec<Box<dyn Job>>,
    /// Of the job whose step is under way.
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
    /// `slots`: how many jobs may be under way at once.
    pub fn new(slots: usize) -> Self {
        Scheduler::with(slots, PATIENCE)
    }

    fn with(slots: usize, patience: Duration) -> Self {
        let (queue, wake) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { queue, wake, slots, patience, fork_guard: ForkGuard::here() });
        Scheduler { owner: Arc::new(Owner { shared }) }
    }

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
        queue.arrived.push(job);
        shared.wake.notify_all();
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        lock(&self.owner.shared.queue).closed
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
        let mut jobs = Jobs::default();
        while let Some(mut seat) = self.next(&mut jobs) {
            let started = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| seat.job.step())) {
                Ok(true) => {
                    seat.used += started.elapsed();
                    jobs.seated.push(seat);
                }
                Ok(false) => {}
                Err(panic) => seat.job.fail(Error::Internal(panic::message(panic))),
            }
        }
        let seated = jobs.seated.into_iter().map(|seat| seat.job);
        seated.chain(jobs.waiting).for_each(|mut job| job.fail(Error::Closed));
    }

    /// Wait for a job that is ready, and take it out; None when the model is closed.
    fn next(&self, jobs: &mut Jobs) -> Option<Seat> {
        let mut queue = lock(&self.queue);
        queue.current = None;
        loop {
            jobs.waiting.extend(queue.arrived.drain(..));
            if queue.closed {
                return None;
            }
            if let Some(seat) = jobs.next(self.slots) {
                queue.current = Some(seat.job.cancel().clone());
                return Some(seat);
            }
            if let Some(busy) = jobs.stuck(self.patience) {
                drop(queue); // a job that fails calls its reader
                jobs.waiting.drain(..).for_each(|mut job| job.fail(busy.clone()));
                queue = lock(&self.queue);
                continue;
            }
            queue = match jobs.next_look(self.patience) {
                Some(timeout) => self.wake.wait_timeout(queue, timeout).unwrap_or_else(PoisonError::into_inner).0,
                None => self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// What the thread has in hand.
#[derive(Default)]
struct Jobs {
    /// Each has a slot.
    seated: Vec<Seat>,
    waiting: VecDeque<Box<dyn Job>>,
    /// The time that the job had used whose turn it was last.
    clock: Duration,
}

struct Seat {
    job: Box<dyn Job>,
    /// The time that it had, and what others had while it did not want any: nobody saves up turns.
    used: Duration,
}

impl Jobs {
    /// Takes out the job whose turn it is. One that was cancelled comes first, and needs no slot to end.
    fn next(&mut self, slots: usize) -> Option<Seat> {
        let used = self.clock;
        if let Some(over) = self.waiting.iter().position(|job| job.cancel().is_set()) {
            return self.waiting.remove(over).map(|job| Seat { job, used });
        }
        if let Some(over) = self.seated.iter().position(|seat| seat.job.cancel().is_set()) {
            return Some(self.seated.remove(over));
        }
        while self.seated.len() < slots
            && let Some(job) = self.waiting.pop_front()
        {
            self.seated.push(Seat { job, used });
        }
        let ready = self.seated.iter().enumerate().filter(|(_, seat)| seat.job.ready());
        let (turn, _) = ready.min_by_key(|(_, seat)| seat.used)?;
        let mut seat = self.seated.remove(turn);
        seat.used = seat.used.max(self.clock);
        self.clock = seat.used;
        Some(seat)
    }

    /// When none is ready: the error of those that wait, if the slots are all held by jobs that nobody reads.
    fn stuck(&self, patience: Duration) -> Option<Error> {
        if self.waiting.is_empty() {
            return None;
        }
        let unread: Option<Vec<Duration>> = self
            .seated
            .iter()
            .map(|seat| Some(seat.job.unread_since()?.elapsed()).filter(|age| *age >= patience))
            .collect();
        let mut seconds: Vec<u64> = unread?.iter().map(Duration::as_secs).collect();
        seconds.sort();
        let ages: Vec<String> = seconds.iter().map(|age| format!("{age} s")).collect();
        let (last, others) = ages.split_last()?;
        let help = "read on, or close what is not needed";
        Some(Error::Busy(match others {
            [] => format!("1 slot is held by a stream that nobody has read for {last}; {help}"),
            _ => {
                let (n, others) = (ages.len(), others.join(", "));
                format!("{n} slots are held by streams that nobody has read for {others} and {last}; {help}")
            }
        }))
    }

    /// When something may have become of the jobs without anybody's doing: a deadline, or a reader that stayed away.
    fn next_look(&self, patience: Duration) -> Option<Duration> {
        let jobs = self.seated.iter().map(|seat| &seat.job).chain(&self.waiting);
        let deadlines = jobs.filter_map(|job| job.cancel().deadline());
        let deadline = deadlines.min().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let reader = (!self.waiting.is_empty()).then_some(patience / 10);
        deadline.into_iter().chain(reader).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    struct Counter {
        name: char,
        left: usize,
        out: Sender<String>,
        panics: bool,
        ready: bool,
        cancel: Cancel,
        unread_since: Option<Instant>,
        pause: Duration,
    }

    impl Job for Counter {
        fn ready(&self) -> bool {
            self.ready || self.cancel.is_set()
        }

        fn step(&mut self) -> bool {
            if self.cancel.is_set() {
                return false;
            }
            assert!(!self.panics, "job {} was asked to panic", self.name);
            thread::sleep(self.pause);
            self.out.send(self.name.to_string()).unwrap();
            self.left -= 1;
            self.left > 0
        }

        fn fail(&mut self, error: Error) {
            self.out.send(error.to_string()).unwrap();
        }

        fn cancel(&self) -> &Cancel {
            &self.cancel
        }

        fn unread_since(&self) -> Option<Instant> {
            self.unread_since
        }
    }

    fn job(name: char, left: usize, out: &Sender<String>) -> Box<Counter> {
        let (cancel, out, pause) = (Cancel::default(), out.clone(), Duration::ZERO);
        Box::new(Counter { name, left, out, panics: false, ready: true, cancel, unread_since: None, pause })
    }

    /// A job without end, and one that waits.
    fn two(out: &Sender<String>) -> [Box<Counter>; 2] {
        let mut waits = job('w', 1, out);
        waits.ready = false;
        [job('x', usize::MAX, out), waits]
    }

    /// Asserts that both are gone: the one perhaps cancelled in the middle of a step, the other told.
    fn end(results: &Receiver<String>) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let rest = results.iter().inspect(|_| assert!(Instant::now() < deadline, "the job goes on"));
        assert!(rest.filter(|text| text == "the model is closed").count() > 0);
    }

    fn take(from: &Receiver<String>, n: usize) -> String {
        from.iter().take(n).collect()
    }

    #[test]
    fn jobs_take_turns_and_a_short_one_overtakes_a_long_one() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        let gate = Arc::new(Mutex::new(()));
        struct Gate(Arc<Mutex<()>>, Cancel);
        impl Job for Gate {
            fn ready(&self) -> bool {
                true
            }
            fn step(&mut self) -> bool {
                drop(lock(&self.0));
                false
            }
            fn fail(&mut self, _: Error) {}
            fn cancel(&self) -> &Cancel {
                &self.1
            }
            fn unread_since(&self) -> Option<Instant> {
                None
            }
        }
        let held = lock(&gate);
        scheduler.submit(Box::new(Gate(gate.clone(), Cancel::default()))).unwrap();
        let pause = Duration::from_millis(20);
        for (name, left) in [('a', 40), ('b', 4)] {
            scheduler.submit(Box::new(Counter { pause, ..*job(name, left, &out) })).unwrap();
        }
        drop(held);
        let turns = take(&results, 44);
        let a_before_b_ended = turns[..turns.rfind('b').unwrap()].matches('a').count();
        assert!((1..20).contains(&a_before_b_ended), "{turns}");
    }

    #[test]
    fn a_job_of_short_steps_gets_more_of_them() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        let pause = Duration::from_millis(200);
        scheduler.submit(Box::new(Counter { pause, ..*job('l', 100, &out) })).unwrap();
        assert_eq!(take(&results, 1), "l");
        let pause = Duration::from_millis(2);
        scheduler.submit(Box::new(Counter { pause, ..*job('s', 50, &out) })).unwrap();
        let mut turns = String::new();
        while turns.matches('s').count() < 50 {
            turns += &take(&results, 1);
        }
        assert!(turns.matches('l').count() < 10, "{turns}");
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
        two(&out).into_iter().for_each(|job| scheduler.submit(job).unwrap());
        assert_eq!(take(&results, 1), "x");
        scheduler.close();
        assert_eq!(scheduler.submit(job('y', 1, &out)), Err(Error::Closed));
        drop(out);
        end(&results);
    }

    #[test]
    fn the_thread_leaves_when_nobody_holds_the_scheduler() {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        two(&out).into_iter().for_each(|job| scheduler.submit(job).unwrap());
        drop((scheduler, out));
        end(&results);
    }

    #[test]
    fn who_has_no_slot_waits_for_one_in_the_order_of_arrival() {
        let (out, results) = channel();
        let scheduler = Scheduler::new(2);
        let mut held = job('h', 1, &out);
        held.ready = false;
        let cancel = held.cancel.clone();
        for job in [held, job('a', 3, &out), job('b', 2, &out), job('c', 1, &out)] {
            scheduler.submit(job).unwrap();
        }
        assert_eq!(take(&results, 6), "aaabbc");
        let mut late = job('l', 1, &out);
        late.ready = false;
        let late_cancel = late.cancel.clone();
        for job in [late, job('d', 1, &out)] {
            scheduler.submit(job).unwrap();
        }
        assert_eq!(results.recv_timeout(Duration::from_millis(100)).ok(), None, "both slots are held");
        cancel.set();
        scheduler.waker().wake();
        assert_eq!(take(&results, 1), "d");
        late_cancel.set();
    }

    #[test]
    fn slots_that_nobody_reads_from_are_an_error_of_those_that_wait() {
        let (out, results) = channel();
        let patience = Duration::from_secs(2);
        let scheduler = Scheduler::with(2, patience);
        let begin = Instant::now();
        for age in [7, 1] {
            let since = begin.checked_sub(Duration::from_secs(age)).unwrap();
            scheduler
                .submit(Box::new(Counter { ready: false, unread_since: Some(since), ..*job('u', 1, &out) }))
                .unwrap();
        }
        scheduler.submit(job('w', 1, &out)).unwrap();
        let said = take(&results, 1);
        assert!(said.starts_with("2 slots are held by streams that nobody has read for "), "{said}");
        assert!(begin.elapsed() > patience / 2, "the second was not unread for long");
    }

    #[test]
    fn a_deadline_ends_a_job_that_nobody_reads() {
        let (out, results) = channel();
        let scheduler = Scheduler::new(1);
        let cancel = Cancel::at(Some(Instant::now() + Duration::from_millis(100)));
        let since = Some(Instant::now());
        scheduler
            .submit(Box::new(Counter { ready: false, cancel, unread_since: since, ..*job('u', 1, &out) }))
            .unwrap();
        scheduler.submit(job('w', 1, &out)).unwrap();
        assert_eq!(take(&results, 1), "w");
    }
}
