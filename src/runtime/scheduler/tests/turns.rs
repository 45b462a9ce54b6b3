//! The turns of jobs on a clock of their own, without a thread.

use std::collections::HashMap;

use super::super::{active, jobs, pass};
use super::*;

/// Jobs on a clock of their own, without a thread.
struct Simulation {
    jobs: Jobs,
    slots: usize,
    max_batch: usize,
    model: Arc<Fake>,
    batch: Batch,
    results: Receiver<String>,
    out: Sender<String>,
}

impl Simulation {
    fn new(slots: usize, max_batch: usize) -> Self {
        let (out, results) = channel();
        let (jobs, batch, model) = (Jobs::default(), Batch::default(), Arc::default());
        Simulation { jobs, slots, max_batch, model, batch, results, out }
    }

    /// A job of this model.
    fn job(&self, name: char, prompt: usize, left: usize) -> Box<Counter> {
        let mut job = job(name, left, &self.out);
        job.model = self.model.clone();
        job.prompt = prompt;
        job
    }

    fn submit(&mut self, job: Box<Counter>) {
        self.jobs.waiting.push_back(job);
    }

    /// The turns that follow: the names of the jobs of a decode pass in parentheses, a prompt's alone.
    fn run(&mut self, turns: usize, length: impl Fn(&str) -> u64) -> Vec<String> {
        let mut taken = Vec::new();
        while taken.len() < turns
            && let Some(turn) = self.jobs.choose(self.slots, self.max_batch, &Prefixes::default())
        {
            let start = Instant::now();
            match turn {
                Turn::End => self.jobs.current[0].fail(Error::Cancelled),
                Turn::Prompt(prompts) => {
                    let prompts = pass::prompt(&mut self.jobs.current, *prompts, &Prefixes::default(), start);
                    let names: String = self.results.try_iter().collect();
                    self.jobs.put_back_prompts(prompts, Duration::from_millis(length(&names)));
                    taken.push(names);
                }
                Turn::Decode => {
                    let prompts = pass::decode(
                        &mut self.jobs.current,
                        &mut self.batch,
                        &mut DraftRows::default(),
                        &Prefixes::default(),
                        start,
                    );
                    let names = format!("({})", self.results.try_iter().collect::<String>());
                    self.jobs.put_back_decoders(prompts, Duration::from_millis(length(&names)));
                    taken.push(names);
                }
            }
            self.jobs.current.clear();
        }
        taken
    }
}

fn counts(turns: &[String]) -> HashMap<&str, usize> {
    let mut counts = HashMap::new();
    turns.iter().for_each(|turn| *counts.entry(turn.as_str()).or_default() += 1);
    counts
}

#[test]
fn decoding_jobs_share_passes_and_leave_them_at_their_end() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    for (name, left) in [('a', 4), ('b', 2), ('c', 3)] {
        simulation.submit(simulation.job(name, 1, left));
    }
    // No pass is taken before the prompts have had as much time.
    let turns = simulation.run(99, |turn| if turn.len() == 1 { 1 } else { 10 });
    assert_eq!(turns, ["a", "(a)", "b", "c", "(abc)", "(ac)"]);
}

#[test]
fn a_pass_has_max_batch_rows_and_each_job_gets_as_many() {
    let mut simulation = Simulation::new(usize::MAX, 2);
    for name in ['a', 'b', 'c'] {
        simulation.submit(simulation.job(name, 1, 100));
    }
    let turns = simulation.run(63, |turn| if turn.len() == 1 { 0 } else { 10 });
    let rows = |name| turns[3..].iter().filter(|turn| turn.contains(name)).count();
    assert_eq!([rows('a'), rows('b'), rows('c')], [40; 3], "{turns:?}");
}

#[test]
fn jobs_of_different_models_share_no_pass() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    simulation.submit(simulation.job('a', 1, 10));
    simulation.submit(job('x', 10, &simulation.out));
    let turns = simulation.run(20, |turn| if turn.len() == 1 { 0 } else { 10 });
    assert!(turns.iter().all(|turn| turn.len() == 1 || ["(a)", "(x)"].contains(&turn.as_str())), "{turns:?}");
}

