//! Drafts from the text itself: what followed the last ids where they were before, in the prompt, the answer or a predicted
//! text.
//!
//! The last 1 to 6 ids are found by hash at their latest place. A match is then extended backwards, and the longest one
//! is copied from. It takes about 1 us and 50 bytes a token.
//!
//! Decisions: docs/design/runtime.md

use super::{Basis, Drafter, Source};
use crate::error::Result;
use crate::runtime::sampling::Sampler;
use crate::system::memory;

/// Ids that are found by hash at most.
const LONGEST_GRAM: usize = 6;
/// Ids of a match that are counted at most.
const LONGEST_MATCH: usize = 32;
/// Places of a hash table that a search looks at: crafted ids cannot make it slow.
const PROBES: usize = 16;

pub struct Lookup {
    /// The prompt and the answer.
    history: Index,
    prediction: Index,
    /// The id after the last one where the current draft is copied from.
    follows: Option<(Source, usize)>,
}

impl Lookup {
    /// `prediction`: ids that the answer will mostly repeat; may be empty.
    pub fn new(prompt: &[u32], prediction: &[u32]) -> Result<Self> {
        let mut lookup = Lookup { history: Index::default(), prediction: Index::default(), follows: None };
        lookup.history.push(prompt)?;
        lookup.prediction.push(prediction)?;
        lookup.follows = Some((Source::Prediction, 0)); // an answer probably begins as its prediction does
        Ok(lookup)
    }

    fn index(&self, source: Source) -> &Index {
        match source {
            Source::Prediction => &self.prediction,
            _ => &self.history,
        }
    }
}

impl Drafter for Lookup {
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        for id in ids {
            let follows = self.follows.filter(|&(source, next)| self.index(source).ids.get(next) == Some(id));
            self.follows = follows.map(|(source, next)| (source, next + 1));
        }
        self.history.push(ids)
    }

    fn draft(&mut self, most: usize, _: &Sampler, draft: &mut Vec<u32>) -> Result<Option<Basis>> {
        let suffix = &self.history.ids[..];
        let found = |source| Some((source, self.index(source).find(suffix)?));
        let candidates = [self.follows, found(Source::Prediction), found(Source::History)];
        let mut best: Option<(Basis, usize)> = None;
        for (source, next) in candidates.into_iter().flatten() {
            let length = self.index(source).matched(next, suffix);
            if length > best.map_or(0, |(basis, _)| basis.length) {
                best = Some((Basis { source, length }, next));
            }
        }
        self.follows = best.map(|(basis, next)| (basis.source, next));
        let Some((basis, next)) = best else { return Ok(None) };
        self.index(basis.source).copy(next, most, draft);
        Ok(Some(basis).filter(|_| !draft.is_empty()))
    }
}

/// Ids, and the latest place of each run of up to 6 of them.
#[derive(Default)]
struct Index {
    ids: Vec<u32>,
    /// By the length of the run, less one.
    tables: [Table; LONGEST_GRAM],
}

impl Index {
    /// Adds ids. A run is in the tables once an id follows it.
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        if self.ids.capacity() - self.ids.len() < ids.len() {
            let more = ids.len().max(self.ids.len()); // room for as many again
            memory::reserve(&mut self.ids, more, format_args!("{more} token ids of drafts"))?;
        }
        for &id in ids {
            let next = self.ids.len();
            self.ids.push(id);
            for (i, table) in self.tables.iter_mut().enumerate().take(next) {
                table.insert(&self.ids, i + 1, next)?;
            }
        }
        Ok(())
    }

    /// The place after the latest run of the last ids of `suffix`, the longest run first.
    fn find(&self, suffix: &[u32]) -> Option<usize> {
        (1..=LONGEST_GRAM.min(suffix.len())).rev().find_map(|n| {
            let place = self.tables[n - 1].place(&self.ids, &suffix[suffix.len() - n..])?;
            Some(self.tables[n - 1].places[place] as usize).filter(|&next| next > 0)
        })
    }

    /// The number of ids before `next` that equal the last ones of `suffix`.
    fn matched(&self, next: usize, suffix: &[u32]) -> usize {
        let pairs = self.ids[..next].iter().rev().zip(suffix.iter().rev());
        pairs.take(LONGEST_MATCH).take_while(|(a, b)| a == b).count()
    }

    /// Copies up to `most` ids from `next` on. Past the last id it goes on with the copy, so that a repeated run is continued.
    fn copy(&self, next: usize, most: usize, draft: &mut Vec<u32>) {
        draft.extend(self.ids[next.min(self.ids.len())..].iter().take(most));
        let copied = draft.len();
        if copied > 0 {
            (copied..most).for_each(|i| draft.push(draft[i - copied]));
        }
    }
}

