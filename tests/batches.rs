//! Sequences that share passes: each has the bits that it has alone.

mod random;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_core::Device;
use candle_phi::compute::kernels::{self, Format, Kernel, KvPage, Line, Out, Query, Tile, Weights};
use candle_phi::compute::ops::{Backend, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::error::Error;
use candle_phi::files::gguf::Gguf;
use candle_phi::model::phi3::Phi3;
use candle_phi::model::runner::Runner;
use candle_phi::model::{self, Batch, Buffers, Member, Model, Phase, Want};
use candle_phi::system::sync::Cancel;
use random::Random;

/// Files with every kind of context: plain, a sliding window, groups of heads, two sets of rope factors, k-quants.
const FILES: [&str; 5] = ["plain", "window", "gqa", "longrope", "k_official"];

fn load(name: &str, backend: Backend, kv_type: KvType) -> Runner<Phi3> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.gguf"));
    Phi3::load(&Gguf::open(&path, true).unwrap(), backend, kv_type).unwrap()
}

fn cpu(kernel: &str, n_threads: usize) -> Backend {
    Backend::Cpu { kernel: kernels::by_name(kernel).unwrap(), pool: Pool::new(n_threads) }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// A sequence of a test: a prompt, then ids that are known in advance.
struct Script {
    prompt: Vec<u32>,
    ids: Vec<u32>,
}

impl Script {
    fn random(random: &mut Random, model: &Runner<Phi3>) -> Self {
        let (n_vocab, most) = (model.info().n_vocab as u32, model.info().context_length.min(200));
        let mut ids = |n: usize| (0..n).map(|_| random.below(n_vocab as usize) as u32).collect::<Vec<_>>();
        let prompt = ids(1 + most / 3);
        let answer = ids(most / 4);
        let cut = 1 + random.below(prompt.len());
        Script { prompt: prompt[..cut].to_vec(), ids: answer }
    }

    /// The logits after the prompt, and after each id.
    fn alone(&self, model: &Runner<Phi3>) -> Vec<Vec<u32>> {
        let mut batch = model::single(model, &Cancel::default()).unwrap();
        let mut all = vec![model::compute(model, &mut batch, &self.prompt, Phase::Prefill, Want::Last).unwrap()];
        for id in &self.ids {
            all.push(model::compute(model, &mut batch, &[*id], Phase::Decode, Want::Last).unwrap());
        }
        all.iter().map(|logits| bits(logits)).collect()
    }
}

/// A sequence under way.
struct Running<'a> {
    script: &'a Script,
    expected: &'a [Vec<u32>],
    batch: Batch,
    /// Ids that were appended.
    done: usize,
}

