//! A batch: the sequences of a pass, and the memory that the pass computes in.
//!
//! Decisions: docs/design/model.md

use std::ops::Range;

use candle_core::Tensor;

use super::sequence::Sequence;
use crate::compute::kernels::Phase;
use crate::compute::ops::Angles;
use crate::system::sync::Cancel;

/// Sequences whose next ids go through a model together. It keeps its memory for the next pass.
#[derive(Default)]
pub struct Batch {
    pub members: Vec<Member>,
    /// The pass, between two of its turns.
    pub pass: Option<Pass>,
    pub activations: Option<Activations>,
    pub buffers: Buffers,
    /// (rows, n_vocab) of the last pass.
    pub logits: Vec<f32>,
}

/// A sequence of a batch.
pub struct Member {
    pub sequence: Sequence,
    /// Once it is set, the member's rows leave the pass before the next layer, and its keys and values are freed.
    pub cancel: Cancel,
    /// Its part of the batch's logits; empty if it wants none of the last pass.
    pub logits: Range<usize>,
}

impl Member {
    pub fn new(sequence: Sequence, cancel: Cancel) -> Self {
        Member { sequence, cancel, logits: 0..0 }
    }
}

impl Batch {
    /// The logits that a member wants of the last pass: (rows, n_vocab).
    pub fn logits(&self, member: usize) -> &[f32] {
        &self.logits[self.members[member].logits.clone()]
    }

    /// Computed ids of a member. Within a pass the computed layers count in proportion.
    pub fn computed(&self, member: usize) -> usize {
        let rows = self.pass.as_ref().map_or(0, |pass| pass.rows[member].len() * pass.layers / pass.n_layers);
        self.members[member].sequence.kv.len() + rows
    }
}

/// A pass on its way through the layers.
pub struct Pass {
    pub phase: Phase,
    /// The rows of each member. A member that has left the pass has none.
    pub rows: Vec<Range<usize>>,
    /// The cancellations of the members that have rows.
    pub cancels: Vec<Cancel>,
    /// Whether it stops after each layer.
    pub by_layer: bool,
    /// Computed layers.
    pub layers: usize,
    pub n_layers: usize,
}

/// What a pass has between two layers. Passes of the same number of rows use the same memory.
pub struct Activations {
    /// (rows, hidden)
    pub x: Tensor,
    pub angles: Angles,
    /// (rows, n_vocab); no rows before the first head.
    pub logits: Tensor,
}

/// The memory that a layer computes in, as the architecture asks for it: (rows, features) each, for at least the rows of a
/// pass. Nothing in it is needed between two layers, so that several batches may use one.
#[derive(Default)]
pub struct Buffers(pub Vec<Tensor>);
