//! The time of a decode pass by its rows, relative to one row: a table that passes refine.
//!
//! The speed of memory swings by 1.6 within seconds on shared machines, so only the ratio of two consecutive passes over
//! the same streams counts, and of those the median.
//!
//! Decisions: docs/design/runtime.md

use std::time::Duration;

/// Ratios of a number of rows that are kept, and that are needed before they count.
const KEPT: usize = 15;
const NEEDED: usize = 5;
/// Passes after which one old ratio of each number of rows is forgotten, so that a number which was too dear is tried again.
const FORGETS: usize = 64;

pub struct Costs {
    /// The costs of 1, 2, ... rows before any pass. Wider passes cost in proportion to the last.
    first: &'static [f32],
    /// For each number of rows, from 1 on: measured costs in those of the table, the newest first.
    ratios: Vec<Vec<f32>>,
    /// Streams, rows and time of the last pass.
    last: Option<(usize, usize, Duration)>,
    passes: usize,
}

impl Costs {
    pub fn new(first: &'static [f32]) -> Self {
        Costs { first, ratios: Vec::new(), last: None, passes: 0 }
    }

    /// The cost of a pass.
    pub fn of(&self, rows: usize) -> f32 {
        self.guess(rows) * self.correction(rows)
    }

    /// The cost in the table. A table that rises with the rows was not measured: it is taken as half as steep, so that good
    /// drafts are tried and measured.
    fn guess(&self, rows: usize) -> f32 {
        match self.first.get(rows - 1) {
            Some(cost) if *cost < rows as f32 => *cost,
            None if self.first.len() > 1 && self.first[self.first.len() - 1] < self.first.len() as f32 => {
                self.first[self.first.len() - 1] / self.first.len() as f32 * rows as f32
            }
            _ => 0.5 + 0.5 * rows as f32,
        }
    }

    /// What passes say about the table: the median of the ratios for this number of rows, or for the nearest number that
    /// has enough.
    fn correction(&self, rows: usize) -> f32 {
        let measured = |i: &usize| self.ratios.get(*i).is_some_and(|ratios| ratios.len() >= NEEDED);
        let nearest = (0..self.ratios.len()).filter(measured).min_by_key(|i| (i + 1).abs_diff(rows));
        nearest.filter(|_| rows > 1).map_or(1.0, |i| median(&self.ratios[i]))
    }

    /// Records a pass of some streams.
    pub fn record(&mut self, streams: usize, rows: usize, time: Duration) {
        let last = self.last.replace((streams, rows, time));
        self.passes += 1;
        if self.passes.is_multiple_of(FORGETS) {
            self.ratios.iter_mut().for_each(|ratios| ratios.truncate(ratios.len().saturating_sub(1)));
        }
        let Some((_, last_rows, last_time)) = last.filter(|(last, ..)| *last == streams) else { return };
        if last_rows == rows || last_time.is_zero() || time.is_zero() {
            return;
        }
        // The pass with fewer rows is the measure of the other.
        let ratio = time.as_secs_f32() / last_time.as_secs_f32();
        let (more, cost) = match rows > last_rows {
            true => (rows, self.of(last_rows) * ratio),
            false => (last_rows, self.of(rows) / ratio),
        };
        if self.ratios.len() < more {
            self.ratios.resize(more, Vec::new());
        }
        let correction = cost / self.guess(more);
        let ratios = &mut self.ratios[more - 1];
        ratios.truncate(KEPT - 1);
        ratios.insert(0, correction);
    }
}

fn median(values: &[f32]) -> f32 {
    let mut values = values.to_vec();
    values.sort_by(f32::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: [f32; 4] = [1.0, 1.1, 1.2, 1.3];

    fn ms(ms: f32) -> Duration {
        Duration::from_secs_f32(ms / 1000.0)
    }

    #[test]
    fn it_starts_from_the_table() {
        let costs = Costs::new(&TABLE);
        assert_eq!([1, 2, 4, 8].map(|rows| costs.of(rows)), [1.0, 1.1, 1.3, 2.6]);
        let unknown = Costs::new(&[1.0]);
        assert_eq!([1, 2, 16].map(|rows| unknown.of(rows)), [1.0, 1.5, 8.5]);
        let linear = Costs::new(&[1.0, 2.0, 3.0]);
        assert_eq!([1, 2, 3, 4].map(|rows| linear.of(rows)), [1.0, 1.5, 2.0, 2.5]);
    }

    #[test]
    fn passes_correct_it_through_swings_of_the_machine() {
        let mut costs = Costs::new(&TABLE);
        // Two rows take 1.5 times as long as one. The machine is 1.6 times as slow in every other half second.
        for pass in 0..60 {
            let swing = if pass / 6 % 2 == 0 { 1.0 } else { 1.6 };
            costs.record(1, [1, 2, 1][pass % 3], ms([80.0, 120.0, 80.0][pass % 3] * swing));
        }
        assert!((costs.of(2) - 1.5).abs() < 0.01, "{}", costs.of(2));
        assert!((costs.of(4) - 1.3 * 1.5 / 1.1).abs() < 0.01, "a number that was never measured: {}", costs.of(4));
        assert_eq!(costs.of(1), 1.0);
    }

    #[test]
    fn a_few_passes_or_equal_ones_say_nothing() {
        let mut costs = Costs::new(&TABLE);
        for pass in 0..5 {
            costs.record(1, 1 + pass % 2, ms(if pass % 2 == 0 { 80.0 } else { 400.0 }));
        }
        assert_eq!(costs.of(2), 1.1, "four ratios");
        let mut costs = Costs::new(&TABLE);
        for pass in 0..100 {
            costs.record(1, 2, ms(80.0 + pass as f32));
            costs.record(1 + pass % 2 * 7, 2, ms(300.0));
        }
        assert_eq!(costs.of(2), 1.1);
        costs.record(1, 1, Duration::ZERO);
        costs.record(1, 2, ms(1.0));
        assert_eq!(costs.of(2), 1.1);
    }

    #[test]
    fn a_number_of_rows_that_was_too_dear_is_tried_again() {
        let mut costs = Costs::new(&TABLE);
        for _ in 0..10 {
            costs.record(1, 1, ms(80.0));
            costs.record(1, 4, ms(400.0));
        }
        assert!(costs.of(4) > 4.9);
        (0..FORGETS * KEPT).for_each(|_| costs.record(1, 1, ms(80.0)));
        assert_eq!(costs.of(4), 1.3);
    }
}