/// Random sets of sequences share random passes. A sequence that outgrows its rope factors is computed anew in between.
fn check_random_passes(model: &Runner<Phi3>, seed: u64, what: &str) {
    let mut random = Random::new(seed);
    let scripts: Vec<Script> = (0..16).map(|_| Script::random(&mut random, model)).collect();
    let expected: Vec<_> = scripts.iter().map(|script| script.alone(model)).collect();
    let mut waiting: Vec<_> = scripts.iter().zip(&expected).collect();
    let mut running: Vec<Running<'_>> = Vec::new();
    let mut shared = Batch::default();
    let mut widest = 0;
    while !waiting.is_empty() || !running.is_empty() {
        if !waiting.is_empty() && (running.is_empty() || random.below(3) == 0) {
            let (script, expected) = waiting.swap_remove(random.below(waiting.len()));
            let mut batch = model::single(model, &Cancel::default()).unwrap();
            let logits = model::compute(model, &mut batch, &script.prompt, Phase::Prefill, Want::Last).unwrap();
            assert!(bits(&logits) == expected[0], "{what}: after the prompt");
            running.push(Running { script, expected, batch, done: 0 });
        }
        // Some of them, in any order.
        let mut chosen: Vec<usize> = (0..running.len()).filter(|_| random.below(4) > 0).collect();
        for i in (1..chosen.len()).rev() {
            chosen.swap(i, random.below(i + 1));
        }
        for &i in &chosen {
            let Running { script, batch, done, .. } = &mut running[i];
            model.append(&mut batch.members[0].sequence, &[script.ids[*done]], Phase::Decode, Want::Last).unwrap();
            while batch.members[0].sequence.phase() == Some(Phase::Prefill) {
                while model.forward(batch).unwrap() {}
            }
            shared.members.extend(batch.members.pop());
        }
        widest = widest.max(chosen.len());
        if !chosen.is_empty() {
            while model.forward(&mut shared).unwrap() {}
        }
        for (member, &i) in chosen.iter().enumerate() {
            let Running { expected, done, .. } = &mut running[i];
            *done += 1;
            let n = chosen.len();
            assert!(bits(shared.logits(member)) == expected[*done], "{what}: id {done}, place {member} of {n}");
        }
        for (member, &i) in shared.members.drain(..).zip(&chosen) {
            running[i].batch.members.push(member);
        }
        running.retain(|sequence| sequence.done < sequence.script.ids.len());
    }
    assert!(widest > 4, "{what}: {widest} sequences at most");
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_among_others() {
    for (i, kernel) in kernels::available().into_iter().enumerate() {
        for (j, file) in FILES.into_iter().enumerate() {
            for (k, kv_type) in [KvType::F16, KvType::F32, KvType::Q8_0].into_iter().enumerate() {
                let model = load(file, cpu(kernel, 2), kv_type);
                check_random_passes(&model, (100 * i + 10 * j + k) as u64, &format!("{file}, {kernel}, {kv_type:?}"));
            }
        }
    }
}

#[test]
fn prompts_that_share_a_pass_have_the_bits_that_each_has_alone() {
    for kernel in kernels::available() {
        for file in FILES {
            let model = load(file, cpu(kernel, 2), KvType::F16);
            let mut random = Random::new(5);
            let scripts: Vec<Script> = (0..7).map(|_| Script::random(&mut random, &model)).collect();
            let mut batch = Batch::default();
            for script in &scripts {
                let mut sequence = model.sequence().unwrap();
                model.append(&mut sequence, &script.prompt, Phase::Prefill, Want::Last).unwrap();
                batch.members.push(Member::new(sequence, Cancel::default()));
            }
            let cancelled = 3;
            assert!(model.forward(&mut batch).unwrap(), "it stops after a layer");
            batch.members[cancelled].cancel.set();
            while model.forward(&mut batch).unwrap() {}
            for (i, script) in scripts.iter().enumerate() {
                let logits = bits(batch.logits(i));
                let expected = if i == cancelled { Vec::new() } else { script.alone(&model)[0].clone() };
                assert!(logits == expected, "{file}, {kernel}, prompt {i}");
                assert_eq!(batch.members[i].sequence.kv.len(), if i == cancelled { 0 } else { script.prompt.len() });
            }
        }
    }
}

#[test]
fn prompts_that_take_turns_compute_in_the_same_buffers() {
    let model = load("plain", cpu(kernels::available().pop().unwrap(), 2), KvType::F16);
    let prompts: [Vec<u32>; 2] = [90, 40].map(|n| (0..n).map(|i| (i * 7) % 60).collect());
    let alone = |prompt: &Vec<u32>| Script { prompt: prompt.clone(), ids: Vec::new() }.alone(&model).remove(0);
    let mut batches: Vec<Batch> = prompts
        .iter()
        .map(|prompt| {
            let mut batch = model::single(&model, &Cancel::default()).unwrap();
            model.append(&mut batch.members[0].sequence, prompt, Phase::Prefill, Want::Last).unwrap();
            batch
        })
        .collect();
    let mut buffers = Buffers::default();
    let mut under_way = vec![true; 2];
    while under_way.contains(&true) {
        for (batch, under_way) in batches.iter_mut().zip(&mut under_way).filter(|(_, under_way)| **under_way) {
            batch.buffers = std::mem::take(&mut buffers);
            *under_way = model.forward(batch).unwrap();
            buffers = std::mem::take(&mut batch.buffers);
        }
    }
    for (batch, prompt) in batches.iter().zip(&prompts) {
        assert!(bits(batch.logits(0)) == alone(prompt), "{} tokens", prompt.len());
    }
    assert_eq!(buffers.0[0].dim(0).unwrap(), 90, "those of the longer one");
}

/// The path that CUDA and Metal take, on the CPU: Candle's own products may round by the number of rows.
#[test]
fn candles_own_operations_compute_each_sequence_over_its_own_columns() {
    for file in ["plain", "window", "gqa"] {
        let model = load(file, Backend::Candle(Device::Cpu), KvType::F32);
        let mut random = Random::new(7);
        let scripts: Vec<Script> = (0..3).map(|_| Script::random(&mut random, &model)).collect();
        let alone: Vec<_> = scripts.iter().map(|script| script.alone(&model)).collect();
        let mut batch = Batch::default();
        for script in &scripts {
            let mut one = model::single(&model, &Cancel::default()).unwrap();
            model::compute(&model, &mut one, &script.prompt, Phase::Prefill, Want::Last).unwrap();
            let mut member = one.members.pop().unwrap();
            model.append(&mut member.sequence, &script.ids[..1], Phase::Decode, Want::Last).unwrap();
            batch.members.push(member);
        }
        while model.forward(&mut batch).unwrap() {}
        for (i, alone) in alone.iter().enumerate() {
            let close = |(a, b): (&f32, &u32)| (a - f32::from_bits(*b)).abs() < 1e-3;
            assert!(batch.logits(i).iter().zip(&alone[1]).all(close), "{file}, sequence {i}");
        }
    }
}

fn prefilled(model: &Runner<Phi3>, ids: &[u32], cancel: &Cancel) -> Member {
    let mut batch = model::single(model, cancel).unwrap();
    model::compute(model, &mut batch, ids, Phase::Prefill, Want::Last).unwrap();
    batch.members.pop().unwrap()
}

#[test]
fn several_rows_of_a_sequence_have_the_bits_of_one_at_a_time() {
    for file in ["plain", "window", "gqa", "k_official"] {
        let model = load(file, cpu(kernels::available().pop().unwrap(), 2), KvType::F16);
        let mut random = Random::new(11);
        let mut ids = |n: usize| (0..n).map(|_| random.below(60) as u32).collect::<Vec<_>>();
        // The number of rows of each member.
        let scripts = [(127, 3), (20, 1), (40, 6), (30, 4)];
        let scripts = scripts.map(|(prompt, rows)| Script { prompt: ids(prompt), ids: ids(rows) });
        let mut batch = Batch::default();
        for script in &scripts {
            let mut member = prefilled(&model, &script.prompt, &Cancel::default());
            model.append(&mut member.sequence, &script.ids, Phase::Decode, Want::EVERY).unwrap();
            batch.members.push(member);
        }
        while model.forward(&mut batch).unwrap() {}
        for (i, script) in scripts.iter().enumerate() {
            assert!(bits(batch.logits(i)) == script.alone(&model)[1..].concat(), "{file}, member {i}");
        }
        // Ids that were decoded before and want no logits are computed first.
        for (script, want) in scripts.iter().zip([Want::EVERY, Want::Last, Want::Last, Want::From(2)]) {
            let mut batch = Batch::default();
            batch.members.push(prefilled(&model, &script.prompt, &Cancel::default()));
            let logits = model::compute(&model, &mut batch, &script.ids, Phase::Decode, want).unwrap();
            let wanted = script.alone(&model)[1..][want.first(script.ids.len())..].concat();
            assert!(bits(&logits) == wanted, "{file}, {want:?}");
        }
    }
}

#[test]
fn forks_and_truncated_sequences_compute_what_their_ids_say() {
    let model = load("gqa", cpu("portable", 2), KvType::Q8_0);
    let prompt: Vec<u32> = (0..150).map(|i| i % 60).collect();
    let mut first = prefilled(&model, &prompt, &Cancel::default());
    let logits = |member: &mut Member, id: u32| {
        let mut batch = Batch::default();
        model.append(&mut member.sequence, &[id], Phase::Decode, Want::Last).unwrap();
        batch
            .members
            .push(Member::new(std::mem::replace(&mut member.sequence, model.sequence().unwrap()), Cancel::default()));
        while model.forward(&mut batch).unwrap() {}
        let logits = bits(batch.logits(0));
        member.sequence = batch.members.pop().unwrap().sequence;
        logits
    };
    let mut fork = prefilled(&model, &[1], &Cancel::default());
    fork.sequence.ids = first.sequence.ids.clone();
    fork.sequence.phases = first.sequence.phases.clone();
    fork.sequence.kv = first.sequence.kv.fork();
    let (seven, nine) = (logits(&mut first, 7), logits(&mut fork, 9));
    assert!(seven != nine);
    // Both go back to the prompt, and take the other's id.
    for member in [&mut first, &mut fork] {
        member.sequence.truncate(prompt.len());
    }
    assert!(logits(&mut first, 9) == nine && logits(&mut fork, 7) == seven);
}

/// A kernel that sets a cancellation in a layer.
struct Cancelling {
    kernel: Box<dyn Kernel>,
    cancel: Cancel,
    /// Calls of `swiglu`, one for each row and layer, up to the one that cancels; 0: none does.
    until: Arc<AtomicUsize>,
}

impl Kernel for Cancelling {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }
    fn decode_costs(&self) -> &'static [f32; 16] {
        self.kernel.decode_costs()
    }

    fn tile(&self, format: Format, cols: usize, phase: Phase) -> Tile {
        self.kernel.tile(format, cols, phase)
    }
    fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]) {
        self.kernel.pack(format, phase, x, at, tile);
    }
    fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>) {
        self.kernel.matmul(weights, phase, x, tokens, out);
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        self.kernel.rms_norm(x, weight, eps, out);
    }
    fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        if self.until.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) == Ok(1) {
            self.cancel.set();
        }
        self.kernel.swiglu(gate, up, out);
    }
    fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
        self.kernel.attention(queries, pages, head_dim);
    }
}

