//! Memory for intermediate results: each thread keeps the pieces that it used, grown to the largest size asked for.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use super::pack::Line;

thread_local! {
    /// As many as were in use at a time. The last one given back is the first to be taken, so that each place in the
    /// code finds the piece it had before.
    static KEPT: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Lines of whatever was left in them.
pub struct Scratch {
    kept: Vec<Line>,
    lines: usize,
}

impl Scratch {
    pub fn take(lines: usize) -> Self {
        let mut kept = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
        if kept.len() < lines {
            kept.resize(lines, Line::ZERO);
        }
        Scratch { kept, lines }
    }
}

impl Deref for Scratch {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        &self.kept[..self.lines]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [Line] {
        &mut self.kept[..self.lines]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.kept);
        // At the end of a thread there may be nowhere to keep it.
        let _ = KEPT.try_with(|kept| kept.borrow_mut().push(lines));
    }
}
