//! Generation and its stream over a scripted model: its text, its end, and the ways to cancel it.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use candle_phi::error::{Error, Result};
use candle_phi::files::gguf::Gguf;
use candle_phi::kv::table::Table;
use candle_phi::model::{Batch, Info, Member, Model, Phase, Sequence, Want};
use candle_phi::runtime::generation::{Generation, Request};
use candle_phi::runtime::prompt::Prompt;
use candle_phi::runtime::sampling::Sampling;
use candle_phi::runtime::scheduler::Scheduler;
use candle_phi::runtime::stream::{Stream, TextStream};
use candle_phi::runtime::work::{FinishReason, Status, Step, Work};
use candle_phi::system::task::Phase as Reported;
use candle_phi::text::tokenizer::{Special, Tokenizer};

/// Repeats a script of ids and counts its passes.
struct Scripted {
    script: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    info: Info,
    passes: Arc<AtomicUsize>,
    failure: Option<Error>,
    panics: bool,
    /// The prompt never ends.
    endless_prompt: bool,
    /// Every turn waits for a message, until the sender is dropped.
    gate: Option<Mutex<Receiver<()>>>,
}

impl Scripted {
    fn wait_at_gate(&self) {
        if let Some(gate) = &self.gate {
            let _ = gate.lock().unwrap().recv(); // an error: the sender was dropped
        }
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
        Ok(Sequence::new(Table::without_layers()))
    }

    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        sequence.append(ids, phase, want);
        Ok(())
    }

    /// A turn for each token of a prompt. The sequences of a pass are all at their own place of the script.
    fn forward(&self, batch: &mut Batch) -> Result<bool> {
        let [Member { sequence, cancel, .. }, ..] = &batch.members[..] else { panic!("an empty batch") };
        let prefills = sequence.left() > 1 || self.endless_prompt;
        self.passes.fetch_add(usize::from(!prefills), SeqCst);
        assert!(prefills || !self.panics, "the model panics");
        self.wait_at_gate();
        if cancel.is_set() {
            return Err(Error::Cancelled);
        }
        batch.logits.clear();
        for Member { sequence, logits, .. } in &mut batch.members {
            let from = batch.logits.len();
            if !self.endless_prompt {
                sequence.kv.commit(1);
            }
            if !prefills {
                let step = sequence.ids.len() - self.prompt;
                if let Some(error) = self.failure.clone().filter(|_| step == self.script.len()) {
                    return Err(error);
                }
                batch.logits.resize(from + self.info.n_vocab, 0.0);
                batch.logits[from + self.script[step % self.script.len()] as usize] = 9.0;
            }
            *logits = from..batch.logits.len();
        }
        Ok(false)
    }
}

struct Setup {
    tokenizer: Arc<Tokenizer>,
    scheduler: Scheduler,
    model: Scripted,
    /// None: a short one.
    prompt: Option<Vec<u32>>,
}

