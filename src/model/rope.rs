//! Rotary position embedding tables, as Hugging Face computes them: RoPE (Su et al., 2021,
//! <https://arxiv.org/abs/2104.09864>) and LongRoPE (Ding et al., 2024, <https://arxiv.org/abs/2402.13753>).
//!
//! `inv_freq[i] = 1 / (factor[i] * base^(2i / d))`; cos and sin are multiplied by the attention factor. `phi3.rs` chooses
//! the set of factors by the length of the sequence.
//!
//! Decisions: docs/design/model.md

use crate::compute::ops::Angles;
use crate::error::Result;
use crate::system::memory;

/// The parameters of LongRoPE, of a file with two sets of factors.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// (rotated / 2): for sequences of at most `original_context` positions.
    pub short: Vec<f32>,
    /// (rotated / 2): for every position of a longer sequence.
    pub long: Vec<f32>,
    pub original_context: usize,
    pub attn_factor: f32,
}

/// Frequencies of one model.
#[derive(Debug)]
pub struct Rope {
    /// (rotated / 2)
    short: Vec<f32>,
    long: Option<Long>,
    attn_factor: f32,
}

#[derive(Debug)]
struct Long {
    inv_freq: Vec<f32>,
    original_context: usize,
}

impl Rope {
    /// `rotated` features of each head are rotated, in pairs.
    pub fn new(rotated: usize, base: f32, long_rope: Option<&LongRope>) -> Self {
        let plain = vec![1.0; rotated / 2];
        match long_rope {
            None => Rope { short: inv_freq(rotated, base, &plain), long: None, attn_factor: 1.0 },
            Some(l) => Rope {
                short: inv_freq(rotated, base, &l.short),
                long: Some(Long { inv_freq: inv_freq(rotated, base, &l.long), original_context: l.original_context }),
                attn_factor: l.attn_factor,
            },
        }
    }

    /// Whether a sequence of this length takes the long factors.
    pub fn is_long(&self, positions: usize) -> bool {
        self.long.as_ref().is_some_and(|long| positions > long.original_context)
    }

    /// Positions that a sequence of this length may get before it takes other factors.
    pub fn room(&self, positions: usize) -> usize {
        let border = self.long.as_ref().map(|long| long.original_context).filter(|border| positions <= *border);
        border.map_or(usize::MAX, |border| border - positions)
    }

    /// Adds the angles of `positions`.
    pub fn extend(&self, angles: &mut Angles, positions: std::ops::Range<usize>, long: bool) -> Result<()> {
        let inv_freq = match &self.long {
            Some(l) if long => &l.inv_freq,
            _ => &self.short,
        };
        angles.half = inv_freq.len();
        let (tokens, half) = (positions.len(), inv_freq.len());
        for table in [&mut angles.cos, &mut angles.sin] {
            memory::reserve(table, tokens * half, format_args!("a rope table of {tokens} tokens and {half} angles"))?;
        }
        for position in positions {
            for f in inv_freq {
                let angle = position as f32 * f;
                angles.cos.push(libm::cosf(angle) * self.attn_factor);
                angles.sin.push(libm::sinf(angle) * self.attn_factor);
            }
        }
        Ok(())
    }
}

fn inv_freq(rotated: usize, base: f32, factors: &[f32]) -> Vec<f32> {
    let power = |i: usize| libm::pow(base as f64, 2.0 * i as f64 / rotated as f64) as f32;
    factors.iter().enumerate().map(|(i, factor)| 1.0 / (factor * power(i))).collect()
}

/// The default attention factor: `sqrt(1 + ln(context / original) / ln(original))`. `original` is at least 2.
pub fn default_attn_factor(context: usize, original: usize) -> f32 {
    if context <= original {
        return 1.0;
    }
    let (context, original) = (context as f64, original as f64);
    libm::sqrt(1.0 + libm::log(context / original) / libm::log(original)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attention_factor_of_phi_3_mini_128k() {
        assert_eq!(default_attn_factor(131072, 4096), 1.190_238_1);
        assert_eq!(default_attn_factor(4096, 4096), 1.0);
        assert!(default_attn_factor(1 << 28, 2).is_finite());
    }

    #[test]
    fn factors_divide_the_frequency_and_long_ones_hold_past_the_original_context() {
        let long_rope =
            LongRope { short: vec![1.0, 2.0], long: vec![4.0, 8.0], original_context: 16, attn_factor: 1.5 };
        let rope = Rope::new(4, 10_000.0, Some(&long_rope));
        assert!(!rope.is_long(16) && rope.is_long(17));
        assert_eq!([0, 15, 16, 17].map(|positions| rope.room(positions)), [16, 1, 0, usize::MAX]);
        let mut angles = Angles::default();
        rope.extend(&mut angles, 3..4, true).unwrap();
        let expected = [3.0f32 / 4.0, 3.0 / 800.0];
        for (i, angle) in expected.iter().enumerate() {
            let (cos, sin) = (angles.cos[i], angles.sin[i]);
            assert!((cos - 1.5 * angle.cos()).abs() < 1e-6 && (sin - 1.5 * angle.sin()).abs() < 1e-6);
        }
    }
}
