//! What generation needs of a model, whichever engine computes it.
//!
//! Decisions: docs/design/model.md

use std::sync::Arc;

use crate::error::Result;
pub use crate::kernels::Phase;
use crate::threads::Cancel;

/// Loaded weights, shared by any number of sequences.
pub trait Model: Send + Sync {
    /// "native" or "candle".
    fn engine(&self) -> &'static str;

    /// The kernel's name, as `doctor` shows it.
    fn kernel(&self) -> &'static str;

    /// "cpu", "cuda" or "metal".
    fn device(&self) -> &'static str;

    fn n_threads(&self) -> usize;

    /// What errors call it: its file.
    fn name(&self) -> String;

    /// Rows of the head: ids are below this.
    fn n_vocab(&self) -> usize;

    /// Positions the file was made for.
    fn context_length(&self) -> usize;

    /// Bytes of keys and values that the last of so many positions reads.
    fn kv_bytes(&self, positions: usize) -> usize;

    /// What goes wrong, if anything, when a sequence of so many positions is asked for.
    fn check_length(&self, _positions: usize) -> Result<()> {
        Ok(())
    }

    /// An empty sequence.
    fn sequence(self: Arc<Self>) -> Result<Box<dyn Sequence>>;
}

/// One sequence of tokens and its KV cache. After an error or a cancellation it is of no more use.
pub trait Sequence: Send {
    /// Hand over ids; nothing is computed yet. Prompts are prefilled, generated ids decoded: within a phase the logits
    /// have the same bits however ids are grouped.
    fn append(&mut self, ids: &[u32], phase: Phase, want: Want) -> Result<()>;

    /// Compute for a turn, so that other sequences get theirs: true as long as there is more to do.
    fn advance(&mut self, cancel: &Cancel) -> Result<bool>;

    /// How many of the ids last appended are computed; inside a pass, by the layers that are.
    fn computed(&self) -> usize;

    /// Once all is computed: the logits of the last of the ids appended, (n_vocab), or of each, (ids, n_vocab).
    fn logits(&self) -> &[f32];

    /// All of it, without turns.
    fn forward(&mut self, ids: &[u32], phase: Phase, want: Want, cancel: &Cancel) -> Result<&[f32]> {
        self.append(ids, phase, want)?;
        while self.advance(cancel)? {}
        Ok(self.logits())
    }
}

/// The positions whose logits are wanted.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Want {
    Last,
    Every,
}
