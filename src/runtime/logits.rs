//! The logits of token ids, as work of the compute thread.

use std::sync::Arc;
use std::time::Instant;

use crate::error::Result;
use crate::model::{Model, Phase, Sequence, Want};
use crate::runtime::work::{FinishReason, Status, Step, Work};
use crate::system::memory;
use crate::system::sync::Cancel;

/// Delivers one item: (n_vocab), or (ids, n_vocab).
pub struct Logits {
    model: Arc<dyn Model>,
    ids: Vec<u32>,
    want: Want,
    sequence: Option<Box<dyn Sequence>>,
    status: Status,
}

impl Logits {
    /// `Error::Memory` if the logits do not fit the available memory.
    pub fn new(model: Arc<dyn Model>, ids: Vec<u32>, want: Want) -> Result<Self> {
        let (rows, n_vocab) = (if want == Want::Every { ids.len() } else { 1 }, model.n_vocab());
        // Twice: here, and as the bytes of the caller.
        let bytes = (2 * size_of::<f32>() as u64).saturating_mul(rows as u64).saturating_mul(n_vocab as u64);
        memory::check(bytes, format_args!("logits of shape ({rows}, {n_vocab})"))?;
        let status = Status { prompt: ids.len(), ..Status::default() };
        Ok(Logits { model, ids, want, sequence: None, status })
    }
}

impl Work for Logits {
    type Item = Vec<f32>;

    fn step(&mut self, cancel: &Cancel) -> Result<Step<Vec<f32>>> {
        let start = Instant::now();
        let sequence = match &mut self.sequence {
            Some(sequence) => sequence,
            none => {
                let sequence = none.insert(self.model.clone().sequence()?);
                sequence.append(&self.ids, Phase::Prefill, self.want)?;
                sequence
            }
        };
        let more = sequence.advance(cancel)?;
        self.status.prefilled = sequence.computed();
        self.status.prefill_time += start.elapsed();
        Ok(if more { Step::More(None) } else { Step::End(Some(sequence.take_logits()), FinishReason::Stop) })
    }

    fn status(&self) -> Status {
        self.status
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Its logits are the ids, turn by turn.
    #[derive(Clone)]
    struct Echo {
        n_vocab: usize,
        left: usize,
        logits: Vec<f32>,
    }

    impl Model for Echo {
        fn engine(&self) -> &'static str {
            "echo"
        }
        fn kernel(&self) -> &'static str {
            "none"
        }
        fn device(&self) -> &'static str {
            "cpu"
        }
        fn n_threads(&self) -> usize {
            1
        }
        fn name(&self) -> String {
            "echo".into()
        }
        fn n_vocab(&self) -> usize {
            self.n_vocab
        }
        fn context_length(&self) -> usize {
            100
        }
        fn kv_bytes(&self, _: usize) -> usize {
            0
        }
        fn sequence(self: Arc<Self>) -> Result<Box<dyn Sequence>> {
            Ok(Box::new((*self).clone()))
        }
    }

    impl Sequence for Echo {
        fn append(&mut self, ids: &[u32], _: Phase, want: Want) -> Result<()> {
            self.left = ids.len();
            let first = if want == Want::Every { 0 } else { ids.len() - 1 };
            self.logits = ids[first..].iter().map(|&id| id as f32).collect();
            Ok(())
        }
        fn advance(&mut self, cancel: &Cancel) -> Result<bool> {
            self.left = self.left.saturating_sub(1);
            if cancel.is_set() { Err(Error::Cancelled) } else { Ok(self.left > 0) }
        }
        fn computed(&self) -> usize {
            self.logits.len().saturating_sub(self.left)
        }
        fn logits(&self) -> &[f32] {
            &self.logits
        }
        fn take_logits(&mut self) -> Vec<f32> {
            std::mem::take(&mut self.logits)
        }
    }

    fn logits(n_vocab: usize, want: Want) -> Result<Logits> {
        Logits::new(Arc::new(Echo { n_vocab, left: 0, logits: Vec::new() }), vec![3, 5, 7], want)
    }

    #[test]
    fn a_step_is_a_turn_and_the_last_one_delivers() {
        for (want, expected) in [(Want::Every, vec![3.0, 5.0, 7.0]), (Want::Last, vec![7.0])] {
            let mut work = logits(9, want).unwrap();
            assert_eq!(work.status().prompt, 3);
            for _ in 0..2 {
                assert_eq!(work.step(&Cancel::default()), Ok(Step::More(None)));
            }
            assert_eq!(work.step(&Cancel::default()), Ok(Step::End(Some(expected), FinishReason::Stop)));
        }
    }

    #[test]
    fn a_cancelled_step_is_an_error() {
        let cancel = Cancel::default();
        cancel.set();
        assert_eq!(logits(9, Want::Last).unwrap().step(&cancel), Err(Error::Cancelled));
    }

    #[cfg(target_os = "linux")] // whose available memory is known
    #[test]
    fn logits_that_do_not_fit_the_memory_are_refused_at_once() {
        let Err(Error::Memory(message)) = logits(1 << 50, Want::Every).map(drop) else { panic!("they fit") };
        assert!(message.contains("(3, 1125899906842624)") && message.contains("bytes are available"), "{message}");
    }
}
