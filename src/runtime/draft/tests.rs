use super::*;
use crate::runtime::sampling::Sampling;

/// Drafts what a list says, whatever the text is.
struct Listed(Vec<Vec<u32>>);

impl Drafter for Listed {
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        assert!(!ids.contains(&13), "the drafter panics");
        Ok(())
    }

    fn draft(&mut self, most: usize, _: &Sampler, draft: &mut Vec<u32>) -> Result<Option<Basis>> {
        draft.extend(self.0.remove(0).into_iter().take(most));
        Ok(Some(Basis { source: Source::History, length: 8 }))
    }
}

fn sampler() -> Sampler {
    Sampler::new(Sampling::default(), 0, &[])
}

#[test]
fn drafts_that_were_not_computed_count_as_far_as_the_text_decides_them() {
    let basis = Basis { source: Source::History, length: 8 };
    let mut survival = Survival::default();
    let mut drafts = Drafts::new(Box::new(Listed(vec![vec![1, 2, 3, 4], vec![9], vec![]])));
    assert_eq!(drafts.draft(15, &sampler(), &mut survival).len(), 4);
    drafts.push(1);
    drafts.draft(15, &sampler(), &mut survival);
    assert!(survival.probability(basis, 0) > 0.75, "1 is right");
    assert_eq!(survival.probability(basis, 1), 0.88, "2 is not decided");
    drafts.push(2);
    drafts.push(7);
    drafts.draft(15, &sampler(), &mut survival);
    assert!(survival.probability(basis, 1) > 0.88, "2 is right");
    assert!(survival.probability(basis, 2) < 0.88, "3 is wrong");
    assert_eq!(survival.probability(basis, 3), 0.88, "4 was never asked");
    assert!(drafts.open.is_empty(), "the draft of 9 is wrong too");
}

#[test]
fn a_drafter_that_panics_or_fails_ends_and_the_text_goes_on() {
    let mut drafts = Drafts::new(Box::new(Listed(vec![vec![1]; 3])));
    let mut survival = Survival::default();
    drafts.push(13);
    for _ in 0..2 {
        assert!(drafts.draft(15, &sampler(), &mut survival).is_empty());
    }
}

/// The passes of one stream that says `text`, by the policy of the scheduler, and their rows. `costs`: of 1 to 16 rows.
fn simulate(prompt: &[u32], text: &[u32], costs: &dyn Fn(usize) -> f32) -> Vec<usize> {
    let lookup = lookup::Lookup::new(prompt, &[]).unwrap();
    let (mut drafts, mut survival) = (Drafts::new(Box::new(lookup)), Survival::default());
    let (mut said, mut rows) = (0, Vec::new());
    while said < text.len() {
        let products = drafts.draft(MOST, &sampler(), &mut survival);
        let n = budget::share(1, 16, &[products], costs)[0];
        let right = drafts.first(n).iter().zip(&text[said..]).take_while(|(draft, id)| draft == id).count();
        text[said..].iter().take(right + 1).for_each(|id| drafts.push(*id));
        said += right + 1;
        rows.push(1 + n);
    }
    rows
}

fn avx512(rows: usize) -> f32 {
    [1.0, 1.06, 1.18, 1.18, 1.63, 1.76, 2.0, 2.0, 2.4, 2.6, 2.8, 2.9, 3.1, 3.3, 3.5, 3.7][rows - 1]
}

fn avx2(rows: usize) -> f32 {
    [1.0, 1.22, 1.65, 1.65, 2.17, 2.39, 2.82, 2.82, 3.2, 3.4, 3.8, 4.0, 4.3, 4.6, 4.9, 5.2][rows - 1]
}

fn time(rows: &[usize], costs: &dyn Fn(usize) -> f32) -> f32 {
    rows.iter().map(|rows| costs(*rows)).sum()
}

/// Ids without any order: each of `n_vocab` with the same probability.
fn random(n: usize, n_vocab: u64, mut state: u64) -> Vec<u32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab) as u32
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn a_text_without_repetitions_gets_nearly_no_rows() {
    let (prompt, text) = (random(400, 300, 1), random(2000, 300, 2)); // single ids repeat, by chance
    for costs in [&avx512 as &dyn Fn(usize) -> f32, &avx2] {
        let rows = simulate(&prompt, &text, costs);
        let (first, later) = rows.split_at(500);
        let spent = |rows: &[usize]| rows.iter().sum::<usize>() - rows.len();
        assert!(spent(later) * 50 < later.len(), "{} drafts in {} passes", spent(later), later.len());
        assert!(spent(first) < 60, "{} drafts in the first {} passes", spent(first), first.len());
        assert!(time(&rows, costs) < text.len() as f32 / 0.98);
    }
}

#[test]
fn a_copied_text_gets_the_rows_that_pay_up_to_all_of_them() {
    let prompt = random(1000, 30_000, 3);
    let equal = |rows: usize| 1.0 + 0.01 * rows as f32;
    let rows = simulate(&prompt, &prompt, &equal);
    assert!(rows[20..].iter().all(|rows| *rows >= 15), "{rows:?}");
    for (costs, least) in [(&avx512 as &dyn Fn(usize) -> f32, 3.0), (&avx2, 2.2)] {
        let rows = simulate(&prompt, &prompt, costs);
        let gain = prompt.len() as f32 / time(&rows, costs);
        assert!(gain > least, "{gain}");
    }
}

#[test]
fn an_edit_of_a_text_is_mostly_copied() {
    let prompt = random(1500, 30_000, 4);
    let mut edited = prompt.clone();
    let other = random(1500, 30_000, 5);
    (0..1500).step_by(40).for_each(|place| edited[place] = other[place]);
    let rows = simulate(&prompt, &edited, &avx512);
    let gain = edited.len() as f32 / time(&rows, &avx512);
    assert!(gain > 2.0, "{gain}");
}
