//! A sequence is data: ids, and the keys and values of those that are computed.
//!
//! Decisions: docs/design/model.md

use crate::compute::kernels::Phase;
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
    /// Ids before this index are prefilled, the others are decoded.
    pub decode_from: usize,
    /// Ids from this index on get logits.
    pub logits_from: usize,
    /// What its engine holds for it.
    pub held: Option<Box<dyn Send>>,
}

impl Sequence {
    pub fn new(kv: Table) -> Self {
        Sequence { ids: Vec::new(), kv, long: false, decode_from: 0, logits_from: 0, held: None }
    }

    /// The phase of the next id to compute; None if all are computed.
    pub fn phase(&self) -> Option<Phase> {
        let next = self.kv.len();
        (next < self.ids.len()).then_some(if next < self.decode_from { Phase::Prefill } else { Phase::Decode })
    }

    /// Ids that are not computed yet.
    pub fn left(&self) -> usize {
        self.ids.len() - self.kv.len()
    }

    /// Records appended ids. The memory for them is there.
    pub fn append(&mut self, ids: &[u32], phase: Phase, want: Want) {
        let (from, before) = (self.ids.len(), self.phase());
        self.ids.extend_from_slice(ids);
        match (phase, before) {
            (Phase::Prefill, _) => self.decode_from = self.ids.len(),
            (Phase::Decode, Some(Phase::Decode)) => {} // ids before them are decoded too
            (Phase::Decode, _) => self.decode_from = from,
        }
        self.logits_from = from + want.first(ids.len());
    }

    /// Forgets the ids from index `len` on, and what was computed of them.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.kv.truncate(len);
        self.decode_from = self.decode_from.min(len);
        self.logits_from = self.logits_from.min(len);
    }
}
