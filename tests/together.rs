//! Streams that share the passes of one scheduler, over a scripted model: what happens to one of them changes no other.
//!
//! `TOGETHER_CASES` sets the number of random cases, `TOGETHER_FIRST` the seed of the first one.

mod random;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use candle_phi::error::{Error, Result};
use candle_phi::files::gguf::Gguf;
use candle_phi::kv::table::Table;
use candle_phi::model::batch::Pass;
use candle_phi::model::{Batch, Info, Member, Model, Phase, Sequence, Want};
use candle_phi::runtime::draft::{Basis, Drafter, Source};
use candle_phi::runtime::generation::{Generation, Request};
use candle_phi::runtime::sampling::{Sampler, Sampling, TokenLogprob};
use candle_phi::runtime::scheduler::Scheduler;
use candle_phi::runtime::stream::TextStream;
use candle_phi::runtime::work::FinishReason;
use candle_phi::text::tokenizer::Tokenizer;
use random::Random;

/// Tokens of a chunk of a prompt, and the turns that it takes.
const CHUNK: usize = 16;
const LAYERS: usize = 3;

/// What goes wrong when a sequence has a number of ids.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Fault {
    Panic,
    Error,
    /// Its logits are NaN.
    Nan,
}

/// A model whose logits are a function of the ids of their own sequence. The first id of a prompt tells sequences apart.
struct Scripted {
    info: Info,
    slots: usize,
    /// Rows of a pass at most.
    max_batch: usize,
    /// By the first id and the number of ids.
    faults: HashMap<(u32, usize), Fault>,
    /// Sequences that exist.
    sequences: Arc<AtomicUsize>,
    /// Rows of the widest decode pass, and the most prompts of a pass.
    widest: AtomicUsize,
    /// Rows beyond one of each sequence.
    drafts: AtomicUsize,
    most_prompts: AtomicUsize,
    /// Names each turn by the first ids of its sequences, and waits until the message is taken.
    turns: Option<Mutex<SyncSender<Vec<u32>>>>,
}

