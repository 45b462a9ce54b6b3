//! Memory for intermediate results. Each thread keeps its pieces, which grow to their largest use.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use super::pack::Line;
use crate::system::{memory, panic};

thread_local! {
    /// The pieces that were in use at a time. The last one returned is taken first, so that each place in the code gets
    /// its former piece.
    static KEPT: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Lines with arbitrary contents.
pub struct Scratch {
    kept: Vec<Line>,
    lines: usize,
}

impl Scratch {
    /// Unwinds with `Error::Memory` if the system refuses: kernels return no errors.
    pub fn take(lines: usize) -> Self {
        let mut kept = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
        if kept.len() < lines {
            drop(kept); // frees the old piece first
            let filled = memory::filled(Line::ZERO, lines, "the scratch memory of a computation");
            kept = filled.unwrap_or_else(|error| panic::resume(error));
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
        // The thread may be ending, and its storage gone.
        let _ = KEPT.try_with(|kept| kept.borrow_mut().push(lines));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Result};

    #[test]
    fn too_large_a_piece_is_an_error_and_the_thread_goes_on() {
        let taken = panic::catch(|| -> Result<()> {
            Scratch::take(usize::MAX / size_of::<Line>());
            Ok(())
        });
        assert!(matches!(taken, Err(Error::Memory(_))));
        assert_eq!(Scratch::take(3).len(), 3);
    }
}
