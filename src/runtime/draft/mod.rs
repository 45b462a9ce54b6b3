//! Exact speculation: ids that probably come next are computed in the pass of the id before them, and count only as far as
//! the sampler draws the same ids.
//!
//! ```text
//! Drafter       proposes ids: `Lookup` copies what followed the last ids before, `ModelDrafter` asks a small model
//! Survival      the probability that a draft is accepted, learned from what was sampled
//! Costs         the time of a pass by its rows, learned from passes
//! budget        the rows of drafts that a pass takes, over all of its streams
//! ```
//! Drafts decide how fast a text comes and never what it says.
//!
//! Decisions: docs/design/runtime.md

pub mod budget;
pub mod costs;
pub mod lookup;
pub mod model;
pub mod survival;

use crate::error::Result;
use crate::runtime::sampling::Sampler;
use crate::system::panic;
use survival::Survival;

/// Drafts of a sequence in a pass at most.
pub const MOST: usize = 15;

/// The origin of a draft.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// The prompt or the answer.
    History,
    /// The text that the caller predicts.
    Prediction,
    Model,
}

/// The reason for a draft, by which its chances are learned.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Basis {
    pub source: Source,
    /// Ids before the draft that equal those of the text it is copied from; 0 for a model.
    pub length: usize,
}

/// Proposes ids.
pub trait Drafter: Send {
    /// The text goes on with these ids, whatever was drafted.
    fn push(&mut self, ids: &[u32]) -> Result<()>;

    /// Adds up to `most` ids to `draft` that may come next, and says why; None: it knows none. `sampler` is that of the text,
    /// for the next id.
    fn draft(&mut self, most: usize, sampler: &Sampler, draft: &mut Vec<u32>) -> Result<Option<Basis>>;
}

/// The drafts of one stream.
pub struct Drafts {
    /// None after an error of it: the text goes on without drafts.
    drafter: Option<Box<dyn Drafter>>,
    /// The ids that the drafter does not know yet.
    sampled: Vec<u32>,
    /// The current draft.
    draft: Vec<u32>,
    /// Drafts whose next id is still to come, whether they were computed or not.
    open: Vec<Open>,
}

/// A draft of which the first ids were right.
struct Open {
    basis: Basis,
    ids: Vec<u32>,
    right: usize,
}

impl Drafts {
    pub fn new(drafter: Box<dyn Drafter>) -> Self {
        Drafts { drafter: Some(drafter), sampled: Vec::new(), draft: Vec::new(), open: Vec::new() }
    }

    /// The text goes on with this id.
    pub fn push(&mut self, id: u32) {
        self.sampled.push(id);
    }

    /// Drafts up to `most` ids. Returns for each the probability that it is accepted with all before it.
    pub fn draft(&mut self, most: usize, sampler: &Sampler, survival: &mut Survival) -> Vec<f32> {
        self.score(survival);
        self.draft.clear();
        let Some(mut drafter) = self.drafter.take() else { return Vec::new() };
        // Drafts do not belong to the result: an error or a panic here ends the drafts, not the text.
        let basis = panic::catch(|| {
            drafter.push(&self.sampled)?;
            drafter.draft(most.min(MOST), sampler, &mut self.draft)
        });
        self.sampled.clear();
        let Ok(basis) = basis else { return Vec::new() };
        self.drafter = Some(drafter);
        let Some(basis) = basis.filter(|_| !self.draft.is_empty()) else { return Vec::new() };
        self.open.push(Open { basis, ids: self.draft.clone(), right: 0 });
        survival.products(basis, self.draft.len())
    }

    /// The first ids of the current draft.
    pub fn first(&self, n: usize) -> &[u32] {
        &self.draft[..n.min(self.draft.len())]
    }

    /// Compares the drafts so far with the ids since. One that was not computed counts as well.
    fn score(&mut self, survival: &mut Survival) {
        for &id in &self.sampled {
            self.open.retain_mut(|open| {
                let right = open.ids[open.right] == id;
                survival.record(open.basis, open.right, right);
                open.right += 1;
                right && open.right < open.ids.len()
            });
        }
    }
}

#[cfg(test)]
mod tests;
