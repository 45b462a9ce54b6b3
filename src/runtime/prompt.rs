//! A prompt: ids, and what decides whether their keys and values are held already.

use std::sync::Arc;

use crate::compute::kernels::Phase;
use crate::error::Result;
use crate::kv::phases::Phases;
use crate::kv::tree::Holder;
use crate::model::{Model, Sequence, Want};

#[derive(Clone, Debug)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// Of the first ids. The others are prefilled.
    pub phases: Phases,
    /// Prompts of another scope share no keys and values with it.
    pub scope: Arc<str>,
    /// Whom its keys and values are held for.
    pub holder: Holder,
}

impl Default for Prompt {
    fn default() -> Self {
        Prompt { ids: Vec::new(), phases: Phases::default(), scope: Arc::from(""), holder: Holder::Anyone }
    }
}

/// All ids are prefilled, and shared with every prompt without a scope.
impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Prompt { ids, ..Prompt::default() }
    }
}

impl Prompt {
    /// A sequence with these ids to compute. `want`: of all ids.
    pub fn sequence(&self, model: &dyn Model, want: Want) -> Result<Sequence> {
        let mut sequence = model.sequence()?;
        sequence.scope = self.scope.clone();
        let mut start = 0;
        while start < self.ids.len() {
            let (phase, end) = match start < self.phases.len() {
                true => (self.phases.at(start), self.phases.run_end(start).min(self.ids.len())),
                false => (Phase::Prefill, self.ids.len()),
            };
            let ids = &self.ids[start..end];
            let want = match want {
                Want::Last if end == self.ids.len() => Want::Last,
                Want::Last => Want::From(ids.len()),
                Want::From(first) => Want::From(first.saturating_sub(start).min(ids.len())),
            };
            model.append(&mut sequence, ids, phase, want)?;
            start = end;
        }
        Ok(sequence)
    }
}