#[test]
fn prompts_and_passes_share_the_time_and_no_job_waits_for_two_long_turns() {
    for (layer, pass) in [(200, 170), (100, 170), (60, 170), (10, 170), (300, 100)] {
        let mut simulation = Simulation::new(usize::MAX, 8);
        for name in ['a', 'b'] {
            simulation.submit(simulation.job(name, 1, usize::MAX));
        }
        simulation.run(2, |_| 0);
        simulation.submit(simulation.job('P', 1 << 20, 1));
        let turns = simulation.run(400, |turn| if turn == "P" { layer } else { pass });
        let count = counts(&turns);
        let (prompts, passes) = (count["P"] as u64 * layer, count["(ab)"] as u64 * pass);
        let share = prompts as f64 / (prompts + passes) as f64;
        assert!((0.33..0.52).contains(&share), "layers of {layer}, passes of {pass}: {share}");
        let mut waits = turns.split(|turn| turn == "(ab)").map(|prompts| prompts.len() as u64 * layer);
        assert!(waits.all(|wait| wait <= layer.max(pass)), "layers of {layer}, passes of {pass}: {turns:?}");
    }
}

#[test]
fn what_prompts_could_not_use_earns_them_no_credit() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    simulation.submit(simulation.job('a', 1, usize::MAX));
    simulation.run(1, |_| 0);
    simulation.submit(simulation.job('P', 1 << 20, 1));
    let length = |layer, pass| move |turn: &str| if turn == "P" { layer } else { pass };
    simulation.run(400, length(100, 170)); // two turns are longer than a pass
    let turns = simulation.run(100, length(300, 100));
    let count = counts(&turns);
    let (prompts, passes) = (count["P"] * 300, count["(a)"] * 100);
    assert!(prompts < passes * 5 / 4, "{prompts} ms of prompts, {passes} ms of passes");
}

#[test]
fn many_decoding_jobs_and_prompts_without_end_all_go_on() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    let decoders: Vec<char> = ('a'..='p').collect();
    for &name in &decoders {
        simulation.submit(simulation.job(name, 1, usize::MAX));
    }
    simulation.run(16, |_| 0);
    let mut turns = Vec::new();
    for _ in 0..40 {
        for (name, prompt) in [('S', 5), ('M', 30), ('L', 90)] {
            simulation.submit(simulation.job(name, prompt, 1));
        }
        turns.extend(simulation.run(40, |turn| if turn.len() == 1 { 100 } else { 200 }));
    }
    let passes: Vec<&String> = turns.iter().filter(|turn| turn.len() > 1).collect();
    assert!(passes.iter().all(|pass| pass.len() == "()".len() + 8), "{passes:?}");
    let rows = |name: char| passes.iter().filter(|pass| pass.contains(name)).count();
    let rows: Vec<usize> = decoders.iter().map(|&name| rows(name)).collect();
    assert!(rows.iter().max().unwrap() - rows.iter().min().unwrap() <= 1, "{rows:?}");
    let share = passes.len() as f64 * 200.0 / (turns.len() as f64 * 100.0 + passes.len() as f64 * 100.0);
    assert!((0.48..0.52).contains(&share), "{share} of the time");
    let count = counts(&turns);
    assert_eq!(count["S"], 40 * 5, "short prompts end");
    assert!(count["M"] > 90 && count["L"] >= 90, "{count:?}");
}

#[test]
fn a_short_prompt_overtakes_a_long_one_and_the_oldest_goes_on() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    simulation.submit(simulation.job('l', 3000, 1));
    assert_eq!(simulation.run(40, |_| 10), ["l"; 40]);
    simulation.submit(simulation.job('s', 20, 1));
    let turns = simulation.run(23, |_| 10);
    let count = counts(&turns);
    assert_eq!((count["s"], count["l"]), (20, 3), "{turns:?}");
    // short ones arrive without end
    for _ in 0..100 {
        simulation.submit(simulation.job('s', 20, 1));
    }
    let turns = simulation.run(800, |_| 10);
    assert_eq!(counts(&turns)["l"], 100, "an eighth of the time");
    // turns of 230 and 14 ms: a short prompt waits for one long turn, not for one in eight
    let mut simulation = Simulation::new(usize::MAX, 8);
    simulation.submit(simulation.job('l', 3000, 1));
    simulation.run(40, |_| 230);
    simulation.submit(simulation.job('s', 32, 1));
    let turns = simulation.run(32, |turn| if turn == "l" { 230 } else { 14 });
    assert_eq!(turns, ["s"; 32]);
}

