//! One generation: takes logits, samples ids one at a time and turns them into text.
//!
//! Decisions: docs/design/runtime.md

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::{Model, Phase, Sequence, Want};
use crate::runtime::draft::lookup::Lookup;
use crate::runtime::draft::survival::Survival;
use crate::runtime::draft::{Drafter, Drafts};
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
    /// Drafts ids, and computes them in the pass of the id before them. It does not change the text.
    pub speculate: bool,
    /// What the answer will mostly repeat: drafts are looked up in it too.
    pub prediction: Vec<u32>,
    /// The ids to generate, for measurements: each is sampled all the same, then replaced. None of them is a stop id.
    pub replay: Option<Vec<u32>>,
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
    drafts: Option<Drafts>,
    /// The next row of the current logits.
    row: usize,
    /// Drafts that were computed, and accepted.
    drafted: (usize, usize),
}

impl Generation {
    pub fn new(model: Arc<dyn Model>, tokenizer: Arc<Tokenizer>, request: Request) -> Self {
        let strip_leading_space = tokenizer.strips_leading_space_after(&request.prompt.ids);
        let speculates = request.speculate && model.info().width > 1;
        let lookup = speculates.then(|| Lookup::new(&request.prompt.ids, &request.prediction).ok()).flatten();
        Generation {
            sampler: Sampler::new(request.sampling.clone(), request.seed, tokenizer.stop_ids()),
            detokenizer: Detokenizer::new(tokenizer.clone(), strip_leading_space),
            stops: StopStrings::new(request.stop.clone()),
            model,
            tokenizer,
            pending: Piece::default(),
            generated: 0,
            drafts: lookup.map(|lookup| Drafts::new(Box::new(lookup))),
            row: 0,
            drafted: (0, 0),
            request,
        }
    }

    /// Drafts with another drafter. It knows the prompt.
    pub fn draft_with(&mut self, drafter: Box<dyn Drafter>) {
        self.drafts = Some(Drafts::new(drafter));
    }

    /// The number of ids to generate at most.
    fn limit(&self) -> usize {
        self.request.replay.as_ref().map_or(usize::MAX, Vec::len).min(self.request.max_tokens)
    }

    /// Samples an id of a row of logits, and says how the text ends if it does.
    fn sample(&mut self, logits: &[f32]) -> Result<(u32, Option<FinishReason>)> {
        let sampled = self.sampler.choose(logits).ok_or_else(|| {
            let file = &self.model.info().file;
            Error::InvalidModel(format!("{file}: every logit is NaN or -inf: the weights are damaged"))
        })?;
        let id = match &self.request.replay {
            Some(ids) => match ids.get(self.generated) {
                Some(id) => *id,
                None => return Ok((sampled, Some(FinishReason::Length))),
            },
            None if !self.request.ignore_eos && self.tokenizer.stop_ids().contains(&sampled) => {
                return Ok((sampled, Some(FinishReason::Stop)));
            }
            None => sampled,
        };
        self.sampler.push(id);
        self.generated += 1;
        self.pending.ids.push(id);
        if let Some(top) = self.request.top_logprobs {
            self.pending.logprobs.push(Distribution::new(logits).entry(id, top));
        }
        if let Some(text) = self.detokenizer.push(id) {
            let (text, stopped) = self.stops.push(&text);
            self.pending.text.push_str(&text);
            if stopped {
                return Ok((id, Some(FinishReason::Stop)));
            }
        }
        Ok((id, Some(FinishReason::Length).filter(|_| self.generated == self.limit())))
    }

    fn end(&mut self, reason: FinishReason) -> Step<Piece> {
        let held = self.stops.finish();
        self.pending.text.push_str(&held);
        Step::End(self.take_pending(), reason)
    }

    /// Takes the pending piece, if it has text.
    fn take_text(&mut self) -> Option<Piece> {
        if self.pending.text.is_empty() { None } else { self.take_pending() }
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

    /// Samples the next id. While it equals the draft in its place, the row after it is a row of the text too.
    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32]) -> Result<Step<Piece>> {
        let n_vocab = self.model.info().n_vocab;
        let (row, drafts) = (self.row, (logits.len() / n_vocab).saturating_sub(1));
        let (id, end) = self.sample(&logits[row * n_vocab..][..n_vocab])?;
        let place = sequence.ids.len() - drafts + row;
        if row == 0 {
            self.drafted.0 += drafts;
        }
        if let Some(drafts) = &mut self.drafts {
            drafts.push(id);
        }
        let right = row < drafts && sequence.ids[place] == id;
        self.drafted.1 += usize::from(right);
        if right && end.is_none() {
            self.row += 1;
            return Ok(Step::Again(self.take_text()));
        }
        self.row = 0;
        sequence.truncate(place); // as it is without drafts
        if let Some(reason) = end {
            return Ok(self.end(reason));
        }
        self.model.append(sequence, &[id], Phase::Decode, Want::Last)?;
        Ok(Step::More(self.take_text()))
    }

    fn draft(&mut self, sequence: &Sequence, most: usize, survival: &mut Survival) -> Vec<f32> {
        // Each row gives an id, and the last of them may end the text.
        let left = self.limit().saturating_sub(self.generated + 1);
        let most = most.min(left).min(self.model.room(sequence));
        match &mut self.drafts {
            Some(drafts) if most > 0 && sequence.left() == 1 => drafts.draft(most, &self.sampler, survival),
            _ => Vec::new(),
        }
    }

    fn extend(&mut self, sequence: &mut Sequence, n: usize) -> Result<()> {
        let Some(drafts) = &self.drafts else { return Ok(()) };
        let from = sequence.logits_from;
        self.model.append(sequence, drafts.first(n), Phase::Decode, Want::EVERY)?;
        sequence.logits_from = from; // the id before them wants its logits as well
        Ok(())
    }

    fn status(&self) -> Status {
        let limit = self.request.limited.then_some(self.request.max_tokens);
        Status { prompt: self.request.prompt.ids.len(), limit, ..Status::default() }
    }

    fn generated(&self) -> usize {
        self.generated
    }

    fn drafted(&self) -> (usize, usize) {
        self.drafted
    }

    fn ids(piece: &Piece) -> &[u32] {
        &piece.ids
    }
}
