//! One generation: takes logits, samples ids one at a time and turns them into text.
//!
//! Decisions: docs/design/runtime.md

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::{Model, Phase, Sequence, Want};
use crate::runtime::prompt::Prompt;
use crate::runtime::sampling::{Distribution, Sampler, Sampling, TokenLogprob};
use crate::runtime::work::{FinishReason, Status, Step, Work};
use crate::text::detokenizer::Detokenizer;
use crate::text::stop::StopStrings;
use crate::text::tokenizer::Tokenizer;

/// The options of a generation. The caller has checked the ranges.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// At least one id, and fewer than the context holds.
    pub prompt: Prompt,
    /// The number of ids to generate at most: the context has room for the prompt and these.
    pub max_tokens: usize,
    /// True if the caller set that limit: progress then has a total.
    pub limited: bool,
    pub sampling: Sampling,
    pub seed: u64,
    pub stop: Vec<String>,
    /// Treats stop ids like any other id.
    pub ignore_eos: bool,
    /// The number of most probable ids reported with each log probability; None: no log probabilities.
    pub top_logprobs: Option<usize>,
}

/// New text and its ids. Only the last piece of a generation may lack text: it has the ids that made none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    pub text: String,
    pub ids: Vec<u32>,
    /// One for each id if the request has `top_logprobs`.
    pub logprobs: Vec<TokenLogprob>,
}

/// The state of a generation.
pub struct Generation {
    request: Request,
    model: Arc<dyn Model>,
    tokenizer: Arc<Tokenizer>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// The ids and text since the last piece.
    pending: Piece,
    generated: usize,
}

impl Generation {
    pub fn new(model: Arc<dyn Model>, tokenizer: Arc<Tokenizer>, request: Request) -> Self {
        let strip_leading_space = tokenizer.strips_leading_space_after(&request.prompt.ids);
        Generation {
            sampler: Sampler::new(request.sampling.clone(), request.seed, tokenizer.stop_ids()),
            detokenizer: Detokenizer::new(tokenizer.clone(), strip_leading_space),
            stops: StopStrings::new(request.stop.clone()),
            model,
            tokenizer,
            pending: Piece::default(),
            generated: 0,
            request,
        }
    }

    fn end(&mut self, reason: FinishReason) -> Step<Piece> {
        let held = self.stops.finish();
        self.pending.text.push_str(&held);
        Step::End(self.take_pending(), reason)
    }

    /// Takes the pending piece, if there is any.
    fn take_pending(&mut self) -> Option<Piece> {
        let piece = std::mem::take(&mut self.pending);
        Some(piece).filter(|piece| !piece.ids.is_empty() || !piece.text.is_empty())
    }
}

impl Work for Generation {
    type Item = Piece;

    fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    fn prompt(&self) -> &Prompt {
        &self.request.prompt
    }

    fn shares_prompt(&self) -> bool {
        self.request.prompt.phases.is_empty()
    }

    fn begin(&mut self) -> Result<Sequence> {
        self.request.prompt.sequence(self.model.as_ref(), Want::Last)
    }

    /// Samples the next id.
    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32]) -> Result<Step<Piece>> {
        let id = self.sampler.sample(logits).ok_or_else(|| {
            let file = &self.model.info().file;
            Error::InvalidModel(format!("{file}: every logit is NaN or -inf: the weights are damaged"))
        })?;
        if !self.request.ignore_eos && self.tokenizer.stop_ids().contains(&id) {
            return Ok(self.end(FinishReason::Stop));
        }
        self.generated += 1;
        self.pending.ids.push(id);
        if let Some(top) = self.request.top_logprobs {
            self.pending.logprobs.push(Distribution::new(logits).entry(id, top));
        }
        if let Some(text) = self.detokenizer.push(id) {
            let (text, stopped) = self.stops.push(&text);
            self.pending.text.push_str(&text);
            if stopped {
                return Ok(Step::End(self.take_pending(), FinishReason::Stop));
            }
        }
        if self.generated == self.request.max_tokens {
            return Ok(self.end(FinishReason::Length));
        }
        self.model.append(sequence, &[id], Phase::Decode, Want::Last)?;
        let has_text = !self.pending.text.is_empty();
        Ok(Step::More(if has_text { self.take_pending() } else { None }))
    }

    fn status(&self) -> Status {
        let limit = self.request.limited.then_some(self.request.max_tokens);
        Status { prompt: self.request.prompt.ids.len(), limit, ..Status::default() }
    }

    fn generated(&self) -> usize {
        self.generated
    }

    fn ids(piece: &Piece) -> &[u32] {
        &piece.ids
    }
}
