//! The work of a stream: steps that deliver items, up to an end.
//!
//! Decisions: docs/design/runtime.md

use std::time::Duration;

use crate::error::Result;
use crate::system::sync::Cancel;

/// Work in steps, as a stream sees it.
pub trait Work: Send + 'static {
    /// What a step may deliver.
    type Item: Send;

    /// Takes a step. `cancel` ends it early with `Error::Cancelled`. It is not called again after `End` or an error.
    fn step(&mut self, cancel: &Cancel) -> Result<Step<Self::Item>>;

    /// Progress so far.
    fn status(&self) -> Status;

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

/// Progress in tokens, and the time that it took.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Prompt tokens that are computed.
    pub prefilled: usize,
    pub generated: usize,
    /// `max_tokens` if the caller set it.
    pub limit: Option<usize>,
    pub prefill_time: Duration,
    pub decode_time: Duration,
    /// Passes within `decode_time`. The first id comes from the prefill.
    pub decode_passes: usize,
}
