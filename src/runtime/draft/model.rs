//! Drafts of a small model that has the same tokens.
//!
//! It draws with a copy of the text's own sampler, so with the same random numbers: the two models then agree as often as
//! their distributions allow (Daliri et al., 2024, <https://arxiv.org/abs/2408.07978>). It computes in the turn of the pass,
//! its prompt at once.
//!
//! Decisions: docs/design/runtime.md

use std::sync::Arc;

use super::{Basis, Drafter, Source};
use crate::error::Result;
use crate::model::{self, Batch, Model, Phase, Want};
use crate::runtime::sampling::Sampler;
use crate::system::sync::Cancel;

pub struct ModelDrafter {
    model: Arc<dyn Model>,
    /// The text as far as it is computed, perhaps with drafts after it.
    batch: Batch,
    text: Vec<u32>,
}

impl ModelDrafter {
    /// Its token ids are those of the model that it drafts for.
    pub fn new(model: Arc<dyn Model>, prompt: &[u32]) -> Result<Self> {
        let batch = model::single(model.as_ref(), &Cancel::default())?;
        Ok(ModelDrafter { model, batch, text: prompt.to_vec() })
    }

    /// The logits after the ids, which are added.
    fn compute(&mut self, ids: &[u32], phase: Phase) -> Result<Vec<f32>> {
        model::compute(self.model.as_ref(), &mut self.batch, ids, phase, Want::Last)
    }
}

impl Drafter for ModelDrafter {
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.text.extend_from_slice(ids);
        Ok(())
    }

    fn draft(&mut self, most: usize, sampler: &Sampler, draft: &mut Vec<u32>) -> Result<Option<Basis>> {
        let most = most.min(self.model.info().context_length.saturating_sub(self.text.len()));
        if most == 0 || self.text.is_empty() {
            return Ok(None);
        }
        // Of the drafts before, it keeps those that were right. At least the last id is computed, for its logits.
        let sequence = &mut self.batch.members[0].sequence;
        let right = sequence.ids.iter().zip(&self.text).take_while(|(a, b)| a == b).count();
        sequence.truncate(right.min(self.text.len() - 1));
        let (start, phase) = match sequence.kv.len() {
            0 => (0, Phase::Prefill), // the window may have moved past what a truncated sequence needs
            computed => (computed, Phase::Decode),
        };
        sequence.truncate(start);
        let new = self.text[start..].to_vec();
        let mut logits = self.compute(&new, phase)?;
        let mut sampler = sampler.clone();
        while let Some(id) = sampler.sample(&logits) {
            draft.push(id);
            if draft.len() == most {
                break;
            }
            logits = self.compute(&[id], Phase::Decode)?;
        }
        Ok(Some(Basis { source: Source::Model, length: 0 }))
    }
}
