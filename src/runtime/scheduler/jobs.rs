//! The jobs of the compute thread, and the choice of the one that runs next.
//!
//! Decisions: docs/design/runtime.md

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Job;
use crate::error::Error;
use crate::system::panic;

/// The jobs that the thread has taken from the queue.
#[derive(Default)]
pub(super) struct Jobs {
    /// The job of the current step.
    pub(super) current: Option<Active>,
    /// The other jobs with a slot.
    active: Vec<Active>,
    /// Jobs without a slot.
    pub(super) waiting: VecDeque<Box<dyn Job>>,
    /// The virtual runtime of the job that was chosen last.
    clock: Duration,
}

/// A job with a slot.
pub(super) struct Active {
    pub(super) job: Box<dyn Job>,
    /// Virtual runtime, as in Linux's fair scheduler: the time of its steps, raised to `Jobs::clock` when it becomes
    /// ready, so that idle time earns no credit.
    runtime: Duration,
}

impl Jobs {
    /// Makes the job that runs next the current one; false if none is ready. A cancelled job comes first, and needs no
    /// slot to end.
    pub(super) fn choose(&mut self, slots: usize) -> bool {
        self.current = self.take_cancelled().or_else(|| self.take_ready(slots));
        self.current.is_some()
    }

    fn take_cancelled(&mut self) -> Option<Active> {
        if let Some(i) = self.waiting.iter().position(|job| job.cancel().is_set()) {
            return self.waiting.remove(i).map(|job| Active { job, runtime: self.clock });
        }
        let i = self.active.iter().position(|active| active.job.cancel().is_set())?;
        Some(self.active.remove(i))
    }

    fn take_ready(&mut self, slots: usize) -> Option<Active> {
        while self.active.len() < slots
            && let Some(job) = self.waiting.pop_front()
        {
            self.active.push(Active { job, runtime: self.clock });
        }
        let ready = self.active.iter().enumerate().filter(|(_, active)| active.job.ready());
        let (i, _) = ready.min_by_key(|(_, active)| active.runtime)?;
        let mut active = self.active.remove(i);
        active.runtime = active.runtime.max(self.clock);
        self.clock = active.runtime;
        Some(active)
    }

    /// The current job has taken a step of this length and goes on.
    pub(super) fn put_back(&mut self, step: Duration) {
        if let Some(mut active) = self.current.take() {
            active.runtime += step;
            self.active.push(active);
        }
    }

    /// Fails and drops every job. A panic of one does not reach the others.
    pub(super) fn fail(mut self, error: &Error) {
        let active = self.current.take().into_iter().chain(self.active).map(|active| active.job);
        for mut job in active.chain(self.waiting) {
            let _ = panic::catch(|| {
                job.fail(error.clone());
                Ok(())
            });
            let _ = panic::catch(|| {
                drop(job);
                Ok(())
            });
        }
    }

    /// If no job is ready: the error of the waiting jobs when all slots are held by jobs that are unread for
    /// `unread_limit`.
    pub(super) fn busy(&self, unread_limit: Duration, now: Instant) -> Option<Error> {
        if self.waiting.is_empty() {
            return None;
        }
        let age = |active: &Active| Some(now.saturating_duration_since(active.job.unread_since()?));
        let ages = self.active.iter().map(|active| age(active).filter(|age| *age >= unread_limit));
        let mut seconds: Vec<u64> = ages.map(|age| Some(age?.as_secs())).collect::<Option<_>>()?;
        seconds.sort_unstable();
        let ages: Vec<String> = seconds.iter().map(|age| format!("{age} s")).collect();
        let (last, others) = ages.split_last()?;
        Some(Error::Busy(match others {
            [] => format!("1 slot is held by a stream unread for {last}; read it or close it"),
            _ => {
                let (n, others) = (ages.len(), others.join(", "));
                format!("{n} slots are held by streams unread for {others} and {last}; read or close them")
            }
        }))
    }

