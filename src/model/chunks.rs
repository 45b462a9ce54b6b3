//! How many tokens of a prompt go through the model together: a chunk.
//!
//! The activations of a chunk fit a byte budget. One layer of it takes at most half as long again at a long context as at an
//! empty one, so that other sequences get their turns. The results have the same bits whatever the lengths are.
//!
//! Decisions: docs/design/model.md
//! Decisions: docs/design/runtime.md

use crate::compute::ops::{ATTEND_COST, ATTENTION_SCRATCH};

/// The longest chunk. Its tokens share one unpacking of the weights: 2% of the work at 512 tokens, 4% at 256.
pub const LONGEST: usize = 512;
/// Tokens of a tile of packed activations.
const TILE: usize = 16;
/// Kernels multiply up to 3 tiles at a time: shorter chunks are multiples of these.
const STEP: usize = 3 * TILE;
/// The byte budget is this part of the weights, within the limits that follow.
const PART_OF_WEIGHTS: u64 = 8;
const LEAST_BUDGET: u64 = 64 << 20;
const MOST_BUDGET: u64 = 256 << 20;
/// A turn may cost this much at any context, in multiplications: a third of a layer of 512 tokens of Phi-3-mini. Narrow
/// models have short turns, and gain nothing from chunks so short that each of them reads the KV cache for a few tokens.
const LEAST_TURN: u64 = 1 << 34;

/// The sizes of a model that decide the lengths.
#[derive(Copy, Clone, Debug)]
pub struct Sizes {
    /// Numbers that the activations of a token have in all buffers of a pass.
    pub activations: usize,
    /// Features of the widest input of a product.
    pub widest: usize,
    pub n_vocab: usize,
    /// Multiplications of a layer for a token, without attention.
    pub layer_cost: u64,
    /// Features of the query heads together.
    pub q_dim: usize,
    /// Multiplications of the head for a token.
    pub head_cost: u64,
    /// Keys that a token sees at most; None: all before it.
    pub window: Option<usize>,
}

/// The lengths of the chunks of a model.
#[derive(Clone, Debug)]
pub struct Chunks {
    budget: u64,
    sizes: Sizes,
}

impl Chunks {
    /// For a model whose weights have `weights` bytes.
    pub fn new(sizes: Sizes, weights: u64) -> Self {
        Chunks { budget: (weights / PART_OF_WEIGHTS).clamp(LEAST_BUDGET, MOST_BUDGET), sizes }
    }

    /// Tokens of the chunk that starts at `position`; `every`: with the logits of each of them.
    pub fn length(&self, position: usize, every: bool) -> usize {
        let turn = self.longest_turn();
        let steps = (1..=LONGEST / STEP).rev().map(|steps| steps * STEP);
        let lengths = [LONGEST].into_iter().chain(steps).chain([2 * TILE, TILE]);
        let within_time = |&tokens: &usize| tokens <= TILE || self.cost(tokens, position, every) <= turn;
        let within_memory = |tokens: &usize| self.bytes(*tokens, every) <= self.budget;
        lengths.filter(within_time).chain([8, 4, 2]).find(within_memory).unwrap_or(1)
    }

    /// Cost of a turn at most: half as much again as the longest chunk has at an empty context.
    fn longest_turn(&self) -> u64 {
        (self.cost(LONGEST, 0, false) / 2 * 3).max(LEAST_TURN)
    }

    /// Bytes of the activations of a chunk, packed ones and the scratch of attention included.
    pub fn bytes(&self, tokens: usize, every: bool) -> u64 {
        let (tokens, tiles) = (tokens as u64, tokens.next_multiple_of(TILE) as u64);
        let logits = if every { tokens } else { 1 };
        let Sizes { activations, widest, n_vocab, .. } = self.sizes;
        let [activations, widest, n_vocab] = [activations, widest, n_vocab].map(|n| n as u64);
        // Logits are in the result of the head, and in the batch.
        4 * (tokens * activations + tiles * widest + 2 * logits * n_vocab) + ATTENTION_SCRATCH as u64
    }

