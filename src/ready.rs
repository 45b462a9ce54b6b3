//! A queue on which one thread waits for many streams, such as the thread that wakes event loops.
//!
//! Decisions: docs/design/runtime.md

use std::sync::{Condvar, Mutex, PoisonError};

use crate::threads::lock;

/// The tickets of streams that have something to read.
#[derive(Default)]
pub struct ReadyQueue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    tickets: Vec<u64>,
    closed: bool,
}

impl ReadyQueue {
    pub fn put(&self, ticket: u64) {
        lock(&self.state).tickets.push(ticket);
        self.changed.notify_one();
    }

    /// Waits for tickets and takes all of them; None once the queue is closed.
    pub fn take(&self) -> Option<Vec<u64>> {
        let waiting = |state: &mut State| state.tickets.is_empty() && !state.closed;
        let mut state = self.changed.wait_while(lock(&self.state), waiting).unwrap_or_else(PoisonError::into_inner);
        if state.closed { None } else { Some(std::mem::take(&mut state.tickets)) }
    }

    /// Ends every `take`, now and later.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn tickets_come_in_order_and_closing_ends_the_wait() {
        let queue = Arc::new(ReadyQueue::default());
        let waiting = queue.clone();
        let taken = std::thread::spawn(move || {
            let mut taken = Vec::new();
            while let Some(tickets) = waiting.take() {
                taken.extend(tickets);
                if taken.len() == 1000 {
                    waiting.close();
                }
            }
            taken
        });
        (0..1000).for_each(|ticket| queue.put(ticket));
        assert_eq!(taken.join().unwrap(), Vec::from_iter(0..1000));
        queue.put(1);
        assert_eq!(queue.take(), None);
    }
}
