//! A generation as its reader sees it: text that arrives, an end, and a way to stop it from any thread.
//!
//! Decisions: docs/design/runtime.md

use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::generate::Generation;
use crate::outbox::{Hook, Outbox, Timings};
use crate::schedule::{Job, Scheduler};
use crate::task::{Phase, Progress};
use crate::threads::{Cancel, lock};
use crate::work::{FinishReason, Work};

/// How often a waiting reader looks up. A progress callback is promised 20 calls a second at most, those included that
/// a new phase brings.
const LOOK: Duration = Duration::from_millis(75);

/// A stream of what some work delivers. Any thread may read it or cancel it; dropping it cancels it.
pub struct Stream<W: Work> {
    outbox: Arc<Outbox<W::Item>>,
    scheduler: Scheduler,
    /// Not handed over before the first read.
    unstarted: Mutex<Option<W>>,
    /// The progress that was last reported: its phase, and when.
    reported: Mutex<Option<(Phase, Instant)>>,
}

pub type TextStream = Stream<Generation>;

impl<W: Work> Stream<W> {
    /// Nothing is computed before the first read; at the deadline it ends.
    pub fn new(work: W, scheduler: Scheduler, deadline: Option<Instant>) -> Self {
        Stream {
            outbox: Arc::new(Outbox::new(Cancel::at(deadline))),
            scheduler,
            unstarted: Mutex::new(Some(work)),
            reported: Mutex::default(),
        }
    }

    /// The next item, None at the end, or pending: then `on_change` tells when to ask again, and so does `time_left`.
    /// Never waits.
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
            self.scheduler.waker().wake(); // there is room, or a deadline has passed
        }
        Ok(match taken {
            Poll::Ready(item) => Poll::Ready(item?),
            Poll::Pending => Poll::Pending,
        })
    }

    /// Waits until `poll` has something, but not for longer than 75 ms: who waits has other things to look after.
    pub fn wait(&self) -> Result<()> {
        self.scheduler.fork_guard().check()?;
        self.outbox.wait(self.time_left().map_or(LOOK, |left| left.min(LOOK)));
        Ok(())
    }

    /// The next item; None at the end. Waits for it.
    pub fn next(&self) -> Result<Option<W::Item>> {
        loop {
            match self.poll()? {
                Poll::Ready(item) => return Ok(item),
                Poll::Pending => self.wait()?,
            }
        }
    }

    /// Calls `hook` once, from whatever thread, when `poll` has something: perhaps at once. What it does must be short,
    /// and not come back here.
    pub fn on_change(&self, hook: Hook) {
        self.outbox.on_change(hook);
    }

    /// Until the deadline.
    pub fn time_left(&self) -> Option<Duration> {
        self.outbox.cancel.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// What the reader is to be told now: nothing, when it was told less than 75 ms ago, no phase has begun since, and
    /// this is not the end. A phase that came and went meanwhile is not left out.
    pub fn progress(&self, end: bool) -> Result<Vec<Progress>> {
        self.scheduler.fork_guard().check()?;
        let mut reported = lock(&self.reported);
        let progress = self.outbox.progress(reported.map(|(phase, _)| phase));
        let Some(last) = progress.last() else { return Ok(progress) };
        if !end && reported.is_some_and(|(phase, at)| phase == last.phase && at.elapsed() < LOOK) {
            return Ok(Vec::new());
        }
        *reported = Some((last.phase, Instant::now()));
        Ok(progress)
    }

    fn start(&self) -> Result<()> {
        let mut unstarted = lock(&self.unstarted);
        let Some(work) = unstarted.take() else { return Ok(()) };
        if self.outbox.cancel.is_set() {
            return Ok(());
        }
        let job = StreamJob { work, outbox: self.outbox.clone(), waiting_since: Instant::now(), began: false };
        let submitted = self.scheduler.submit(Box::new(job));
        drop(unstarted);
        if submitted.is_err() {
            self.outbox.abandon(FinishReason::Error);
        }
        submitted
    }

    /// End the stream, from any thread; returns at once. What was not read is dropped. A stream that was read to its end
    /// stays as it is.
    pub fn cancel(&self) {
        if self.scheduler.fork_guard().is_forked() || !self.outbox.abandon(FinishReason::Cancelled) {
            return;
        }
        self.outbox.cancel.set();
        drop(lock(&self.unstarted).take()); // it holds the model
        self.scheduler.waker().wake();
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

    pub fn timings(&self) -> Result<Timings> {
        self.scheduler.fork_guard().check()?;
        Ok(self.outbox.timings())
    }
}

impl<W: Work> Drop for Stream<W> {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Work in the hands of the compute thread.
struct StreamJob<W: Work> {
    work: W,
    outbox: Arc<Outbox<W::Item>>,
    waiting_since: Instant,
    began: bool,
}

impl<W: Work> Job for StreamJob<W> {
    fn ready(&self) -> bool {
        self.outbox.cancel.is_set() || self.outbox.wants_more()
    }

    fn step(&mut self) -> bool {
        let cancel = &self.outbox.cancel;
        if !self.began && !cancel.is_set() {
            self.began = true;
            self.outbox.begin(self.waiting_since.elapsed(), self.work.status());
        }
        let step = if cancel.is_set() { Err(Error::Cancelled) } else { self.work.step(cancel) };
        self.outbox.deliver(step, self.work.status(), self.waiting_since.elapsed())
    }

    fn fail(&mut self, error: Error) {
        self.outbox.end(FinishReason::Error, Some(error));
    }

    fn cancel(&self) -> &Cancel {
        &self.outbox.cancel
    }

    fn unread_since(&self) -> Option<Instant> {
        self.outbox.unread_since()
    }
}
