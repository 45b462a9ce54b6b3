//! Memory for intermediate results, one piece for each thread: it grows to the largest size asked for and is kept.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use super::pack::Line;

thread_local! {
    static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Lines of whatever was left in them.
pub struct Scratch(Vec<Line>);

impl Scratch {
    pub fn take(lines: usize) -> Self {
        let mut kept = KEPT.take();
        if kept.len() < lines {
            kept.resize(lines, Line::ZERO);
        }
        Scratch(kept)
    }
}

impl Deref for Scratch {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [Line] {
        &mut self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        KEPT.set(std::mem::take(&mut self.0));
    }
}