impl Setup {
    /// The model repeats these ids.
    fn ids(script: &[u32]) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain.gguf");
        let tokenizer = Arc::new(Tokenizer::from_gguf(&Gguf::open(&path, true).unwrap()).unwrap());
        let info = Info {
            engine: "scripted",
            file: "the script".into(),
            n_vocab: tokenizer.n_vocab(),
            width: 8,
            shared_tokens: 128,
            ..Info::default()
        };
        let (script, passes, failure) = (script.to_vec(), Arc::default(), None);
        let model =
            Scripted { script, prompt: 0, info, passes, failure, panics: false, endless_prompt: false, gate: None };
        Setup { tokenizer, scheduler: Scheduler::default(), model, prompt: None }
    }

    /// The model says this text, then `<|end|>`.
    fn text(text: &str) -> Self {
        let mut setup = Setup::ids(&[0]);
        setup.model.script = setup.tokenizer.encode(text, Special::None).unwrap();
        setup.model.script.push(setup.tokenizer.token_to_id("<|end|>").unwrap());
        setup
    }

    /// Other streams of this scheduler.
    fn sibling(scheduler: &Scheduler, text: &str) -> Self {
        Setup { scheduler: scheduler.clone(), ..Setup::text(text) }
    }

    /// Its prefill goes on until it is cancelled.
    fn endless_prompt() -> Self {
        let mut setup = Setup::text("never comes");
        setup.model.endless_prompt = true;
        setup
    }

    /// Adds a gate to the model. A message lets one turn through, dropping the sender all. At most 8 messages wait.
    fn gate(&mut self) -> SyncSender<()> {
        let (open, gate) = sync_channel(8);
        self.model.gate = Some(Mutex::new(gate));
        open
    }

    fn request(&self) -> Request {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let short = || self.tokenizer.encode("<|user|>hi<|end|><|assistant|>", Special::All).unwrap();
        let prompt = self.prompt.clone().unwrap_or_else(short);
        Request { prompt: prompt.into(), max_tokens: 500, limited: true, sampling, ..Request::default() }
    }

    fn stream(self, change: impl FnOnce(&mut Request)) -> TextStream {
        self.stream_until(None, change)
    }

    fn stream_until(mut self, deadline: Option<Instant>, change: impl FnOnce(&mut Request)) -> TextStream {
        let mut request = self.request();
        change(&mut request);
        self.model.prompt = request.prompt.ids.len();
        TextStream::new(Generation::new(Arc::new(self.model), self.tokenizer, request), self.scheduler, deadline)
    }
}

/// The text, the number of ids, the reason.
fn read(stream: &TextStream) -> Result<(String, usize, FinishReason)> {
    let mut text = String::new();
    while let Some(piece) = stream.next()? {
        text += &piece.text;
    }
    Ok((text, stream.ids()?.len(), stream.finish_reason()?.expect("it was read to its end")))
}

#[test]
fn a_stop_id_ends_the_text_even_as_the_first_token() {
    let (text, ids, reason) = read(&Setup::text("").stream(|_| {})).unwrap();
    assert_eq!((text.as_str(), ids, reason), ("", 0, FinishReason::Stop));
    for stop in ["<|end|>", "<|endoftext|>", "<|assistant|>"] {
        let mut setup = Setup::text("yes");
        *setup.model.script.last_mut().unwrap() = setup.tokenizer.token_to_id(stop).unwrap();
        let (text, _, reason) = read(&setup.stream(|_| {})).unwrap();
        assert_eq!((text.as_str(), reason), ("yes", FinishReason::Stop), "{stop}");
    }
}

#[test]
fn streamed_text_is_the_whole_text() {
    for text in [
        "héllo wörld",
        "冰球很好玩",
        "goal 🏒🥅!",
        "flags 🇨🇦🇸🇪",
        "family 👨\u{200d}👩\u{200d}👧",
        "a\nb\n\nc",
        "  two  spaces ",
    ] {
        let (streamed, ..) = read(&Setup::text(text).stream(|_| {})).unwrap();
        assert_eq!(streamed, text);
    }
}

#[test]
fn a_character_that_max_tokens_cuts_is_dropped_and_its_ids_stay() {
    let setup = Setup::text("ok 🏒");
    let whole = setup.model.script.len() - 1;
    let (text, ids, reason) = read(&setup.stream(|request| request.max_tokens = whole - 1)).unwrap();
    assert_eq!((text.as_str(), ids, reason), ("ok ", whole - 1, FinishReason::Length));
}

#[test]
fn ignore_eos_generates_past_stop_ids() {
    let (text, ids, reason) = read(&Setup::text("ab").stream(|request| {
        request.ignore_eos = true;
        request.max_tokens = 20;
    }))
    .unwrap();
    assert_eq!((ids, reason), (20, FinishReason::Length));
    assert!(text.starts_with("ab") && text.len() > 4 && !text.contains('<'), "{text}");
}