#[test]
fn short_prompts_that_begin_together_share_a_pass() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    let shared = |simulation: &Simulation, name, prompt| {
        let mut job = simulation.job(name, prompt, 2);
        job.shares_prompt = true;
        job
    };
    for (name, prompt) in [('a', 50), ('b', 50), ('c', 50), ('d', 300), ('e', 20)] {
        simulation.submit(shared(&simulation, name, prompt));
    }
    simulation.submit(simulation.job('x', 5, 2));
    let first = simulation.run(1, |_| 1);
    assert_eq!(first[0].len(), 3, "{first:?}");
    let passes = lock(&simulation.model.passes);
    let names: String = passes[0].iter().map(|&id| char::from_u32(id).unwrap()).collect();
    assert_eq!(names, "abe", "the third has no room, the fourth is long, the last is computed alone");
}

#[test]
fn of_prompts_that_share_a_pass_one_may_be_cancelled_and_one_may_panic() {
    let start = |culprit: Option<&'static [&'static str]>| {
        let mut simulation = Simulation::new(usize::MAX, 8);
        let mut cancels = Vec::new();
        for name in ['a', 'b', 'c'] {
            let mut job = simulation.job(name, 3, 1);
            job.shares_prompt = true;
            job.panics = if name == 'b' { culprit.unwrap_or(&[]) } else { &[] };
            cancels.push(job.cancel.clone());
            simulation.submit(job);
        }
        (simulation, cancels)
    };
    let (mut simulation, cancels) = start(None);
    assert_eq!(simulation.run(1, |_| 1), ["abc"]);
    cancels[0].set();
    assert_eq!(simulation.run(99, |_| 1), ["cancelledbc"]);
    let (mut simulation, _) = start(Some(&["begin"]));
    assert_eq!(simulation.run(99, |_| 1), ["internal error: begin of b panicsac", "ac"]);
    // the pass itself panics: each is computed alone
    let (mut simulation, _) = start(None);
    simulation.run(1, |_| 1);
    simulation.model.panics_at.store('b' as usize, SeqCst);
    let turns = simulation.run(99, |_| 1);
    assert!(turns.concat().contains("internal error: the pass over [98] panics"), "{turns:?}");
    assert_eq!(["a", "c"].map(|name| turns.iter().filter(|turn| *turn == name).count()), [3, 3], "{turns:?}");
}

#[test]
fn idle_time_earns_no_credit() {
    let mut simulation = Simulation::new(usize::MAX, 1);
    let late = simulation.job('i', 1, 100);
    let ready = late.ready.clone();
    simulation.submit(simulation.job('b', 1, 100));
    simulation.submit(late);
    let turns = simulation.run(2, |turn| if turn.len() == 1 { 0 } else { 10 });
    assert_eq!(turns, ["b", "i"]);
    ready.store(false, SeqCst);
    assert_eq!(simulation.run(50, |_| 10), vec!["(b)"; 50]);
    ready.store(true, SeqCst);
    let turns = simulation.run(20, |_| 10).concat();
    assert_eq!((turns.matches('i').count(), turns.contains("(i)(i)(i)")), (10, false), "{turns}");
}

#[test]
fn jobs_without_a_slot_wait_for_one_in_the_order_of_arrival() {
    let mut simulation = Simulation::new(2, 8);
    let (held, late) = (idle('h', &simulation.out), idle('l', &simulation.out));
    let (cancel, ready) = (held.cancel.clone(), late.ready.clone());
    simulation.submit(held);
    for (name, left) in [('a', 3), ('b', 2), ('c', 1)] {
        simulation.submit(simulation.job(name, 1, left));
    }
    assert_eq!(simulation.run(99, |_| 1), ["a", "(a)", "(a)", "b", "(b)", "c"]);
    simulation.submit(late);
    simulation.submit(simulation.job('d', 1, 1));
    assert_eq!(simulation.run(99, |_| 1), [""; 0], "both slots are held");
    cancel.set();
    assert_eq!(simulation.run(99, |_| 1), ["cancelledd"]);
    ready.store(true, SeqCst);
    assert_eq!(simulation.run(99, |_| 1), ["l"]);
}

