//! The rows of drafts in a decode pass: one budget for all of its streams.
//!
//! Decisions: docs/design/runtime.md

use std::time::Duration;

use super::Job;
use super::active::Active;
use crate::model::{Member, Model, Phase};
use crate::runtime::draft::costs::Costs;
use crate::runtime::draft::survival::Survival;
use crate::runtime::draft::{MOST, budget};
use crate::system::panic;

/// What the passes of a model have shown so far.
#[derive(Default)]
pub struct DraftRows {
    survival: Survival,
    costs: Option<Costs>,
}

impl DraftRows {
    /// Adds drafts to the members of a decode pass, as far as they pay. A job that cannot draft has none.
    pub fn add(&mut self, model: &dyn Model, jobs: &mut [Active], numbers: &[u64], members: &mut [Member]) {
        let (rows, width) = (rows(members), model.info().width);
        let most = width.saturating_sub(rows).min(MOST);
        if most == 0 {
            return;
        }
        let mut products = Vec::new();
        for (number, member) in numbers.iter().zip(members.iter()) {
            let job = job(jobs, *number).filter(|job| !job.cancel().is_set());
            let draft = job.map(|job| panic::catch(|| Ok(job.draft(&member.sequence, most, &mut self.survival))));
            products.push(draft.and_then(Result::ok).unwrap_or_default());
        }
        let costs = self.costs.get_or_insert_with(|| Costs::new(model.info().pass_costs));
        let taken = budget::share(rows, width, &products, |rows| costs.of(rows));
        for ((number, member), n) in numbers.iter().zip(members).zip(taken).filter(|(_, n)| *n > 0) {
            // Without memory for them it goes on without them.
            let _ = job(jobs, *number).map(|job| panic::catch(|| job.extend(&mut member.sequence, n)));
        }
    }

    /// Records a pass that took `time`. One that lost members says nothing.
    pub fn record(&mut self, members: &[Member], rows: usize, time: Duration) {
        if let Some(costs) = &mut self.costs
            && members.iter().all(|member| !member.logits.is_empty())
        {
            costs.record(members.len(), rows, time);
        }
    }
}

fn job(jobs: &mut [Active], number: u64) -> Option<&mut Box<dyn Job>> {
    jobs.iter_mut().find(|active| active.number == number).map(|active| &mut active.job)
}

/// Rows of a decode pass.
pub fn rows(members: &[Member]) -> usize {
    members.iter().map(|member| member.sequence.left()).sum()
}

/// Removes the drafts that a failed pass has left in a sequence. False if it has none.
pub fn withdraw(member: &mut Member) -> bool {
    let sequence = &mut member.sequence;
    let text = sequence.logits_from + 1; // the last id of the text is the first that wants logits
    let has_drafts = sequence.phase() == Some(Phase::Decode) && sequence.ids.len() > text;
    if has_drafts {
        sequence.truncate(text);
    }
    has_drafts
}
