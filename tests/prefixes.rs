//! Prefixes that are held change no bit: a prompt has the same ids, pieces, log probabilities and logits, whatever was
//! computed before it.

mod random;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;

use candle_phi::compute::kernels;
use candle_phi::engine::{Engine, LoadOptions};
use candle_phi::kv::phases::Phases;
use candle_phi::model::{Phase, Want};
use candle_phi::runtime::generation::{Piece, Request};
use candle_phi::runtime::prompt::Prompt;
use candle_phi::runtime::sampling::Sampling;
use candle_phi::runtime::stream::TextStream;
use candle_phi::runtime::work::FinishReason;
use candle_phi::system::task::Task;
use random::Random;

/// Positions of a column.
const COLUMN: usize = 128;
/// Enough for every test.
const LARGE: u64 = 1 << 30;
const KV_TYPES: [&str; 3] = ["f16", "f32", "q8_0"];
/// Goldens of every kind, with lengths of prompts around what matters to each: the original context of LongRoPE (20 and
/// 16), the window (8 and 2047), a column (128).
const FILES: [(&str, &[usize]); 8] = [
    ("plain", &[33, 135]),
    ("window", &[21, 300]),
    ("gqa", &[140]),
    ("longrope", &[15, 19, 20, 21, 26]),
    ("partial_tied", &[29]),
    ("partial_tied_longrope", &[12, 16, 17, 40]),
    ("k_official", &[130]),
    ("k_low", &[40]),
];

/// The specification, and the best for this CPU.
fn two_kernels() -> [&'static str; 2] {
    ["portable", kernels::available().pop().unwrap()]
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.gguf"))
}

fn open(path: &Path, kernel: &str, kv_cache: &str, prefix_cache: u64) -> Engine {
    let options = LoadOptions {
        kernel: Some(kernel.into()),
        kv_cache: kv_cache.into(),
        n_threads: Some(2),
        prefix_cache: Some(prefix_cache),
        ..LoadOptions::default()
    };
    Engine::load(path, &options, &Task::default()).unwrap()
}

fn random_ids(random: &mut Random, n: usize, n_vocab: usize) -> Vec<u32> {
    (0..n).map(|_| random.below(n_vocab) as u32).collect()
}

fn scoped(ids: &[u32], scope: &str) -> Prompt {
    Prompt { ids: ids.to_vec(), scope: Arc::from(scope), ..Prompt::default() }
}

/// What a reader sees.
#[derive(Debug, PartialEq)]
struct Text {
    pieces: Vec<Piece>,
    end: Option<FinishReason>,
}

impl Text {
    fn ids(&self) -> Vec<u32> {
        self.pieces.iter().flat_map(|piece| piece.ids.clone()).collect()
    }
}

fn request(prompt: Prompt, temperature: f32, seed: u64) -> Request {
    let sampling = Sampling { temperature, ..Sampling::default() };
    Request { prompt, sampling, seed, ignore_eos: true, top_logprobs: Some(4), ..Request::default() }
}

fn stream(engine: &Engine, request: Request, max_tokens: usize) -> TextStream {
    engine.stream(request, Some(max_tokens), None).unwrap()
}

/// The text of a stream, and the positions of its prompt that were held.
fn read(stream: &TextStream) -> (Text, usize) {
    let mut pieces = Vec::new();
    while let Some(piece) = stream.next().unwrap() {
        pieces.push(piece);
    }
    (Text { pieces, end: stream.finish_reason().unwrap() }, stream.timings().unwrap().cached)
}

fn generated(engine: &Engine, prompt: Prompt, max_tokens: usize) -> (Text, usize) {
    read(&stream(engine, request(prompt, 0.7, 3), max_tokens))
}

/// Computes a prompt, which is held from then on.
fn warm(engine: &Engine, prompt: Prompt) {
    let stream = engine.prefill(prompt, false).unwrap();
    while stream.next().unwrap().is_some() {}
}

