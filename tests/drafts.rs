//! Exact speculation: whatever is drafted, a text has the ids, the bits of logits and the pieces that it has without drafts.

mod random;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_phi::compute::kernels;
use candle_phi::compute::ops::{Backend, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::error::{Error, Result};
use candle_phi::files::gguf::Gguf;
use candle_phi::model::phi3::Phi3;
use candle_phi::model::{self, Batch, Info, Model, Phase, Sequence, Want};
use candle_phi::runtime::draft::model::ModelDrafter;
use candle_phi::runtime::draft::survival::Survival;
use candle_phi::runtime::draft::{Basis, Drafter, MOST, Source};
use candle_phi::runtime::generation::{Generation, Piece, Request};
use candle_phi::runtime::sampling::{Sampler, Sampling};
use candle_phi::runtime::scheduler::Scheduler;
use candle_phi::runtime::stream::TextStream;
use candle_phi::runtime::work::{FinishReason, Step, Work};
use candle_phi::system::sync::Cancel;
use candle_phi::text::tokenizer::Tokenizer;
use random::Random;

/// Plain, a window of 8, groups of heads, rope factors that change at 20 and, with a window, at 16 positions, k-quants.
const FILES: [&str; 6] = ["plain", "window", "gqa", "longrope", "partial_tied_longrope", "k_official"];

fn gguf(name: &str) -> Gguf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.gguf"));
    Gguf::open(&path, true).unwrap()
}

fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(&gguf("plain")).unwrap())
}

fn load(name: &str, kernel: &str, kv_type: KvType) -> Arc<dyn Model> {
    let backend = Backend::Cpu { kernel: kernels::by_name(kernel).unwrap(), pool: Pool::new(2) };
    Arc::new(Phi3::load(&gguf(name), backend, kv_type).unwrap())
}

fn best() -> &'static str {
    kernels::available().pop().unwrap()
}

/// Drafts a known answer, of which it gets some ids wrong.
struct Known {
    answer: Vec<u32>,
    /// Ids of the answer that are there.
    said: usize,
    /// Of 100 ids, those that it gets wrong.
    wrong: usize,
    random: Random,
}

impl Known {
    fn new(answer: &[u32], wrong: usize) -> Box<Self> {
        Box::new(Known { answer: answer.to_vec(), said: 0, wrong, random: Random::new(9) })
    }
}

impl Drafter for Known {
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.said += ids.len();
        Ok(())
    }

    fn draft(&mut self, most: usize, _: &Sampler, draft: &mut Vec<u32>) -> Result<Option<Basis>> {
        for i in self.said..self.said + most {
            let right = self.answer.get(i).copied().unwrap_or(7); // past a stop
            let is_wrong = self.random.below(100) < self.wrong;
            draft.push(if is_wrong { (right + 1 + self.random.below(200) as u32) % 288 } else { right });
        }
        Ok(Some(Basis { source: Source::History, length: 32 }))
    }
}

/// Everything about a generation that drafts must not change.
#[derive(Clone, Debug, Default, PartialEq)]
struct Trace {
    /// What each id delivered.
    pieces: Vec<Option<Piece>>,
    end: Option<FinishReason>,
    /// The bits of the logits that each id was sampled from.
    logits: Vec<Vec<u32>>,
    /// The sequence after the end.
    ids: Vec<u32>,
    runs: Vec<usize>,
    computed: usize,
}

impl Trace {
    fn answer(&self) -> Vec<u32> {
        self.pieces.iter().flatten().flat_map(|piece| piece.ids.clone()).collect()
    }
}