#[test]
fn a_member_that_is_cancelled_within_a_layer_leaves_before_the_next_one() {
    let (cancel, until) = (Cancel::default(), Arc::new(AtomicUsize::new(0)));
    let kernel = kernels::by_name("portable").unwrap();
    let kernel = Box::new(Cancelling { kernel, cancel: cancel.clone(), until: until.clone() });
    let model = load("plain", Backend::Cpu { kernel, pool: Pool::new(2) }, KvType::F16);
    // One row of the first member, and several of the others, as with drafts.
    let scripts = [(70, vec![3]), (20, vec![3, 4, 5, 6]), (45, vec![8, 9, 10])];
    let scripts = scripts.map(|(n, ids)| Script { prompt: (0..n).map(|i| (i * 7) % 60).collect(), ids });
    let expected = scripts.each_ref().map(|script| script.alone(&model)[1..].concat());
    let cancels = [Cancel::default(), cancel, Cancel::default()];
    let mut batch = Batch::default();
    for (script, cancel) in scripts.iter().zip(&cancels) {
        let mut member = prefilled(&model, &script.prompt, cancel);
        model.append(&mut member.sequence, &script.ids, Phase::Decode, Want::EVERY).unwrap();
        batch.members.push(member);
    }
    until.store(2, SeqCst);
    while model.forward(&mut batch).unwrap() {}
    assert!(cancels[1].is_set() && batch.logits(1).is_empty() && batch.members[1].sequence.kv.is_empty());
    assert!(bits(batch.logits(0)) == expected[0] && bits(batch.logits(2)) == expected[2]);
}

