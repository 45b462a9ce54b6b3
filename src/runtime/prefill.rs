//! Keys and values of given ids, as work of the scheduler: a prompt that is read before it is asked, or a chat that is saved.

use std::sync::Arc;

use crate::error::Result;
use crate::kv::table::Table;
use crate::model::{Model, Sequence, Want};
use crate::runtime::prompt::Prompt;
use crate::runtime::work::{FinishReason, Status, Step, Work};

/// Delivers one item: a table with all positions, if it is wanted.
pub struct Prefill {
    model: Arc<dyn Model>,
    prompt: Prompt,
    wants_table: bool,
}

impl Prefill {
    pub fn new(model: Arc<dyn Model>, prompt: Prompt, wants_table: bool) -> Self {
        Prefill { model, prompt, wants_table }
    }
}

impl Work for Prefill {
    type Item = Option<Table>;

    fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    fn begin(&mut self) -> Result<Sequence> {
        self.prompt.sequence(self.model.as_ref(), Want::From(usize::MAX))
    }

    fn accept(&mut self, sequence: &mut Sequence, _: &[f32]) -> Result<Step<Option<Table>>> {
        let table = self.wants_table.then(|| sequence.kv.fork());
        Ok(Step::End(Some(table), FinishReason::Stop))
    }

    fn status(&self) -> Status {
        Status { prompt: self.prompt.ids.len(), ..Status::default() }
    }
}
