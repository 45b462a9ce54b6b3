//! The jobs of the compute thread, and the choice of the next turn.
//!
//! Decoding jobs share passes, and so do short prompts that begin together. While there are prompts and decoding jobs, time
//! is shared one to one between their turns, and a decoding job waits for one turn of a prompt at a time, or for as many
//! as take no longer than a pass. Among prompts, those that have had the least time come first, and an eighth of the time
//! goes to the oldest ones. A prompt that begins as one under way does waits until that one has computed what they share.
//!
//! Decisions: docs/design/runtime.md

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Job;
use super::active::{Active, Prompts, State};
use crate::compute::kernels::PAGE;
use crate::error::Error;
use crate::model::{Batch, Buffers, Member};
use crate::runtime::prefixes::Prefixes;
use crate::system::panic;

/// The oldest prompt gets this part of the time of prompts, however many short ones arrive.
const PART_OF_OLDEST: u32 = 8;

/// The jobs that the thread has taken from the queue.
#[derive(Default)]
pub(super) struct Jobs {
    /// The jobs of the current turn.
    pub(super) current: Vec<Active>,
    /// The other jobs with a slot, oldest first.
    pub(super) active: Vec<Active>,
    /// Jobs that got a slot so far.
    admitted: u64,
    /// Jobs without a slot.
    pub(super) waiting: VecDeque<Box<dyn Job>>,
    /// Prompts between two of their turns.
    prompts: Vec<Prompts>,
    /// The memory that the layers of prompts compute in, one after the other. Without prompts it is freed.
    buffers: Buffers,
    oldest: Oldest,
    /// The virtual runtime of the decoding job that was chosen last.
    clock: Duration,
    shares: Shares,
}

/// What the current jobs do in the next turn.
pub(super) enum Turn {
    /// The job is cancelled. It ends.
    End,
    /// A layer of their prompts.
    Prompt(Box<Prompts>),
    /// A decode pass.
    Decode,
}

/// The shares of prompts and decode passes, while both have jobs that are ready.
#[derive(Default)]
struct Shares {
    /// The time that prompts have had more than passes, and passes more than prompts: one of them is zero.
    prompts_ahead: Duration,
    passes_ahead: Duration,
    /// The time of prompts since the last pass, and of the last of their turns.
    since_pass: Duration,
    last_turn: Duration,
    last_pass: Duration,
}

/// The time of the oldest prompt among the others.
#[derive(Default)]
struct Oldest {
    /// Whether the current turn is its own.
    now: bool,
    last_turn: Duration,
    /// The time of the others that it has not had its part of.
    others: Duration,
}

impl Oldest {
    fn is_next(&self) -> bool {
        self.others >= self.last_turn * (PART_OF_OLDEST - 1)
    }

    fn add(&mut self, turn: Duration) {
        if self.now {
            self.last_turn = turn;
            self.others = self.others.saturating_sub(turn * (PART_OF_OLDEST - 1));
        } else {
            self.others += turn;
        }
    }
}

impl Shares {
    /// Whether a prompt comes next.
    fn prompt_is_next(&self) -> bool {
        let fits = self.since_pass.is_zero() || self.since_pass + self.last_turn <= self.last_pass;
        self.prompts_ahead.is_zero() && fits
    }

    fn add_prompt(&mut self, turn: Duration) {
        self.since_pass += turn;
        self.last_turn = turn;
        self.prompts_ahead += turn.saturating_sub(self.passes_ahead);
        self.passes_ahead = self.passes_ahead.saturating_sub(turn);
    }

    /// Passes are ahead by one pass at most: the time that turns between passes leave unused earns no credit.
    fn add_pass(&mut self, pass: Duration) {
        self.since_pass = Duration::ZERO;
        self.last_pass = pass;
        self.passes_ahead = (self.passes_ahead + pass.saturating_sub(self.prompts_ahead)).min(pass);
        self.prompts_ahead = self.prompts_ahead.saturating_sub(pass);
    }

    /// Time without a competitor earns no credit.
    fn forget(&mut self) {
        *self = Shares { last_pass: self.last_pass, last_turn: self.last_turn, ..Shares::default() };
    }
}

