use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::model::fake::Fake;
use crate::model::{Phase, Want};

mod turns;

/// Sends its name at each turn. Its ids are the letters of the name.
struct Counter {
    name: char,
    model: Arc<dyn Model>,
    prompt: usize,
    /// What others may wait for.
    ids: Prompt,
    shares_prompt: bool,
    /// Ids that it takes after the prompt.
    left: usize,
    out: Sender<String>,
    /// The methods that panic.
    panics: &'static [&'static str],
    ready: Arc<AtomicBool>,
    /// A turn waits for this at its end.
    gate: Option<Receiver<()>>,
    cancel: Cancel,
    unread_since: Option<Instant>,
}

impl Counter {
    fn panic_in(&self, method: &str) {
        assert!(!self.panics.contains(&method), "{method} of {} panics", self.name);
    }

    fn tell(&self) {
        self.out.send(self.name.to_string()).unwrap();
        self.gate.iter().for_each(|gate| gate.recv().unwrap());
    }
}

impl Job for Counter {
    fn ready(&self) -> bool {
        self.panic_in("ready");
        self.ready.load(SeqCst) || self.cancel.is_set()
    }

    fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    fn prompt(&self) -> &Prompt {
        &self.ids
    }

    fn shared_prompt(&self) -> Option<usize> {
        self.shares_prompt.then_some(self.prompt)
    }

    fn begin(&mut self) -> Result<Sequence> {
        self.panic_in("begin");
        let mut sequence = self.model.sequence()?;
        self.model.append(&mut sequence, &vec![self.name as u32; self.prompt], Phase::Prefill, Want::Last)?;
        Ok(sequence)
    }

    fn turn(&mut self, _: &Sequence, _: usize, _: Duration) {
        self.panic_in("turn");
        self.tell();
    }

    fn accept(&mut self, sequence: &mut Sequence, logits: &[f32], _: Duration) -> Result<bool> {
        assert_eq!(logits, [self.name as u32 as f32]);
        self.panic_in("accept");
        self.tell();
        self.left -= 1;
        self.model.append(sequence, &[self.name as u32], Phase::Decode, Want::Last)?;
        Ok(self.left > 0)
    }

    fn leave(&self, _: &mut Sequence) {}

    fn fail(&mut self, error: Error) {
        self.out.send(error.to_string()).unwrap();
        self.panic_in("fail");
    }

    fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    fn unread_since(&self) -> Option<Instant> {
        self.unread_since
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.panic_in("drop");
    }
}

/// A job with a prompt of one token.
fn job(name: char, left: usize, out: &Sender<String>) -> Box<Counter> {
    let (model, cancel, out, ready) =
        (Arc::new(Fake::default()), Cancel::default(), out.clone(), Arc::new(true.into()));
    Box::new(Counter {
        name,
        model,
        prompt: 1,
        ids: Prompt::default(),
        shares_prompt: false,
        left,
        out,
        panics: &[],
        ready,
        gate: None,
        cancel,
        unread_since: None,
    })
}

/// A job that is not ready.
fn idle(name: char, out: &Sender<String>) -> Box<Counter> {
    let job = job(name, 1, out);
    job.ready.store(false, SeqCst);
    job
}

/// A job without end, and one that is not ready.
fn two(out: &Sender<String>) -> [Box<Counter>; 2] {
    [job('x', usize::MAX, out), idle('w', out)]
}

/// Asserts that both have ended: the first perhaps cancelled within a turn, the other failed.
fn assert_closed(results: &Receiver<String>) {
    assert!(results.iter().filter(|text| text == "the model is closed").count() > 0);
}

fn take(from: &Receiver<String>, n: usize) -> Vec<String> {
    (0..n).map(|_| from.recv_timeout(Duration::from_secs(60)).expect("the thread goes on")).collect()
}