#[test]
fn a_stop_string_ends_the_text_and_leaks_nothing() {
    let stream = Setup::text("one two END three").stream(|request| request.stop = vec!["END".into(), "zzz".into()]);
    let (text, ids, reason) = read(&stream).unwrap();
    assert_eq!((text.as_str(), reason), ("one two ", FinishReason::Stop));
    let setup = Setup::text("one two END three");
    let completed = setup.tokenizer.decode(&setup.model.script[..ids], true).unwrap();
    assert!(completed.ends_with("END"), "the ids go up to the one that completes it: {completed}");
    let (text, _, reason) = read(&Setup::text("one EN").stream(|request| request.stop = vec!["END".into()])).unwrap();
    assert_eq!((text.as_str(), reason), ("one EN", FinishReason::Stop));
}

#[test]
fn every_id_has_a_log_probability_those_without_text_too() {
    let stream = Setup::text("ok 🏒").stream(|request| {
        request.top_logprobs = Some(2);
        request.max_tokens = 6;
    });
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    while let Some(piece) = stream.next().unwrap() {
        assert_eq!(piece.ids.len(), piece.logprobs.len());
        ids.extend(piece.ids);
        logprobs.extend(piece.logprobs);
    }
    assert_eq!(ids, stream.ids().unwrap());
    assert!(logprobs.iter().zip(&ids).all(|(l, &id)| l.id == id && l.top.len() == 2 && l.top[0] == (id, l.logprob)));
}

#[test]
fn nothing_is_computed_before_the_first_read_nor_far_ahead_of_the_reader() {
    let text = "word ".repeat(90);
    let setup = Setup::text(&text);
    let (passes, scheduler) = (setup.model.passes.clone(), setup.scheduler.clone());
    let stream = setup.stream(|_| {});
    read(&Setup::sibling(&scheduler, &text).stream(|_| {})).unwrap();
    assert_eq!(passes.load(SeqCst), 0);
    stream.next().unwrap();
    read(&Setup::sibling(&scheduler, &text).stream(|_| {})).unwrap(); // 90 turns that this stream could have shared
    assert!(passes.load(SeqCst) < 20, "{}", passes.load(SeqCst));
}

#[test]
fn the_reason_shows_when_the_end_was_read_and_not_before() {
    let stream = Setup::text("a").stream(|_| {});
    stream.next().unwrap();
    let (sender, complete) = channel();
    stream.on_change(Box::new(move || sender.send(()).unwrap()));
    complete.recv().unwrap();
    assert_eq!(stream.finish_reason(), Ok(None));
    assert_eq!(stream.next(), Ok(None));
    assert_eq!(stream.finish_reason(), Ok(Some(FinishReason::Stop)));
    stream.cancel();
    assert_eq!(stream.finish_reason(), Ok(Some(FinishReason::Stop)), "too late to cancel");
}

#[test]
fn cancel_works_from_another_thread_in_the_middle_of_a_pass() {
    let mut setup = Setup::text("never comes");
    let open = setup.gate();
    setup.prompt = Some(vec![5]);
    let passes = setup.model.passes.clone();
    let stream = setup.stream(|_| {});
    thread::scope(|scope| {
        scope.spawn(|| {
            while passes.load(SeqCst) == 0 {
                thread::yield_now();
            }
            stream.cancel();
        });
        assert_eq!(read(&stream).unwrap(), (String::new(), 0, FinishReason::Cancelled));
    });
    assert_eq!(stream.next(), Ok(None), "and stays ended");
    drop(open);
}

#[test]
fn closing_the_model_is_an_error_of_its_streams() {
    let setup = Setup::text("never ends");
    let scheduler = setup.scheduler.clone();
    let stream = setup.stream(|request| request.ignore_eos = true);
    stream.next().unwrap();
    scheduler.close();
    assert_eq!(read(&stream), Err(Error::Closed));
    assert_eq!(stream.finish_reason(), Ok(Some(FinishReason::Error)));
}

