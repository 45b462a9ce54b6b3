//! The reader's side of a generation: text as it arrives, its end, and a way to cancel it from any thread.
//!
//! Decisions: docs/design/runtime.md

use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::compute::kernels::PAGE;
use crate::error::{Error, Result};
use crate::kv::phases::Phases;
use crate::model::{Model, Sequence};
use crate::runtime::draft::survival::Survival;
use crate::runtime::generation::Generation;
use crate::runtime::outbox::{Hook, Outbox, Timings};
use crate::runtime::prefixes::Prefixes;
use crate::runtime::prompt::Prompt;
use crate::runtime::scheduler::{Job, Scheduler};
use crate::runtime::work::{FinishReason, Status, Step, Work};
use crate::system::sync::{Cancel, drop_in_background, lock};
use crate::system::task::{Phase, Progress};

/// The longest wait in one piece. A progress callback is promised at most 20 calls a second, with those for new phases.
const POLL_INTERVAL: Duration = Duration::from_millis(75);

/// The items that a `Work` delivers. Any thread may read or cancel the stream. Dropping it cancels it.
pub struct Stream<W: Work> {
    outbox: Arc<Outbox<W::Item>>,
    scheduler: Scheduler,
    /// The work until the first read, which submits it.
    unstarted: Mutex<Option<W>>,
    /// Phase and time of the last progress report.
    reported: Mutex<Option<(Phase, Instant)>>,
}

pub type TextStream = Stream<Generation>;

impl<W: Work> Stream<W> {
    /// Nothing is computed before the first read. The stream ends at the deadline.
    pub fn new(work: W, scheduler: Scheduler, deadline: Option<Instant>) -> Self {
        Stream {
            outbox: Arc::new(Outbox::new(Cancel::at(deadline))),
            scheduler,
            unstarted: Mutex::new(Some(work)),
            reported: Mutex::default(),
        }
    }

    /// Lets everything be computed without a read, before the first one. `poll` then has nothing before the end.
    pub fn read_whole(&self) {
        self.outbox.read_whole();
    }

    /// The next item, None at the end, or pending. Never waits: `on_change` and `time_left` tell when to poll again.
    pub fn poll(&self) -> Result<Poll<Option<W::Item>>> {
        self.scheduler.fork_guard().check()?;
        self.start()?;
        let taken = match self.outbox.take(W::ids) {
            Poll::Pending if self.scheduler.is_closed() => {
                self.outbox.end(FinishReason::Error, Some(Error::Closed));
                self.outbox.take(W::ids)
            }
            taken => taken,
        };
        if taken.is_ready() {
            self.scheduler.waker().wake(); // the outbox has room again, or the deadline has passed
        }
        Ok(match taken {
            Poll::Ready(item) => Poll::Ready(item?),
            Poll::Pending => Poll::Pending,
        })
    }

    /// Waits until `poll` has something, for at most 75 ms: the reader has signals and callbacks to handle.
    pub fn wait(&self) -> Result<()> {
        self.scheduler.fork_guard().check()?;
        self.outbox.wait(self.time_left().map_or(POLL_INTERVAL, |left| left.min(POLL_INTERVAL)));
        Ok(())
    }

    /// Waits for the next item; None at the end.
    pub fn next(&self) -> Result<Option<W::Item>> {
        loop {
            match self.poll()? {
                Poll::Ready(item) => return Ok(item),
                Poll::Pending => self.wait()?,
            }
        }
    }

    /// Calls `hook` once when `poll` has something, on any thread, perhaps at once. It must be short and must not use this
    /// stream.
    pub fn on_change(&self, hook: Hook) {
        self.outbox.on_change(hook);
    }