/// Counts a sequence while it exists.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Scripted {
    fn new(tokenizer: &Tokenizer, slots: usize, max_batch: usize) -> Self {
        let info = Info {
            engine: "scripted",
            file: "the script".into(),
            n_vocab: tokenizer.n_vocab(),
            width: 16,
            shared_tokens: 128,
            pass_costs: &[1.0; 16], // every draft is computed
            ..Info::default()
        };
        Scripted {
            info,
            slots,
            max_batch,
            faults: HashMap::new(),
            sequences: Arc::default(),
            widest: AtomicUsize::new(0),
            drafts: AtomicUsize::new(0),
            most_prompts: AtomicUsize::new(0),
            turns: None,
        }
    }

    fn fault(&self, ids: &[u32]) -> Option<Fault> {
        self.faults.get(&(ids[0], ids.len())).copied()
    }

    /// Fails if one of the ids to compute does.
    fn fail(&self, Sequence { ids, kv, .. }: &Sequence) -> Result<()> {
        let mut faults = (kv.len() + 1..=ids.len()).map(|length| self.fault(&ids[..length]));
        match faults.find(|fault| [Some(Fault::Panic), Some(Fault::Error)].contains(fault)).flatten() {
            Some(Fault::Panic) => panic!("the sequence of {} panics", ids[0]),
            Some(Fault::Error) => Err(Error::InvalidModel(format!("the sequence of {} is broken", ids[0]))),
            _ => Ok(()),
        }
    }

    /// The logits after the last of `ids`.
    fn logits(&self, ids: &[u32], logits: &mut Vec<f32>) {
        let seed = ids.iter().fold(7, |seed, &id| Random::new(seed ^ u64::from(id)).bits());
        let mut random = Random::new(seed);
        let nan = self.fault(ids) == Some(Fault::Nan);
        logits.extend((0..self.info.n_vocab).map(|_| if nan { f32::NAN } else { random.below(1000) as f32 / 50.0 }));
    }

    /// A turn of prompts. Several take one pass.
    fn prefill(&self, batch: &mut Batch) -> Result<bool> {
        let Batch { members, pass, logits, .. } = batch;
        let alone = members.len() == 1;
        let rows: Vec<usize> = members
            .iter()
            .map(|Member { sequence, .. }| if alone { CHUNK.min(sequence.left()) } else { sequence.left() })
            .collect();
        let layers = pass.take().map_or(0, |pass| pass.layers) + 1;
        self.most_prompts.fetch_max(members.len(), SeqCst);
        let left: Vec<bool> = members.iter().map(|member| member.cancel.is_set()).collect();
        if !left.contains(&false) {
            return Err(Error::Cancelled);
        }
        members.iter_mut().zip(&left).filter(|(_, left)| **left).for_each(|(member, _)| member.sequence.held = None);
        thread::yield_now();
        if layers < LAYERS {
            let cancels = members.iter().map(|member| member.cancel.clone()).collect();
            let rows = rows.into_iter().map(|rows| 0..rows).collect();
            *pass = Some(Pass { phase: Phase::Prefill, rows, cancels, by_layer: true, layers, n_layers: LAYERS });
            return Ok(true);
        }
        let stay = members.iter().zip(&rows).zip(&left).filter(|(_, left)| !**left).map(|(member, _)| member);
        let last = stay.filter(|(member, rows)| **rows == member.sequence.left());
        last.clone().try_for_each(|(member, _)| self.fail(&member.sequence))?;
        logits.clear();
        for ((Member { sequence, logits: wanted, .. }, rows), left) in members.iter_mut().zip(rows).zip(left) {
            assert_eq!(sequence.phase(), Some(Phase::Prefill));
            let from = logits.len();
            if !left {
                sequence.kv.commit(rows);
            }
            if !left && sequence.left() == 0 {
                self.logits(&sequence.ids, logits);
            }
            *wanted = from..logits.len();
        }
        Ok(false)
    }

    /// A pass of sequences that decode. One that is cancelled leaves it before a layer.
    fn decode(&self, Batch { members, logits, .. }: &mut Batch) -> Result<bool> {
        assert!(members.len() <= self.max_batch, "{} rows, {} at most", members.len(), self.max_batch);
        let rows: usize = members.iter().map(|member| member.sequence.left()).sum();
        assert!(rows <= self.info.width, "{rows} rows");
        self.widest.fetch_max(members.len(), SeqCst);
        self.drafts.fetch_add(rows - members.len(), SeqCst);
        let mut left = vec![false; members.len()];
        for layer in 0..LAYERS {
            let cancelled = members.iter().map(|member| member.cancel.is_set());
            left.iter_mut().zip(cancelled).for_each(|(left, cancelled)| *left |= cancelled);
            if !left.contains(&false) {
                return Err(Error::Cancelled);
            }
            thread::yield_now();
            let computed = members.iter().zip(&left).filter(|(_, left)| layer == 1 && !**left);
            computed.map(|(member, _)| member).try_for_each(|member| self.fail(&member.sequence))?;
        }
        logits.clear();
        for (Member { sequence, logits: wanted, .. }, left) in members.iter_mut().zip(left) {
            assert!(left || sequence.decodes());
            let from = logits.len();
            while !left && sequence.left() > 0 {
                sequence.kv.commit(1);
                self.logits(&sequence.ids[..sequence.kv.len()], logits);
            }
            *wanted = from..logits.len();
        }
        Ok(false)
    }
}

impl Model for Scripted {
    fn info(&self) -> &Info {
        &self.info
    }

    fn kv_bytes(&self, _: usize) -> usize {
        0
    }

    fn sequence(&self) -> Result<Sequence> {
        let before = self.sequences.fetch_add(1, SeqCst);
        // Prompts that are cancelled stay in their pass up to the next layer: of n, n - 1 stay with the last one, whose pass
        // waits for that of n - 1 new ones.
        assert!(before < self.slots * (self.slots + 1) / 2, "{before} sequences and {} slots", self.slots);
        let mut sequence = Sequence::new(Table::without_layers());
        sequence.held = Some(Box::new(Counted(self.sequences.clone())));
        Ok(sequence)
    }

    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        sequence.append(ids, phase, want);
        Ok(())
    }

    fn forward(&self, batch: &mut Batch) -> Result<bool> {
        if let Some(turns) = &self.turns {
            let first = |member: &Member| member.sequence.ids[0];
            let _ = turns.lock().unwrap().send(batch.members.iter().map(first).collect()); // the test may have ended
        }
        match batch.members[0].sequence.phase() {
            Some(Phase::Prefill) => self.prefill(batch),
            _ => self.decode(batch),
        }
    }
}

fn tokenizer() -> Arc<Tokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain.gguf");
    Arc::new(Tokenizer::from_gguf(&Gguf::open(&path, true).unwrap()).unwrap())
}

