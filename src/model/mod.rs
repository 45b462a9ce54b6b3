//! Models: token ids of several sequences in, logits out. It may use `kv`, `compute` and `files`. `runner` has what every
//! architecture shares, and a file of an architecture has its layers alone.
//!
//! Decisions: docs/design/model.md

pub mod baseline;
pub mod batch;
pub mod chunks;
#[cfg(test)]
pub mod fake;
pub mod phi3;
pub mod requirements;
pub mod rope;
pub mod runner;
pub mod sequence;

pub use crate::compute::kernels::Phase;
use crate::error::Result;
use crate::system::memory;
use crate::system::sync::Cancel;

pub use batch::{Batch, Buffers, Member};
pub use sequence::{Sequence, Want};

/// Facts about a loaded model.
#[derive(Clone, Debug)]
pub struct Info {
    /// "native" or "candle".
    pub engine: &'static str,
    /// The kernel's name in the report of `doctor`.
    pub kernel: &'static str,
    /// "cpu", "cuda" or "metal".
    pub device: &'static str,
    pub n_threads: usize,
    /// The file, for errors.
    pub file: String,
    /// Rows of the head: ids are below this.
    pub n_vocab: usize,
    /// The context length of the file.
    pub context_length: usize,
    /// Rows of a decode pass at most, and prompts of a pass.
    pub width: usize,
    /// Tokens of prompts that share a pass at most.
    pub shared_tokens: usize,
    /// The time of a decode pass over 1, 2, ... rows, in passes over one row.
    pub pass_costs: &'static [f32],
}

/// Of a model that computes nothing: one row in a pass.
impl Default for Info {
    fn default() -> Self {
        Info {
            engine: "none",
            kernel: "none",
            device: "cpu",
            n_threads: 1,
            file: String::new(),
            n_vocab: 1,
            context_length: 1000,
            width: 1,
            shared_tokens: 0,
            pass_costs: &[1.0],
        }
    }
}

/// Loaded weights, shared by any number of sequences.
pub trait Model: Send + Sync {
    fn info(&self) -> &Info;

    /// Bytes of keys and values that a token reads at a context of `positions`.
    fn kv_bytes(&self, positions: usize) -> usize;

    /// An error if a sequence of `positions` is not supported.
    fn check_length(&self, _positions: usize) -> Result<()> {
        Ok(())
    }

    /// An empty sequence.
    fn sequence(&self) -> Result<Sequence>;

    /// Adds ids to a sequence, and computes nothing yet. Prompts are prefilled, generated ids are decoded: within a phase
    /// the logits have the same bits however the ids are grouped, and whatever other sequences are in a pass.
    /// `Error::Memory` if the system has too little for them.
    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()>;

    /// Ids that may be added to a sequence before all of it is computed anew.
    fn room(&self, _sequence: &Sequence) -> usize {
        usize::MAX
    }

    /// Takes a turn with a batch whose members have ids to compute: a whole decode pass, or one layer of prompts. A prompt is
    /// alone in its batch, or short and wants the logits of its last id. True if the pass goes on. At its end the members
    /// have the logits that they want of the pass. After an error each sequence is as it was before the pass, but for
    /// those that are cancelled.
    fn forward(&self, batch: &mut Batch) -> Result<bool>;

    /// Calls `task(i)` once for each i in 0..tasks, on all threads of the model. A task must not compute.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// Adds ids to the only member of a batch and takes all turns. The logits are (wanted ids, n_vocab).
pub fn compute(model: &dyn Model, batch: &mut Batch, ids: &[u32], phase: Phase, want: Want) -> Result<Vec<f32>> {
    model.append(&mut batch.members[0].sequence, ids, phase, want)?;
    let mut logits = Vec::new();
    let (rows, n_vocab) = (ids.len().saturating_sub(want.first(ids.len())), model.info().n_vocab);
    memory::reserve(&mut logits, rows.saturating_mul(n_vocab), format_args!("{rows} x {n_vocab} logits"))?;
    while batch.members[0].sequence.phase().is_some() {
        while model.forward(batch)? {}
        logits.extend_from_slice(batch.logits(0));
    }
    Ok(logits)
}

/// A batch of one empty sequence.
pub fn single(model: &dyn Model, cancel: &Cancel) -> Result<Batch> {
    let mut batch = Batch::default();
    batch.members.push(Member::new(model.sequence()?, cancel.clone()));
    Ok(batch)
}
