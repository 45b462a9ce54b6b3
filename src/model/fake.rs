//! A model for tests of the code above it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::batch::Pass;
use super::{Batch, Info, Model, Phase, Sequence, Want};
use crate::error::{Error, Result};
use crate::kv::table::Table;
use crate::system::sync::lock;

/// A turn computes one token of a prompt, or one of each sequence that decodes. Prompts that share a pass take two turns. The
/// logits are one number, that of the id.
pub struct Fake {
    info: Info,
    /// Ids of the passes so far, those of one pass in one list.
    pub passes: Mutex<Vec<Vec<u32>>>,
    /// A pass with this id panics.
    pub panics_at: AtomicUsize,
    /// A pass with this id needs too much memory.
    pub too_large_at: AtomicUsize,
}

impl Default for Fake {
    fn default() -> Self {
        let info = Info {
            engine: "fake",
            file: "fake".into(),
            n_vocab: 1,
            width: usize::MAX,
            shared_tokens: 128,
            ..Info::default()
        };
        let never = || AtomicUsize::new(usize::MAX);
        Fake { info, passes: Mutex::default(), panics_at: never(), too_large_at: never() }
    }
}

impl Fake {
    pub fn with_vocabulary(n_vocab: usize) -> Self {
        let mut fake = Fake::default();
        fake.info.n_vocab = n_vocab;
        fake
    }
}

impl Model for Fake {
    fn info(&self) -> &Info {
        &self.info
    }

    fn kv_bytes(&self, _: usize) -> usize {
        0
    }

    fn sequence(&self) -> Result<Sequence> {
        Ok(Sequence::new(Table::without_layers()))
    }

    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        sequence.append(ids, phase, want);
        Ok(())
    }

    fn forward(&self, batch: &mut Batch) -> Result<bool> {
        let next = |sequence: &Sequence| sequence.ids[sequence.kv.len()];
        let ids: Vec<u32> = batch.members.iter().map(|member| next(&member.sequence)).collect();
        lock(&self.passes).push(ids.clone());
        assert!(!ids.contains(&(self.panics_at.load(SeqCst) as u32)), "the pass over {ids:?} panics");
        if ids.contains(&(self.too_large_at.load(SeqCst) as u32)) {
            return Err(Error::Memory(format!("the pass over {ids:?} is too large")));
        }
        if batch.members.iter().all(|member| member.cancel.is_set()) {
            return Err(Error::Cancelled);
        }
        batch.logits.clear();
        let shared = batch.members.len() > 1 && batch.members[0].sequence.phase() == Some(Phase::Prefill);
        if shared && batch.pass.take().is_none() {
            let rows = batch.members.iter().map(|_| 0..0).collect();
            batch.pass =
                Some(Pass { phase: Phase::Prefill, rows, cancels: Vec::new(), by_layer: true, layers: 1, n_layers: 2 });
            return Ok(true);
        }
        for (member, id) in batch.members.iter_mut().zip(ids) {
            let sequence = &mut member.sequence;
            sequence.kv.commit(if shared { sequence.left() } else { 1 });
            let wanted = sequence.kv.len() > sequence.logits_from && !member.cancel.is_set();
            let from = batch.logits.len();
            batch.logits.extend(wanted.then_some(id as f32));
            member.logits = from..batch.logits.len();
        }
        Ok(false)
    }
}
