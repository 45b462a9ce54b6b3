//! The keys and values of one sequence: a table of columns, which grows with the sequence. The full context is never
//! allocated. Sequences share columns. A shared column is copied before one of them writes to it.
//!
//! Decisions: docs/design/kv.md

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::compute::kernels::PAGE;
use crate::compute::ops::{Column, KvShape, KvType, Segment};
use crate::error::Result;

/// Columns of consecutive positions. Positions below `len` are computed and do not change.
pub struct Table {
    shape: KvShape,
    /// Attention reads this number of the newest positions; None: all of them.
    window: Option<usize>,
    columns: VecDeque<Arc<Column>>,
    /// Columns for reuse.
    spare: Vec<Column>,
    len: usize,
}

impl Table {
    pub fn new(shape: &KvShape, window: Option<usize>) -> Self {
        Table { shape: shape.clone(), window, columns: VecDeque::new(), spare: Vec::new(), len: 0 }
    }

    /// A table that counts positions and holds nothing, for an engine that keeps its keys and values itself.
    pub fn without_layers() -> Self {
        let (kv_type, device) = (KvType::F32, None);
        Table::new(&KvShape { n_layers: 0, n_head_kv: 0, head_dim: 0, kv_type, device }, None)
    }

    /// Computed positions, those behind the window included.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first held position.
    fn start(&self) -> usize {
        self.columns.front().map_or(self.len, |column| column.start())
    }

    fn first_seen(&self, len: usize) -> usize {
        first_seen(self.window, len)
    }

    /// Bytes of the columns that `positions` more would add.
    pub fn growth(&self, positions: usize) -> u64 {
        let first_seen = self.first_seen(self.len);
        let needed = (self.len + positions).div_ceil(PAGE) - first_seen.max(self.start()) / PAGE;
        let behind = self.columns.iter().take_while(|column| column.start() + PAGE <= first_seen);
        let lost = behind.filter(|column| is_kept(column)).count(); // their memory is not reused
        let copied = usize::from(positions > 0 && self.kept_tail().is_some());
        let more = needed.saturating_sub(self.columns.len() + self.spare.len() - lost) + copied;
        (more as u64).saturating_mul((PAGE * self.shape.position_bytes()) as u64)
    }

    /// Prepares the columns of `positions` more: drops those behind the window, and copies the last one if another
    /// sequence shares it or a file has it.
    pub fn reserve(&mut self, positions: usize) -> Result<()> {
        let first_seen = self.first_seen(self.len);
        while self.columns.front().is_some_and(|column| column.start() + PAGE <= first_seen) {
            let column = self.columns.pop_front();
            self.spare.extend(column.and_then(reusable));
        }
        if positions > 0
            && let Some(tail) = self.kept_tail()
        {
            self.columns[tail] = Arc::new(self.columns[tail].copy()?);
        }
        let mut next = self.columns.back().map_or(self.len / PAGE * PAGE, |column| column.start() + PAGE);
        while next < self.len + positions {
            let column = match self.spare.pop() {
                Some(column) => column.reuse(next),
                None => Column::new(next, &self.shape),
            };
            self.columns.push_back(Arc::new(column));
            next += PAGE;
        }
        if positions < PAGE {
            // After a prompt, a sliding window needs less. A decoded token takes one column at most.
            self.spare.truncate(1);
        }
        Ok(())
    }

    /// The index of the column that the next position goes to, if it has computed positions and may not be written.
    fn kept_tail(&self) -> Option<usize> {
        let tail = (self.len - self.start()) / PAGE;
        let kept = self.columns.get(tail).is_some_and(is_kept);
        (!self.len.is_multiple_of(PAGE) && kept).then_some(tail)
    }

