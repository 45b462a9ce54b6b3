//! How many threads, the pool that a model computes on, and the guard against use after `fork()`.
//!
//! Decisions: docs/design/compute.md

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// More threads than any machine that runs this has cores; catches a typo before it becomes a million threads.
const MAX_THREADS: usize = 1024;

/// The number of threads to use: `n_threads` if given, else `CANDLE_PHI_NUM_THREADS`, else what affinity and cgroup
/// quota leave to this process (rounded down, at least 1).
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

/// A process id, to notice that the process was forked: threads and locks do not survive that.
///
/// A forked child finds locks as they happened to be, perhaps held by threads that it does not have. So whatever takes
/// one asks here first, `drop` included.
#[derive(Copy, Clone, Debug)]
pub struct ForkGuard {
    loaded_in: u32,
}

impl ForkGuard {
    pub fn here() -> Self {
        ForkGuard { loaded_in: std::process::id() }
    }

    pub fn check(&self) -> Result<()> {
        if !self.is_forked() {
            return Ok(());
        }
        Err(Error::Fork(format!(
            "this model was loaded in process {}, before a fork(): load it in the child, or use spawn or forkserver",
            self.loaded_in
        )))
    }

    pub fn is_forked(&self) -> bool {
        std::process::id() != self.loaded_in
    }
}

/// A flag that stops the work that watches it: any thread may set it, and it sets itself at the deadline, if there is
/// one.
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

/// Takes a lock. A poisoned one is as good as new: what it guards is only ever replaced whole.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Worker threads of one model. The thread that calls `run` is one of them.
///
/// Work comes in bursts, five of them for each layer of a token, a few microseconds apart. So whoever waits looks for a
/// moment before it sleeps, since waking takes longer than most pauses last, and yields while it looks, so that a
/// machine with more threads than cores is not held up.
pub struct Pool {
    shared: Arc<Shared>,
    n_threads: usize,
    /// Of each thread, the task of its share that comes next.
    shares: Vec<Share>,
    /// One `run` at a time.
    turn: Mutex<()>,
    fork_guard: ForkGuard,
}

/// How long a thread looks for work, or for the end of it, before it sleeps.
const LOOK: Duration = Duration::from_micros(100);

/// In a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
}

struct Shared {
    state: Mutex<State>,
    /// There is a new job, or the pool is going away.
    start: Condvar,
    /// A worker is done with its share.
    done: Condvar,
    /// `State::number`, to be looked at without the lock.
    number: AtomicU64,
    /// `State::working`, likewise.
    working: AtomicUsize,
}

struct State {
    job: Option<Job>,
    /// Counts jobs, so that a worker takes part in each at most once. It counts the end of the pool, too.
    number: u64,
    /// Workers that have taken the job up and are not done.
    working: usize,
    /// Workers asleep.
    asleep: usize,
    stop: bool,
}

/// A borrowed job: valid until `run` returns.
#[derive(Copy, Clone)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `work` points to a Sync closure that `run` keeps alive until no worker uses it any more.
unsafe impl Send for Job {}

impl Pool {
    /// Starts `n_threads - 1` threads. Fewer, if the system refuses more: the work is then shared by fewer.
    pub fn new(n_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { job: None, number: 0, working: 0, asleep: 0, stop: false }),
            start: Condvar::new(),
            done: Condvar::new(),
            number: AtomicU64::new(0),
            working: AtomicUsize::new(0),
        });
        for i in 1..n_threads {
            let shared = shared.clone();
            let worker = std::thread::Builder::new().name(format!("candle-phi-{i}"));
            if worker.spawn(move || shared.work(i)).is_err() {
                break;
            }
        }
        let shares = (0..n_threads).map(|_| Share::default()).collect();
        Pool { shared, n_threads, shares, turn: Mutex::new(()), fork_guard: ForkGuard::here() }
    }

    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Calls `task(i)` once for each i in 0..tasks, on all threads; returns when all are done. A panic in a task is
    /// raised here.
    ///
    /// Each thread has a share of the tasks, which it takes in order, so that what lies side by side in memory is read in
    /// one run; when it is done it helps the others.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.n_threads == 1 {
            return (0..tasks).for_each(task);
        }
        let _turn = lock(&self.turn);
        let first = |share: usize| tasks * share / self.n_threads;
        for (i, share) in self.shares.iter().enumerate() {
            share.next.store(first(i), Relaxed);
        }
        let panic = Mutex::new(None);
        let work = |thread: usize| {
            let all = || {
                for share in (thread..self.n_threads).chain(0..thread) {
                    let (next, end) = (&self.shares[share].next, first(share + 1));
                    while let Some(i) = Some(next.fetch_add(1, Relaxed)).filter(|&i| i < end) {
                        task(i);
                    }
                }
            };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(all)) {
                self.shares.iter().for_each(|share| share.next.store(tasks, Relaxed));
                *lock(&panic) = Some(payload);
            }
        };
        self.shared.publish(&work);
        work(0);
        self.shared.retire();
        if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    /// Offers `work` to the workers.
    fn publish(&self, work: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is erased; `retire` takes the job back before `run`, which owns it, returns.
        let work: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        let mut state = lock(&self.state);
        state.job = Some(Job { work });
        self.announce(&mut state);
    }

    /// Have every worker look at the state again.
    fn announce(&self, state: &mut State) {
        state.number += 1;
        self.number.store(state.number, Release);
        if state.asleep > 0 {
            self.start.notify_all();
        }
    }

    /// Takes the job back and waits for the workers that are still on it.
    fn retire(&self) {
        lock(&self.state).job = None; // from here on no worker takes it up
        look_until(|| self.working.load(Acquire) == 0);
        let mut state = lock(&self.state);
        while state.working > 0 {
            state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The life of the worker of this number, which starts at 1.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            look_until(|| self.number.load(Acquire) != seen);
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
            // SAFETY: `working` was raised under the lock while the job was there, so `retire` waits for us.
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

/// Looks for a moment whether `it_is_so`.
fn look_until(it_is_so: impl Fn() -> bool) {
    const BEFORE_YIELDING: u32 = 64;
    let mut looks = 0;
    let mut since = None;
    while !it_is_so() {
        looks += 1;
        if looks < BEFORE_YIELDING {
            std::hint::spin_loop();
        } else if since.get_or_insert_with(Instant::now).elapsed() < LOOK {
            std::thread::yield_now();
        } else {
            return;
        }
    }
}

impl Drop for Pool {
    /// The workers leave by themselves; nobody waits for them.
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
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(100, |i| assert!(i != 50, "task 50"))));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, |i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn a_thread_count_out_of_range_names_the_number() {
        assert_eq!(count(Some(3)), Ok(3));
        let error = count(Some(0)).unwrap_err().to_string();
        assert!(error.contains("n_threads") && error.contains('0'), "{error}");
    }
}