#[test]
fn a_panic_in_a_shared_pass_ends_the_job_that_it_comes_from_alone() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    for name in ['a', 'p', 'c'] {
        simulation.submit(simulation.job(name, 1, 3));
    }
    simulation.run(3, |_| 0);
    simulation.model.panics_at.store('p' as usize, SeqCst);
    let turns = simulation.run(2, |_| 10);
    assert_eq!(turns[1], "(ac)");
    let error = "internal error: the pass over [112] panics";
    assert!(["a", error, "c"].iter().all(|part| turns[0].contains(part)), "{turns:?}");
    let passes = lock(&simulation.model.passes);
    let [all, a, p, c, rest] = &passes[3..] else { panic!("{passes:?}") };
    assert_eq!((all.len(), a.len(), p.len(), c.len(), rest.len()), (3, 1, 1, 1, 2));
}

#[test]
fn memory_that_one_job_of_a_shared_pass_lacks_ends_that_job_alone() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    for name in ['a', 'm', 'c'] {
        simulation.submit(simulation.job(name, 1, 3));
    }
    simulation.run(3, |_| 0);
    simulation.model.too_large_at.store('m' as usize, SeqCst);
    let turns = simulation.run(3, |_| 10);
    let error = "the pass over [109] is too large";
    assert!(["a", error, "c"].iter().all(|part| turns[0].contains(part)), "{turns:?}");
    assert_eq!(turns[1..], ["(ac)"], "they take their third id and end");
}

#[test]
fn a_job_that_panics_as_it_is_dropped_leaves_the_others_of_its_pass() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    let mut culprit = simulation.job('p', 1, 2);
    culprit.panics = &["drop"];
    simulation.submit(culprit);
    for name in ['a', 'b'] {
        simulation.submit(simulation.job(name, 1, 9));
    }
    simulation.run(3, |_| 0);
    let jobs = &mut simulation.jobs;
    assert!(matches!(jobs.choose(8, 8, &Prefixes::default()), Some(Turn::Decode)) && jobs.current.len() == 3);
    let prompts = pass::decode(
        &mut jobs.current,
        &mut simulation.batch,
        &mut DraftRows::default(),
        &Prefixes::default(),
        Instant::now(),
    );
    let dropped = panic::catch(|| {
        jobs.put_back_decoders(prompts, Duration::ZERO);
        jobs.current.clear();
        Ok(())
    });
    assert!(dropped.is_err() && jobs.active.len() == 2, "the others are there, to go on or to be told of the panic");
}

#[test]
fn a_cancelled_job_of_a_pass_that_fails_is_not_computed_again() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    let cancelled = simulation.job('x', 1, 3);
    let cancel = cancelled.cancel.clone();
    simulation.submit(cancelled);
    for name in ['p', 'c'] {
        simulation.submit(simulation.job(name, 1, 3));
    }
    simulation.run(3, |_| 0);
    simulation.model.panics_at.store('p' as usize, SeqCst);
    assert!(matches!(simulation.jobs.choose(8, 8, &Prefixes::default()), Some(Turn::Decode)));
    cancel.set();
    pass::decode(
        &mut simulation.jobs.current,
        &mut simulation.batch,
        &mut DraftRows::default(),
        &Prefixes::default(),
        Instant::now(),
    );
    let alive: Vec<bool> = simulation.jobs.current.iter().map(active::Active::is_alive).collect();
    assert_eq!(alive, [false, false, true]);
    let told: Vec<String> = simulation.results.try_iter().collect();
    assert!(told.contains(&Error::Cancelled.to_string()), "{told:?}");
    let passes = lock(&simulation.model.passes);
    let names = ['p', 'c'].map(|name| vec![name as u32]);
    assert_eq!(passes[4..], names, "after the shared one");
}