/// Computes a generation with `n` drafts in each pass, as far as it drafts them. Also returns the drafts and the accepted ones.
fn run(
    model: &Arc<dyn Model>,
    request: &Request,
    drafter: Option<Box<dyn Drafter>>,
    n: usize,
) -> (Trace, usize, usize) {
    let mut generation = Generation::new(model.clone(), tokenizer(), request.clone());
    if let Some(drafter) = drafter {
        generation.draft_with(drafter);
    }
    let (mut trace, mut survival, n_vocab) = (Trace::default(), Survival::default(), model.info().n_vocab);
    let mut batch = Batch::default();
    batch.members.push(model::Member::new(generation.begin().unwrap(), Cancel::default()));
    while trace.end.is_none() {
        if batch.members[0].sequence.decodes() {
            let sequence = &mut batch.members[0].sequence;
            let products = generation.draft(sequence, n, &mut survival);
            assert!(products.len() <= n);
            generation.extend(sequence, products.len()).unwrap();
        }
        while model.forward(&mut batch).unwrap() {}
        let logits = batch.logits(0).to_vec();
        for row in logits.chunks_exact(n_vocab) {
            trace.logits.push(row.iter().map(|logit| logit.to_bits()).collect());
            let (piece, again) = match generation.accept(&mut batch.members[0].sequence, &logits).unwrap() {
                Step::Again(piece) => (piece, true),
                Step::More(piece) => (piece, false),
                Step::End(piece, reason) => {
                    trace.end = Some(reason);
                    (piece, false)
                }
            };
            trace.pieces.push(piece);
            if !again {
                break;
            }
        }
    }
    let sequence = &batch.members[0].sequence;
    (trace.ids, trace.runs, trace.computed) = (sequence.ids.clone(), sequence.phases.runs(), sequence.kv.len());
    let (drafted, accepted) = generation.drafted();
    (trace, drafted, accepted)
}

fn alone(model: &Arc<dyn Model>, request: &Request) -> Trace {
    run(model, request, None, 0).0
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 13) % 288).collect()
}

/// Requests with every option that decides ids, text or its end. The prompts of those files may be longer than the window.
fn requests(model: &Arc<dyn Model>, length: usize) -> Vec<Request> {
    let stop_id = tokenizer().stop_ids()[0];
    let request = |sampling: Sampling| Request {
        prompt: prompt(length).into(),
        max_tokens: 26.min(model.info().context_length - length),
        sampling,
        seed: 5,
        ignore_eos: true,
        ..Request::default()
    };
    let penalties = Sampling {
        repeat_penalty: 1.3,
        repeat_last_n: Some(5),
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        logit_bias: vec![(40, 2.0), (41, -100.0)],
        ..Sampling::default()
    };
    let cut = Sampling { top_k: 30, top_p: 0.9, min_p: 0.02, temperature: 0.8, ..Sampling::default() };
    let stops = Sampling { logit_bias: vec![(stop_id, 4.0)], ..Sampling::default() };
    let mut all = vec![
        request(greedy()),
        request(Sampling::default()),
        request(Sampling { temperature: 0.0, ..penalties.clone() }),
        request(penalties),
        Request { top_logprobs: Some(3), ..request(cut) },
        Request { ignore_eos: false, ..request(stops) },
    ];
    // A stop string within the text that one of them has anyway.
    let text: String = alone(model, &all[1]).pieces.into_iter().flatten().map(|piece| piece.text).collect();
    let chars: Vec<char> = text.chars().collect();
    let stop: String = chars[chars.len() / 2..].iter().take(2).collect();
    all.push(Request { stop: vec![stop], ..all[1].clone() });
    all
}

/// Draws with each drafter, `n` drafts in a pass.
fn check(model: &Arc<dyn Model>, request: &Request, n: usize, what: &str) {
    let expected = alone(model, request);
    for wrong in [0, 100, 30] {
        let (found, drafted, accepted) = run(model, request, Some(Known::new(&expected.answer(), wrong)), n);
        let what = format!("{what}, {n} drafts, {wrong} % wrong: {request:?}");
        assert!(found.pieces == expected.pieces, "{what}: {:?}, not {:?}", found.pieces, expected.pieces);
        assert!(found.logits == expected.logits, "{what}: logits");
        assert!(found == expected, "{what}");
        match wrong {
            0 => assert!(expected.logits.len() < 3 || accepted > 0 && accepted + n >= drafted, "{what}"),
            100 => assert_eq!(accepted, 0, "{what}"),
            _ => {}
        }
    }
}

#[test]
fn every_kind_of_model_has_the_bits_and_pieces_that_it_has_without_drafts() {
    for (i, file) in FILES.into_iter().enumerate() {
        for (j, kernel) in ["portable", best()].into_iter().enumerate() {
            for (k, kv_type) in [KvType::F16, KvType::F32, KvType::Q8_0].into_iter().enumerate() {
                let model = load(file, kernel, kv_type);
                for (r, request) in requests(&model, 6 + i).into_iter().enumerate() {
                    let n = 1 + (5 * i + 3 * j + 7 * k + 2 * r) % MOST;
                    check(&model, &request, n, &format!("{file}, {kernel}, {kv_type:?}"));
                }
            }
        }
    }
}

