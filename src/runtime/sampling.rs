//! Samples a token id from logits.
//!
//! The steps in order:
//!
//! 1. logit bias
//! 2. repeat penalty (Keskar et al., 2019, <https://arxiv.org/abs/1909.05858>): positive logits are divided, negative ones
//!    multiplied
//! 3. presence and frequency penalty, as OpenAI defines them
//! 4. temperature
//! 5. top-k (Fan et al., 2018, <https://arxiv.org/abs/1805.04833>)
//! 6. top-p (Holtzman et al., 2019, <https://arxiv.org/abs/1904.09751>)
//! 7. min-p (Nguyen et al., 2024, <https://arxiv.org/abs/2407.01082>)
//! 8. a draw
//!
//! Temperature 0 is greedy: the largest logit after bias and penalties, the lowest id among equals. All functions are
//! `libm`'s, so that a seed draws the same id on every platform.

use std::cmp::Ordering;
use std::collections::HashMap;

/// The sampling options. The caller has checked the ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// 0: off.
    pub top_k: usize,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub repeat_penalty: f32,
    /// The number of last generated ids that the repeat penalty applies to; None: all.
    pub repeat_last_n: Option<usize>,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Sampling {
    /// The model's own distribution: temperature 1, everything else off.
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: Some(64),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

/// Draws the ids of one generation.
#[derive(Clone)]
pub struct Sampler {
    sampling: Sampling,
    /// Stop ids are exempt from the repeat penalty.
    stop_ids: Vec<u32>,
    random: SplitMix64,
    generated: Vec<u32>,
    counts: HashMap<u32, u32>,
    /// The logits of the current id, after bias and penalties.
    biased: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Copy, Clone)]
struct Candidate {
    id: u32,
    /// First a logit, later a probability up to a common factor.
    weight: f32,
}

impl Sampler {
    pub fn new(sampling: Sampling, seed: u64, stop_ids: &[u32]) -> Self {
        Sampler {
            sampling,
            stop_ids: stop_ids.to_vec(),
            random: SplitMix64(seed),
            generated: Vec::new(),
            counts: HashMap::new(),
            biased: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// The next id; None when no logit is a number. `logits` is (n_vocab).
    pub fn sample(&mut self, logits: &[f32]) -> Option<u32> {
        let id = self.choose(logits)?;
        self.push(id);
        Some(id)
    }

    /// The next id, which does not count as generated.
    pub fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        let mut biased = std::mem::take(&mut self.biased);
        biased.clear();
        biased.extend_from_slice(logits);
        self.penalize(&mut biased);
        let id = self.choose_among(&biased);
        self.biased = biased;
        id
    }

    fn choose_among(&mut self, logits: &[f32]) -> Option<u32> {
        let (greatest, logit) = greatest(logits)?;
        if self.sampling.temperature == 0.0 || logit == f32::INFINITY {
            return Some(greatest);
        }
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        candidates.extend((0..).zip(logits).map(|(id, &weight)| Candidate { id, weight: number(weight) }));
        let id = self.draw(&mut candidates, logit);
        self.candidates = candidates;
        Some(id)
    }

    /// Records a generated id.
    pub fn push(&mut self, id: u32) {
        self.generated.push(id);
        *self.counts.entry(id).or_default() += 1;
    }

    /// Bias and penalties.
    fn penalize(&self, logits: &mut [f32]) {
        let s = &self.sampling;
        for &(id, bias) in &s.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = number(*logit) + bias;
            }
        }
        if s.repeat_penalty != 1.0 {
            let last = s.repeat_last_n.unwrap_or(usize::MAX).min(self.generated.len());
            let mut recent = self.generated[self.generated.len() - last..].to_vec();
            recent.sort_unstable();
            recent.dedup();
            for id in recent.into_iter().filter(|id| !self.stop_ids.contains(id)) {
                let logit = &mut logits[id as usize];
                *logit = if *logit < 0.0 { *logit * s.repeat_penalty } else { *logit / s.repeat_penalty };
            }
        }
        if s.presence_penalty != 0.0 || s.frequency_penalty != 0.0 {
            for (&id, &count) in &self.counts {
                logits[id as usize] -= s.presence_penalty + s.frequency_penalty * count as f32;
            }
        }
    }

    fn draw(&mut self, candidates: &mut Vec<Candidate>, greatest: f32) -> u32 {
        let s = &self.sampling;
        for candidate in candidates.iter_mut() {
            candidate.weight = libm::expf((candidate.weight - greatest) / s.temperature);
        }
        if s.top_k > 0 && s.top_k < candidates.len() {
            candidates.select_nth_unstable_by(s.top_k, descending);
            candidates.truncate(s.top_k);
        }
        if s.top_p < 1.0 {
            keep_nucleus(candidates, s.top_p);
        }
        if s.min_p > 0.0 {
            // The greatest has weight 1, so min-p's bound relative to it is min_p itself.
            candidates.retain(|candidate| candidate.weight >= s.min_p);
        }
        candidates.sort_unstable_by_key(|candidate| candidate.id);
        let total = sum(candidates);
        let mut left = self.random.unit() * total;
        for candidate in candidates.iter() {
            left -= candidate.weight as f64;
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding left a remainder: the last candidate that can be drawn takes it.
        candidates.iter().rev().find(|candidate| candidate.weight > 0.0).map_or(0, |candidate| candidate.id)
    }
}

