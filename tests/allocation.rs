//! Memory of a prompt: bounded, and an error where the allocator refuses. A binary of its own: it counts and refuses
//! allocations of the whole process.

mod gguf_writer;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use candle_phi::compute::kernels;
use candle_phi::compute::ops::{Backend, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::engine::{Engine, LoadOptions};
use candle_phi::error::{Error, Result};
use candle_phi::files::gguf::Gguf;
use candle_phi::model::phi3::Phi3;
use candle_phi::model::runner::Runner;
use candle_phi::model::{self, Batch, Member, Model, Phase, Sequence, Want};
use candle_phi::runtime::scheduler::Scheduler;
use candle_phi::runtime::scores::Scores;
use candle_phi::runtime::stream::Stream;
use candle_phi::system::sync::Cancel;
use candle_phi::system::task::Task;
use gguf_writer::model::{Shape, model_of};

const MIB: usize = 1 << 20;
/// Allocations of at least this size can be refused: a prompt or a file decides them.
const LARGE: usize = 4 << 10;

/// Bytes that are allocated now, the most since `start`, and the largest allocation since then.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
/// Large allocations up to the one that is refused; 0: none is.
static UNTIL_REFUSAL: AtomicUsize = AtomicUsize::new(0);

struct Counted;

// SAFETY: the system's allocator does the work; null stands for a refusal.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let one_less = |left: usize| left.checked_sub(1);
        if layout.size() >= LARGE && UNTIL_REFUSAL.fetch_update(SeqCst, SeqCst, one_less) == Ok(1) {
            return std::ptr::null_mut();
        }
        let live = LIVE.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(live, SeqCst);
        LARGEST.fetch_max(layout.size(), SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// The most bytes that `work` allocated at a time, and its largest allocation.
fn measured(work: impl FnOnce()) -> (usize, usize) {
    let before = LIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    LARGEST.store(0, SeqCst);
    work();
    (PEAK.load(SeqCst) - before, LARGEST.load(SeqCst))
}

fn load(shape: Shape, kernel: &str, n_threads: usize) -> Runner<Phi3> {
    let folder = tempfile::tempdir().unwrap();
    let path = model_of(shape).save(folder.path(), "model.gguf");
    let backend = Backend::Cpu { kernel: kernels::by_name(kernel).unwrap(), pool: Pool::new(n_threads) };
    Phi3::load(&Gguf::open(&path, true).unwrap(), backend, KvType::F16).unwrap()
}

fn run(model: &Runner<Phi3>, tokens: usize, want: Want) -> Result<usize> {
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i % 64).collect();
    let mut batch = model::single(model, &Cancel::default())?;
    Ok(model::compute(model, &mut batch, &ids, Phase::Prefill, want)?.len())
}

/// Its weights are a few features by many: small files with long rows.
fn wide(feed_forward: u64) -> Shape {
    Shape { hidden: 2, feed_forward, n_head: 1, n_head_kv: 1, n_vocab: 64, context: 1024 }
}

/// The specification, and the best for this CPU.
fn two_kernels() -> [&'static str; 2] {
    ["portable", kernels::available().pop().unwrap()]
}

/// One after the other in one test: the test harness allocates too, as it reports a test.
#[test]
fn memory_is_bounded_and_a_refusal_is_an_error() {
    a_wide_model_takes_a_bounded_part_of_the_memory();
    the_logits_of_every_position_are_held_once();
    attention_takes_no_memory_that_grows_with_the_context();
    if cfg!(target_os = "linux") {
        a_prompt_that_cannot_fit_is_refused_before_it_is_computed(); // where the available memory is known
    }
    a_refused_allocation_is_an_error_and_the_model_goes_on();
    a_refused_allocation_in_a_shared_pass_changes_no_sequence();
    a_prompt_that_waits_for_its_reader_keeps_no_activations();
    many_long_prompts_stay_within_the_prefix_cache();
}

fn a_wide_model_takes_a_bounded_part_of_the_memory() {
    for kernel in two_kernels() {
        for (feed_forward, most) in [(87_000, 96 * MIB), (1 << 18, 128 * MIB)] {
            let model = load(wide(feed_forward), kernel, 2);
            assert!(model.info().shared_tokens < 128, "its prompts share smaller passes");
            let (peak, _) = measured(|| assert_eq!(run(&model, 130, Want::Last), Ok(64)));
            assert!(peak < most, "{kernel}, {feed_forward}: {peak} bytes");
        }
    }
}

fn the_logits_of_every_position_are_held_once() {
    const N_VOCAB: usize = 1 << 18;
    let shape = Shape { n_vocab: N_VOCAB as u64, ..wide(16) };
    let model = load(shape, kernels::available()[0], 2);
    let (peak, _) = measured(|| assert_eq!(run(&model, 200, Want::EVERY), Ok(200 * N_VOCAB)));
    let logits = 4 * 200 * N_VOCAB;
    assert!(peak < logits + 72 * MIB, "{peak} bytes, {logits} of logits");
}

fn attention_takes_no_memory_that_grows_with_the_context() {
    let shape = Shape { hidden: 512, feed_forward: 1024, n_head: 8, n_head_kv: 8, n_vocab: 64, context: 1 << 14 };
    for n_threads in [2, 100] {
        let model = load(shape, kernels::available().pop().unwrap(), n_threads);
        let (_, largest) = measured(|| assert_eq!(run(&model, 6500, Want::Last), Ok(64)));
        // 7 blocks of partial results of 512 tokens would be 7.6 MB.
        assert!(largest <= 5 * MIB, "{n_threads} threads: {largest} bytes at once");
    }
}

fn a_prompt_that_cannot_fit_is_refused_before_it_is_computed() {
    let shape = Shape { hidden: 1024, feed_forward: 16, n_head: 1, n_head_kv: 1, n_vocab: 64, context: 1024 };
    let model = load(shape, "portable", 1);
    let mut sequence = model.sequence().unwrap();
    let error = model.append(&mut sequence, &vec![1; 1 << 26], Phase::Prefill, Want::Last).unwrap_err();
    let Error::Memory(message) = &error else { panic!("{error:?}") };
    assert!(message.contains("67108864 tokens") && message.contains("bytes are available"), "{message}");
    assert_eq!(run(&model, 3, Want::Last), Ok(64), "the model is usable");
}

/// Every large allocation of a prompt is refused once, in the order in which they come.
fn a_refused_allocation_is_an_error_and_the_model_goes_on() {
    for kernel in two_kernels() {
        for want in [Want::Last, Want::EVERY] {
            let model = load(Shape { n_vocab: 4096, ..wide(1 << 14) }, kernel, 2);
            let mut refused = 0;
            loop {
                UNTIL_REFUSAL.store(refused + 1, SeqCst);
                // On threads of its own, which have no scratch yet.
                let result = std::thread::scope(|scope| scope.spawn(|| run(&model, 300, want)).join().unwrap());
                let all_granted = UNTIL_REFUSAL.swap(0, SeqCst) > 0;
                match result {
                    Err(Error::Memory(message)) => assert!(message.contains(" bytes of memory"), "{message}"),
                    Ok(_) if all_granted => break,
                    other => panic!("{kernel}, {want:?}, allocation {refused}: {other:?}"),
                }
                refused += 1;
            }
            assert!(refused > 5, "{kernel}, {want:?}: {refused} large allocations");
        }
    }
}

/// A member with the same ids and shared columns.
fn fork(sequence: &Sequence, cancel: &Cancel) -> Member {
    let &Sequence { ref ids, ref phases, ref scope, ref kv, long, logits_from, .. } = sequence;
    let (ids, phases, scope, kv) = (ids.clone(), phases.clone(), scope.clone(), kv.fork());
    Member::new(Sequence { ids, phases, kv, long, logits_from, scope, held: None }, cancel.clone())
}

/// Takes the pass, on a thread of its own, which has no scratch yet.
fn pass(model: &Runner<Phi3>, batch: &mut Batch) -> Result<()> {
    let forward = || -> Result<()> {
        while model.forward(batch)? {}
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(forward).join().unwrap())
}

/// Every large allocation of a pass over three sequences is refused once. Then the same pass has its usual results. Of
/// sequences that decode, one needs a new column, and the others have to copy one. One of the three may be cancelled.
fn a_refused_allocation_in_a_shared_pass_changes_no_sequence() {
    let shape = Shape { hidden: 1024, feed_forward: 4096, n_head: 8, n_head_kv: 8, n_vocab: 2048, context: 1024 };
    let model = load(shape, kernels::available().pop().unwrap(), 2);
    let prompts = [128, 20, 127].map(|tokens| {
        let ids: Vec<u32> = (0..tokens).map(|i| i * 7 % 64).collect();
        let mut batch = model::single(&model, &Cancel::default()).unwrap();
        model::compute(&model, &mut batch, &ids, Phase::Prefill, Want::Last).unwrap();
        batch.members.remove(0).sequence
    });
    let (go, stop) = (Cancel::default(), Cancel::default());
    stop.set();
    let all = [Phase::Decode, Phase::Prefill].map(|phase| [[&go, &go, &go], [&go, &stop, &go]].map(|c| (phase, c)));
    for (phase, cancels) in all.into_iter().flatten() {
        let batch = || {
            let mut batch = Batch::default();
            for (prompt, cancel) in prompts.iter().zip(cancels) {
                let (mut member, ids) = match phase {
                    Phase::Decode => (fork(prompt, cancel), &[5][..]),
                    Phase::Prefill => (fork(&model.sequence().unwrap(), cancel), &prompt.ids[..15]),
                };
                model.append(&mut member.sequence, ids, phase, Want::Last).unwrap();
                batch.members.push(member);
            }
            batch
        };
        let results = |batch: &Batch| [0, batch.members.len() - 1].map(|member| batch.logits(member).to_vec());
        let mut usual = batch();
        pass(&model, &mut usual).unwrap();
        let mut refused = 0;
        loop {
            let mut batch = batch();
            UNTIL_REFUSAL.store(refused + 1, SeqCst);
            let result = pass(&model, &mut batch);
            let all_granted = UNTIL_REFUSAL.swap(0, SeqCst) > 0;
            match result {
                Err(Error::Memory(_)) => {
                    batch.members.retain(|member| !member.cancel.is_set());
                    pass(&model, &mut batch).unwrap();
                }
                Ok(()) if all_granted => break,
                other => panic!("allocation {refused}: {other:?}"),
            }
            assert!(results(&batch) == results(&usual), "{phase:?}, after allocation {refused} was refused");
            refused += 1;
        }
        assert!(refused > 5, "{phase:?}: {refused} large allocations");
    }
}

fn a_prompt_that_waits_for_its_reader_keeps_no_activations() {
    const N_VOCAB: usize = 1 << 18;
    let model = Arc::new(load(Shape { n_vocab: N_VOCAB as u64, ..wide(16) }, kernels::available()[0], 2));
    let before = LIVE.load(SeqCst);
    let scores = Scores::new(model, (0..600).map(|i| i % 64).collect(), 1, 0);
    let stream = Stream::new(scores, Scheduler::default(), None);
    let rows = stream.next().unwrap().unwrap().len();
    assert!(4 * rows * N_VOCAB > 8 * MIB, "{rows} logits at a time");
    // Four items more are computed ahead of the reader.
    let since = Instant::now();
    let waits = || stream.progress(true).unwrap().pop().is_some_and(|progress| progress.done == 5 * rows as u64);
    while !waits() || LIVE.load(SeqCst) > before + 4 * MIB {
        let held = LIVE.load(SeqCst) - before;
        assert!(since.elapsed() < Duration::from_secs(60), "{held} bytes are held for a reader that is behind");
        std::thread::yield_now();
    }
}

/// The memory that is held and the peak after 200 prompts are those after the first 20.
fn many_long_prompts_stay_within_the_prefix_cache() {
    const LIMIT: usize = 2 * MIB;
    /// What the tree needs beside columns, and the last answers.
    const MORE: usize = MIB / 2;
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bare.gguf");
    let options = LoadOptions { n_threads: Some(2), prefix_cache: Some(LIMIT as u64), ..LoadOptions::default() };
    let engine = Engine::load(&path, &options, &Task::default()).unwrap();
    let ask = |prompts: std::ops::Range<u32>| {
        for first in prompts {
            let ids: Vec<u32> = (0..1500).map(|i| if i == 0 { first } else { i * 7 % 200 }).collect();
            let stream = engine.prefill(ids.into(), false).unwrap();
            while stream.next().unwrap().is_some() {}
            let held = engine.cache_info().unwrap();
            assert!(held.bytes <= LIMIT as u64, "{held:?}");
        }
    };
    let before = LIVE.load(SeqCst);
    let (first, _) = measured(|| ask(0..20));
    let held = LIVE.load(SeqCst).saturating_sub(before);
    let (peak, _) = measured(|| ask(20..220));
    let grown = LIVE.load(SeqCst).saturating_sub(before).saturating_sub(held);
    assert!(engine.cache_info().unwrap().bytes > LIMIT as u64 / 2, "the prompts fill it");
    assert!(grown < MORE, "{grown} bytes more after 200 prompts; {held} after 20");
    assert!(held < LIMIT + 3 * MIB, "{held} bytes");
    assert!(peak < first, "{peak} bytes more at a time in 200 prompts; {first} in the first 20");
}