/// What was read of a stream.
#[derive(Clone, Debug, Default, PartialEq)]
struct Text {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    /// None: the reader left.
    end: Option<Result<FinishReason>>,
}

impl Text {
    /// Takes what `poll` has. True if that was something.
    fn poll(&mut self, stream: &TextStream) -> bool {
        match stream.poll() {
            Ok(Poll::Pending) => return false,
            Ok(Poll::Ready(None)) => self.end = Some(Ok(stream.finish_reason().unwrap().unwrap())),
            Err(error) => self.end = Some(Err(error)),
            Ok(Poll::Ready(Some(piece))) => {
                self.text += &piece.text;
                self.ids.extend(piece.ids);
                self.logprobs.extend(piece.logprobs);
            }
        }
        true
    }

    fn whole(stream: &TextStream) -> Self {
        let mut text = Text::default();
        while text.end.is_none() {
            if !text.poll(stream) {
                stream.wait().unwrap();
            }
        }
        text
    }

    /// Whether the other text begins with this one.
    fn begins(&self, other: &Text) -> bool {
        other.text.starts_with(&self.text)
            && other.ids.starts_with(&self.ids)
            && other.logprobs.starts_with(&self.logprobs)
    }
}

/// How the reader of a stream behaves.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Reader {
    /// It reads to the end.
    Whole,
    /// It lets everything be computed without a read.
    AtTheEnd,
    /// It stops reading after this number of items, for this number of steps of the test.
    Pauses(usize, usize),
    /// It cancels after this number of steps.
    Cancels(usize),
    /// It drops the stream after this number of items.
    Drops(usize),
    /// The stream has a deadline, in microseconds from the start.
    Deadline(u64),
}

/// Drafts the answer of a stream, with some ids wrong.
struct Known {
    answer: Vec<u32>,
    said: usize,
    wrong: usize,
    random: Random,
}

impl Drafter for Known {
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.said += ids.len();
        Ok(())
    }

    fn draft(&mut self, most: usize, _: &Sampler, draft: &mut Vec<u32>) -> Result<Option<Basis>> {
        for id in self.answer.iter().skip(self.said).take(1 + self.random.below(most)) {
            let is_wrong = self.random.below(100) < self.wrong;
            draft.push(if is_wrong { self.random.below(200) as u32 } else { *id });
        }
        Ok(Some(Basis { source: Source::Model, length: 0 }))
    }
}

struct Plan {
    request: Request,
    /// Of 100 drafts, those that are wrong; None: it has no drafts.
    wrong: Option<usize>,
    reader: Reader,
    fault: Option<(usize, Fault)>,
}

impl Plan {
    fn random(random: &mut Random, first: u32, n_vocab: usize) -> Self {
        let length = [1, 2, 1 + random.below(CHUNK), 1 + random.below(4 * CHUNK)][random.below(4)];
        let prompt: Vec<u32> = (0..length).map(|i| if i == 0 { first } else { random.below(n_vocab) as u32 }).collect();
        let sampling = Sampling {
            temperature: [0.0, 0.7, 1.5][random.below(3)],
            top_k: [0, 1, 12][random.below(3)],
            top_p: [1.0, 0.8][random.below(2)],
            repeat_penalty: [1.0, 1.2][random.below(2)],
            ..Sampling::default()
        };
        let max_tokens = 1 + random.below(40);
        let fault = [Fault::Panic, Fault::Error, Fault::Nan][random.below(3)];
        let fault = (random.below(4) == 0).then(|| (length + random.below(max_tokens), fault));
        let reader = match random.below(10) {
            0 => Reader::AtTheEnd,
            1 | 2 => Reader::Pauses(random.below(4), random.below(300)),
            3 => Reader::Cancels(random.below(300)),
            4 => Reader::Drops(random.below(10)),
            5 => Reader::Deadline(random.below(4000) as u64),
            _ => Reader::Whole,
        };
        let request = Request {
            prompt: prompt.into(),
            max_tokens,
            limited: true,
            sampling,
            seed: random.bits(),
            stop: [vec![], vec!["e".into(), "st".into()]][random.below(2)].clone(),
            ignore_eos: random.below(3) == 0,
            top_logprobs: [None, Some(0), Some(3)][random.below(3)],
            ..Request::default()
        };
        let wrong = [None, Some(0), Some(10), Some(50)][random.below(4)];
        Plan { request, wrong, reader, fault }
    }

