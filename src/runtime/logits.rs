//! The logits of token ids, as work of the scheduler.

use std::sync::Arc;

use crate::error::Result;
use crate::model::{Model, Sequence, Want};
use crate::runtime::prompt::Prompt;
use crate::runtime::work::{FinishReason, Status, Step, Work};
use crate::system::memory;

/// Delivers one item: (n_vocab), or (ids, n_vocab).
pub struct Logits {
    model: Arc<dyn Model>,
    prompt: Prompt,
    want: Want,
    /// Those of the passes so far.
    logits: Vec<f32>,
}

impl Logits {
    /// `Error::Memory` if the logits do not fit the available memory.
    pub fn new(model: Arc<dyn Model>, ids: Vec<u32>, want: Want) -> Result<Self> {
        let (rows, n_vocab) = (ids.len() - want.first(ids.len()), model.info().n_vocab);
        // Twice: here, and as the bytes of the caller.
        let bytes = (2 * size_of::<f32>() as u64).saturating_mul(rows as u64).saturating_mul(n_vocab as u64);
        memory::check(bytes, format_args!("logits of shape ({rows}, {n_vocab})"))?;
        Ok(Logits { model, prompt: ids.into(), want, logits: Vec::new() })
    }
}

impl Work for Logits {
    type Item = Vec<f32>;

    fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    fn begin(&mut self) -> Result<Sequence> {
        let sequence = self.prompt.sequence(self.model.as_ref(), self.want)?;
        let ids = self.prompt.ids.len();
        let (rows, n_vocab) = (ids - self.want.first(ids), self.model.info().n_vocab);
        memory::reserve(&mut self.logits, rows.saturating_mul(n_vocab), format_args!("{rows} x {n_vocab} logits"))?;
        Ok(sequence)
    }

    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32]) -> Result<Step<Vec<f32>>> {
        self.logits.extend_from_slice(logits);
        Ok(match sequence.phase() {
            Some(_) => Step::More(None),
            None => Step::End(Some(std::mem::take(&mut self.logits)), FinishReason::Stop),
        })
    }

    fn status(&self) -> Status {
        Status { prompt: self.prompt.ids.len(), ..Status::default() }
    }
}