    /// The time until a job may change without a wake-up: at its deadline, or when it is unread for too long.
    pub(super) fn timeout(&self, unread_limit: Duration, now: Instant) -> Option<Duration> {
        let jobs = self.active.iter().map(|active| &active.job).chain(&self.waiting);
        let deadlines = jobs.filter_map(|job| job.cancel().deadline());
        let deadline = deadlines.min().map(|deadline| deadline.saturating_duration_since(now));
        let unread = (!self.waiting.is_empty()).then_some(unread_limit / 10);
        deadline.into_iter().chain(unread).min()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::super::UNREAD_LIMIT;
    use super::super::tests::{Counter, idle, job};
    use super::*;
    use crate::system::sync::Cancel;

    /// Jobs on a clock of their own, without a thread.
    struct Simulation {
        jobs: Jobs,
        slots: usize,
        results: Receiver<String>,
        out: Sender<String>,
    }

    impl Simulation {
        fn new(slots: usize) -> Self {
            let (out, results) = channel();
            Simulation { jobs: Jobs::default(), slots, results, out }
        }

        fn submit(&mut self, job: Box<Counter>) {
            self.jobs.waiting.push_back(job);
        }

        /// The names of the jobs that take the next steps, each of which takes `length` ms.
        fn run(&mut self, steps: usize, length: impl Fn(char) -> u64) -> String {
            let mut turns = String::new();
            while turns.len() < steps && self.jobs.choose(self.slots) {
                let goes_on = self.jobs.current.as_mut().unwrap().job.step();
                turns.extend(self.results.try_recv());
                match goes_on {
                    true => self.jobs.put_back(Duration::from_millis(length(turns.chars().next_back().unwrap()))),
                    false => self.jobs.current = None,
                }
            }
            turns
        }
    }

    #[test]
    fn jobs_take_turns_and_a_short_one_overtakes_a_long_one() {
        let mut simulation = Simulation::new(usize::MAX);
        for (name, left) in [('a', 10), ('b', 4)] {
            simulation.submit(job(name, left, &simulation.out));
        }
        assert_eq!(simulation.run(99, |_| 20), "ababababaaaaaa");
    }

    #[test]
    fn a_job_of_short_steps_gets_more_of_them() {
        let mut simulation = Simulation::new(usize::MAX);
        for name in ['l', 's'] {
            simulation.submit(job(name, 300, &simulation.out));
        }
        let turns = simulation.run(202, |name| if name == 'l' { 200 } else { 2 });
        assert_eq!(turns, format!("l{}l{}", "s".repeat(100), "s".repeat(100)));
    }

    #[test]
    fn idle_time_earns_no_credit() {
        let mut simulation = Simulation::new(usize::MAX);
        let mut late = idle('i', &simulation.out);
        late.left = 100;
        let ready = late.ready.clone();
        simulation.submit(job('b', 100, &simulation.out));
        simulation.submit(late);
        assert_eq!(simulation.run(50, |_| 10), "b".repeat(50));
        ready.store(true, SeqCst);
        let turns = simulation.run(20, |_| 10);
        assert_eq!((turns.matches('i').count(), turns.contains("iii")), (10, false), "{turns}");
    }

    #[test]
    fn jobs_without_a_slot_wait_for_one_in_the_order_of_arrival() {
        let mut simulation = Simulation::new(2);
        let (held, late) = (idle('h', &simulation.out), idle('l', &simulation.out));
        let (cancel, ready) = (held.cancel.clone(), late.ready.clone());
        simulation.submit(held);
        for (name, left) in [('a', 3), ('b', 2), ('c', 1)] {
            simulation.submit(job(name, left, &simulation.out));
        }
        assert_eq!(simulation.run(99, |_| 1), "aaabbc");
        simulation.submit(late);
        simulation.submit(job('d', 1, &simulation.out));
        assert_eq!(simulation.run(99, |_| 1), "", "both slots are held");
        cancel.set();
        assert_eq!(simulation.run(99, |_| 1), "d");
        ready.store(true, SeqCst);
        assert_eq!(simulation.run(99, |_| 1), "l");
    }

    #[test]
    fn the_busy_error_names_the_slots_and_their_ages() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut simulation = Simulation::new(2);
        for read_at in [0, 6] {
            let mut unread = idle('u', &simulation.out);
            unread.unread_since = Some(at(read_at));
            simulation.submit(unread);
        }
        let busy = |simulation: &Simulation, seconds| simulation.jobs.busy(UNREAD_LIMIT, at(seconds));
        assert_eq!(simulation.run(99, |_| 1), "");
        assert_eq!(busy(&simulation, 99), None, "no job waits");
        assert_eq!(simulation.jobs.timeout(UNREAD_LIMIT, at(99)), None);
        simulation.submit(job('w', 1, &simulation.out));
        assert_eq!(busy(&simulation, 15), None, "the second was read 9 s ago");
        assert!(simulation.jobs.timeout(UNREAD_LIMIT, at(15)) <= Some(Duration::from_secs(1)));
        let text = "2 slots are held by streams unread for 11 s and 17 s; read or close them";
        assert_eq!(busy(&simulation, 17), Some(Error::Busy(text.into())));
        simulation.jobs.active.pop();
        let text = "1 slot is held by a stream unread for 17 s; read it or close it";
        assert_eq!(busy(&simulation, 17), Some(Error::Busy(text.into())));
        let mut read = idle('r', &simulation.out);
        read.unread_since = None;
        simulation.jobs.active.push(Active { job: read, runtime: Duration::ZERO });
        assert_eq!(busy(&simulation, 99), None, "a reader waits for the second");
    }

    #[test]
    fn the_thread_wakes_at_the_first_deadline() {
        let start = Instant::now();
        let mut simulation = Simulation::new(1);
        for seconds in [70, 7] {
            let mut late = idle('d', &simulation.out);
            late.cancel = Cancel::at(Some(start + Duration::from_secs(seconds)));
            simulation.submit(late);
        }
        assert_eq!(simulation.jobs.timeout(Duration::from_secs(600), start), Some(Duration::from_secs(7)));
        assert_eq!(simulation.jobs.timeout(Duration::from_secs(20), start), Some(Duration::from_secs(2)));
    }
}
