//! A queue on which one thread waits for many streams: the thread that wakes event loops, or the caller of `Phi.map`.
//!
//! Decisions: docs/design/runtime.md

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

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

    /// Waits for tickets and takes all of them. `limit`: returns none after this time; None waits without a limit.
    pub fn take(&self, limit: Option<Duration>) -> Vec<u64> {
        let (tickets, is_empty) = (lock(&self.tickets), |tickets: &mut Vec<u64>| tickets.is_empty());
        let mut tickets = match limit {
            None => self.changed.wait_while(tickets, is_empty).unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                let waited = self.changed.wait_timeout_while(tickets, limit, is_empty);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        std::mem::take(&mut tickets)
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
                let tickets = queue.take(None);
                assert!(!tickets.is_empty());
                taken.extend(tickets);
            }
            assert_eq!(taken, Vec::from_iter(0..1000));
        });
    }

    #[test]
    fn a_limit_ends_the_wait() {
        let queue = ReadyQueue::default();
        assert!(queue.take(Some(Duration::ZERO)).is_empty());
        queue.put(7);
        assert_eq!(queue.take(Some(Duration::from_secs(3600))), [7]);
    }
}