    /// `answer`: the ids to draft, if it drafts.
    fn stream(
        &self,
        model: &Arc<Scripted>,
        tokenizer: &Arc<Tokenizer>,
        scheduler: &Scheduler,
        answer: Option<&[u32]>,
    ) -> TextStream {
        let mut generation = Generation::new(model.clone(), tokenizer.clone(), self.request.clone());
        if let (Some(answer), Some(wrong)) = (answer, self.wrong) {
            let random = Random::new(self.request.seed);
            generation.draft_with(Box::new(Known { answer: answer.to_vec(), said: 0, wrong, random }));
        }
        let deadline = match self.reader {
            Reader::Deadline(us) if scheduler_is_shared(model) => Some(Instant::now() + Duration::from_micros(us)),
            _ => None,
        };
        let stream = TextStream::new(generation, scheduler.clone(), deadline);
        if self.reader == Reader::AtTheEnd && scheduler_is_shared(model) {
            stream.read_whole();
        }
        stream
    }
}

/// A model of the run alone has one slot, and passes of one row.
fn scheduler_is_shared(model: &Scripted) -> bool {
    (model.slots, model.max_batch) != (1, 1)
}

/// A stream under way.
struct Running {
    plan: usize,
    stream: TextStream,
    text: Text,
    items: usize,
    steps: usize,
    /// Steps for which it is not read.
    pause: usize,
}

impl Running {
    fn new(plan: usize, stream: TextStream) -> Self {
        Running { plan, stream, text: Text::default(), items: 0, steps: 0, pause: 0 }
    }

    /// Reads once, unless the reader pauses. True at the end.
    fn step(&mut self, reader: Reader) -> bool {
        self.steps += 1;
        match reader {
            Reader::Pauses(items, steps) if self.pause == 0 && self.items == items => {
                (self.pause, self.items) = (steps, self.items + 1);
            }
            Reader::Cancels(steps) if self.steps > steps => self.stream.cancel(),
            Reader::Drops(items) if self.items >= items => return true,
            _ => {}
        }
        if self.pause > 0 {
            self.pause -= 1;
        } else if self.text.poll(&self.stream) {
            self.items += 1;
        } else {
            thread::yield_now();
        }
        self.text.end.is_some()
    }
}

/// Draws streams, and reads them in random steps from one thread while they share passes.
fn check(seed: u64, tokenizer: &Arc<Tokenizer>) -> [usize; 3] {
    let mut random = Random::new(seed);
    let max_batch = 1 + random.below(16);
    let slots = if random.below(2) == 0 { 1 + random.below(4) } else { 100 }.max(1 + usize::from(max_batch == 1));
    let n_vocab = tokenizer.n_vocab();
    let plans: Vec<Plan> = (0..2 + random.below(11)).map(|i| Plan::random(&mut random, i as u32, n_vocab)).collect();
    let faults = plans.iter().filter_map(|plan| {
        let (length, fault) = plan.fault?;
        Some(((plan.request.prompt.ids[0], length), fault))
    });
    let faults: HashMap<_, _> = faults.collect();
    let model = |slots, max_batch| {
        let mut model = Scripted::new(tokenizer, slots, max_batch);
        model.faults = faults.clone();
        Arc::new(model)
    };
    let alone =
        |plan: &Plan| Text::whole(&plan.stream(&model(1, 1), tokenizer, &Scheduler::new(1, 1, Arc::default()), None));
    let expected: Vec<Text> = plans.iter().map(alone).collect();
    let model = model(slots, max_batch);

    let scheduler = Scheduler::new(slots, max_batch, Arc::default());
    let (mut waiting, mut running) = ((0..plans.len()).collect::<Vec<_>>(), Vec::<Running>::new());
    let mut texts: Vec<Text> = plans.iter().map(|_| Text::default()).collect();
    while !waiting.is_empty() || !running.is_empty() {
        if !waiting.is_empty() && (running.is_empty() || random.below(8) == 0) {
            let plan = waiting.swap_remove(random.below(waiting.len()));
            running
                .push(Running::new(plan, plans[plan].stream(&model, tokenizer, &scheduler, Some(&expected[plan].ids))));
        }
        let i = random.below(running.len());
        let reader = plans[running[i].plan].reader;
        if running[i].step(reader) {
            let ended = running.swap_remove(i);
            texts[ended.plan] = ended.text;
        }
    }
    let mut next = Plan::random(&mut random, plans.len() as u32, n_vocab);
    (next.reader, next.fault) = (Reader::Whole, None);
    let found = Text::whole(&next.stream(&model, tokenizer, &scheduler, None));
    assert_eq!(found, alone(&next), "seed {seed}: a stream after all others");
    assert!(model.sequences.load(SeqCst) <= 1, "seed {seed}: ended streams hold their sequences");
    for (i, (plan, text)) in plans.iter().zip(&texts).enumerate() {
        let alone = &expected[i];
        let early = [None, Some(Ok(FinishReason::Cancelled)), Some(Ok(FinishReason::Timeout))].contains(&text.end);
        let what = || format!("seed {seed}, stream {i}: {:?}, {:?}", plan.reader, plan.fault);
        if early {
            let leaves = matches!(plan.reader, Reader::Cancels(_) | Reader::Drops(_) | Reader::Deadline(_));
            assert!(leaves && text.begins(alone), "{}: {text:?}, alone {alone:?}", what());
        } else {
            assert_eq!(text, alone, "{}", what());
        }
    }
    [model.widest.load(SeqCst), model.most_prompts.load(SeqCst), model.drafts.load(SeqCst)]
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("it is a number"))
}