    /// The time until the deadline.
    pub fn time_left(&self) -> Option<Duration> {
        self.outbox.cancel.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// The progress since the last report, as `Outbox::progress` has it. Empty within 75 ms of the last report, unless a phase
    /// has begun since or `end` is set.
    pub fn progress(&self, end: bool) -> Result<Vec<Progress>> {
        self.scheduler.fork_guard().check()?;
        let mut reported = lock(&self.reported);
        let progress = self.outbox.progress(reported.map(|(phase, _)| phase));
        let Some(last) = progress.last() else { return Ok(progress) };
        if !end && reported.is_some_and(|(phase, at)| phase == last.phase && at.elapsed() < POLL_INTERVAL) {
            return Ok(Vec::new());
        }
        *reported = Some((last.phase, Instant::now()));
        Ok(progress)
    }

    fn start(&self) -> Result<()> {
        // The lock is free again from here on: dropping work may unmap the model.
        let Some(work) = lock(&self.unstarted).take() else { return Ok(()) };
        if self.outbox.cancel.is_set() {
            return Ok(());
        }
        let (status, outbox) = (work.status(), self.outbox.clone());
        let (prefixes, submitted) = (self.scheduler.prefixes().clone(), Instant::now());
        let job = StreamJob { work, outbox, prefixes, held: 0, submitted, status };
        let result = self.scheduler.submit(Box::new(job));
        if result.is_err() {
            self.outbox.abandon(FinishReason::Error);
        }
        result
    }

    /// Ends the stream, from any thread. Returns at once. Unread items are dropped. Does nothing after the end was read.
    pub fn cancel(&self) {
        drop(self.abandon());
    }

    /// Cancels the stream. Returns work that was never submitted.
    fn abandon(&self) -> Option<W> {
        if self.scheduler.fork_guard().is_forked() || !self.outbox.abandon(FinishReason::Cancelled) {
            return None;
        }
        self.outbox.cancel.set();
        let unstarted = lock(&self.unstarted).take();
        self.scheduler.waker().wake();
        unstarted
    }

    /// None until the end was read.
    pub fn finish_reason(&self) -> Result<Option<FinishReason>> {
        self.scheduler.fork_guard().check()?;
        Ok(self.outbox.finish_reason())
    }

    /// The token ids of the items that were read.
    pub fn ids(&self) -> Result<Vec<u32>> {
        self.scheduler.fork_guard().check()?;
        Ok(self.outbox.ids())
    }

    /// The phases of the ids whose keys and values are computed, at the end of the work.
    pub fn phases(&self) -> Result<Option<Phases>> {
        self.scheduler.fork_guard().check()?;
        Ok(self.outbox.phases())
    }

    pub fn timings(&self) -> Result<Timings> {
        self.scheduler.fork_guard().check()?;
        Ok(self.outbox.timings())
    }
}

impl<W: Work> Drop for Stream<W> {
    /// Work holds the model, perhaps as the last one, and Python drops its objects with the interpreter's lock held.
    fn drop(&mut self) {
        if let Some(unstarted) = self.abandon() {
            drop_in_background(unstarted);
        }
    }
}

/// A `Work` and its outbox as a job of the scheduler.
struct StreamJob<W: Work> {
    work: W,
    outbox: Arc<Outbox<W::Item>>,
    prefixes: Arc<Prefixes>,
    /// Columns that `prefixes` has.
    held: usize,
    /// The first read.
    submitted: Instant,
    status: Status,
}

impl<W: Work> StreamJob<W> {
    /// The prompt takes the time up to the first id.
    fn record(&mut self, computed: usize, time: Duration) {
        if self.status.generated == 0 {
            self.status.prefilled = computed.min(self.status.prompt);
            self.status.prefill_time += time;
        } else {
            self.status.decode_time += time;
        }
    }

    /// Holds the full columns of a sequence.
    fn keep(&mut self, sequence: &Sequence) {
        let full = sequence.kv.len() / PAGE;
        if full != self.held {
            self.prefixes.keep(sequence, &self.work.prompt().holder, self.held);
            self.held = full;
        }
    }
}

impl<W: Work> Job for StreamJob<W> {
    fn ready(&self) -> bool {
        self.outbox.cancel.is_set() || self.outbox.wants_more()
    }

    fn model(&self) -> &Arc<dyn Model> {
        self.work.model()
    }

    fn prompt(&self) -> &Prompt {
        self.work.prompt()
    }

    fn shared_prompt(&self) -> Option<usize> {
        self.work.shares_prompt().then_some(self.status.prompt)
    }

    fn begin(&mut self) -> Result<Sequence> {
        let queue = self.submitted.elapsed();
        let mut sequence = self.work.begin()?;
        self.status.cached = self.prefixes.resume(&mut sequence)?;
        self.status.prefilled = self.status.cached;
        self.held = self.status.cached / PAGE;
        self.outbox.begin(queue, self.status);
        Ok(sequence)
    }

    fn turn(&mut self, sequence: &Sequence, computed: usize, time: Duration) {
        self.keep(sequence);
        self.record(computed, time);
        self.outbox.deliver(Step::More(None), self.status, self.submitted.elapsed());
    }

    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32], time: Duration) -> Result<bool> {
        let (computed, mut start) = (sequence.kv.len(), Instant::now());
        let mut step = self.work.accept(sequence, logits)?;
        self.record(computed, time + start.elapsed());
        self.status.decode_passes += usize::from(self.status.generated > 0);
        loop {
            let (again, ends) = (matches!(step, Step::Again(_)), matches!(step, Step::End(..)));
            self.status.generated = self.work.generated();
            (self.status.drafted, self.status.accepted) = self.work.drafted();
            if ends {
                self.leave(sequence); // before the reader sees the end, and may go on from it
            }
            if !self.outbox.deliver(step, self.status, self.submitted.elapsed()) {
                return Ok(false);
            }
            if !again {
                break;
            }
            start = Instant::now();
            step = self.work.accept(sequence, logits)?;
            self.record(computed, start.elapsed());
        }
        if sequence.kv.is_empty() {
            self.held = self.prefixes.resume(sequence)? / PAGE; // it took other rope factors
        } else {
            self.keep(sequence);
        }
        Ok(true)
    }

    fn draft(&mut self, sequence: &Sequence, most: usize, survival: &mut Survival) -> Vec<f32> {
        self.work.draft(sequence, most, survival)
    }

    fn extend(&mut self, sequence: &mut Sequence, n: usize) -> Result<()> {
        self.work.extend(sequence, n)
    }

    fn leave(&self, sequence: &mut Sequence) {
        let mut phases = sequence.phases.clone();
        phases.truncate(sequence.kv.len());
        self.outbox.leave(phases);
        self.prefixes.take(sequence, &self.work.prompt().holder, self.held);
    }

    fn fail(&mut self, error: Error) {
        self.outbox.fail(error);
    }

    fn cancel(&self) -> &Cancel {
        &self.outbox.cancel
    }

    fn unread_since(&self) -> Option<Instant> {
        self.outbox.unread_since()
    }
}
