//! One generation: a prompt is prefilled once, then ids are sampled one at a time and turned into text.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::detokenizer::Detokenizer;
use crate::error::Result;
use crate::model::{Model, Phase, Sequence, Want};
use crate::sampling::{Distribution, Sampler, Sampling};
use crate::stop::StopStrings;
use crate::threads::Cancel;
use crate::tokenizer::Tokenizer;

/// What to generate. The caller has checked the ranges.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one id, and fewer than the context holds.
    pub prompt: Vec<u32>,
    /// Ids to generate at most: prompt and these fit the context.
    pub max_tokens: usize,
    pub sampling: Sampling,
    pub seed: u64,
    pub stop: Vec<String>,
    /// Stop ids are ids like any other.
    pub ignore_eos: bool,
    /// None: no log probabilities; else how many of the most probable ids come along.
    pub top_logprobs: Option<usize>,
}

/// Why a generation ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, or the context's end.
    Length,
    Cancelled,
    Error,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Error => "error",
        }
    }
}

/// New text and the ids it took. Only the last piece of a generation may lack text: it has the ids that made none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    pub text: String,
    pub ids: Vec<u32>,
    /// Of each id, if they were asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// How probable an id was, in the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// What one step brought.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// An id, and the text that it completed, if it did.
    Token(Option<Piece>),
    /// The end, and what was still held back.
    End(Option<Piece>, FinishReason),
}

/// A generation under way.
pub struct Generation {
    request: Request,
    model: Arc<dyn Model>,
    tokenizer: Arc<Tokenizer>,
    sequence: Option<Box<dyn Sequence>>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Ids that no text has been handed out for yet.
    pending: Piece,
    last: Option<u32>,
    generated: usize,
    pub prefill_time: Duration,
    pub decode_time: Duration,
    /// Passes that `decode_time` took; the first id comes from the prefill.
    pub decode_passes: usize,
}

impl Generation {
    pub fn new(model: Arc<dyn Model>, tokenizer: Arc<Tokenizer>, request: Request) -> Self {
        let strips = tokenizer.strips_leading_space_after(&request.prompt);
        Generation {
            sampler: Sampler::new(request.sampling.clone(), request.seed, tokenizer.stop_ids()),
            detokenizer: Detokenizer::new(tokenizer.clone(), strips),
            stops: StopStrings::new(request.stop.clone()),
            model,
            tokenizer,
            sequence: None,
            pending: Piece::default(),
            last: None,
            generated: 0,
            prefill_time: Duration::ZERO,
            decode_time: Duration::ZERO,
            decode_passes: 0,
            request,
        }
    }

    /// The next id. The first step computes the whole prompt. Not to be called again after `End` or an error.
    pub fn step(&mut self, cancel: &Cancel) -> Result<Step> {
        let start = Instant::now();
        let sequence = match &mut self.sequence {
            Some(sequence) => sequence,
            None => self.sequence.insert(self.model.clone().sequence()?),
        };
        let (ids, phase, time) = match &self.last {
            Some(id) => (std::slice::from_ref(id), Phase::Decode, &mut self.decode_time),
            None => (&self.request.prompt[..], Phase::Prefill, &mut self.prefill_time),
        };
        let logits = sequence.forward(ids, phase, Want::Last, cancel)?;
        *time += start.elapsed();
        self.decode_passes += usize::from(self.last.is_some());
        let id = self.sampler.sample(logits)?;
        if !self.request.ignore_eos && self.tokenizer.stop_ids().contains(&id) {
            return Ok(self.end(FinishReason::Stop));
        }
        self.last = Some(id);
        self.generated += 1;
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
                return Ok(Step::End(self.rest(), FinishReason::Stop));
            }
        }
        if self.generated == self.request.max_tokens {
            return Ok(self.end(FinishReason::Length));
        }
        let has_text = !self.pending.text.is_empty();
        Ok(Step::Token(if has_text { self.rest() } else { None }))
    }

    fn end(&mut self, reason: FinishReason) -> Step {
        let held = self.stops.finish();
        self.pending.text.push_str(&held);
        Step::End(self.rest(), reason)
    }

    /// Everything up to here that was not handed out yet.
    fn rest(&mut self) -> Option<Piece> {
        let piece = std::mem::take(&mut self.pending);
        Some(piece).filter(|piece| !piece.ids.is_empty() || !piece.text.is_empty())
    }
}
