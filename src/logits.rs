//! The logits of given ids, as work of the compute thread.

use std::sync::Arc;
use std::time::Instant;

use crate::error::Result;
use crate::model::{Model, Phase, Sequence, Want};
use crate::threads::Cancel;
use crate::work::{FinishReason, Status, Step, Work};

/// Delivers once: (n_vocab), or (ids, n_vocab).
pub struct Logits {
    model: Arc<dyn Model>,
    ids: Vec<u32>,
    want: Want,
    sequence: Option<Box<dyn Sequence>>,
    status: Status,
}

impl Logits {
    pub fn new(model: Arc<dyn Model>, ids: Vec<u32>, want: Want) -> Self {
        let status = Status { prompt: ids.len(), ..Status::default() };
        Logits { model, ids, want, sequence: None, status }
    }
}

impl Work for Logits {
    type Item = Vec<f32>;

    fn step(&mut self, cancel: &Cancel) -> Result<Step<Vec<f32>>> {
        let start = Instant::now();
        let sequence = match &mut self.sequence {
            Some(sequence) => sequence,
            none => {
                let sequence = none.insert(self.model.clone().sequence()?);
                sequence.append(&self.ids, Phase::Prefill, self.want)?;
                sequence
            }
        };
        let more = sequence.advance(cancel)?;
        self.status.prefilled = sequence.computed();
        self.status.prefill_time += start.elapsed();
        Ok(if more { Step::More(None) } else { Step::End(Some(sequence.logits().to_vec()), FinishReason::Stop) })
    }

    fn status(&self) -> Status {
        self.status
    }
}
