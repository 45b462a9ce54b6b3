//! The log probabilities of given ids, as work of the scheduler.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::model::{Model, Sequence, Want};
use crate::runtime::prompt::Prompt;
use crate::runtime::sampling::{Distribution, TokenLogprob};
use crate::runtime::work::{FinishReason, Status, Step, Work};
use crate::system::sync::lock;

/// Delivers the log probability of each id from index `start` on, given all before it. An item has those of one pass,
/// so that the logits of a few positions are held at a time.
pub struct Scores {
    model: Arc<dyn Model>,
    /// All ids but the last: the logits at a position are those of the next id.
    prompt: Prompt,
    last: u32,
    /// The next id to score.
    next: usize,
    /// The number of most probable ids that each entry has.
    top: usize,
}

impl Scores {
    /// `start` is from 1 to `ids.len() - 1`.
    pub fn new(model: Arc<dyn Model>, ids: Vec<u32>, start: usize, top: usize) -> Self {
        let (mut ids, mut last) = (ids, 0);
        if let Some(id) = ids.pop() {
            last = id;
        }
        Scores { model, prompt: ids.into(), last, next: start, top }
    }
}

impl Work for Scores {
    type Item = Vec<TokenLogprob>;

    fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    fn begin(&mut self) -> Result<Sequence> {
        self.prompt.sequence(self.model.as_ref(), Want::From(self.next - 1))
    }

    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32]) -> Result<Step<Vec<TokenLogprob>>> {
        let n_vocab = self.model.info().n_vocab;
        let rows = logits.len() / n_vocab;
        let scored = self.prompt.ids.iter().copied().chain([self.last]).skip(self.next).take(rows);
        let ids: Vec<u32> = scored.collect();
        let entries: Vec<Mutex<Option<TokenLogprob>>> = ids.iter().map(|_| Mutex::default()).collect();
        // It shares no pass, so this is not a task of the pool, which must not call the pool.
        self.model.run(rows, &|row| {
            let distribution = Distribution::new(&logits[row * n_vocab..][..n_vocab]);
            *lock(&entries[row]) = Some(distribution.entry(ids[row], self.top));
        });
        self.next += rows;
        let taken = |entry: Mutex<_>| entry.into_inner().unwrap_or_else(PoisonError::into_inner);
        let entries: Vec<TokenLogprob> = entries.into_iter().filter_map(taken).collect();
        if entries.iter().any(|entry| entry.logprob.is_nan()) {
            let file = &self.model.info().file;
            return Err(Error::InvalidModel(format!("{file}: a log probability is NaN: the weights are damaged")));
        }
        Ok(match sequence.phase() {
            Some(_) => Step::More(Some(entries)),
            None => Step::End(Some(entries), FinishReason::Stop),
        })
    }

    fn status(&self) -> Status {
        Status { prompt: self.prompt.ids.len(), ..Status::default() }
    }
}
