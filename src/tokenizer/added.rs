//! Added tokens: those that are found in text as they stand, before anything is normalized or merged.
//!
//! The rules are those of `tokenizers`' AddedVocabulary: the leftmost match, of several there the longest; `lstrip` and
//! `rstrip` take the (Unicode) whitespace around a match with it; tokens with `normalized` are looked for in what the
//! normalizer makes of the rest. One rule is ours: no match starts in the user's text (`literal`).
use std::path::Path;

use aho_corasick::{AhoCorasick, Input, MatchKind};
use tokenizers::normalizer::Range;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::utils::SysRegex;
use tokenizers::{NormalizedString, Normalizer, Token};

use crate::error::{Error, Result};

/// Of the texts of all tokens: an automaton over them takes a hundred times as much. Phi-4-mini has 3 KB.
const MAX_BYTES: usize = 256 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Left out of decoded text.
    pub special: bool,
    /// Matches only where no letter, digit or underscore is next to it.
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    /// Matches what the normalizer makes of it, in normalized text.
    pub normalized: bool,
}

pub(super) struct AddedTokens {
    /// Ascending by id.
    tokens: Vec<AddedToken>,
    /// The token's own text, or for a `normalized` one the normalized text; parallel to `tokens`.
    texts: Vec<String>,
    raw: Matcher,
    normalized: Matcher,
    /// Sorted.
    first_chars: Vec<char>,
    word: SysRegex,
}

/// An automaton over the texts of some of the tokens; `None` if there are none.
struct Matcher(Option<(AhoCorasick, Vec<usize>)>);

/// A piece of the text, and the token if it is one.
type Split = (NormalizedString, Option<Vec<Token>>);

impl AddedTokens {
    /// Tokens without text are left out, as `tokenizers` does; of two with the same id the later one counts.
    pub fn new(path: &Path, mut tokens: Vec<AddedToken>, normalizer: Option<&NormalizerWrapper>) -> Result<Self> {
        let internal = |e: tokenizers::Error| Error::Internal(format!("added tokens: {e}"));
        tokens.retain(|token| !token.content.is_empty());
        tokens.reverse();
        tokens.sort_by_key(|token| token.id);
        tokens.dedup_by_key(|token| token.id);
        let bytes: usize = tokens.iter().map(|token| token.content.len()).sum();
        if bytes > MAX_BYTES {
            return Err(Error::InvalidModel(format!(
                "{}: the tokenizer has {} added tokens of {bytes} bytes together; at most {MAX_BYTES} are allowed",
                path.display(),
                tokens.len()
            )));
        }
        let mut texts = Vec::with_capacity(tokens.len());
        for token in &tokens {
            let mut text = NormalizedString::from(token.content.as_str());
            if let Some(normalizer) = normalizer.filter(|_| token.normalized) {
                normalizer.normalize(&mut text).map_err(internal)?;
            }
            texts.push(text.get().to_owned());
        }
        let mut first_chars: Vec<char> = tokens.iter().filter_map(|token| token.content.chars().next()).collect();
        first_chars.sort_unstable();
        first_chars.dedup();
        Ok(Self {
            raw: Matcher::new(&tokens, &texts, false)?,
            normalized: Matcher::new(&tokens, &texts, true)?,
            word: SysRegex::new(r"\w").map_err(internal)?,
            tokens,
            texts,
            first_chars,
        })
    }

    pub fn get(&self, id: u32) -> Option<&AddedToken> {
        let i = self.tokens.binary_search_by_key(&id, |token| token.id).ok()?;
        Some(&self.tokens[i])
    }

    pub fn id(&self, content: &str) -> Option<u32> {
        self.tokens.iter().find(|token| token.content == content).map(|token| token.id)
    }

    /// The text of a token that matches wherever it stands.
    pub fn first(&self) -> Option<&str> {
        let token = self.tokens.iter().find(|token| !token.single_word && !token.normalized)?;
        Some(&token.content)
    }

    /// `(id, text)` as decoders get them.
    pub fn texts(&self) -> impl Iterator<Item = (u32, &str)> {
        self.tokens.iter().zip(&self.texts).map(|(token, text)| (token.id, text.as_str()))
    }

