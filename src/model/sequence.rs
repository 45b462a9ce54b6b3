//! A sequence is data: ids, and the keys and values of those that are computed.
//!
//! Decisions: docs/design/model.md

use std::sync::Arc;

use crate::compute::kernels::Phase;
use crate::kv::phases::Phases;
use crate::kv::table::Table;

/// The ids of an `append` that get logits.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Want {
    /// The last id.
    Last,
    /// The ids from this index on.
    From(usize),
}

impl Want {
    /// Every id.
    pub const EVERY: Want = Want::From(0);

    /// The index of the first of `ids` ids that gets logits.
    pub fn first(self, ids: usize) -> usize {
        match self {
            Want::Last => ids.saturating_sub(1),
            Want::From(first) => first,
        }
    }
}

/// One sequence of tokens. After a cancellation it cannot be used.
pub struct Sequence {
    /// All ids: a sequence that outgrows the short rope factors is computed anew.
    pub ids: Vec<u32>,
    /// Keys and values of the first ids.
    pub kv: Table,
    /// Whether they are computed with the long rope factors.
    pub long: bool,
    /// The phase of each id.
    pub phases: Phases,
    /// Ids from this index on get logits.
    pub logits_from: usize,
    /// Sequences of another scope share no keys and values with it.
    pub scope: Arc<str>,
    /// What its engine holds for it.
    pub held: Option<Box<dyn Send>>,
}

impl Sequence {
    pub fn new(kv: Table) -> Self {
        let (ids, phases, scope) = (Vec::new(), Phases::default(), Arc::from(""));
        Sequence { ids, kv, long: false, phases, logits_from: 0, scope, held: None }
    }

    /// The phase of the next id to compute; None if all are computed.
    pub fn phase(&self) -> Option<Phase> {
        let next = self.kv.len();
        (next < self.ids.len()).then(|| self.phases.at(next))
    }

    /// Ids that are not computed yet.
    pub fn left(&self) -> usize {
        self.ids.len() - self.kv.len()
    }

    /// Whether the next ids are decoded and get logits.
    pub fn decodes(&self) -> bool {
        self.phase() == Some(Phase::Decode) && self.kv.len() >= self.logits_from
    }

    /// Records appended ids. The memory for them is there.
    pub fn append(&mut self, ids: &[u32], phase: Phase, want: Want) {
        let from = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.phases.push(ids.len(), phase);
        self.logits_from = from + want.first(ids.len());
    }

    /// Forgets the ids from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.phases.truncate(length);
        self.kv.truncate(length);
    }

    /// Takes other rope factors. All keys and values are computed anew, and the ids before `from` are prefilled.
    pub fn restart(&mut self, long: bool, from: usize) {
        let phase = self.phases.at(from);
        self.kv.clear();
        self.long = long;
        self.phases = Phases::prefill(from);
        self.phases.push(self.ids.len() - from, phase);
    }
}
