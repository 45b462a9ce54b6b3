//! The work of a stream. It is passive: its sequence says what is computed next, and it takes the logits.
//!
//! Decisions: docs/design/runtime.md

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::model::{Model, Sequence};
use crate::runtime::draft::survival::Survival;
use crate::runtime::prompt::Prompt;

/// Work as a stream sees it.
pub trait Work: Send + 'static {
    /// What the work may deliver.
    type Item: Send;

    /// The model that computes its logits.
    fn model(&self) -> &Arc<dyn Model>;

    fn prompt(&self) -> &Prompt;

    /// Whether the prompt may share a pass with others. It then wants the logits of its last id alone.
    fn shares_prompt(&self) -> bool {
        false
    }

    /// The sequence, with the prompt appended. Called once, before the others.
    fn begin(&mut self) -> Result<Sequence>;

    /// Takes the logits that the sequence wanted of a pass, (rows, n_vocab), and appends what is wanted next, unless it ends. A
    /// sequence that wants no logits ends with none. After `Again` it is called with the same logits, until it has taken
    /// all of their rows. It is not called again after `End` or an error.
    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32]) -> Result<Step<Self::Item>>;

    /// Drafts up to `most` ids that may follow those of the sequence. Returns for each the probability that it is accepted with
    /// all before it. Called before a decode pass.
    fn draft(&mut self, _sequence: &Sequence, _most: usize, _survival: &mut Survival) -> Vec<f32> {
        Vec::new()
    }

    /// Appends the first `n` drafts to the sequence, which wants their logits too. After an error it is unchanged.
    fn extend(&mut self, _sequence: &mut Sequence, _n: usize) -> Result<()> {
        Ok(())
    }

    /// The progress before the first step.
    fn status(&self) -> Status;

    /// Generated ids.
    fn generated(&self) -> usize {
        0
    }

    /// Drafts that were computed, and those of them that were accepted.
    fn drafted(&self) -> (usize, usize) {
        (0, 0)
    }

    /// The token ids of an item.
    fn ids(_item: &Self::Item) -> &[u32] {
        &[]
    }
}

/// The result of one step.
#[derive(Debug, PartialEq)]
pub enum Step<T> {
    /// Perhaps an item, and more steps to come after another pass.
    More(Option<T>),
    /// Perhaps an item, and another step to come from the same logits.
    Again(Option<T>),
    /// Perhaps an item, and the end.
    End(Option<T>, FinishReason),
}

/// Why a generation ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    Cancelled,
    Timeout,
    Error,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Timeout => "timeout",
            FinishReason::Error => "error",
        }
    }
}

/// Progress in tokens, and the time that it took. A pass counts whole for each of its streams.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of them whose keys and values were held.
    pub cached: usize,
    /// Prompt tokens that are computed or were held.
    pub prefilled: usize,
    pub generated: usize,
    /// `max_tokens` if the caller set it.
    pub limit: Option<usize>,
    pub prefill_time: Duration,
    pub decode_time: Duration,
    /// Passes within `decode_time`. The first id comes from the prefill.
    pub decode_passes: usize,
    /// Drafts that were computed in those passes, and those of them that were accepted.
    pub drafted: usize,
    pub accepted: usize,
}