#[test]
fn every_number_of_drafts_gives_the_same() {
    let model = load("gqa", best(), KvType::F16);
    for request in requests(&model, 9) {
        for n in 1..=MOST {
            check(&model, &request, n, "gqa");
        }
    }
}

#[test]
fn drafts_do_not_reach_the_border_of_rope_factors_early() {
    for (file, border) in [("longrope", 20), ("partial_tied_longrope", 16)] {
        let model = load(file, best(), KvType::F16);
        for length in 1..border + 3 {
            for sampling in [greedy(), Sampling::default()] {
                let request = Request { sampling, seed: 3, ..requests(&model, length)[0].clone() };
                check(&model, &request, [15, 3][length % 2], &format!("{file}, a prompt of {length}"));
            }
        }
    }
}

#[test]
fn drafts_end_with_max_tokens_and_the_context() {
    let model = load("plain", best(), KvType::F16);
    for max_tokens in 1..=17 {
        let request = Request { max_tokens, ..requests(&model, 5)[0].clone() };
        let expected = alone(&model, &request);
        let (found, drafted, accepted) = run(&model, &request, Some(Known::new(&expected.answer(), 0)), MOST);
        assert!(found == expected, "{max_tokens}");
        assert_eq!((drafted, accepted), (max_tokens.saturating_sub(2), max_tokens.saturating_sub(2)), "none too many");
    }
    let length = model.info().context_length - 9;
    let request = Request { max_tokens: 9, ..requests(&model, 5)[0].clone() };
    check(&model, &Request { prompt: prompt(length).into(), ..request }, MOST, "the end of the context");
}

#[test]
fn a_looked_up_draft_changes_nothing_and_a_repeated_text_accepts_it() {
    let model = load("k_official", best(), KvType::F16);
    for request in requests(&model, 12) {
        let expected = alone(&model, &request);
        for prediction in [vec![], expected.answer()] {
            let speculating = Request { speculate: true, prediction: prediction.clone(), ..request.clone() };
            let (found, drafted, accepted) = run(&model, &speculating, None, 6);
            assert!(found == expected, "{request:?}");
            let predicted = !prediction.is_empty() && expected.logits.len() > 3;
            assert!(!predicted || accepted * 3 > drafted && accepted > 0, "{accepted} of {drafted}: {request:?}");
        }
    }
    let off = Request { prediction: prompt(20), ..requests(&model, 12)[0].clone() };
    assert_eq!(run(&model, &off, None, 6).1, 0, "`speculate` is off");
}

#[test]
fn a_model_drafts_for_another_one() {
    let model = load("plain", best(), KvType::F16);
    for request in requests(&model, 12) {
        let expected = alone(&model, &request);
        for (name, kv_type) in
            [("plain", KvType::F16), ("plain", KvType::Q8_0), ("gqa", KvType::F16), ("window", KvType::F16)]
        {
            let small = load(name, best(), kv_type);
            let drafter = Box::new(ModelDrafter::new(small, &request.prompt.ids).unwrap());
            let (found, drafted, accepted) = run(&model, &request, Some(drafter), 4);
            assert!(found == expected, "{name}: {request:?}");
            if (name, kv_type) == ("plain", KvType::F16) {
                // With the same random numbers the same model says the same, so only a stop cuts its drafts off.
                assert!(accepted + 4 >= drafted && accepted > expected.logits.len() / 2, "{accepted} of {drafted}");
            }
        }
    }
}

#[test]
fn a_replay_says_the_given_ids_and_samples_all_the_same() {
    let model = load("plain", best(), KvType::F16);
    let stop_id = tokenizer().stop_ids()[0];
    let ids = [prompt(30), vec![stop_id, 40, 41]].concat();
    let request = Request {
        prompt: [prompt(30), vec![3]].concat().into(),
        max_tokens: 50,
        replay: Some(ids.clone()),
        sampling: Sampling { repeat_penalty: 1.2, ..Sampling::default() },
        ..Request::default()
    };
    let expected = alone(&model, &request);
    assert_eq!((expected.answer(), expected.end), (ids.clone(), Some(FinishReason::Length)));
    let (found, drafted, accepted) = run(&model, &Request { speculate: true, ..request.clone() }, None, 7);
    assert!(found == expected);
    assert!(accepted > 20 && drafted < 45, "{accepted} of {drafted}: it repeats the prompt");
    let short = Request { max_tokens: 4, ..request.clone() };
    assert_eq!(alone(&model, &short).answer(), ids[..4]);
    let empty = alone(&model, &Request { replay: Some(Vec::new()), ..request });
    assert_eq!((empty.answer(), empty.end), (vec![], Some(FinishReason::Length)));
}

