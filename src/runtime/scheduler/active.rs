//! A job with a slot: what it has of its sequence.

use std::mem;
use std::time::Duration;

use super::Job;
use crate::error::{Error, Result};
use crate::model::{Batch, Member, Phase, Sequence};
use crate::system::sync::Cancel;

pub(super) struct Active {
    pub job: Box<dyn Job>,
    /// Counts the jobs that got a slot.
    pub number: u64,
    pub state: State,
    /// Virtual runtime among decoding jobs, as in Linux's fair scheduler: its part of the time of its passes, raised to
    /// the clock of the others when it becomes ready, so that idle time earns no credit.
    pub runtime: Duration,
    /// The time of its prompt's turns.
    pub prompt_time: Duration,
}

/// The sequence of a job between two turns.
pub(super) enum State {
    /// Not made yet.
    Unstarted,
    /// Its next ids are prefilled, alone in a batch.
    Prompt(Batch),
    /// Its next ids are decoded.
    Decode(Sequence),
}

impl State {
    /// Of a sequence that goes on.
    pub fn of(sequence: Sequence, cancel: &Cancel) -> Result<Self> {
        match sequence.phase() {
            Some(Phase::Decode) => Ok(State::Decode(sequence)),
            Some(Phase::Prefill) => {
                let mut batch = Batch::default();
                batch.members.push(Member::new(sequence, cancel.clone()));
                Ok(State::Prompt(batch))
            }
            None => Err(Error::Internal("a job goes on without ids to compute".into())),
        }
    }

    /// The sequence that decodes, for a pass.
    pub fn take_sequence(&mut self) -> Option<Sequence> {
        match mem::replace(self, State::Unstarted) {
            State::Decode(sequence) => Some(sequence),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl Active {
    pub fn new(job: Box<dyn Job>, number: u64) -> Self {
        Active { job, number, state: State::Unstarted, runtime: Duration::ZERO, prompt_time: Duration::ZERO }
    }

    pub fn decodes(&self) -> bool {
        matches!(self.state, State::Decode(_))
    }
}
