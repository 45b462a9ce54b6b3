//! A queue on which one thread waits for many streams, such as the thread that wakes event loops.
//!
//! Decisions: docs/design/runtime.md

use std::sync::{Condvar, Mutex, PoisonError};

use crate::system::sync::lock;

/// The tickets of streams that have something to read.
#[derive(Default)]
pub struct ReadyQueue {
    tickets: Mutex<Vec<u64>>,
    changed: Condvar,
}

impl ReadyQueue {
    pub fn put(&self, ticket: u64) {
        lock(&self.tickets).push(ticket);
        self.changed.notify_one();
    }

    /// Waits for tickets and takes all of them.
    pub fn take(&self) -> Vec<u64> {
        let waiting = self.changed.wait_while(lock(&self.tickets), |tickets| tickets.is_empty());
        std::mem::take(&mut waiting.unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_come_in_order() {
        let queue = ReadyQueue::default();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..1000).for_each(|ticket| queue.put(ticket)));
            let mut taken = Vec::new();
            while taken.len() < 1000 {
                let tickets = queue.take();
                assert!(!tickets.is_empty());
                taken.extend(tickets);
            }
            assert_eq!(taken, Vec::from_iter(0..1000));
        });
    }
}