#[test]
fn every_stream_reads_as_it_does_alone_whatever_the_others_do() {
    let tokenizer = tokenizer();
    let (first, cases) = (number("TOGETHER_FIRST", 0), number("TOGETHER_CASES", 100));
    let most = (first..first + cases).map(|seed| check(seed, &tokenizer));
    let [rows, prompts, drafts] = most.fold([0; 3], |[a, b, c], [d, e, f]| [a.max(d), b.max(e), c + f]);
    println!("{cases} cases, up to {rows} streams of a decode pass, {prompts} prompts of a pass, {drafts} drafts");
    assert!(
        cases < 20 || rows > 4 && prompts > 2 && drafts > 500,
        "{rows} streams, {prompts} prompts, {drafts} drafts"
    );
}

/// How a stream that holds the only slot ends.
#[derive(Copy, Clone, Debug)]
enum End {
    Cancel,
    Drop,
    Fault(Fault),
    MaxTokens,
}

/// The first ids of the sequences of the turns that follow.
fn turn(turns: &Receiver<Vec<u32>>) -> Vec<u32> {
    turns.recv_timeout(Duration::from_secs(60)).expect("the thread goes on")
}

#[test]
fn a_slot_is_free_at_the_turn_after_an_end() {
    let tokenizer = tokenizer();
    let faults = [Fault::Panic, Fault::Error, Fault::Nan].map(End::Fault);
    for decodes in [false, true] {
        for end in [End::Cancel, End::Drop, End::MaxTokens].into_iter().chain(faults) {
            let request = |first: u32, length: usize, max_tokens: usize| Request {
                prompt: vec![first; length].into(),
                max_tokens,
                ignore_eos: true,
                ..Request::default()
            };
            // The turn that the end comes in is the last one of its prompt, or the second of its decode passes.
            let before = LAYERS + if decodes { 2 } else { 0 };
            let tokens = if decodes { 3 } else { 1 };
            let most = if matches!(end, End::MaxTokens) { tokens } else { 500 };
            let (sender, turns) = sync_channel(0);
            let mut model = Scripted::new(&tokenizer, 1, 8);
            model.turns = Some(Mutex::new(sender));
            if let End::Fault(fault) = end {
                model.faults.insert((5, CHUNK + tokens - 1), fault);
            }
            let (model, scheduler) = (Arc::new(model), Scheduler::new(1, 8, Arc::default()));
            let stream = |request| {
                let generation = Generation::new(model.clone(), tokenizer.clone(), request);
                TextStream::new(generation, scheduler.clone(), None)
            };
            let (holder, next) = (stream(request(5, CHUNK, most)), stream(request(6, 1, 1)));
            assert_eq!(holder.poll(), Ok(Poll::Pending));
            for _ in 0..before - 1 {
                assert_eq!(turn(&turns), [5], "{end:?}");
                assert_eq!(next.poll(), Ok(Poll::Pending), "it waits for the slot");
            }
            match end {
                End::Cancel => holder.cancel(),
                End::Drop => drop(holder),
                _ => {}
            }
            let mut following = turn(&turns);
            if following == [5] {
                following = turn(&turns); // the turn had begun
            }
            assert_eq!(following, [6], "{end:?}, decodes: {decodes}");
            drop(turns);
            assert_eq!(Text::whole(&next).end, Some(Ok(FinishReason::Length)));
        }
    }
}
