//! Who computes when: the scheduler, the work of a stream, and the queue between that work and its reader. It may use
//! `text` and `model`.

pub mod draft;
pub mod generation;
pub mod logits;
pub mod outbox;
pub mod prefill;
pub mod prefixes;
pub mod prompt;
pub mod ready;
pub mod sampling;
pub mod scheduler;
pub mod scores;
pub mod stream;
pub mod work;
