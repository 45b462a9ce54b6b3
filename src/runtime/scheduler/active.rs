//! A job with a slot, and the prompts that are computed.

use std::time::Duration;

use super::Job;
use crate::error::Error;
use crate::model::{Batch, Member, Sequence};
use crate::runtime::prefixes::Prefixes;
use crate::system::panic;

pub(super) struct Active {
    pub job: Box<dyn Job>,
    /// Counts the jobs that got a slot.
    pub number: u64,
    pub state: State,
    /// Virtual runtime among decoding jobs, as in Linux's fair scheduler: its part of the time of its passes, raised to
    /// the clock of the others when it becomes ready, so that idle time earns no credit.
    pub runtime: Duration,
}

/// Where the sequence of a job is between two turns.
#[allow(clippy::large_enum_variant)] // each job has one
pub(super) enum State {
    /// It is not made yet.
    Unstarted,
    /// Its next ids are prefilled: it is in `Prompts`.
    Prompt,
    /// Its next ids are decoded.
    Decode(Sequence),
    /// The job has its end, or an error.
    Ended,
}

/// Prompts whose rows go through the layers together.
#[derive(Default)]
pub(super) struct Prompts {
    pub batch: Batch,
    /// The jobs of the members. One that was cancelled is gone.
    pub numbers: Vec<u64>,
    /// The time of their turns.
    pub time: Duration,
}

impl Active {
    pub fn new(job: Box<dyn Job>, number: u64) -> Self {
        Active { job, number, state: State::Unstarted, runtime: Duration::ZERO }
    }

    pub fn is_alive(&self) -> bool {
        !matches!(self.state, State::Ended)
    }

    pub fn fail(&mut self, error: Error) {
        if let State::Decode(mut sequence) = std::mem::replace(&mut self.state, State::Ended) {
            self.job.leave(&mut sequence);
        }
        self.job.fail(error);
    }

    /// Makes the sequence, as a member of `prompts`.
    pub fn begin(&mut self, prompts: &mut Prompts, prefixes: &Prefixes) {
        match prefixes.give_way_to(|| panic::catch(|| self.job.begin())) {
            Ok(mut sequence) if sequence.phase().is_none() => {
                // Everything is held.
                if let Err(error) = panic::catch(|| self.job.accept(&mut sequence, &[], Duration::ZERO)) {
                    return self.fail(error);
                }
                self.state = State::Ended;
            }
            Ok(sequence) => {
                self.state = State::Prompt;
                prompts.batch.members.push(Member::new(sequence, self.job.cancel().clone()));
                prompts.numbers.push(self.number);
            }
            Err(error) => self.fail(error),
        }
    }

    /// The sequence that decodes, for a pass.
    pub fn take_sequence(&mut self) -> Option<Sequence> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Decode(sequence) => Some(sequence),
            other => {
                self.state = other;
                None
            }
        }
    }
}