/// A model whose passes cost the same whatever their rows, so that every draft is computed.
struct Free {
    model: Arc<dyn Model>,
    info: Info,
    /// Passes with drafts fail.
    refuses_drafts: bool,
    /// Rows of the widest pass.
    widest: AtomicUsize,
}

impl Free {
    fn new(model: Arc<dyn Model>, refuses_drafts: bool) -> Arc<Self> {
        let info = Info { pass_costs: &[1.0; 16], ..model.info().clone() };
        Arc::new(Free { model, info, refuses_drafts, widest: AtomicUsize::new(0) })
    }
}

impl Model for Free {
    fn info(&self) -> &Info {
        &self.info
    }
    fn kv_bytes(&self, positions: usize) -> usize {
        self.model.kv_bytes(positions)
    }
    fn sequence(&self) -> Result<Sequence> {
        self.model.sequence()
    }
    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        self.model.append(sequence, ids, phase, want)
    }
    fn room(&self, sequence: &Sequence) -> usize {
        self.model.room(sequence)
    }
    fn forward(&self, batch: &mut Batch) -> Result<bool> {
        if batch.members[0].sequence.decodes() {
            let rows = batch.members.iter().map(|member| member.sequence.left()).sum::<usize>();
            self.widest.fetch_max(rows, SeqCst);
            if self.refuses_drafts && rows > batch.members.len() {
                return Err(Error::Memory(format!("no memory for {rows} rows")));
            }
        }
        self.model.forward(batch)
    }
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.model.run(tasks, task);
    }
}

fn read(stream: &TextStream) -> (Vec<Piece>, FinishReason) {
    let mut pieces = Vec::new();
    while let Some(piece) = stream.next().unwrap() {
        pieces.push(piece);
    }
    (pieces, stream.finish_reason().unwrap().unwrap())
}

/// Streams with different drafters, read at once. Returns the rows of the widest pass.
fn check_streams(name: &str, refuses_drafts: bool) -> usize {
    let model = load(name, best(), KvType::F16);
    let free = Free::new(model.clone(), refuses_drafts);
    let scheduler = Scheduler::new(usize::MAX, 8, Arc::default());
    let expected: Vec<_> = requests(&model, 7).into_iter().map(|request| (alone(&model, &request), request)).collect();
    let streams = expected.iter().enumerate().map(|(i, (expected, request))| {
        let mut generation = Generation::new(free.clone(), tokenizer(), request.clone());
        if i != 2 {
            generation.draft_with(Known::new(&expected.answer(), [0, 30, 0, 100, 10, 0, 0][i]));
        }
        TextStream::new(generation, scheduler.clone(), None)
    });
    let streams: Vec<TextStream> = streams.collect();
    std::thread::scope(|scope| {
        for (stream, (expected, request)) in streams.iter().zip(&expected) {
            scope.spawn(move || {
                let (pieces, end) = read(stream);
                let wanted: Vec<Piece> = expected.pieces.iter().flatten().cloned().collect();
                assert!(pieces == wanted, "{name}: {request:?}");
                assert_eq!(Some(end), expected.end);
            });
        }
    });
    free.widest.load(SeqCst)
}

#[test]
fn streams_with_different_drafters_share_passes() {
    for name in ["plain", "window", "longrope"] {
        let widest = check_streams(name, false);
        assert!((9..=16).contains(&widest), "{name}: {widest} rows");
    }
}

#[test]
fn a_pass_that_fails_with_drafts_is_taken_without_them() {
    assert!(check_streams("gqa", true) > 8);
}

#[test]
fn a_stream_counts_its_drafts() {
    let model = load("plain", best(), KvType::F16);
    let request = requests(&model, 7)[0].clone();
    let answer = alone(&model, &request).answer();
    let mut generation = Generation::new(Free::new(model, false), tokenizer(), request);
    generation.draft_with(Known::new(&answer, 0));
    let stream = TextStream::new(generation, Scheduler::new(1, 1, Arc::default()), None);
    read(&stream);
    let timings = stream.timings().unwrap();
    assert!(timings.decode_passes < answer.len() / 4, "{} passes", timings.decode_passes);
    assert_eq!(timings.accepted, timings.drafted);
    assert_eq!(timings.accepted + timings.decode_passes + 1, answer.len(), "each pass gives one more");
}
