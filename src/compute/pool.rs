//! The number of threads, and the pool that a model computes on.
//!
//! Decisions: docs/design/compute.md

use std::cell::Cell;
use std::io;
use std::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::system::fork::ForkGuard;
use crate::system::panic;
use crate::system::sync::lock;

/// No machine has as many cores: a larger number is a typo.
const MAX_THREADS: usize = 1024;

/// The number of threads to use: `n_threads` if given, else `CANDLE_PHI_NUM_THREADS`, else the CPUs that affinity and
/// cgroup quota allow (rounded down, at least 1).
pub fn count(n_threads: Option<usize>) -> Result<usize> {
    const VARIABLE: &str = "CANDLE_PHI_NUM_THREADS";
    let check = |name: &str, n: usize| match n {
        1..=MAX_THREADS => Ok(n),
        _ => Err(Error::Value(format!("{name} must be from 1 to {MAX_THREADS}, not {n}"))),
    };
    if let Some(n) = n_threads {
        return check("n_threads", n);
    }
    match std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) {
        Some(text) => match text.to_str().and_then(|text| text.trim().parse().ok()) {
            Some(n) => check(VARIABLE, n),
            None => Err(Error::Value(format!("{VARIABLE} must be a whole number, not {text:?}"))),
        },
        None => Ok(std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS))),
    }
}

/// Worker threads of one model. The thread that calls `run` is one of them.
///
/// Work comes in bursts: five for each layer of a token, a few microseconds apart. A thread without work spins before it
/// sleeps, since waking it takes longer than most pauses last. While it spins it yields, so that a machine with more
/// threads than cores is not held up.
pub struct Pool {
    shared: Arc<Shared>,
    /// The workers and the calling thread.
    n_threads: usize,
    /// For each thread, the next task of its share.
    shares: Vec<Share>,
    /// One `run` at a time.
    turn: Mutex<()>,
    fork_guard: ForkGuard,
}

/// How long a thread spins before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

thread_local! {
    /// The pool whose task this thread is running, or null: to report a nested `run`.
    static RUNNING: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// Has a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
}

struct Shared {
    state: Mutex<State>,
    /// Signals a new job or the pool's end.
    start: Condvar,
    /// Signals that no worker is on the job any more.
    done: Condvar,
    /// A copy of `State::number` to read without the lock.
    number: AtomicU64,
    /// A copy of `State::working` to read without the lock.
    working: AtomicUsize,
}

struct State {
    job: Option<JobRef>,
    /// Counts jobs, so that a worker joins each at most once. The pool's end counts as one, too.
    number: u64,
    /// Workers that are on the job.
    working: usize,
    /// Workers that sleep.
    asleep: usize,
    stop: bool,
}

/// The closure of a `run`, valid until that returns.
#[derive(Copy, Clone)]
struct JobRef {
    work: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `work` points to a Sync closure that `run` keeps alive until no worker uses it.
unsafe impl Send for JobRef {}

impl Pool {
    /// Starts `n_threads - 1` workers. If the system refuses a thread, the pool has only those before it.
    pub fn new(n_threads: usize) -> Self {
        Pool::with(n_threads, |number, worker| {
            std::thread::Builder::new().name(format!("candle-phi-{number}")).spawn(worker).map(drop)
        })
    }

    fn with(n_threads: usize, mut spawn: impl FnMut(usize, Box<dyn FnOnce() + Send>) -> io::Result<()>) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { job: None, number: 0, working: 0, asleep: 0, stop: false }),
            start: Condvar::new(),
            done: Condvar::new(),
            number: AtomicU64::new(0),
            working: AtomicUsize::new(0),
        });
        let mut worker = |number| {
            let shared = shared.clone();
            spawn(number, Box::new(move || shared.work(number)))
        };
        let refused = (1..n_threads).find(|&number| worker(number).is_err());
        let n_threads = refused.unwrap_or(n_threads);
        let shares = (0..n_threads).map(|_| Share::default()).collect();
        Pool { shared, n_threads, shares, turn: Mutex::new(()), fork_guard: ForkGuard::here() }
    }

    /// The threads that run: fewer than asked for if the system refused one.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Calls `task(i)` once for each i in 0..tasks, on all threads. Returns when all are done. A panic in a task goes on
    /// here. Two threads that call it take turns. A task must not call it on its own pool: that would deadlock.
    ///
    /// Each thread takes the tasks of its share in order, so that it reads neighbours in memory in one go, and then helps
    /// with the other shares.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.n_threads == 1 {
            return (0..tasks).for_each(task);
        }
        debug_assert!(RUNNING.get() != Arc::as_ptr(&self.shared), "a task calls `run` of its own pool");
        let _turn = lock(&self.turn);
        let first = |share: usize| tasks * share / self.n_threads;
        for (i, share) in self.shares.iter().enumerate() {
            share.next.store(first(i), Relaxed);
        }
        let failure = Mutex::new(None);
        let work = |thread: usize| {
            let outer = RUNNING.replace(Arc::as_ptr(&self.shared));
            let result = panic::catch(|| {
                for share in (thread..self.n_threads).chain(0..thread) {
                    let (next, end) = (&self.shares[share].next, first(share + 1));
                    while let Some(i) = Some(next.fetch_add(1, Relaxed)).filter(|&i| i < end) {
                        task(i);
                    }
                }
                Ok(())
            });
            RUNNING.set(outer);
            if let Err(error) = result {
                self.shares.iter().for_each(|share| share.next.store(tasks, Relaxed));
                *lock(&failure) = Some(error);
            }
        };
        self.shared.publish(&work);
        work(0);
        self.shared.retire();
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            panic::resume(error);
        }
    }
}

