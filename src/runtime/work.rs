//! The work of a stream. It is passive: its sequence says what is computed next, and it takes the logits.
//!
//! Decisions: docs/design/runtime.md

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::model::{Model, Sequence};
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

    /// Takes the logits that the sequence wanted of a pass, (rows, n_vocab), or none of the last one, and appends what is wanted next, unless it ends.
    /// It is not called again after `End` or an error.
    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32]) -> Result<Step<Self::Item>>;

    /// The progress before the first step.
    fn status(&self) -> Status;

    /// Generated ids.
    fn generated(&self) -> usize {
        0
    }

    /// The token ids of an item.
    fn ids(_item: &Self::Item) -> &[u32] {
        &[]
    }
}

/// The result of one step.
#[derive(Debug, PartialEq)]
pub enum Step<T> {
    /// Perhaps an item, and more steps to come.
    More(Option<T>),
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
}