/// The bits of the logits after the last id.
fn logits(engine: &Engine, ids: &[u32]) -> Vec<u32> {
    let logits = engine.logits(ids.to_vec(), Want::Last).unwrap().next().unwrap().unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

fn most(engine: &Engine, wanted: usize) -> usize {
    wanted.min(engine.info.n_ctx - 12)
}

/// The original context of a file with two sets of rope factors.
fn original(name: &str) -> usize {
    match name {
        "longrope" => 20,
        "partial_tied_longrope" => 16,
        _ => usize::MAX,
    }
}

#[test]
fn a_held_prefix_of_every_length_changes_nothing() {
    for kernel in two_kernels() {
        for kv_cache in KV_TYPES {
            for (name, lengths) in FILES {
                // The longest ones once for each kernel.
                let lengths = lengths.iter().filter(|&&n| n < 100 || kv_cache == KV_TYPES[name.len() % 3]);
                for &n in lengths {
                    check_every_length(name, kernel, kv_cache, n);
                }
            }
        }
    }
}

fn check_every_length(name: &str, kernel: &str, kv_cache: &str, n: usize) {
    let (engine, plain) = (open(&golden(name), kernel, kv_cache, LARGE), open(&golden(name), kernel, kv_cache, 0));
    let mut random = Random::new(n as u64);
    let n = most(&engine, n);
    let ids = random_ids(&mut random, n, engine.info.n_vocab);
    let (text, cached) = generated(&plain, ids.clone().into(), 8);
    assert_eq!(cached, 0, "without a cache");
    for length in 0..n {
        for goes_on in [0, 5, COLUMN] {
            let (mut before, scope) = (ids[..length].to_vec(), format!("{length}, {goes_on}"));
            before.extend(vec![ids.get(length).map_or(0, |id| (id + 1) % 60); goes_on]);
            before.truncate(engine.info.n_ctx);
            if before.is_empty() || goes_on == COLUMN && length % 10 != 0 {
                continue;
            }
            warm(&engine, scoped(&before, &scope));
            let (found, cached) = generated(&engine, scoped(&ids, &scope), 8);
            let case = format!("{name}, {kernel}, {kv_cache}: {length} of {n} are held, with {goes_on} more");
            assert_eq!(found, text, "{case}");
            let regime = |n: usize| n > original(name);
            let held = if regime(before.len()) == regime(n) { length } else { 0 };
            assert_eq!(cached, held, "{case}");
        }
    }
}

#[test]
fn logits_and_scores_are_the_same_with_every_held_prefix() {
    for kernel in two_kernels() {
        for (name, _) in FILES {
            let (engine, plain) = (open(&golden(name), kernel, "f16", LARGE), open(&golden(name), kernel, "f16", 0));
            let mut random = Random::new(7);
            let ids = random_ids(&mut random, most(&engine, 40), engine.info.n_vocab);
            let score = |engine: &Engine, start| {
                let stream = engine.score(ids.clone(), start, 3).unwrap();
                let mut all = Vec::new();
                while let Some(entries) = stream.next().unwrap() {
                    all.extend(entries);
                }
                all
            };
            let (last, scores) = (logits(&plain, &ids), score(&plain, ids.len() / 2));
            for length in 1..=ids.len() {
                logits(&engine, &ids[..length]); // from the prefix before it
                assert!(logits(&engine, &ids) == last, "{name}, {kernel}: logits with {length} held");
                assert_eq!(score(&engine, ids.len() / 2), scores, "{name}, {kernel}: scores with {length} held");
            }
            for length in 1..=ids.len() {
                assert!(
                    logits(&engine, &ids[..length]) == logits(&plain, &ids[..length]),
                    "{name}, {kernel}: {length}"
                );
            }
        }
    }
}

/// Prompts that begin like earlier ones, and differ later.
fn related_prompts(random: &mut Random, count: usize, longest: usize, n_vocab: usize) -> Vec<Vec<u32>> {
    let mut prompts: Vec<Vec<u32>> = vec![random_ids(random, longest / 2, n_vocab)];
    while prompts.len() < count {
        let from = &prompts[random.below(prompts.len())];
        let mut ids = from[..random.below(from.len() + 1)].to_vec();
        if random.below(4) > 0 {
            let more = 1 + random.below(longest / 2);
            ids.extend(random_ids(random, more, n_vocab));
        }
        ids.truncate(longest);
        if !ids.is_empty() {
            prompts.push(ids);
        }
    }
    prompts
}

/// The budget runs out at every size, in columns: after each request something else is left.
#[test]
fn eviction_at_any_point_changes_nothing() {
    for (i, kernel) in two_kernels().into_iter().enumerate() {
        for (j, (name, longest)) in
            [("window", 500), ("bare", 700), ("gqa", 240), ("k_official", 200)].into_iter().enumerate()
        {
            let kv_cache = KV_TYPES[(i + j) % 3];
            let plain = open(&golden(name), kernel, kv_cache, 0);
            let mut random = Random::new(j as u64);
            let prompts = related_prompts(&mut random, 24, longest, plain.info.n_vocab);
            let expected: Vec<Text> = prompts.iter().map(|ids| generated(&plain, ids.clone().into(), 5).0).collect();
            let engine = open(&golden(name), kernel, kv_cache, LARGE);
            warm(&engine, random_ids(&mut random, 1, 60).into());
            let column = engine.cache_info().unwrap().bytes;
            assert!(column > 0);
            for columns in 0..=8 {
                let limit = columns * column + column / 2;
                let engine = open(&golden(name), kernel, kv_cache, limit);
                let mut hits = 0;
                for i in (0..prompts.len()).chain(0..prompts.len()) {
                    let (text, cached) = generated(&engine, prompts[i].clone().into(), 5);
                    hits += cached;
                    let case = format!("{name}, {kernel}, {kv_cache}: {columns} columns, prompt {i}, {cached} held");
                    assert_eq!(text, expected[i], "{case}");
                    let held = engine.cache_info().unwrap();
                    assert!(held.bytes <= limit && held.limit == limit, "{case}: {held:?}");
                }
                assert_eq!(hits > 0, columns > 0, "{name}, {columns} columns: {hits} hits");
            }
        }
    }
}

/// Streams that begin and end while others run, over a budget of a few columns.
#[test]
fn streams_that_run_at_once_share_prefixes_and_read_as_alone() {
    for (j, (name, longest)) in
        [("window", 400), ("gqa", 200), ("longrope", 40), ("k_official", 180)].into_iter().enumerate()
    {
        for kernel in two_kernels() {
            let plain = open(&golden(name), kernel, "f16", 0);
            let mut random = Random::new(100 + j as u64);
            let prompts = related_prompts(&mut random, 40, longest, plain.info.n_vocab);
            for limit in [60_000, LARGE] {
                let engine = open(&golden(name), kernel, "f16", limit);
                let (mut running, mut next) = (Vec::new(), 0);
                while next < prompts.len() || !running.is_empty() {
                    if next < prompts.len() && running.len() < 6 && random.below(3) > 0 {
                        let stream = stream(&engine, request(prompts[next].clone().into(), 0.7, 3), 1 + next % 30);
                        running.push((next, stream, Vec::new()));
                        next += 1;
                    }
                    if running.is_empty() {
                        continue;
                    }
                    let i = random.below(running.len());
                    let (prompt, stream, pieces) = &mut running[i];
                    match stream.poll().unwrap() {
                        Poll::Ready(Some(piece)) => pieces.push(piece),
                        Poll::Ready(None) => {
                            let (prompt, stream, pieces) = (*prompt, stream, std::mem::take(pieces));
                            let text = Text { pieces, end: stream.finish_reason().unwrap() };
                            let (alone, _) = generated(&plain, prompts[prompt].clone().into(), 1 + prompt % 30);
                            assert_eq!(text, alone, "{name}, {kernel}, {limit} bytes, prompt {prompt}");
                            running.swap_remove(i);
                        }
                        Poll::Pending if random.below(50) == 0 => {
                            stream.cancel();
                            running.swap_remove(i);
                        }
                        Poll::Pending => stream.wait().unwrap(),
                    }
                }
            }
        }
    }
}

/// The second stream of a prompt does not compute it again, although the first one has not ended.
#[test]
fn the_second_of_two_streams_at_once_takes_the_columns_of_the_first() {
    let kernel = two_kernels()[1];
    let (engine, plain) = (open(&golden("bare"), kernel, "f16", LARGE), open(&golden("bare"), kernel, "f16", 0));
    let mut random = Random::new(5);
    let common = random_ids(&mut random, 2500, engine.info.n_vocab);
    let prompts = [1, 2].map(|last| [&common[..], &[last]].concat());
    let streams = prompts.each_ref().map(|ids| stream(&engine, request(ids.clone().into(), 0.7, 3), 6));
    assert_eq!(streams[0].poll().unwrap(), Poll::Pending);
    assert_eq!(streams[1].poll().unwrap(), Poll::Pending);
    for (stream, ids) in streams.iter().zip(&prompts) {
        let (alone, _) = generated(&plain, ids.clone().into(), 6);
        assert_eq!(read(stream).0, alone);
    }
    let [first, second] = streams.map(|stream| stream.timings().unwrap().cached);
    assert_eq!(first, 0);
    assert!(second >= common.len() / COLUMN * COLUMN, "{second} of {} were shared", common.len());
}

#[test]
fn scopes_share_nothing() {
    let engine = open(&golden("gqa"), two_kernels()[1], "f16", LARGE);
    let ids = random_ids(&mut Random::new(3), 150, engine.info.n_vocab);
    let (text, cached) = generated(&engine, scoped(&ids, "a"), 6);
    assert_eq!(cached, 0);
    for scope in ["b", "", "A", "a "] {
        assert_eq!(
            generated(&engine, scoped(&ids, scope), 6),
            (Text { pieces: text.pieces.clone(), ..text }, 0),
            "{scope:?}"
        );
        assert_eq!(generated(&engine, scoped(&ids, scope), 6).1, ids.len() - 1, "{scope:?} has its own now");
    }
    assert_eq!(generated(&engine, scoped(&ids, "a"), 6).1, ids.len() - 1);
}

/// The keys and values of an answer are those of decode. A prompt that repeats the answer is prefilled, which rounds
/// differently: it must not meet them.
#[test]
fn a_prompt_never_meets_decoded_positions() {
    for kernel in two_kernels() {
        let mut differ = 0;
        for kv_cache in KV_TYPES {
            let (engine, plain) = (
                open(&golden("k_official"), kernel, kv_cache, LARGE),
                open(&golden("k_official"), kernel, kv_cache, 0),
            );
            let mut random = Random::new(1);
            let ids = random_ids(&mut random, 20, engine.info.n_vocab);
            // In a chat, so that the answer is held, and without one.
            let chat = engine.chat().unwrap();
            for holder in [chat.holder(), Default::default()] {
                let prompt = Prompt { holder, ..ids.clone().into() };
                let (text, _) = generated(&engine, prompt, 40);
                let mut whole = [&ids[..], &text.ids()].concat();
                let in_a_chat = engine.cache_info().unwrap().positions;
                whole.push(5);
                let expected = logits(&plain, &whole);
                assert!(logits(&engine, &whole) == expected, "{kernel}, {kv_cache}: {in_a_chat} positions were held");
                // The test can fail: with the phases of the answer, some log probabilities differ.
                let mut phases = Phases::prefill(ids.len());
                phases.push(text.ids().len(), Phase::Decode);
                let of_chat = |engine: &Engine| {
                    let prompt = Prompt { phases: phases.clone(), ..whole.clone().into() };
                    let request = Request { top_logprobs: Some(60), ..request(prompt, 0.0, 1) };
                    read(&stream(engine, request, 1)).0
                };
                let as_prompt = generated_greedily(&plain, whole.clone().into());
                assert_eq!(of_chat(&engine), of_chat(&plain), "{kernel}, {kv_cache}");
                differ += usize::from(of_chat(&plain) != as_prompt);
            }
        }
        assert!(differ > 0 || kernel == "portable", "{kernel}: the phases have the same bits");
    }
}

fn generated_greedily(engine: &Engine, prompt: Prompt) -> Text {
    read(&stream(engine, Request { top_logprobs: Some(60), ..request(prompt, 0.0, 1) }, 1)).0
}