    /// Multiplications of the longest turn of a chunk: a layer, with the head if every token has logits.
    fn cost(&self, tokens: usize, position: usize, every: bool) -> u64 {
        let Sizes { layer_cost, q_dim, head_cost, window, .. } = self.sizes;
        let keys = (position as u64 + tokens as u64 / 2).min(window.map_or(u64::MAX, |window| window as u64));
        let head = if every { head_cost } else { 0 };
        tokens as u64 * (layer_cost + (ATTEND_COST * q_dim) as u64 * keys + head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::phi3::Config;

    fn phi3_mini() -> Config {
        Config::phi3_mini(131_072)
    }

    fn phi4() -> Config {
        let sizes = (5120, 17_920, 40, 10, 128, 100_352);
        let (hidden, feed_forward, n_head, n_head_kv, head_dim, n_vocab) = sizes;
        Config { hidden, feed_forward, n_head, n_head_kv, head_dim, n_vocab, ..phi3_mini() }
    }

    #[test]
    fn a_chunk_of_the_known_models_is_longest_at_short_contexts() {
        for (config, weights) in [(phi3_mini(), 2_400_000_000), (phi4(), 8_900_000_000)] {
            let chunks = Chunks::new(config.sizes(), weights);
            assert_eq!(chunks.length(0, false), 512);
            assert!(chunks.bytes(512, false) < 256 << 20);
        }
        let mini = Chunks::new(phi3_mini().sizes(), 2_400_000_000);
        assert_eq!([512, 2048, 4000].map(|position| mini.length(position, false)), [512; 3]);
    }

    #[test]
    fn a_turn_costs_half_as_much_again_at_most() {
        let chunks = Chunks::new(phi3_mini().sizes(), 2_400_000_000);
        let empty = chunks.cost(512, 0, false);
        let lengths = [4096, 32_768, 65_536, 131_000].map(|position| (position, chunks.length(position, false)));
        assert_eq!(lengths, [(4096, 512), (32_768, 144), (65_536, 96), (131_000, 48)]);
        for (position, tokens) in lengths {
            let cost = chunks.cost(tokens, position, false);
            assert!((empty..=empty / 2 * 3).contains(&cost), "{cost} at {position}, {empty} at 0");
        }
    }

    #[test]
    fn a_narrow_model_keeps_long_chunks() {
        let narrow = Config {
            hidden: 512,
            feed_forward: 1024,
            n_head: 8,
            n_head_kv: 4,
            head_dim: 64,
            n_vocab: 512,
            ..phi3_mini()
        };
        let chunks = Chunks::new(narrow.sizes(), 5 << 20);
        let lengths = [0, 8192, 16_384, 32_768, 65_536].map(|position| chunks.length(position, false));
        assert_eq!(lengths, [512, 512, 432, 240, 96]);
        assert!(chunks.cost(96, 65_536, false) <= LEAST_TURN);
    }

    #[test]
    fn a_window_bounds_the_cost_of_a_position() {
        let windowed =
            |window| Chunks::new(Config { sliding_window: Some(window), ..phi3_mini() }.sizes(), 2_400_000_000);
        assert_eq!(windowed(2047).length(131_000, false), 512);
        assert_eq!(windowed(16_383).length(16_384, false), 240);
        assert_eq!(windowed(16_383).length(131_000, false), 240);
    }

    #[test]
    fn a_wide_model_takes_short_chunks_and_at_least_one_token() {
        let wide =
            |feed_forward| Config { hidden: 2, feed_forward, n_head: 1, n_head_kv: 1, head_dim: 2, ..phi3_mini() };
        for (feed_forward, expected) in [(1 << 15, 144), (1 << 18, 16), (1 << 19, 4), (1 << 24, 1)] {
            let chunks = Chunks::new(wide(feed_forward).sizes(), 1 << 20);
            let tokens = chunks.length(0, false);
            assert_eq!(tokens, expected, "{feed_forward}");
            assert!(tokens == 1 || chunks.bytes(tokens, false) <= 64 << 20, "{feed_forward}");
        }
    }

    #[test]
    fn the_logits_of_every_token_count() {
        let large = Config { n_vocab: 200_064, ..phi3_mini() };
        let chunks = Chunks::new(large.sizes(), 2_400_000_000);
        let tokens = chunks.length(0, true);
        assert!((16..512).contains(&tokens) && chunks.bytes(tokens, true) <= 256 << 20, "{tokens}");
        assert!(chunks.cost(tokens, 0, true) <= chunks.longest_turn());
    }
}