impl Jobs {
    /// Makes the jobs of the next turn the current ones; None if none is ready. A cancelled job comes first, and needs no
    /// slot to end.
    pub(super) fn choose(&mut self, slots: usize, max_batch: usize, prefixes: &Prefixes) -> Option<Turn> {
        if let Some(cancelled) = self.take_cancelled() {
            self.current.push(cancelled);
            return Some(Turn::End);
        }
        while self.active.len() < slots
            && let Some(job) = self.waiting.pop_front()
        {
            self.active.push(Active::new(job, self.admitted));
            self.admitted += 1;
        }
        let ready: Vec<usize> = (0..self.active.len()).filter(|&i| self.active[i].job.ready()).collect();
        let (decoders, mut prompts): (Vec<_>, Vec<_>) =
            ready.into_iter().partition(|&i| matches!(self.active[i].state, State::Decode(_)));
        if prefixes.is_on() {
            prompts.retain(|&i| !self.waits_for_prefix(i));
        }
        if prompts.is_empty() || decoders.is_empty() {
            self.shares.forget();
        }
        if !prompts.is_empty() && (decoders.is_empty() || self.shares.prompt_is_next()) {
            Some(Turn::Prompt(Box::new(self.take_prompts(&prompts))))
        } else if !decoders.is_empty() {
            self.take_decoders(decoders, max_batch);
            Some(Turn::Decode)
        } else {
            None
        }
    }

    /// Whether a prompt that has not begun will find more of itself held, since a prompt under way begins with the same ids.
    fn waits_for_prefix(&self, i: usize) -> bool {
        let Active { job, state: State::Unstarted, .. } = &self.active[i] else { return false };
        let goes_on = |number: &u64| self.active.iter().any(|other| other.number == *number && other.job.ready());
        let under_way = self.prompts.iter().flat_map(|prompts| prompts.batch.members.iter().zip(&prompts.numbers));
        under_way.filter(|(_, number)| goes_on(number)).any(|(Member { sequence, .. }, _)| {
            let (ids, scope) = (&job.prompt().ids, &job.prompt().scope);
            let same = || ids.iter().zip(&sequence.ids).take_while(|(a, b)| a == b).count();
            *scope == sequence.scope && same() / PAGE > sequence.kv.len() / PAGE
        })
    }

    fn take_cancelled(&mut self) -> Option<Active> {
        if let Some(i) = self.waiting.iter().position(|job| job.cancel().is_set()) {
            return self.waiting.remove(i).map(|job| Active::new(job, self.admitted));
        }
        let i = self.active.iter().position(|active| active.job.cancel().is_set())?;
        let cancelled = self.active.remove(i);
        self.drop_abandoned_prompts();
        Some(cancelled)
    }

    /// Makes the jobs of the next prompts the current ones.
    fn take_prompts(&mut self, ready: &[usize]) -> Prompts {
        let under_way = |i: usize| {
            let number = self.active[i].number;
            self.prompts.iter().position(|prompts| prompts.numbers.contains(&number))
        };
        let time = |i: usize| under_way(i).map_or(Duration::ZERO, |prompts| self.prompts[prompts].time);
        let least = ready.iter().copied().min_by_key(|&i| time(i)).unwrap_or(ready[0]);
        let chosen = if self.oldest.is_next() { ready[0] } else { least };
        let under_way = under_way(chosen);
        self.oldest.now = chosen == ready[0];
        match under_way {
            Some(prompts) => {
                let mut prompts = self.prompts.swap_remove(prompts);
                self.take(|active| prompts.numbers.contains(&active.number));
                prompts.batch.buffers = std::mem::take(&mut self.buffers);
                prompts
            }
            None => {
                let numbers = self.new_prompts(chosen, ready);
                self.take(|active| numbers.contains(&active.number));
                let batch = Batch { buffers: std::mem::take(&mut self.buffers), ..Batch::default() };
                Prompts { batch, ..Prompts::default() }
            }
        }
    }

    /// The jobs that begin their prompts in one pass: the chosen one and, if it is short, other short ones.
    fn new_prompts(&self, chosen: usize, ready: &[usize]) -> Vec<u64> {
        let (first, model) = (&self.active[chosen], self.active[chosen].job.model());
        let mut numbers = vec![first.number];
        let Some(mut tokens) = first.job.shared_prompt() else { return numbers };
        for other in ready.iter().map(|&i| &self.active[i]).filter(|other| other.number != first.number) {
            let begins = matches!(other.state, State::Unstarted) && Arc::ptr_eq(other.job.model(), model);
            let Some(more) = other.job.shared_prompt().filter(|_| begins) else { continue };
            if tokens + more <= model.info().shared_tokens && numbers.len() < model.info().width {
                tokens += more;
                numbers.push(other.number);
            }
        }
        numbers
    }