#[test]
fn waiting_jobs_fail_when_all_slots_are_unread() {
    let (out, results) = channel();
    let scheduler = Scheduler::with(1, 8, Arc::default(), Duration::ZERO);
    let mut unread = idle('u', &out);
    unread.unread_since = Some(Instant::now() + Duration::from_secs(3600)); // it counts as 0 s
    scheduler.submit(unread).unwrap();
    for name in ['v', 'w'] {
        scheduler.submit(job(name, 1, &out)).unwrap();
        assert_eq!(take(&results, 1), ["1 slot is held by a stream unread for 0 s; read it or close it"]);
    }
}

#[test]
fn a_deadline_ends_an_unread_job() {
    let (out, results) = channel();
    let scheduler = Scheduler::new(1, 8, Arc::default());
    let mut unread = idle('u', &out);
    unread.cancel = Cancel::at(Some(Instant::now() + Duration::from_millis(100)));
    unread.unread_since = Some(Instant::now());
    scheduler.submit(unread).unwrap();
    scheduler.submit(job('w', 1, &out)).unwrap();
    assert_eq!(take(&results, 2)[1], "w");
}

#[test]
fn a_panic_in_a_turn_ends_its_job_alone() {
    for method in ["begin", "turn", "accept"] {
        let (out, results) = channel();
        let scheduler = Scheduler::default();
        let mut culprit = job('p', 1, &out);
        culprit.panics = match method {
            "begin" => &["begin"],
            "turn" => &["turn"],
            _ => &["accept"],
        };
        culprit.prompt = 2;
        scheduler.submit(culprit).unwrap();
        let told = take(&results, if method == "accept" { 2 } else { 1 });
        assert_eq!(told.last().unwrap(), &format!("internal error: {method} of p panics"));
        scheduler.submit(job('q', 2, &out)).unwrap();
        assert_eq!(take(&results, 2), ["q", "q"]);
    }
}

#[test]
fn a_panic_outside_of_a_turn_fails_the_jobs_at_hand_and_the_thread_goes_on() {
    let cases: [(&[&str], &[&str]); 3] = [
        (&["ready"], &["internal error: ready of p panics"; 2]),
        (&["accept", "fail"], &["internal error: accept of p panics", "internal error: fail of p panics"]),
        (&["drop"], &["p"]),
    ];
    for (panics, told) in cases {
        let (out, results) = channel();
        let (open, gate) = channel();
        let scheduler = Scheduler::default();
        let mut first = job('g', 1, &out);
        first.gate = Some(gate);
        let mut culprit = job('p', 1, &out);
        culprit.panics = panics;
        scheduler.submit(first).unwrap();
        assert_eq!(take(&results, 1), ["g"]);
        for job in [culprit, idle('w', &out)] {
            scheduler.submit(job).unwrap();
        }
        open.send(()).unwrap();
        assert_eq!(take(&results, told.len()), told);
        if panics != ["ready"] {
            let last = panics[panics.len() - 1];
            assert_eq!(take(&results, 1), [format!("internal error: {last} of p panics")], "the other job");
        }
        scheduler.submit(job('q', 1, &out)).unwrap();
        assert_eq!(take(&results, 1), ["q"]);
    }
}

#[test]
fn closing_fails_the_jobs_at_hand_and_refuses_new_ones() {
    let (out, results) = channel();
    let scheduler = Scheduler::default();
    two(&out).into_iter().for_each(|job| scheduler.submit(job).unwrap());
    assert_eq!(take(&results, 1), ["x"]);
    scheduler.close();
    assert_eq!(scheduler.submit(job('y', 1, &out)), Err(Error::Closed));
    drop(out);
    assert_closed(&results);
}

#[test]
fn the_thread_ends_with_the_last_scheduler() {
    let (out, results) = channel();
    let scheduler = Scheduler::default();
    two(&out).into_iter().for_each(|job| scheduler.submit(job).unwrap());
    drop((scheduler, out));
    assert_closed(&results);
}