#[test]
fn an_error_of_the_model_reaches_the_reader_after_the_text() {
    let mut setup = Setup::text("partial");
    setup.model.script.pop();
    setup.model.failure = Some(Error::InvalidModel("broken weights".into()));
    let stream = setup.stream(|_| {});
    let mut text = String::new();
    let error = loop {
        match stream.next() {
            Ok(piece) => text += &piece.expect("the error comes before the end").text,
            Err(error) => break error,
        }
    };
    assert_eq!((text.as_str(), error), ("partial", Error::InvalidModel("broken weights".into())));
    assert_eq!(stream.finish_reason(), Ok(Some(FinishReason::Error)));
    assert_eq!(stream.next(), Ok(None));
}

#[test]
fn a_panic_of_the_model_is_an_internal_error_and_the_scheduler_lives() {
    let mut setup = Setup::text("x");
    setup.model.panics = true;
    let scheduler = setup.scheduler.clone();
    let error = read(&setup.stream(|_| {})).unwrap_err();
    assert!(matches!(&error, Error::Internal(message) if message.contains("the model panics")), "{error}");
    assert_eq!(read(&Setup::sibling(&scheduler, "fine").stream(|_| {})).unwrap().0, "fine");
}

#[test]
fn streams_take_turns() {
    let long = Setup::text("never ends");
    let scheduler = long.scheduler.clone();
    let long = long.stream(|request| (request.ignore_eos, request.max_tokens) = (true, usize::MAX));
    long.next().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| while long.next().unwrap().is_some() {});
        assert_eq!(read(&Setup::sibling(&scheduler, "short").stream(|_| {})).unwrap().0, "short");
        long.cancel();
    });
}

#[test]
fn a_short_stream_is_not_stuck_behind_a_long_prompt() {
    let long = Setup::endless_prompt();
    let scheduler = long.scheduler.clone();
    let long = long.stream(|_| {});
    assert_eq!(long.poll(), Ok(Poll::Pending));
    assert_eq!(read(&Setup::sibling(&scheduler, "short").stream(|_| {})).unwrap().0, "short");
    assert_eq!(long.poll(), Ok(Poll::Pending));
}

fn in_ms(ms: u64) -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(ms))
}

#[test]
fn a_deadline_ends_a_stream_in_any_phase_and_keeps_the_text() {
    // in the queue, behind a pass that does not end
    let mut stuck = Setup::text("never comes");
    let open = stuck.gate();
    let scheduler = stuck.scheduler.clone();
    let stuck = stuck.stream(|_| {});
    assert_eq!(stuck.poll(), Ok(Poll::Pending));
    let queued = Setup::sibling(&scheduler, "late").stream_until(in_ms(100), |_| {});
    assert_eq!(read(&queued).unwrap(), (String::new(), 0, FinishReason::Timeout));
    assert_eq!(stuck.poll(), Ok(Poll::Pending));
    drop(open);
    // in a prompt
    let prompt = Setup::endless_prompt().stream_until(in_ms(100), |_| {});
    assert_eq!(read(&prompt).unwrap(), (String::new(), 0, FinishReason::Timeout));
    assert_eq!(prompt.next(), Ok(None));
    // in the text
    let endless = |request: &mut Request| (request.ignore_eos, request.max_tokens) = (true, usize::MAX);
    try_deadlines(|deadline| {
        let (text, ids, reason) = read(&Setup::text("never ends").stream_until(deadline, endless)).unwrap();
        assert_eq!((reason, ids > 0), (FinishReason::Timeout, !text.is_empty()));
        text.starts_with("never")
    });
    // before the first read
    let stream = Setup::text("never read").stream_until(Some(Instant::now()), |_| {});
    assert_eq!(read(&stream).unwrap(), (String::new(), 0, FinishReason::Timeout));
    // with text that is still unread
    try_deadlines(|deadline| {
        let stream = Setup::text("read late ".repeat(50).trim_end()).stream_until(deadline, |_| {});
        let Some(first) = stream.next().unwrap() else { return false };
        thread::sleep(stream.time_left().unwrap());
        let (rest, _, reason) = read(&stream).unwrap();
        assert_eq!(reason, FinishReason::Timeout);
        let text = first.text + &rest;
        assert!(text.starts_with("read") && text.len() < 100, "{text}");
        !rest.is_empty()
    });
}