    /// The reserved positions as rows of a pass.
    pub fn segment(&mut self, rows: Range<usize>) -> Segment<'_> {
        Segment::new(rows, self.len, &mut self.columns)
    }

    /// The next `positions` are computed, in every layer.
    pub fn commit(&mut self, positions: usize) {
        self.len += positions;
    }

    /// Forgets the positions from `len` on. If the window has moved past what position `len` sees, it forgets all of them.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        if !self.columns.is_empty() && self.start() > self.first_seen(len) {
            return self.clear();
        }
        while self.columns.back().is_some_and(|column| column.start() >= len) {
            let column = self.columns.pop_back();
            self.spare.extend(column.and_then(reusable));
        }
        self.len = len;
    }

    /// The same positions for another sequence, without a copy.
    pub fn fork(&self) -> Self {
        Table { columns: self.columns().cloned().collect(), spare: Vec::new(), shape: self.shape.clone(), ..*self }
    }

    /// The columns with computed positions, oldest first.
    pub fn columns(&self) -> impl Iterator<Item = &Arc<Column>> {
        self.columns.iter().take_while(|column| column.start() < self.len)
    }

    /// Takes consecutive columns in which the positions below `len` are computed, in place of its own.
    pub fn adopt(&mut self, columns: VecDeque<Arc<Column>>, len: usize) {
        self.clear();
        (self.columns, self.len) = (columns, len);
    }

    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Forgets every position and frees the memory.
    pub fn release(&mut self) {
        self.columns.clear();
        self.spare.clear();
        self.len = 0;
    }

    /// Forgets every position and keeps the memory.
    pub fn clear(&mut self) {
        self.spare.extend(self.columns.drain(..).filter_map(reusable));
        self.len = 0;
    }
}

/// Whether a column may not be written: another sequence holds it, or a file has it.
fn is_kept(column: &Arc<Column>) -> bool {
    Arc::strong_count(column) > 1 || column.is_mapped()
}

/// A column whose memory another position may take.
fn reusable(column: Arc<Column>) -> Option<Column> {
    Arc::into_inner(column).filter(|column| !column.is_mapped())
}