#[test]
fn a_panic_of_one_job_with_its_logits_leaves_the_others() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    for name in ['a', 'p', 'c'] {
        let mut job = simulation.job(name, 1, 3);
        if name == 'p' {
            job.panics = &["accept"];
            job.prompt = 1;
        }
        simulation.submit(job);
    }
    let turns = simulation.run(99, |_| 0);
    assert!(turns.concat().contains("internal error: accept of p panics"), "{turns:?}");
    let ids = |name| turns.concat().matches(name).count();
    assert!(ids('a') >= 3 && ids('c') >= 3, "{turns:?}");
    assert_eq!(turns.last().unwrap(), "(ac)");
}

#[test]
fn a_member_that_is_cancelled_within_a_pass_leaves_it_and_the_others_go_on() {
    let mut simulation = Simulation::new(usize::MAX, 8);
    let cancelled = simulation.job('x', 1, 3);
    let cancel = cancelled.cancel.clone();
    simulation.submit(cancelled);
    simulation.submit(simulation.job('b', 1, 3));
    simulation.run(2, |_| 0);
    assert!(matches!(simulation.jobs.choose(8, 8, &Prefixes::default()), Some(Turn::Decode)));
    cancel.set();
    pass::decode(
        &mut simulation.jobs.current,
        &mut simulation.batch,
        &mut DraftRows::default(),
        &Prefixes::default(),
        Instant::now(),
    );
    let alive: Vec<bool> = simulation.jobs.current.iter().map(active::Active::is_alive).collect();
    assert_eq!(alive, [false, true]);
    let told: Vec<String> = simulation.results.try_iter().collect();
    assert!(told.contains(&"b".to_owned()) && told.contains(&Error::Cancelled.to_string()), "{told:?}");
}

#[test]
fn the_busy_error_names_the_slots_and_their_ages() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut simulation = Simulation::new(2, 8);
    for read_at in [0, 6] {
        let mut unread = idle('u', &simulation.out);
        unread.unread_since = Some(at(read_at));
        simulation.submit(unread);
    }
    let busy = |simulation: &Simulation, seconds| simulation.jobs.busy(UNREAD_LIMIT, at(seconds));
    assert_eq!(simulation.run(99, |_| 1), [""; 0]);
    assert_eq!(busy(&simulation, 99), None, "no job waits");
    assert_eq!(simulation.jobs.timeout(UNREAD_LIMIT, at(99)), None);
    simulation.submit(simulation.job('w', 1, 1));
    assert_eq!(busy(&simulation, 15), None, "the second was read 9 s ago");
    assert!(simulation.jobs.timeout(UNREAD_LIMIT, at(15)) <= Some(Duration::from_secs(1)));
    let text = "2 slots are held by streams unread for 11 s and 17 s; read or close them";
    assert_eq!(busy(&simulation, 17), Some(Error::Busy(text.into())));
    simulation.jobs.active.pop();
    let text = "1 slot is held by a stream unread for 17 s; read it or close it";
    assert_eq!(busy(&simulation, 17), Some(Error::Busy(text.into())));
    let mut read = idle('r', &simulation.out);
    read.unread_since = None;
    simulation.jobs.active.push(active::Active::new(read, 9));
    assert_eq!(busy(&simulation, 99), None, "a reader waits for the second");
}

#[test]
fn the_thread_wakes_at_the_first_deadline() {
    let start = Instant::now();
    let mut simulation = Simulation::new(1, 8);
    for seconds in [70, 7] {
        let mut late = idle('d', &simulation.out);
        late.cancel = Cancel::at(Some(start + Duration::from_secs(seconds)));
        simulation.submit(late);
    }
    assert_eq!(simulation.jobs.timeout(Duration::from_secs(600), start), Some(Duration::from_secs(7)));
    assert_eq!(simulation.jobs.timeout(Duration::from_secs(20), start), Some(Duration::from_secs(2)));
}

#[test]
fn the_width_of_a_pass_has_the_most_rows_in_a_time() {
    let costs = [1.0, 1.1, 1.2, 1.3, 2.2, 2.3, 2.4, 2.5];
    let expected = [1, 2, 3, 4, 4, 4, 4, 8];
    for (most, expected) in (1..).zip(expected) {
        assert_eq!(jobs::width(most, &costs), expected, "{most}");
    }
    assert_eq!([jobs::width(12, &costs), jobs::width(5, &[1.0])], [12, 5], "past the table the last one's speed holds");
}
