//! One turn of the compute thread: a layer of prompts, or a decode pass.
//!
//! Decisions: docs/design/runtime.md

use std::mem;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::active::{Active, Prompts, State};
use super::drafts::{self, DraftRows};
use crate::error::{Error, Result};
use crate::model::{Batch, Member, Model, Sequence};
use crate::runtime::prefixes::Prefixes;
use crate::system::sync::lock;
use crate::system::{memory, panic};

/// Takes a turn with prompts. New ones have no members yet. `jobs` are those of the members, but for cancelled ones. Returns
/// the prompts that go on.
pub fn prompt(jobs: &mut [Active], mut prompts: Prompts, prefixes: &Prefixes, start: Instant) -> Vec<Prompts> {
    let Some(first) = jobs.first() else { return Vec::new() };
    let model = first.job.model().clone();
    if prompts.numbers.is_empty() {
        jobs.iter_mut().for_each(|active| active.begin(&mut prompts, prefixes));
    }
    if prompts.numbers.is_empty() {
        return Vec::new(); // every job has ended
    }
    let shared = prompts.numbers.len() > 1;
    let pass_goes_on = match prefixes.give_way_to(|| panic::catch(|| model.forward(&mut prompts.batch))) {
        Ok(pass_goes_on) => pass_goes_on,
        Err(error) if shared && error != Error::Cancelled => return split(prompts),
        Err(error) => {
            jobs.iter_mut().for_each(|active| active.fail(error.clone()));
            return Vec::new();
        }
    };
    let ends_without_logits = || prompts.batch.members[0].sequence.phase().is_none();
    if pass_goes_on || !shared && prompts.batch.logits(0).is_empty() && !ends_without_logits() {
        record_turn(jobs, &prompts, start.elapsed());
        if pass_goes_on {
            return vec![prompts];
        }
        let members = mem::take(&mut prompts.batch.members);
        let going_on = jobs.iter_mut().zip(members.into_iter().map(|member| member.sequence));
        return settle(going_on.filter(|(active, _)| active.is_alive()), prompts.batch, prompts.time);
    }
    let outcomes = match &prompts.batch.members[..] {
        [alone] => vec![Ok(alone.logits.clone())],
        members => members.iter().map(logits_of).collect(),
    };
    let going_on = deliver(model.as_ref(), jobs, &prompts.numbers, &mut prompts.batch, outcomes, start);
    settle(going_on.into_iter(), prompts.batch, prompts.time)
}

/// Takes a decode pass with jobs of one model. Returns the prompts that follow from it: a sequence may outgrow its rope
/// factors, and is computed anew.
pub fn decode(
    jobs: &mut [Active],
    batch: &mut Batch,
    drafts: &mut DraftRows,
    prefixes: &Prefixes,
    start: Instant,
) -> Vec<Prompts> {
    let Some(first) = jobs.first() else { return Vec::new() };
    let model = first.job.model().clone();
    batch.pass = None;
    batch.members.clear();
    let mut numbers = Vec::new();
    for active in jobs.iter_mut() {
        if let Some(sequence) = active.take_sequence() {
            numbers.push(active.number);
            batch.members.push(Member::new(sequence, active.job.cancel().clone()));
        }
    }
    drafts.add(model.as_ref(), jobs, &numbers, &mut batch.members);
    let outcomes = forward(model.as_ref(), batch, drafts, prefixes);
    let going_on = deliver(model.as_ref(), jobs, &numbers, batch, outcomes, start);
    settle(going_on.into_iter(), Batch::default(), Duration::ZERO)
}

/// Tells the jobs how far their prompts are.
fn record_turn(jobs: &mut [Active], prompts: &Prompts, time: Duration) {
    for active in jobs {
        let Some(member) = prompts.numbers.iter().position(|&number| number == active.number) else { continue };
        let recorded = panic::catch(|| {
            active.job.turn(&prompts.batch.members[member].sequence, prompts.batch.computed(member), time);
            Ok(())
        });
        if let Err(error) = recorded {
            active.job.cancel().set(); // its rows leave the pass
            active.fail(error);
        }
    }
}

/// Each prompt alone, to be computed from its start.
fn split(prompts: Prompts) -> Vec<Prompts> {
    let Prompts { batch, numbers, time } = prompts;
    let alone = |(member, number)| {
        let batch = Batch { members: vec![member], ..Batch::default() };
        Prompts { batch, numbers: vec![number], time }
    };
    batch.members.into_iter().zip(numbers).map(alone).collect()
}