#[test]
fn a_cancelled_member_leaves_the_pass_and_the_others_keep_their_bits() {
    let model = load("plain", cpu(kernels::available().pop().unwrap(), 2), KvType::F16);
    let prompts: [Vec<u32>; 3] = [140, 20, 75].map(|n| (0..n).map(|i| (i * 7) % 60).collect());
    let expected: Vec<_> = prompts
        .iter()
        .map(|prompt| Script { prompt: prompt.clone(), ids: vec![3] }.alone(&model).pop().unwrap())
        .collect();
    let cancels: [Cancel; 3] = std::array::from_fn(|_| Cancel::default());
    let mut batch = Batch::default();
    for (prompt, cancel) in prompts.iter().zip(&cancels) {
        let mut member = prefilled(&model, prompt, cancel);
        model.append(&mut member.sequence, &[3], Phase::Decode, Want::Last).unwrap();
        batch.members.push(member);
    }
    cancels[1].set();
    while model.forward(&mut batch).unwrap() {}
    assert!(bits(batch.logits(0)) == expected[0] && bits(batch.logits(2)) == expected[2]);
    assert!(batch.logits(1).is_empty() && batch.members[1].sequence.kv.is_empty(), "its keys and values are freed");
    cancels.iter().for_each(Cancel::set);
    batch.members.remove(1);
    for member in &mut batch.members {
        model.append(&mut member.sequence, &[4], Phase::Decode, Want::Last).unwrap();
    }
    assert_eq!(model.forward(&mut batch), Err(Error::Cancelled));
}