    /// Any character may, once a normalizer can turn it into another.
    pub fn may_start_with(&self, c: char) -> bool {
        self.normalized.0.is_some() || self.first_chars.binary_search(&c).is_ok()
    }

    /// Cuts the tokens out of the whole text.
    pub fn split(&self, text: NormalizedString, literal: &[usize]) -> tokenizers::Result<Vec<Split>> {
        self.cut(text, &self.raw, |_, range| literal.binary_search(&range.start).is_ok())
    }

    /// Cuts the `normalized` tokens out of a normalized segment. What the normalizer inserts has the place of a
    /// neighbour ("▁" that of the character before or after it), so no literal offset may lie anywhere in a match.
    pub fn split_normalized(&self, segment: NormalizedString, literal: &[usize]) -> tokenizers::Result<Vec<Split>> {
        let (start, _) = segment.offsets_original();
        self.cut(segment, &self.normalized, |segment, range| {
            let Some(original) = segment.convert_offsets(Range::Normalized(range)) else { return !literal.is_empty() };
            let next = literal.partition_point(|&offset| offset < start + original.start);
            literal.get(next).is_some_and(|&offset| offset < start + original.end)
        })
    }

    fn cut(
        &self,
        whole: NormalizedString,
        matcher: &Matcher,
        is_literal: impl Fn(&NormalizedString, std::ops::Range<usize>) -> bool,
    ) -> tokenizers::Result<Vec<Split>> {
        let text = whole.get();
        let mut cuts = Vec::new(); // (token, start, stop)
        let mut done = 0; // everything before is cut
        let mut at = 0; // where the search goes on
        while let Some((token, found)) = matcher.find(text, at) {
            let token = &self.tokens[token];
            if is_literal(&whole, found.clone()) {
                at = found.start + text[found.start..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            at = found.end;
            let (before, after) = (&text[..found.start], &text[found.end..]);
            if token.single_word && (self.is_word(before.chars().next_back()) || self.is_word(after.chars().next())) {
                continue;
            }
            // A token that begins with whitespace may start inside what the one before has taken.
            let start = if token.lstrip { before.trim_end().len().max(done) } else { found.start };
            let stop = if token.rstrip { text.len() - after.trim_start().len() } else { found.end };
            if done < start {
                cuts.push((None, done, start));
            }
            cuts.push((Some(token.id), start.min(stop), stop));
            done = stop;
        }
        if cuts.is_empty() {
            return Ok(vec![(whole, None)]);
        }
        if done < text.len() {
            cuts.push((None, done, text.len()));
        }
        let slice = |(id, start, stop): (Option<u32>, usize, usize)| {
            let piece = whole.slice(Range::Normalized(start..stop)).ok_or("a cut inside a character")?;
            Ok((piece, id.map(|id| vec![Token::new(id, String::new(), (0, 0))])))
        };
        cuts.into_iter().map(slice).collect()
    }

    fn is_word(&self, c: Option<char>) -> bool {
        c.is_some_and(|c| self.word.find_iter(c.encode_utf8(&mut [0; 4])).next().is_some())
    }
}

impl Matcher {
    fn new(tokens: &[AddedToken], texts: &[String], normalized: bool) -> Result<Self> {
        let chosen = |&i: &usize| tokens[i].normalized == normalized && !texts[i].is_empty();
        let chosen: Vec<usize> = (0..tokens.len()).filter(chosen).collect();
        if chosen.is_empty() {
            return Ok(Self(None));
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(chosen.iter().map(|&i| &texts[i]))
            .map_err(|e| Error::InvalidModel(format!("{} added tokens are too many: {e}", chosen.len())))?;
        Ok(Self(Some((automaton, chosen))))
    }

    /// The next match at or after `at`: the token's place, and where its text is.
    fn find(&self, text: &str, at: usize) -> Option<(usize, std::ops::Range<usize>)> {
        let (automaton, tokens) = self.0.as_ref()?;
        let found = automaton.find(Input::new(text).range(at..))?;
        Some((tokens[found.pattern().as_usize()], found.range()))
    }
}
