//! The model against itself: the same bits however the work is cut, the same numbers from Candle's own operations.

mod gguf_writer;

use std::path::PathBuf;

use candle_core::Device;
use candle_phi::compute::kernels;
use candle_phi::compute::ops::{Backend, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::error::Error;
use candle_phi::files::gguf::Gguf;
use candle_phi::model::phi3::{Config, Phi3};
use candle_phi::model::runner::Runner;
use candle_phi::model::{self, Model, Phase, Want};
use candle_phi::system::sync::Cancel;
use gguf_writer::model::{Shape, model_of};

/// Every kind of model there is a golden file of.
const FILES: [&str; 6] = ["plain", "window", "gqa", "longrope", "partial_tied", "k_official"];

fn load(name: &str, backend: Backend) -> Runner<Phi3> {
    load_with(name, backend, KvType::F16)
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.gguf"))
}

fn load_with(name: &str, backend: Backend, kv_type: KvType) -> Runner<Phi3> {
    let path = golden(name);
    Phi3::load(&Gguf::open(&path, true).unwrap(), backend, kv_type).unwrap()
}

fn config(name: &str) -> Config {
    Config::read(&Gguf::open(&golden(name), true).unwrap()).unwrap()
}

fn cpu(kernel: &str, n_threads: usize) -> Backend {
    Backend::Cpu { kernel: kernels::by_name(kernel).unwrap(), pool: Pool::new(n_threads) }
}

fn prompt(model: &Runner<Phi3>, n: usize) -> Vec<u32> {
    let n_vocab = model.info().n_vocab as u32;
    (0..n as u32).map(|i| (i * 7919 + 13) % n_vocab).collect()
}

/// The logits of every position when the prompt comes in pieces of these lengths.
fn logits(model: &Runner<Phi3>, ids: &[u32], pieces: &[usize]) -> Vec<f32> {
    logits_of(model, ids, pieces, Phase::Prefill)
}

fn logits_of(model: &Runner<Phi3>, ids: &[u32], pieces: &[usize], phase: Phase) -> Vec<f32> {
    let mut batch = model::single(model, &Cancel::default()).unwrap();
    let (mut at, mut out) = (0, Vec::new());
    for &length in pieces.iter().cycle() {
        if at == ids.len() {
            break;
        }
        let end = ids.len().min(at + length);
        out.extend(model::compute(model, &mut batch, &ids[at..end], phase, Want::EVERY).unwrap());
        at = end;
    }
    out
}

/// The root mean square of the differences, relative to that of the first.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / a.iter().copied().map(square).sum::<f64>()).sqrt()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

#[test]
fn the_same_bits_however_the_prompt_is_cut() {
    for kernel in kernels::available() {
        for file in FILES.iter().filter(|file| **file != "longrope") {
            let model = load(file, cpu(kernel, 2));
            // Longer than two pages of the cache, and than one chunk of the prefill.
            let ids = prompt(&model, 300.min(model.info().context_length));
            let whole = bits(&logits(&model, &ids, &[ids.len()]));
            for pieces in [&[1][..], &[2, 3, 5, 7], &[127, 1, 1, 130], &[256]] {
                assert!(whole == bits(&logits(&model, &ids, pieces)), "{file} with {kernel}, cut by {pieces:?}");
            }
        }
    }
}

/// What a batch of sequences and the check of guessed tokens stand on: rows of a decode pass do not know of each other.
#[test]
fn the_same_bits_in_a_decode_pass_of_one_to_eight_tokens() {
    for kernel in kernels::available() {
        for (file, kv_type) in [("plain", KvType::F16), ("window", KvType::Q8_0), ("k_official", KvType::F16)] {
            let model = load_with(file, cpu(kernel, 2), kv_type);
            let ids = prompt(&model, 150);
            let one = bits(&logits_of(&model, &ids, &[1], Phase::Decode));
            for n in 2..=8 {
                assert!(
                    one == bits(&logits_of(&model, &ids, &[n], Phase::Decode)),
                    "{file} with {kernel}, {n} at a time"
                );
            }
        }
    }
}

#[test]
fn the_same_bits_whatever_the_number_of_threads() {
    for kernel in kernels::available() {
        for file in FILES {
            let run = |n_threads| {
                let model = load(file, cpu(kernel, n_threads));
                let ids = prompt(&model, 200.min(model.info().context_length));
                bits(&logits(&model, &ids, &[150, 1]))
            };
            let one = run(1);
            assert!([2, 3, 7].into_iter().all(|n| run(n) == one), "{file} with {kernel}");
        }
    }
}

/// Longer than two blocks of attention: on few threads a task walks through the blocks, on many they are computed side by
/// side.
#[test]
fn the_same_bits_of_a_long_context_whatever_the_number_of_threads_and_the_chunks() {
    let shape = Shape { hidden: 32, feed_forward: 32, n_head: 2, n_head_kv: 1, n_vocab: 64, context: 4096 };
    let folder = tempfile::tempdir().unwrap();
    let path = model_of(shape).save(folder.path(), "model.gguf");
    let load = |backend| Phi3::load(&Gguf::open(&path, true).unwrap(), backend, KvType::F32).unwrap();
    let ids = prompt(&load(cpu("portable", 1)), 2500);
    for kernel in kernels::available() {
        let run = |n_threads, pieces: &[usize]| bits(&logits(&load(cpu(kernel, n_threads)), &ids, pieces));
        let whole = run(1, &[2500]);
        for (n_threads, pieces) in [(64, &[2500][..]), (2, &[700, 16, 1, 500]), (3, &[2499, 1])] {
            assert!(run(n_threads, pieces) == whole, "{kernel}, {n_threads} threads, cut by {pieces:?}");
        }
    }
    let ours = logits(&load(cpu("portable", 2)), &ids, &[2500]);
    let candle = logits(&load(Backend::Candle(Device::Cpu)), &ids, &[2500]);
    assert!(distance(&ours, &candle) < 1e-5, "{}", distance(&ours, &candle));
}

/// LongRoPE: the pass that outgrows the original context computes every position anew, so that what follows equals a
/// prompt that was long from its first token.
#[test]
fn a_sequence_that_outgrows_the_short_rope_factors_is_computed_anew() {
    let model = load("longrope", cpu("portable", 1));
    let original = config("longrope").long_rope.unwrap().original_context;
    let ids = prompt(&model, original + 5);
    let n_vocab = model.info().n_vocab;
    let whole = logits(&model, &ids, &[ids.len()]);
    let crossing = logits(&model, &ids, &[original - 2, 2]);
    assert!(bits(&crossing[original * n_vocab..]) == bits(&whole[original * n_vocab..]));
    let short = logits(&model, &ids[..original], &[original]);
    assert!(bits(&crossing[..original * n_vocab]) == bits(&short));
    assert!(bits(&short) != bits(&whole[..original * n_vocab]), "the two sets of factors differ");
}

/// The path that CUDA and Metal take, on the CPU.
#[test]
fn candles_own_operations_agree_with_the_kernels() {
    for file in FILES {
        let ours = load_with(file, cpu("portable", 1), KvType::F32);
        let candle = load_with(file, Backend::Candle(Device::Cpu), KvType::F32);
        let ids = prompt(&ours, 40);
        let (a, b) = (logits(&ours, &ids, &[17, 1]), logits(&candle, &ids, &[17, 1]));
        let error = distance(&a, &b);
        // Candle quantizes the activations of quantized weights to 8 bits.
        let bound = if file == "k_official" { 0.05 } else { 1e-5 };
        assert!(error < bound, "{file}: {error}");
    }
}

#[test]
fn a_cancelled_pass_says_so() {
    let model = load("plain", cpu("portable", 2));
    let cancel = Cancel::default();
    cancel.set();
    let mut batch = model::single(&model, &cancel).unwrap();
    let result = model::compute(&model, &mut batch, &prompt(&model, 20), Phase::Prefill, Want::Last);
    assert_eq!(result, Err(Error::Cancelled));
}

#[test]
fn an_id_outside_the_vocabulary_is_named() {
    let model = load("plain", cpu("portable", 1));
    let mut batch = model::single(&model, &Cancel::default()).unwrap();
    let error = model::compute(&model, &mut batch, &[1, 999_999], Phase::Prefill, Want::Last).unwrap_err();
    assert!(matches!(&error, Error::Value(message) if message.contains("999999")), "{error}");
}