/// Attempts with later and later deadlines, until one leaves the time for some text. A busy machine needs several.
fn try_deadlines(attempt: impl Fn(Option<Instant>) -> bool) {
    assert!([100, 1_000, 10_000, 60_000].into_iter().any(|ms| attempt(in_ms(ms))));
}

/// Waits for a message where it is dropped.
struct Heavy {
    dropping: Sender<()>,
    go: Receiver<()>,
}

impl Drop for Heavy {
    fn drop(&mut self) {
        self.dropping.send(()).unwrap();
        self.go.recv().unwrap();
    }
}

impl Work for Heavy {
    type Item = ();

    fn model(&self) -> &Arc<dyn Model> {
        unreachable!("its time is over before the first read")
    }

    fn prompt(&self) -> &Prompt {
        unreachable!("its time is over before the first read")
    }

    fn begin(&mut self) -> Result<Sequence> {
        unreachable!("its time is over before the first read")
    }

    fn accept(&mut self, _: &mut Sequence, _: &[f32]) -> Result<Step<()>> {
        unreachable!("its time is over before the first read")
    }

    fn status(&self) -> Status {
        Status::default()
    }
}

#[test]
fn dropping_unstarted_work_keeps_no_other_thread_waiting() {
    let (sender, dropping) = channel();
    let (go, gate) = channel();
    let (cancelled, done) = channel();
    let work = Heavy { dropping: sender, go: gate };
    let stream = Stream::new(work, Scheduler::default(), Some(Instant::now()));
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(stream.poll(), Ok(Poll::Ready(None))));
        dropping.recv().unwrap();
        scope.spawn(|| {
            stream.cancel();
            cancelled.send(()).unwrap();
        });
        let result = done.recv_timeout(Duration::from_secs(60));
        go.send(()).unwrap();
        assert_eq!(result, Ok(()), "`cancel` waits for the drop");
    });
}

#[test]
fn a_stream_whose_time_is_over_gives_its_slot_up_unread() {
    let scheduler = Scheduler::new(1, 8, Arc::default());
    let first = Setup::sibling(&scheduler, &"word ".repeat(90)).stream_until(in_ms(500), |_| {});
    first.next().unwrap();
    assert_eq!(read(&Setup::sibling(&scheduler, "next").stream(|_| {})).unwrap().0, "next", "no BusyError");
}

#[test]
fn a_complete_text_gives_its_slot_up_unread_and_a_cancelled_one_at_once() {
    let scheduler = Scheduler::new(1, 8, Arc::default());
    let setup = |text: &str| Setup::sibling(&scheduler, text);
    let complete = setup("ab").stream(|_| {});
    complete.next().unwrap();
    let endless = setup("endless").stream(|request| request.ignore_eos = true);
    endless.next().unwrap();
    let waiting = setup("waiting").stream(|_| {});
    assert_eq!(waiting.poll(), Ok(Poll::Pending));
    for _ in 0..20 {
        endless.next().unwrap();
    }
    assert_eq!(waiting.poll(), Ok(Poll::Pending));
    endless.cancel();
    assert_eq!(read(&waiting).unwrap().0, "waiting");
    drop(setup("dropped while it waits").stream(|_| {}));
    let dropped = setup("endless").stream(|request| request.ignore_eos = true);
    dropped.next().unwrap();
    drop(dropped);
    assert_eq!(read(&setup("after").stream(|_| {})).unwrap().0, "after");
    assert_eq!(read(&complete).unwrap().2, FinishReason::Stop);
}

