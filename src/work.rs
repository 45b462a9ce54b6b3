//! Work of the compute thread as its reader sees it: taken in steps, which deliver something now and then, up to an end.

use std::time::Duration;

use crate::error::Result;
use crate::threads::Cancel;

/// Work in steps.
pub trait Work: Send + 'static {
    /// What it delivers.
    type Item: Send;

    /// Take a step; `cancel` ends it early, with `Error::Cancelled`. Not to be called again after `End` or an error.
    fn step(&mut self, cancel: &Cancel) -> Result<Step<Self::Item>>;

    /// How far it is.
    fn status(&self) -> Status;

    /// The token ids that an item stands for.
    fn ids(_item: &Self::Item) -> &[u32] {
        &[]
    }
}

/// What one step brought.
#[derive(Debug, PartialEq)]
pub enum Step<T> {
    /// Perhaps something, and there is more to do.
    More(Option<T>),
    /// The end, and what came with it.
    End(Option<T>, FinishReason),
}

/// Why a generation ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, or the context's end.
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

/// How far it is, in tokens, and how long that took.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, computed.
    pub prefilled: usize,
    pub generated: usize,
    /// How many may be generated; None: nobody said.
    pub limit: Option<usize>,
    pub prefill_time: Duration,
    pub decode_time: Duration,
    /// Passes that `decode_time` took; the first id comes from the prefill.
    pub decode_passes: usize,
}
