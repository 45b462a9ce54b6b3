//! The probability that a draft is accepted, by its source, the length of its match and its position, as the streams of a
//! model have shown.
//!
//! Decisions: docs/design/runtime.md

use super::{Basis, MOST, Source};

/// The longest match of each bucket, and the acceptance that is assumed of it: a first guess from chats, summaries, code and
/// edits (docs/design/runtime.md).
const BUCKETS: [(usize, f32); 6] = [(1, 0.25), (2, 0.4), (4, 0.55), (8, 0.75), (16, 0.88), (usize::MAX, 0.95)];
const PRIOR_OF_MODEL: f32 = 0.7;
/// Observations that the first guess counts for.
const WEIGHT: f32 = 4.0;
/// What a new observation leaves of the older ones: the last 50 decide.
const DECAY: f32 = 0.98;

/// Counts of a kind of draft.
#[derive(Copy, Clone, Default)]
struct Counts {
    accepted: f32,
    all: f32,
}

/// The acceptance of drafts so far.
pub struct Survival {
    /// By source, bucket and position.
    counts: [[[Counts; MOST]; BUCKETS.len()]; 3],
}

impl Default for Survival {
    fn default() -> Self {
        Survival { counts: [[[Counts::default(); MOST]; BUCKETS.len()]; 3] }
    }
}

fn bucket(length: usize) -> usize {
    BUCKETS.iter().position(|(longest, _)| length <= *longest).unwrap_or(BUCKETS.len() - 1)
}

impl Survival {
    /// Records whether the id at a position of a draft was right, given that all before it were.
    pub fn record(&mut self, basis: Basis, position: usize, accepted: bool) {
        let counts = &mut self.counts[basis.source as usize][bucket(basis.length)][position.min(MOST - 1)];
        counts.accepted = counts.accepted * DECAY + f32::from(accepted);
        counts.all = counts.all * DECAY + 1.0;
    }

    /// The probability that the id at a position is right, given that all before it are.
    pub fn probability(&self, basis: Basis, position: usize) -> f32 {
        let counts = self.counts[basis.source as usize][bucket(basis.length)][position.min(MOST - 1)];
        let prior = match basis.source {
            Source::Model => PRIOR_OF_MODEL,
            _ => BUCKETS[bucket(basis.length + position)].1, // the ids before it have made the match longer
        };
        (counts.accepted + WEIGHT * prior) / (counts.all + WEIGHT)
    }

    /// For each of the first `n` positions the probability that it and all before it are right.
    pub fn products(&self, basis: Basis, n: usize) -> Vec<f32> {
        let mut product = 1.0;
        (0..n)
            .map(|position| {
                product *= self.probability(basis, position);
                product
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(length: usize) -> Basis {
        Basis { source: Source::History, length }
    }

    #[test]
    fn the_first_guess_rises_with_the_match() {
        let survival = Survival::default();
        let guesses = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32].map(|length| survival.probability(history(length), 0));
        assert_eq!(guesses, [0.25, 0.4, 0.55, 0.55, 0.75, 0.75, 0.88, 0.88, 0.95, 0.95]);
        let products = survival.products(history(1), 3);
        assert_eq!(products, [0.25, 0.25 * 0.4, 0.25 * 0.4 * 0.55]);
    }

    #[test]
    fn what_was_seen_outweighs_the_guess_for_its_kind_alone() {
        let mut survival = Survival::default();
        (0..50).for_each(|_| survival.record(history(32), 0, false));
        assert!(survival.probability(history(20), 0) < 0.12, "of the same bucket");
        assert_eq!(survival.probability(history(32), 1), 0.95, "another position");
        assert_eq!(survival.probability(history(8), 0), 0.75, "another length");
        assert_eq!(survival.probability(Basis { source: Source::Prediction, length: 32 }, 0), 0.95);
        (0..200).for_each(|_| survival.record(history(32), 0, true));
        assert!(survival.probability(history(32), 0) > 0.95, "old observations fade");
    }
}