#[test]
fn a_reader_may_be_called_instead_of_waiting() {
    let mut setup = Setup::text("called");
    let open = setup.gate();
    let stream = setup.stream(|_| {});
    let (mut text, mut calls) = (String::new(), 0);
    let (sender, called) = channel();
    loop {
        match stream.poll().unwrap() {
            Poll::Ready(Some(piece)) => text += &piece.text,
            Poll::Ready(None) => break,
            Poll::Pending => {
                let sender = sender.clone();
                stream.on_change(Box::new(move || sender.send(()).unwrap()));
                while called.try_recv().is_err() {
                    let _ = open.try_send(()); // an error: enough messages wait, or the last turn is done
                    thread::yield_now();
                }
                calls += 1;
            }
        }
    }
    assert_eq!((text.as_str(), called.try_recv().ok()), ("called", None));
    assert!(calls > 0);
    // also when another thread ends it
    let endless = Setup::endless_prompt().stream(|_| {});
    assert_eq!(endless.poll(), Ok(Poll::Pending));
    let hook_sender = sender.clone();
    endless.on_change(Box::new(move || hook_sender.send(()).unwrap()));
    endless.cancel();
    called.recv().unwrap();
    endless.on_change(Box::new(move || sender.send(()).unwrap()));
    called.try_recv().expect("what has ended calls at once");
}

#[test]
fn progress_goes_through_the_phases() {
    let mut setup = Setup::text("never ends");
    let open = setup.gate();
    setup.prompt = Some(vec![5; 40]);
    let stream = setup.stream(|request| (request.max_tokens, request.ignore_eos) = (12, true));
    let mut seen = Vec::new();
    loop {
        seen.extend(stream.progress(false).unwrap());
        match stream.poll().unwrap() {
            Poll::Ready(Some(_)) => {}
            Poll::Ready(None) => break,
            Poll::Pending => {
                while open.try_send(()).is_ok() {}
                stream.wait().unwrap();
            }
        }
    }
    seen.extend(stream.progress(true).unwrap());
    let of = |phase| seen.iter().filter(|p| p.phase == phase).map(|p| (p.done, p.total)).collect::<Vec<_>>();
    assert_eq!(of(Reported::Wait)[0], (0, None));
    let (prefill, decode) = (of(Reported::Prefill), of(Reported::Decode));
    assert_eq!(prefill.last(), Some(&(40, Some(40))));
    assert!(prefill.len() > 1 && prefill.is_sorted() && prefill[0].0 < 40, "{prefill:?}"); // reports may be 75 ms apart
    assert_eq!(decode.last(), Some(&(12, Some(12))));
    assert!(decode.len() > 1 && decode.is_sorted(), "{decode:?}");
    assert!(seen.is_sorted_by_key(|p| p.phase), "{seen:?}");
}

#[test]
fn a_wait_returns_though_there_is_nothing_to_read() {
    let stream = Setup::endless_prompt().stream(|_| {});
    assert_eq!(stream.poll(), Ok(Poll::Pending));
    for _ in 0..3 {
        stream.wait().unwrap();
        assert_eq!(stream.poll(), Ok(Poll::Pending));
    }
}

#[test]
fn closing_reaches_a_stream_that_waits_for_a_slot_and_calls_its_hook() {
    let scheduler = Scheduler::new(1, 8, Arc::default());
    let holder = Setup::sibling(&scheduler, "never ends").stream(|request| request.ignore_eos = true);
    holder.next().unwrap();
    let waiting = Setup::sibling(&scheduler, "waiting").stream(|_| {});
    assert_eq!(waiting.poll(), Ok(Poll::Pending));
    let (sender, called) = channel();
    waiting.on_change(Box::new(move || sender.send(()).unwrap()));
    scheduler.close();
    called.recv().unwrap();
    assert_eq!(waiting.poll(), Err(Error::Closed));
    assert_eq!(read(&holder), Err(Error::Closed));
}