/// Places of runs of one length, by hash: the index of the id after a run, or 0. A run is compared with the ids at its place.
#[derive(Default)]
struct Table {
    /// A power of two of them, of which three quarters are used at most.
    places: Vec<u32>,
    used: usize,
}

impl Table {
    /// The place of a run: where it is, or the first free one. None if there is neither near its hash.
    fn place(&self, ids: &[u32], run: &[u32]) -> Option<usize> {
        let mask = self.places.len().checked_sub(1)?;
        let start = hash(run) as usize;
        (start..start + PROBES).map(|place| place & mask).find(|&place| {
            let next = self.places[place] as usize;
            next == 0 || ids[next - run.len()..next] == *run
        })
    }

    /// Records the run of `n` ids before `next`, in place of an earlier one.
    fn insert(&mut self, ids: &[u32], n: usize, next: usize) -> Result<()> {
        if 4 * self.used >= 3 * self.places.len() {
            self.grow(ids, n)?;
        }
        let run = &ids[next - n..next];
        let mask = self.places.len() - 1;
        let place = self.place(ids, run).unwrap_or(hash(run) as usize & mask); // a crowded one is given up
        self.used += usize::from(self.places[place] == 0);
        self.places[place] = next as u32;
        Ok(())
    }

    fn grow(&mut self, ids: &[u32], n: usize) -> Result<()> {
        let length = (2 * self.places.len()).max(64);
        let places = memory::filled(0u32, length, format_args!("a table of {length} places for drafts"))?;
        let before = std::mem::replace(self, Table { places, used: 0 });
        before.places.into_iter().filter(|next| *next > 0).try_for_each(|next| self.insert(ids, n, next as usize))
    }
}

