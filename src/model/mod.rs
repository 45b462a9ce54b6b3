//! The interface of a model to generation, for every engine.
//!
//! Decisions: docs/design/model.md

pub mod baseline;
pub mod phi3;
pub mod requirements;
pub mod rope;

use std::sync::Arc;

pub use crate::compute::kernels::Phase;
use crate::error::Result;
use crate::system::sync::Cancel;

/// Loaded weights, shared by any number of sequences.
pub trait Model: Send + Sync {
    /// "native" or "candle".
    fn engine(&self) -> &'static str;

    /// The kernel's name in the report of `doctor`.
    fn kernel(&self) -> &'static str;

    /// "cpu", "cuda" or "metal".
    fn device(&self) -> &'static str;

    fn n_threads(&self) -> usize;

    /// Its file, for errors.
    fn name(&self) -> String;

    /// Rows of the head: ids are below this.
    fn n_vocab(&self) -> usize;

    /// The context length of the file.
    fn context_length(&self) -> usize;

    /// Bytes of keys and values that a token reads at a context of `positions`.
    fn kv_bytes(&self, positions: usize) -> usize;

    /// An error if a sequence of `positions` is not supported.
    fn check_length(&self, _positions: usize) -> Result<()> {
        Ok(())
    }

    /// An empty sequence.
    fn sequence(self: Arc<Self>) -> Result<Box<dyn Sequence>>;
}

/// One sequence of tokens and its KV cache. It cannot be used after an error or a cancellation.
pub trait Sequence: Send {
    /// Adds ids, and computes nothing yet. Prompts are prefilled, generated ids are decoded: within a phase the logits
    /// have the same bits however the ids are grouped. `Error::Memory` if the system has too little for them.
    fn append(&mut self, ids: &[u32], phase: Phase, want: Want) -> Result<()>;

    /// Computes one turn; other sequences may take theirs before the next. True if more turns follow.
    fn advance(&mut self, cancel: &Cancel) -> Result<bool>;

    /// Computed ids of the last `append`. Within a pass the computed layers count in proportion.
    fn computed(&self) -> usize;

    /// After the last turn: the logits of the last appended id, (n_vocab), or of each, (ids, n_vocab).
    fn logits(&self) -> &[f32];

    /// The same without a copy. `logits` is empty afterwards.
    fn take_logits(&mut self) -> Vec<f32>;

    /// `append`, and all turns.
    fn forward(&mut self, ids: &[u32], phase: Phase, want: Want, cancel: &Cancel) -> Result<&[f32]> {
        self.append(ids, phase, want)?;
        while self.advance(cancel)? {}
        Ok(self.logits())
    }
}

/// The positions that get logits.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Want {
    Last,
    Every,
}