    /// Makes the jobs that `is_chosen` the current ones, oldest first.
    fn take(&mut self, is_chosen: impl Fn(&Active) -> bool) {
        let (chosen, others) = std::mem::take(&mut self.active).into_iter().partition(is_chosen);
        (self.current, self.active) = (chosen, others);
    }

    /// The ready job with the least runtime, and those of the same model with the least after it.
    fn take_decoders(&mut self, mut ready: Vec<usize>, max_batch: usize) {
        ready.sort_by_key(|&i| self.active[i].runtime);
        let model = self.active[ready[0]].job.model().clone();
        ready.retain(|&i| Arc::ptr_eq(self.active[i].job.model(), &model));
        let info = model.info();
        ready.truncate(width(ready.len().min(max_batch).min(info.width), info.pass_costs));
        self.clock = self.clock.max(self.active[ready[0]].runtime);
        let numbers: Vec<u64> = ready.iter().map(|&i| self.active[i].number).collect();
        self.take(|active| numbers.contains(&active.number));
        self.current.iter_mut().for_each(|active| active.runtime = active.runtime.max(self.clock));
    }

    /// The current jobs have taken a turn of this length with their prompts, of which `prompts` go on.
    pub(super) fn put_back_prompts(&mut self, prompts: Vec<Prompts>, turn: Duration) {
        self.shares.add_prompt(turn);
        self.oldest.add(turn);
        self.put_back(prompts.into_iter().map(|prompts| Prompts { time: prompts.time + turn, ..prompts }));
    }

    /// The current jobs have taken a pass of this length, which is charged to them in equal parts.
    pub(super) fn put_back_decoders(&mut self, prompts: Vec<Prompts>, pass: Duration) {
        self.shares.add_pass(pass);
        let part = pass / self.current.len().max(1) as u32;
        self.current.iter_mut().for_each(|active| active.runtime += part);
        self.put_back(prompts.into_iter());
    }

    /// The current jobs that go on are among the others again, in the order of their arrival. Those that ended stay
    /// current: they are dropped last, so that a drop that panics does not take the others along.
    fn put_back(&mut self, prompts: impl Iterator<Item = Prompts>) {
        let (alive, ended): (Vec<_>, _) = std::mem::take(&mut self.current).into_iter().partition(Active::is_alive);
        self.current = ended;
        for active in alive {
            let place = self.active.partition_point(|other| other.number < active.number);
            self.active.insert(place, active);
        }
        for mut prompts in prompts {
            if !prompts.batch.buffers.0.is_empty() {
                self.buffers = std::mem::take(&mut prompts.batch.buffers);
            }
            self.prompts.push(prompts);
        }
        self.drop_abandoned_prompts();
    }

    /// Prompts whose jobs have all ended.
    fn drop_abandoned_prompts(&mut self) {
        let lives = |number: &u64| self.active.iter().any(|active| active.number == *number);
        self.prompts.retain(|prompts| prompts.numbers.iter().any(lives));
        if self.prompts.is_empty() {
            self.buffers = Buffers::default();
        }
    }

    /// Fails and drops every job. A panic of one does not reach the others.
    pub(super) fn fail(self, error: &Error) {
        let active = self.current.into_iter().chain(self.active).map(|active| active.job);
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

/// The number of rows, of `most`, with the most rows in the time of a pass. `costs`: of passes over 1, 2, ... rows; wider
/// ones cost in proportion to the last. Among equals the widest.
pub(super) fn width(most: usize, costs: &[f32]) -> usize {
    let cost = |rows: usize| match costs.get(rows - 1) {
        Some(cost) => *cost,
        None => costs.last().map_or(1.0, |last| last / costs.len() as f32) * rows as f32,
    };
    let speed = |rows: usize| rows as f32 / cost(rows);
    (1..=most).max_by(|&a, &b| speed(a).total_cmp(&speed(b))).unwrap_or(1)
}
