//! One generation: prefills its prompt once, then samples ids one at a time and turns them into text.
//!
//! Decisions: docs/design/runtime.md

use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::model::{Model, Phase, Sequence, Want};
use crate::runtime::sampling::{Distribution, Sampler, Sampling};
use crate::runtime::work::{FinishReason, Status, Step, Work};
use crate::system::sync::Cancel;
use crate::text::detokenizer::Detokenizer;
use crate::text::stop::StopStrings;
use crate::text::tokenizer::Tokenizer;

/// The options of a generation. The caller has checked the ranges.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// At least one id, and fewer than the context holds.
    pub prompt: Vec<u32>,
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

/// The log probability of an id in the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// The state of a generation.
pub struct Generation {
    request: Request,
    model: Arc<dyn Model>,
    tokenizer: Arc<Tokenizer>,
    sequence: Option<Box<dyn Sequence>>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// The ids and text since the last piece.
    pending: Piece,
    /// The sampled id that is not appended yet.
    next: Option<u32>,
    status: Status,
}

impl Generation {
    pub fn new(model: Arc<dyn Model>, tokenizer: Arc<Tokenizer>, request: Request) -> Self {
        let strip_leading_space = tokenizer.strips_leading_space_after(&request.prompt);
        Generation {
            sampler: Sampler::new(request.sampling.clone(), request.seed, tokenizer.stop_ids()),
            detokenizer: Detokenizer::new(tokenizer.clone(), strip_leading_space),
            stops: StopStrings::new(request.stop.clone()),
            model,
            tokenizer,
            sequence: None,
            pending: Piece::default(),
            next: None,
            status: Status {
                prompt: request.prompt.len(),
                limit: request.limited.then_some(request.max_tokens),
                ..Status::default()
            },
            request,
        }
    }

    fn prefill(model: &Arc<dyn Model>, prompt: &[u32]) -> Result<Box<dyn Sequence>> {
        let mut sequence = model.clone().sequence()?;
        sequence.append(prompt, Phase::Prefill, Want::Last)?;
        Ok(sequence)
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

    /// Computes one turn of the prompt, or samples the next id.
    fn step(&mut self, cancel: &Cancel) -> Result<Step<Piece>> {
        let start = Instant::now();
        let sequence = match &mut self.sequence {
            Some(sequence) => sequence,
            none => none.insert(Self::prefill(&self.model, &self.request.prompt)?),
        };
        if let Some(id) = self.next.take() {
            sequence.append(&[id], Phase::Decode, Want::Last)?;
        }
        let more = sequence.advance(cancel)?;
        let decoding = self.status.generated > 0;
        if decoding {
            self.status.decode_time += start.elapsed();
            self.status.decode_passes += usize::from(!more);
        } else {
            self.status.prefilled = sequence.computed();
            self.status.prefill_time += start.elapsed();
        }
        if more {
            return Ok(Step::More(None));
        }
        let logits = sequence.logits();
        let id = self.sampler.sample(logits).ok_or_else(|| {
            let name = self.model.name();
            Error::InvalidModel(format!("{name}: every logit is NaN or -inf: the weights are damaged"))
        })?;
        if !self.request.ignore_eos && self.tokenizer.stop_ids().contains(&id) {
            return Ok(self.end(FinishReason::Stop));
        }
        self.next = Some(id);
        self.status.generated += 1;
        self.pending.ids.push(id);
        if let Some(top) = self.request.top_logprobs {
            let distribution = Distribution::new(logits);
            let top = distribution.top(top).into_iter().map(|id| (id, distribution.logprob(id))).collect();
            self.pending.logprobs.push(TokenLogprob { id, logprob: distribution.logprob(id), top });
        }
        if let Some(text) = self.detokenizer.push(id) {
            let (text, stopped) = self.stops.push(&text);
            self.pending.text.push_str(&text);
            if stopped {
                return Ok(Step::End(self.take_pending(), FinishReason::Stop));
            }
        }
        if self.status.generated == self.request.max_tokens {
            return Ok(self.end(FinishReason::Length));
        }
        let has_text = !self.pending.text.is_empty();
        Ok(Step::More(if has_text { self.take_pending() } else { None }))
    }

    fn status(&self) -> Status {
        self.status
    }

    fn ids(piece: &Piece) -> &[u32] {
        &piece.ids
    }
}