/// FxHash, whose high bits are the good ones (<https://nnethercote.github.io/2021/12/08/a-brutally-effective-hash-function-in-rust.html>).
fn hash(run: &[u32]) -> u32 {
    let add = |hash: u64, id: &u32| (hash.rotate_left(5) ^ u64::from(*id)).wrapping_mul(0x517c_c1b7_2722_0a95);
    (run.iter().fold(run.len() as u64, add) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::sampling::Sampling;

    fn draft(lookup: &mut Lookup, most: usize) -> (Vec<u32>, Option<Basis>) {
        let mut draft = Vec::new();
        let basis = lookup.draft(most, &Sampler::new(Sampling::default(), 0, &[]), &mut draft).unwrap();
        (draft, basis)
    }

    fn basis(source: Source, length: usize) -> Option<Basis> {
        Some(Basis { source, length })
    }

    #[test]
    fn the_longest_match_is_continued_and_among_equals_the_latest() {
        let mut lookup = Lookup::new(&[1, 2, 3, 4, 9, 2, 3, 5, 9, 8, 3, 6, 9, 2, 3], &[]).unwrap();
        assert_eq!(draft(&mut lookup, 3), (vec![5, 9, 8], basis(Source::History, 3)), "9 2 3, not 2 3 or 3");
        lookup.push(&[7, 3]).unwrap();
        assert_eq!(draft(&mut lookup, 2), (vec![7, 3], basis(Source::History, 1)), "the latest 3");
        lookup.push(&[100]).unwrap();
        assert_eq!(draft(&mut lookup, 2), (vec![], None), "an id that was never seen");
        let mut empty = Lookup::new(&[], &[]).unwrap();
        assert_eq!(draft(&mut empty, 2), (vec![], None));
    }

    #[test]
    fn a_match_is_extended_to_32_ids() {
        let text: Vec<u32> = (0..40).collect();
        let mut lookup = Lookup::new(&[&text[..], &[99], &text[..20]].concat(), &[]).unwrap();
        assert_eq!(draft(&mut lookup, 15), ((20..35).collect(), basis(Source::History, 20)));
        lookup.push(&text[20..39]).unwrap();
        assert_eq!(draft(&mut lookup, 15).1, basis(Source::History, 32));
        assert_eq!(draft(&mut lookup, 3).0, [39, 99, 0], "past the copy, the text goes on");
    }

    #[test]
    fn a_repeated_run_is_continued_past_the_end() {
        let mut lookup = Lookup::new(&[5, 6, 7, 5, 6, 7, 5], &[]).unwrap();
        assert_eq!(draft(&mut lookup, 7).0, [6, 7, 5, 6, 7, 5, 6]);
    }

    #[test]
    fn a_prediction_is_followed_from_its_first_id_and_found_again_after_a_change() {
        let prediction: Vec<u32> = [1, 1, 2, 3, 1, 1, 4, 5, 6, 7, 8, 9].to_vec();
        let mut lookup = Lookup::new(&[50, 51], &prediction).unwrap();
        assert_eq!(draft(&mut lookup, 3), (vec![], None), "nothing has been said");
        let mut lookup = Lookup::new(&[50, 51], &prediction).unwrap();
        lookup.push(&[1]).unwrap();
        assert_eq!(draft(&mut lookup, 3), (vec![1, 2, 3], basis(Source::Prediction, 1)), "not the latest 1");
        lookup.push(&[1, 2, 3, 60, 61]).unwrap();
        assert_eq!(draft(&mut lookup, 3), (vec![], None));
        lookup.push(&[5, 6]).unwrap();
        assert_eq!(draft(&mut lookup, 9), (vec![7, 8, 9, 7, 8, 9, 7, 8, 9], basis(Source::Prediction, 2)));
    }

    #[test]
    fn a_match_does_not_reach_from_the_prediction_into_the_prompt() {
        let mut lookup = Lookup::new(&[1, 2, 3], &[9, 3, 4]).unwrap();
        assert_eq!(draft(&mut lookup, 1), (vec![4], basis(Source::Prediction, 1)));
    }

    /// The definition: of the places after the longest run of up to 6 ids, the latest one.
    fn latest(ids: &[u32]) -> Option<usize> {
        (1..=LONGEST_GRAM.min(ids.len())).rev().find_map(|n| {
            let run = &ids[ids.len() - n..];
            (n..ids.len()).rev().find(|&next| ids[next - n..next] == *run)
        })
    }

    #[test]
    fn tables_find_what_a_search_of_the_whole_text_finds() {
        let mut state = 1u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % n) as u32
        };
        for n_vocab in [2, 30, 2000] {
            let mut index = Index::default();
            let (mut found, mut missed) = (0, 0);
            for _ in 0..1500 {
                index.push(&[random(n_vocab)]).unwrap();
                let expected = latest(&index.ids);
                match index.find(&index.ids) {
                    place if place == expected => found += usize::from(expected.is_some()),
                    _ => missed += 1, // a crowded place was given up
                }
            }
            assert!(missed <= 15 && found > 400, "{n_vocab}: {found} found, {missed} missed");
        }
    }

    #[test]
    fn it_takes_about_50_bytes_a_token() {
        let ids: Vec<u32> = (0..20_000).map(|i: u32| i.wrapping_mul(2_654_435_761) % 32_000).collect();
        let lookup = Lookup::new(&ids, &[]).unwrap();
        let places: usize = lookup.history.tables.iter().map(|table| table.places.len()).sum();
        let bytes = 4 * (places + lookup.history.ids.capacity());
        assert!(bytes < 64 * ids.len(), "{} bytes a token", bytes / ids.len());
    }
}