/// Keeps the smallest set of the most probable candidates that has at least the share `top_p`; at least one.
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f32) {
    candidates.sort_unstable_by_key(|candidate| candidate.id); // the order in which the total is summed
    let enough = top_p as f64 * sum(candidates);
    // A nucleus is usually small: sort the 64 most probable, and more only if their share is too small.
    let mut sorted = 0;
    let mut share = 0.0;
    while sorted < candidates.len() {
        let next = (4 * sorted).max(64).min(candidates.len());
        if next < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(next - sorted, descending);
        }
        candidates[sorted..next].sort_unstable_by(descending);
        for (i, candidate) in candidates[sorted..next].iter().enumerate() {
            share += candidate.weight as f64;
            if share >= enough {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted = next;
    }
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight as f64).sum()
}

/// A logit that is NaN counts as -inf.
fn number(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// The greatest logit in the order of `descending`, with its id; None if there is none above -inf.
fn greatest(logits: &[f32]) -> Option<(u32, f32)> {
    // As integers in the order of `total_cmp`: their maximum takes vector instructions, a maximum of pairs does not.
    let key = |logit: f32| {
        let bits = number(logit).to_bits() as i32;
        bits ^ ((bits >> 31) as u32 >> 1) as i32
    };
    let most = logits.iter().map(|&logit| key(logit)).max()?;
    let id = logits.iter().position(|&logit| key(logit) == most)?;
    Some((id as u32, number(logits[id]))).filter(|(_, logit)| *logit > f32::NEG_INFINITY)
}

/// Orders by weight, the greatest first; among equals the lower id first.
fn descending(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// The log probability of an id in the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// The model's own distribution at one position, before penalties and temperature.
pub struct Distribution<'a> {
    logits: &'a [f32],
    /// `ln(sum(exp(logit)))`
    log_total: f64,
}

impl<'a> Distribution<'a> {
    pub fn new(logits: &'a [f32]) -> Self {
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let total: f64 = logits.iter().filter(|l| !l.is_nan()).map(|&l| libm::exp(l as f64 - greatest)).sum();
        Distribution { logits, log_total: greatest + libm::log(total) }
    }

    pub fn logprob(&self, id: u32) -> f32 {
        (self.logits[id as usize] as f64 - self.log_total) as f32
    }

    /// The log probability of an id, with those of the `top` most probable ids.
    pub fn entry(&self, id: u32, top: usize) -> TokenLogprob {
        let top = self.top(top).into_iter().map(|id| (id, self.logprob(id))).collect();
        TokenLogprob { id, logprob: self.logprob(id), top }
    }

    /// The `n` most probable ids, the most probable first.
    pub fn top(&self, n: usize) -> Vec<u32> {
        let n = n.min(self.logits.len());
        if n == 0 {
            return Vec::new();
        }
        let mut all: Vec<Candidate> = (0..).zip(self.logits).map(|(id, &weight)| Candidate { id, weight }).collect();
        all.retain(|candidate| !candidate.weight.is_nan());
        if n < all.len() {
            all.select_nth_unstable_by(n, descending);
            all.truncate(n);
        }
        all.sort_unstable_by(descending);
        all.into_iter().map(|candidate| candidate.id).collect()
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014, <https://doi.org/10.1145/2660193.2660195>): one addition and one hash per draw,
/// and every seed is good.
#[derive(Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    /// Uniform in [0, 1), 53 bits.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of each id in many first draws.
    fn shares(sampling: &Sampling, logits: &[f32]) -> Vec<f64> {
        const DRAWS: u64 = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..DRAWS {
            counts[Sampler::new(sampling.clone(), seed, &[]).sample(logits).unwrap() as usize] += 1.0;
        }
        counts.iter().map(|count| count / DRAWS as f64).collect()
    }

    fn logits(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    #[track_caller]
    fn assert_shares(sampling: &Sampling, probabilities: &[f64], expected: &[f64]) {
        let shares = shares(sampling, &logits(probabilities));
        assert!(
            shares.iter().zip(expected).all(|(s, e)| (s - e).abs() < 0.015 && (*e > 0.0 || *s == 0.0)),
            "{shares:?}"
        );
    }

    #[test]
    fn plain_draws_follow_the_distribution() {
        assert_shares(&Sampling::default(), &[0.5, 0.2, 0.3], &[0.5, 0.2, 0.3]);
    }

    #[test]
    fn temperature_sharpens() {
        let squares = 0.25 + 0.04 + 0.09;
        let expected = [0.25 / squares, 0.04 / squares, 0.09 / squares];
        assert_shares(&Sampling { temperature: 0.5, ..Default::default() }, &[0.5, 0.2, 0.3], &expected);
    }

    #[test]
    fn top_k_keeps_the_k_greatest_and_the_lower_id_among_equals() {
        assert_shares(
            &Sampling { top_k: 2, ..Default::default() },
            &[0.1, 0.5, 0.1, 0.1, 0.2],
            &[0.0, 5.0 / 7.0, 0.0, 0.0, 2.0 / 7.0],
        );
        assert_shares(&Sampling { top_k: 1, ..Default::default() }, &[0.2, 0.4, 0.4], &[0.0, 1.0, 0.0]);
    }

    #[test]
    fn top_p_is_the_smallest_set_that_reaches_p_of_what_top_k_left() {
        assert_shares(&Sampling { top_p: 0.6, ..Default::default() }, &[0.5, 0.2, 0.3], &[0.625, 0.0, 0.375]);
        assert_shares(&Sampling { top_p: 0.01, ..Default::default() }, &[0.5, 0.2, 0.3], &[1.0, 0.0, 0.0]);
        // Renormalized after top_k: 0.4 / 0.7 = 0.57 reaches 0.55 alone, where 0.4 would not.
        assert_shares(&Sampling { top_k: 2, top_p: 0.55, ..Default::default() }, &[0.4, 0.3, 0.3], &[1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_wide_nucleus_is_found_beyond_the_first_few() {
        let sampling = Sampling { top_p: 0.5, ..Default::default() };
        let equal = vec![0f32; 1000];
        let mut candidates: Vec<_> = (0..).zip(&equal).map(|(id, _)| Candidate { id, weight: 1.0 }).collect();
        keep_nucleus(&mut candidates, 0.5);
        assert_eq!(candidates.len(), 500);
        let drawn = (0..2000).map(|seed| Sampler::new(sampling.clone(), seed, &[]).sample(&equal).unwrap());
        assert!(drawn.max().unwrap() < 500, "among equals the lower ids are kept");
    }

    #[test]
    fn min_p_is_relative_to_the_greatest() {
        assert_shares(&Sampling { min_p: 0.5, ..Default::default() }, &[0.5, 0.2, 0.3], &[0.625, 0.0, 0.375]);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Default::default() }, 1, &[]);
        assert_eq!(sampler.sample(&[0.0, 2.0, 2.0, f32::NAN]), Some(1));
    }

    #[test]
    fn the_greatest_logit_is_the_first_in_the_order_of_candidates() {
        let odd = [f32::NAN, -f32::NAN, f32::NEG_INFINITY, 0.0, -0.0, -1.5, f32::MIN_POSITIVE, 2.0, 2.0, f32::INFINITY];
        let mut random = SplitMix64(1);
        for most in 1..=odd.len() {
            for _ in 0..200 {
                let length = 1 + (random.unit() * 20.0) as usize;
                let logits: Vec<f32> = (0..length).map(|_| odd[(random.unit() * most as f64) as usize]).collect();
                let candidates = (0..).zip(&logits).map(|(id, &logit)| Candidate { id, weight: number(logit) });
                let first = candidates.min_by(descending).filter(|first| first.weight > f32::NEG_INFINITY);
                let bits = |(id, logit): (u32, f32)| (id, logit.to_bits());
                let expected = first.map(|first| bits((first.id, first.weight)));
                assert_eq!(greatest(&logits).map(bits), expected, "{logits:?}");
            }
        }
    }

    #[test]
    fn a_choice_does_not_count_before_it_is_pushed() {
        let sampling = Sampling { temperature: 0.0, frequency_penalty: 1.5, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling, 1, &[]);
        assert_eq!([sampler.choose(&[3.0, 2.0]), sampler.choose(&[3.0, 2.0])], [Some(0); 2]);
        sampler.push(0);
        assert_eq!(sampler.choose(&[3.0, 2.0]), Some(1));
    }

    #[test]
    fn the_repeat_penalty_looks_at_the_last_generated_ids_each_once() {
        let sampling = Sampling { temperature: 0.0, repeat_penalty: 2.0, repeat_last_n: Some(1), ..Default::default() };
        let mut sampler = Sampler::new(sampling, 1, &[2]);
        let logits = [3.0, 2.0, 1.0];
        assert_eq!(sampler.sample(&logits), Some(0));
        assert_eq!(sampler.sample(&logits), Some(1), "3 / 2 < 2");
        assert_eq!(sampler.sample(&logits), Some(0), "0 is no longer among the last one");
        let negative = [-1.0, -1.5, -9.0];
        assert_eq!(sampler.sample(&negative), Some(1), "-1 * 2 < -1.5");
    }

    #[test]
    fn stop_ids_are_exempt_from_the_repeat_penalty() {
        let sampling = Sampling { temperature: 0.0, repeat_penalty: 9.0, ..Default::default() };
        let mut sampler = Sampler::new(sampling, 1, &[0]);
        assert_eq!(sampler.sample(&[3.0, 2.0]), Some(0));
        assert_eq!(sampler.sample(&[3.0, 2.0]), Some(0));
    }

    #[test]
    fn presence_counts_once_and_frequency_every_time() {
        let mut sampler =
            Sampler::new(Sampling { temperature: 0.0, presence_penalty: 1.5, ..Default::default() }, 1, &[]);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.sample(&[3.0, 2.0]).unwrap()).collect();
        assert_eq!(drawn, [0, 1, 0, 0]);
        let mut sampler =
            Sampler::new(Sampling { temperature: 0.0, frequency_penalty: 1.5, ..Default::default() }, 1, &[]);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.sample(&[3.0, 2.0]).unwrap()).collect();
        assert_eq!(drawn, [0, 1, 0, 1]);
    }

    #[test]
    fn bias_comes_before_penalties_and_can_ban_an_id() {
        assert_shares(
            &Sampling { logit_bias: vec![(0, -100.0)], ..Default::default() },
            &[0.5, 0.2, 0.3],
            &[0.0, 0.4, 0.6],
        );
    }

    #[test]
    fn a_model_without_numbers_is_an_error() {
        let mut sampler = Sampler::new(Sampling::default(), 1, &[]);
        assert_eq!(sampler.sample(&[f32::NAN, f32::NAN]), None);
        assert_eq!(sampler.sample(&[f32::NAN, 1.0]), Some(1));
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let logits = logits(&[0.5, 0.2, 0.3]);
        let distribution = Distribution::new(&logits);
        assert!((distribution.logprob(1) as f64 - 0.2f64.ln()).abs() < 1e-6);
        assert_eq!(distribution.top(2), [0, 2]);
        assert_eq!(distribution.top(9), [0, 2, 1]);
    }
}
