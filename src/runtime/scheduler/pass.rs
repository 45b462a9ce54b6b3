//! One turn of the compute thread: a layer of a prompt, or a decode pass of several jobs.
//!
//! Decisions: docs/design/runtime.md

use std::mem;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::active::{Active, State};
use crate::error::{Error, Result};
use crate::model::{Batch, Member, Model, Phase, Sequence};
use crate::system::sync::lock;
use crate::system::{memory, panic};

/// Takes a turn with the prompt of a job; false after the last one, and if it fails.
pub fn prompt(active: &mut Active, start: Instant) -> bool {
    panic::catch(|| prompt_turn(active, start)).unwrap_or_else(|error| {
        active.job.fail(error);
        false
    })
}

fn prompt_turn(Active { job, state, .. }: &mut Active, start: Instant) -> Result<bool> {
    let model = job.model().clone();
    let mut batch = match mem::replace(state, State::Unstarted) {
        State::Prompt(batch) => batch,
        _ => match State::of(job.begin()?, job.cancel())? {
            State::Prompt(batch) => batch,
            _ => return Err(Error::Internal("a prompt has no ids to prefill".into())),
        },
    };
    let pass_goes_on = model.forward(&mut batch)?;
    if pass_goes_on || batch.logits(0).is_empty() {
        job.turn(batch.computed(0), start.elapsed());
    } else {
        let Batch { members, logits, .. } = &mut batch;
        let Member { sequence, logits: wanted, .. } = &mut members[0];
        if !job.accept(sequence, &logits[wanted.clone()], start.elapsed())? {
            return Ok(false);
        }
    }
    let prefills = batch.members[0].sequence.phase() == Some(Phase::Prefill);
    *state = if pass_goes_on || prefills && job.ready() {
        State::Prompt(batch) // the next turn uses its memory
    } else {
        let Some(member) = batch.members.pop() else { return Err(Error::Internal("a batch lost its sequence".into())) };
        State::of(member.sequence, job.cancel())?
    };
    Ok(true)
}

/// Takes a decode pass with the jobs, which have the same model. The jobs then take their logits side by side. Whether
/// each of them goes on.
pub fn decode(jobs: &mut [Active], batch: &mut Batch, start: Instant) -> Vec<bool> {
    let Some(first) = jobs.first() else { return Vec::new() };
    let model = first.job.model().clone();
    batch.pass = None;
    batch.members.clear();
    let sequences = jobs.iter_mut().map(|active| (active.state.take_sequence(), active.job.cancel().clone()));
    batch.members.extend(sequences.filter_map(|(sequence, cancel)| Some(Member::new(sequence?, cancel))));
    debug_assert_eq!(batch.members.len(), jobs.len(), "each job has a sequence that decodes");
    let outcomes = forward(model.as_ref(), batch);
    let (logits, time) = (mem::take(&mut batch.logits), start.elapsed());
    let outcomes = batch.members.drain(..).zip(outcomes);
    let deliveries = jobs.iter_mut().zip(outcomes).map(|(active, (member, outcome))| {
        Mutex::new(Delivery { active, sequence: Some(member.sequence), outcome, goes_on: false })
    });
    let deliveries: Vec<_> = deliveries.collect();
    model.run(deliveries.len(), &|i| lock(&deliveries[i]).deliver(&logits, time));
    let go_on = deliveries.iter().map(|delivery| lock(delivery).goes_on).collect();
    drop(deliveries);
    batch.logits = logits; // the memory is used again
    go_on
}

/// The logits of a job, or the error of its pass, on their way to the job.
struct Delivery<'a> {
    active: &'a mut Active,
    sequence: Option<Sequence>,
    outcome: Result<Range<usize>>,
    goes_on: bool,
}

impl Delivery<'_> {
    fn deliver(&mut self, logits: &[f32], time: Duration) {
        let Active { job, state, .. } = &mut *self.active;
        let Some(mut sequence) = self.sequence.take() else { return };
        let outcome = mem::replace(&mut self.outcome, Ok(0..0));
        let accepted = outcome.and_then(|range| {
            panic::catch(|| {
                let goes_on = job.accept(&mut sequence, &logits[range], time)?;
                if goes_on {
                    *state = State::of(sequence, job.cancel())?;
                }
                Ok(goes_on)
            })
        });
        match accepted {
            Ok(goes_on) => self.goes_on = goes_on,
            Err(error) => job.fail(error),
        }
    }
}

/// The logits of each member, as ranges of the batch's. If a pass of several fails, each of them is computed alone, so that
/// the error reaches the job that it belongs to and no other.
fn forward(model: &dyn Model, batch: &mut Batch) -> Vec<Result<Range<usize>>> {
    let logits_of = |member: &Member| match member.logits.is_empty() {
        true => Err(Error::Cancelled), // it left the pass
        false => Ok(member.logits.clone()),
    };
    match panic::catch(|| pass(model, batch)) {
        Ok(()) => batch.members.iter().map(logits_of).collect(),
        Err(error) if batch.members.len() == 1 || error == Error::Cancelled => {
            batch.members.iter().map(|_| Err(error.clone())).collect()
        }
        Err(_) => alone(model, batch),
    }
}

fn pass(model: &dyn Model, batch: &mut Batch) -> Result<()> {
    while model.forward(batch)? {}
    Ok(())
}

fn alone(model: &dyn Model, batch: &mut Batch) -> Vec<Result<Range<usize>>> {
    let members = mem::take(&mut batch.members);
    let (mut logits, mut outcomes, mut computed) = (Vec::new(), Vec::new(), Vec::new());
    for member in members {
        batch.pass = None;
        batch.members.push(member);
        let outcome = panic::catch(|| {
            if batch.members[0].cancel.is_set() {
                return Err(Error::Cancelled); // the pass may have freed its keys and values
            }
            pass(model, batch)?;
            let (from, more) = (logits.len(), batch.logits(0));
            memory::reserve(&mut logits, more.len(), format_args!("{} logits", more.len()))?;
            logits.extend_from_slice(more);
            Ok(from..logits.len())
        });
        outcomes.push(outcome);
        computed.append(&mut batch.members);
    }
    (batch.members, batch.logits) = (computed, logits);
    outcomes
}
