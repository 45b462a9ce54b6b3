//! The phase that each position of a sequence is computed in: it decides the bits of keys and values.
//!
//! Decisions: docs/design/kv.md

use crate::compute::kernels::Phase;

/// Runs of one phase, in turns: prefill, decode, prefill and so on. The first one may be empty.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Phases {
    /// The positions after each run.
    ends: Vec<usize>,
}

impl Phases {
    /// `length` positions that are prefilled.
    pub fn prefill(length: usize) -> Self {
        Phases { ends: vec![length] }
    }

    /// The lengths of the runs, as `runs` gives them. None if their sum is larger than any number of positions.
    pub fn from_runs(runs: &[usize]) -> Option<Self> {
        let end = |end: &mut usize, run: &usize| {
            *end = end.checked_add(*run).unwrap_or(usize::MAX);
            Some(*end)
        };
        let ends: Vec<usize> = runs.iter().scan(0, end).collect();
        (ends.last() != Some(&usize::MAX)).then_some(Phases { ends })
    }

    /// The lengths of the runs: prefill, decode, prefill and so on.
    pub fn runs(&self) -> Vec<usize> {
        let before = [0].iter().chain(&self.ends);
        self.ends.iter().zip(before).map(|(end, before)| end - before).collect()
    }

    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn push(&mut self, length: usize, phase: Phase) {
        let (end, run) = (self.len() + length, usize::from(phase == Phase::Decode));
        if length == 0 {
            return;
        }
        if self.ends.is_empty() {
            self.ends.push(0);
        }
        if (self.ends.len() - 1) % 2 != run {
            self.ends.push(end);
        } else if let Some(last) = self.ends.last_mut() {
            *last = end;
        }
    }

    /// Forgets the positions from `length` on.
    pub fn truncate(&mut self, length: usize) {
        let kept = self.ends.partition_point(|&end| end < length);
        if kept < self.ends.len() {
            self.ends.truncate(kept + 1);
            self.ends[kept] = length;
        }
    }

    /// The phase of a position.
    pub fn at(&self, position: usize) -> Phase {
        match self.run(position) % 2 {
            0 => Phase::Prefill,
            _ => Phase::Decode,
        }
    }

    /// The position after the run of a position.
    pub fn run_end(&self, position: usize) -> usize {
        self.ends.get(self.run(position)).copied().unwrap_or(position)
    }

    /// Positions before the first that is decoded.
    pub fn prefilled(&self) -> usize {
        self.ends.first().copied().unwrap_or(0)
    }

    /// The phases of up to 128 positions from `start` on: a bit is set for each that is decoded.
    pub fn bits(&self, start: usize, length: usize) -> u128 {
        (0..length).filter(|i| self.at(start + i) == Phase::Decode).fold(0, |bits, i| bits | 1 << i)
    }

    fn run(&self, position: usize) -> usize {
        self.ends.partition_point(|&end| end <= position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(runs: &[usize]) -> Phases {
        Phases::from_runs(runs).unwrap()
    }

    #[test]
    fn runs_grow_and_give_the_phase_of_each_position() {
        let mut grown = Phases::default();
        for (length, phase) in [(3, Phase::Prefill), (1, Phase::Decode), (0, Phase::Prefill), (2, Phase::Decode)] {
            grown.push(length, phase);
        }
        grown.push(4, Phase::Prefill);
        assert_eq!((grown.runs(), grown.len(), grown.prefilled()), (vec![3, 3, 4], 10, 3));
        let decoded: Vec<usize> = (0..10).filter(|&i| grown.at(i) == Phase::Decode).collect();
        assert_eq!(decoded, [3, 4, 5]);
        assert_eq!([0, 2, 3, 5, 6, 9].map(|i| grown.run_end(i)), [3, 3, 6, 6, 10, 10]);
        assert_eq!((grown.bits(2, 5), grown.bits(6, 4)), (0b1110, 0));
        assert_eq!(phases(&grown.runs()), grown);
    }

    #[test]
    fn a_sequence_may_begin_with_decoding() {
        let mut decoded = Phases::default();
        decoded.push(2, Phase::Decode);
        assert_eq!((decoded.runs(), decoded.at(0), decoded.prefilled()), (vec![0, 2], Phase::Decode, 0));
    }

    #[test]
    fn truncation_keeps_the_first_positions() {
        for length in 0..=10 {
            let mut cut = phases(&[3, 3, 4]);
            cut.truncate(length);
            assert_eq!(cut.len(), length);
            (0..length).for_each(|i| assert_eq!(cut.at(i), phases(&[3, 3, 4]).at(i), "{i} of {length}"));
            cut.push(1, Phase::Decode);
            assert_eq!((cut.len(), cut.at(length)), (length + 1, Phase::Decode));
        }
        let mut same = phases(&[3]);
        same.truncate(5);
        assert_eq!(same.runs(), [3]);
    }

    #[test]
    fn runs_beyond_any_length_are_refused() {
        assert_eq!(Phases::from_runs(&[1, usize::MAX]), None);
    }
}