/// The first position that a query at position `len` sees.
pub fn first_seen(window: Option<usize>, len: usize) -> usize {
    window.map_or(0, |window| (len + 1).saturating_sub(window))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMN_BYTES: u64 = 2 * 2 * 2 * PAGE as u64;

    fn table(window: Option<usize>) -> Table {
        let shape = KvShape { n_layers: 1, n_head_kv: 1, head_dim: 2, kv_type: KvType::F16, device: None };
        Table::new(&shape, window)
    }

    fn fill(table: &mut Table, positions: usize) {
        table.reserve(positions).unwrap();
        table.commit(positions);
    }

    fn starts(table: &Table) -> Vec<usize> {
        table.columns.iter().map(|column| column.start()).collect()
    }

    #[test]
    fn columns_are_added_as_the_sequence_grows() {
        let mut table = table(None);
        fill(&mut table, 1);
        assert_eq!(starts(&table), [0]);
        fill(&mut table, 2 * PAGE);
        assert_eq!(starts(&table), [0, PAGE, 2 * PAGE]);
        table.clear();
        assert!(table.is_empty() && starts(&table).is_empty());
    }

    #[test]
    fn a_window_keeps_what_the_next_query_sees_and_no_more() {
        let mut table = table(Some(9));
        for len in 1..5 * PAGE {
            fill(&mut table, 1);
            table.reserve(0).unwrap();
            let first_seen = (len + 1).saturating_sub(9);
            assert!(table.start() <= first_seen && first_seen - table.start() < PAGE, "{len}: {}", table.start());
            assert!(table.columns.len() + table.spare.len() <= 2, "{len}");
        }
    }

    #[test]
    fn the_growth_is_that_of_the_columns_which_are_added() {
        for window in [None, Some(9), Some(3 * PAGE)] {
            let mut table = table(window);
            for positions in [1, PAGE - 1, 1, 2 * PAGE, 5, 300] {
                let columns = |table: &Table| (table.columns.len() + table.spare.len()) as u64;
                let (before, growth) = (columns(&table), table.growth(positions));
                fill(&mut table, positions);
                let added = columns(&table).saturating_sub(before);
                assert_eq!(growth, added * COLUMN_BYTES, "{window:?}, {positions} more");
            }
            table.clear();
            assert_eq!(table.growth(1), 0, "columns are reused");
        }
        assert_eq!(table(None).growth(1 << 28), (1 << 28) * 8);
    }

    #[test]
    fn a_fork_shares_columns_and_a_write_copies_the_last_one() {
        let mut first = table(None);
        fill(&mut first, PAGE + 5);
        let mut second = first.fork();
        let shared = |a: &Table, b: &Table, i: usize| Arc::ptr_eq(&a.columns[i], &b.columns[i]);
        assert!(second.len() == PAGE + 5 && shared(&first, &second, 0) && shared(&first, &second, 1));
        assert_eq!(second.growth(1), COLUMN_BYTES, "a copy of the last one");
        fill(&mut second, 1);
        assert!(shared(&first, &second, 0) && !shared(&first, &second, 1));
        assert_eq!(first.growth(1), 0, "its last column is its own again");
        let mut full = table(None);
        fill(&mut full, PAGE);
        let mut other = full.fork();
        fill(&mut other, 1);
        assert!(shared(&full, &other, 0), "a full column is never written, so it is never copied");
    }

    #[test]
    fn the_growth_counts_what_a_fork_keeps_and_the_copy_of_the_last_column() {
        let mut spare = table(None);
        fill(&mut spare, 2 * PAGE + 5);
        spare.truncate(PAGE + 5);
        let _fork = spare.fork();
        assert_eq!((spare.spare.len(), spare.growth(1)), (1, COLUMN_BYTES), "a copy does not reuse a column");
        let mut windowed = table(Some(9));
        fill(&mut windowed, 2 * PAGE);
        assert_eq!(windowed.growth(PAGE), 0, "the first column is reused");
        let _fork = windowed.fork();
        assert_eq!(windowed.growth(PAGE), COLUMN_BYTES, "the fork keeps the first column");
        windowed.reserve(PAGE).unwrap();
        assert!(windowed.spare.is_empty());
    }

    #[test]
    fn after_a_long_prompt_a_window_frees_what_decoding_does_not_need() {
        let mut table = table(Some(PAGE));
        fill(&mut table, 6 * PAGE);
        fill(&mut table, 4 * PAGE);
        assert!(table.columns.len() + table.spare.len() > 5);
        fill(&mut table, 1);
        assert!(table.columns.len() + table.spare.len() <= 3, "{} spare", table.spare.len());
    }

    #[test]
    fn a_shared_column_is_not_written() {
        let mut first = table(None);
        fill(&mut first, 5);
        let mut fork = first.fork();
        assert!(first.segment(0..1).pieces(0).any(|piece| piece.is_err()));
        fork.reserve(1).unwrap();
        assert!(fork.segment(0..1).pieces(0).all(|piece| piece.is_ok()));
    }

    #[test]
    fn truncation_forgets_the_newest_positions() {
        let mut table = table(None);
        fill(&mut table, 3 * PAGE);
        table.truncate(4 * PAGE);
        assert_eq!(table.len(), 3 * PAGE);
        table.truncate(PAGE + 1);
        assert_eq!((table.len(), starts(&table)), (PAGE + 1, vec![0, PAGE]));
        table.truncate(PAGE);
        assert_eq!((table.len(), starts(&table)), (PAGE, vec![0]));
        fill(&mut table, 1);
        assert_eq!(starts(&table), [0, PAGE]);
    }

    #[test]
    fn truncation_of_a_table_without_layers_counts() {
        let mut table = Table::without_layers();
        table.commit(20);
        table.truncate(17);
        assert_eq!(table.len(), 17);
    }

    #[test]
    fn truncation_past_the_window_forgets_all() {
        let mut table = table(Some(9));
        fill(&mut table, 3 * PAGE);
        fill(&mut table, 1); // columns behind the window are dropped
        table.truncate(3 * PAGE - 2);
        assert_eq!(table.len(), 3 * PAGE - 2, "the column before is still held");
        table.truncate(PAGE);
        assert_eq!((table.len(), starts(&table)), (0, vec![]));
    }
}