impl Shared {
    /// Hands `work` to the workers.
    fn publish(&self, work: &(dyn Fn(usize) + Sync)) {
        // SAFETY: this erases the lifetime alone. `retire` takes the job back before `run`, which owns it, returns.
        let work: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        let mut state = lock(&self.state);
        state.job = Some(JobRef { work });
        self.announce(&mut state);
    }

    /// Makes every worker read the state again.
    fn announce(&self, state: &mut State) {
        state.number += 1;
        self.number.store(state.number, Release);
        if state.asleep > 0 {
            self.start.notify_all();
        }
    }

    /// Takes the job back and waits for the workers that are on it.
    fn retire(&self) {
        lock(&self.state).job = None; // no worker joins from here on
        spin_until(|| self.working.load(Acquire) == 0);
        let mut state = lock(&self.state);
        while state.working > 0 {
            state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The main function of worker `thread`, from 1 on.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            spin_until(|| self.number.load(Acquire) != seen);
            let mut state = lock(&self.state);
            while state.number == seen {
                state.asleep += 1;
                state = self.start.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.asleep -= 1;
            }
            seen = state.number;
            if state.stop {
                return;
            }
            let Some(job) = state.job else { continue };
            state.working += 1;
            self.working.store(state.working, Release);
            drop(state);
            // SAFETY: `working` was raised under the lock while the job was there, so `retire` waits for this worker.
            unsafe { (*job.work)(thread) };
            let mut state = lock(&self.state);
            state.working -= 1;
            self.working.store(state.working, Release);
            if state.working == 0 {
                self.done.notify_all();
            }
        }
    }
}

/// Spins until `condition` holds, for at most `SPIN`.
fn spin_until(condition: impl Fn() -> bool) {
    const SPINS_BEFORE_YIELD: u32 = 64;
    let mut spins = 0;
    let mut since = None;
    while !condition() {
        spins += 1;
        if spins < SPINS_BEFORE_YIELD {
            std::hint::spin_loop();
        } else if since.get_or_insert_with(Instant::now).elapsed() < SPIN {
            std::thread::yield_now();
        } else {
            return;
        }
    }
}

impl Drop for Pool {
    /// Tells the workers to end, and does not wait for that.
    fn drop(&mut self) {
        if self.fork_guard.is_forked() {
            return;
        }
        let mut state = lock(&self.shared.state);
        state.stop = true;
        self.shared.announce(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for n_threads in [1, 2, 3, 8] {
            let pool = Pool::new(n_threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Relaxed) == 1), "{n_threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn a_pool_that_is_refused_threads_runs_on_those_it_has() {
        for allowed in 0..4 {
            let pool = Pool::with(4, |number, worker| match number <= allowed {
                true => std::thread::Builder::new().spawn(worker).map(drop),
                false => Err(io::Error::from(io::ErrorKind::WouldBlock)),
            });
            assert_eq!(pool.n_threads(), (allowed + 1).min(4));
            let sum = AtomicUsize::new(0);
            pool.run(100, |i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let error = panic::catch(|| {
            pool.run(100, |i| assert!(i != 50, "task 50"));
            Ok(())
        });
        assert_eq!(error, Err(Error::Internal("task 50".into())));
        let sum = AtomicUsize::new(0);
        pool.run(10, |i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    #[cfg(debug_assertions)]
    fn a_run_inside_a_task_of_the_same_pool_is_reported_and_of_another_allowed() {
        let (pool, other) = (Pool::new(2), Pool::new(2));
        let error = panic::catch(|| {
            pool.run(2, |_| pool.run(2, |_| ()));
            Ok(())
        });
        assert!(matches!(&error, Err(Error::Internal(text)) if text.contains("its own pool")), "{error:?}");
        let runs = AtomicUsize::new(0);
        pool.run(2, |_| {
            other.run(2, |_| {
                runs.fetch_add(1, Relaxed);
            })
        });
        assert_eq!(runs.into_inner(), 4);
    }

    #[test]
    fn a_thread_count_out_of_range_names_the_number() {
        assert_eq!(count(Some(3)), Ok(3));
        let error = count(Some(0)).unwrap_err().to_string();
        assert!(error.contains("n_threads") && error.contains('0'), "{error}");
    }
}
