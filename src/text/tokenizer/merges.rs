//! The merges of a BPE: pairs of neighbors that become one token, in order of priority.
//!
//! Decisions: docs/design/files.md

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab};

use crate::error::{Error, Result, excerpt};

pub(super) type Merge = (String, String);

/// The merges of a SentencePiece vocabulary, which has only a score for each piece. Any two pieces whose texts join to a
/// third are a merge. The order is that of Hugging Face's `tokenizer.json` for Phi-3: by falling score of the result, then
/// by the ids of the parts.
///
/// `pieces`: the text and the score of each ordinary piece, ascending by id. `ids`: the pieces that a merge may consist of.
/// None: there are far more merges than in a vocabulary that was learned from text, as with "a", "aa", "aaa" and so on. They
/// would fill memory.
pub(super) fn by_score<'a>(
    pieces: impl Iterator<Item = (&'a str, f32)>,
    ids: &HashMap<&str, u32>,
) -> Option<Vec<Merge>> {
    let mut merges = Vec::new(); // (score, left, right)
    let mut splits = Vec::new(); // of one piece: (id of the left part, id of the right part, length of the left)
    let (mut most, mut most_bytes) = (1 << 16, 1 << 20usize);
    for (piece, score) in pieces {
        // Phi-3 has 1.9 merges for a piece.
        (most, most_bytes) = (most + 8, most_bytes + 16 * piece.len());
        splits.clear();
        splits.extend(piece.char_indices().skip(1).filter_map(|(at, _)| {
            let (left, right) = piece.split_at(at);
            Some((ids.get(left)?, ids.get(right)?, at))
        }));
        splits.sort_unstable();
        most_bytes = most_bytes.checked_sub(splits.len() * piece.len())?;
        if merges.len() + splits.len() > most {
            return None;
        }
        merges.extend(splits.iter().map(|&(_, _, at)| (score, piece.split_at(at))));
    }
    merges.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    Some(merges.into_iter().map(|(_, (left, right))| (left.to_owned(), right.to_owned())).collect())
}

/// A byte-pair encoding, as `tokenizers` builds it.
#[derive(Default)]
pub(super) struct Encoding {
    pub vocab: Vocab,
    pub merges: Vec<Merge>,
    pub unk: Option<String>,
    pub fuse_unk: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
}

impl Encoding {
    /// `name`: the file and key of the merges, for messages.
    pub fn build(self, name: &str) -> Result<BPE> {
        // `BpeBuilder` reports parts that are not tokens, but indexes past its buffer for a merge longer than every token.
        let mut merged = String::new();
        for (i, (left, right)) in self.merges.iter().enumerate() {
            merged.clear();
            merged.push_str(left);
            merged.push_str(right);
            if !self.vocab.contains_key(&merged) {
                let [merged, left, right] = [&merged, left, right].map(|text| excerpt(text));
                return Err(Error::InvalidModel(format!(
                    "{name}: merge {i} makes \"{merged}\" of \"{left}\" and \"{right}\", but that is not in the vocabulary"
                )));
            }
        }
        // No cache: there would be one for every thread that ever encodes, and it would outlive the tokenizer.
        let mut builder = BPE::builder()
            .cache_capacity(0)
            .vocab_and_merges(self.vocab, self.merges)
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        if let Some(unk) = self.unk {
            builder = builder.unk_token(unk);
        }
        builder.build().map_err(|e| Error::InvalidModel(format!("{name}: {}", excerpt(&e.to_string()))))
    }
}