/// Of a member after a pass, as a range of the batch's logits.
fn logits_of(member: &Member) -> Result<Range<usize>> {
    match member.logits.is_empty() {
        true => Err(Error::Cancelled), // it left the pass
        false => Ok(member.logits.clone()),
    }
}

/// A decode pass. If it fails, each member is computed alone and without drafts, so that the error reaches the job that it
/// belongs to and no other, and drafts never cause one.
fn forward(
    model: &dyn Model,
    batch: &mut Batch,
    drafts: &mut DraftRows,
    prefixes: &Prefixes,
) -> Vec<Result<Range<usize>>> {
    let (rows, start) = (drafts::rows(&batch.members), Instant::now());
    let Err(error) = prefixes.give_way_to(|| panic::catch(|| pass(model, batch))) else {
        drafts.record(&batch.members, rows, start.elapsed());
        return batch.members.iter().map(logits_of).collect();
    };
    let cancelled = error == Error::Cancelled;
    let withdrawn =
        batch.members.iter_mut().filter(|_| !cancelled).map(drafts::withdraw).filter(|drafts| *drafts).count();
    if cancelled || batch.members.len() == 1 && withdrawn == 0 {
        return batch.members.iter().map(|_| Err(error.clone())).collect();
    }
    alone(model, batch)
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

/// The logits of a job, or the error of its pass, on their way to the job.
struct Delivery<'a> {
    active: &'a mut Active,
    /// None once the job has ended.
    sequence: Option<Sequence>,
    outcome: Result<Range<usize>>,
}

impl Delivery<'_> {
    fn deliver(&mut self, logits: &[f32], time: Duration) {
        let (job, Some(mut sequence)) = (&mut self.active.job, self.sequence.take()) else { return };
        let outcome = mem::replace(&mut self.outcome, Ok(0..0));
        let accepted = outcome.and_then(|range| panic::catch(|| job.accept(&mut sequence, &logits[range], time)));
        match accepted {
            Ok(true) => self.sequence = Some(sequence),
            Ok(false) => self.active.state = State::Ended,
            Err(error) => self.active.fail(error),
        }
    }
}

/// Jobs and the sequences with which they go on.
type GoingOn<'a> = Vec<(&'a mut Active, Sequence)>;

/// Hands the logits of a pass to the jobs of its members, side by side.
fn deliver<'a>(
    model: &dyn Model,
    jobs: &'a mut [Active],
    numbers: &[u64],
    batch: &mut Batch,
    outcomes: Vec<Result<Range<usize>>>,
    start: Instant,
) -> GoingOn<'a> {
    let (logits, time) = (mem::take(&mut batch.logits), start.elapsed());
    let mut members: Vec<_> = numbers.iter().zip(batch.members.drain(..)).zip(outcomes).collect();
    let delivery = |active: &'a mut Active| {
        let member = members.iter().position(|((number, _), _)| **number == active.number)?;
        let ((_, Member { sequence, .. }), outcome) = members.swap_remove(member);
        Some(Mutex::new(Delivery { active, sequence: Some(sequence), outcome }))
    };
    let deliveries: Vec<_> = jobs.iter_mut().filter_map(delivery).collect();
    model.run(deliveries.len(), &|i| lock(&deliveries[i]).deliver(&logits, time));
    batch.logits = logits; // the memory is used again
    let goes_on = |delivery: Mutex<Delivery<'a>>| {
        let Delivery { active, sequence, .. } = delivery.into_inner().unwrap_or_else(PoisonError::into_inner);
        Some((active, sequence?))
    };
    deliveries.into_iter().filter_map(goes_on).collect()
}

/// Records what each sequence needs next. Returns those that are prefilled, the first of them with the memory of `batch`.
fn settle<'a>(
    going_on: impl Iterator<Item = (&'a mut Active, Sequence)>,
    batch: Batch,
    time: Duration,
) -> Vec<Prompts> {
    let (mut batch, mut prompts) = (Some(batch), Vec::new());
    for (active, sequence) in going_on {
        match sequence.phase() {
            Some(_) if sequence.decodes() => active.state = State::Decode(sequence),
            Some(_) => {
                // A prompt that waits for its reader keeps no activations.
                let mut batch = batch.take().filter(|_| active.job.ready()).unwrap_or_default();
                batch.members.push(Member::new(sequence, active.job.cancel().clone()));
                active.state = State::Prompt;
                prompts.push(Prompts { batch, numbers: vec![active.number], time });
            }
            None => active.fail(Error::Internal("a job goes on without ids to compute".into())),
        }
    }
    prompts
}
