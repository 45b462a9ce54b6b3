//! Added tokens: those that are found in text verbatim, before it is normalized or merged.
//!
//! The rules are those of `tokenizers`' AddedVocabulary: the leftmost match, of several there the longest; `lstrip` and
//! `rstrip` include the (Unicode) whitespace around a match; tokens with `normalized` are searched in the normalized
//! rest. One rule is ours: no match overlaps the user's text, as if each of its characters occurred in no token. The
//! whitespace around a match may be the user's.
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
    /// Matches only without a letter, digit or underscore next to it.
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    /// Matches its normalized text, in normalized text.
    pub normalized: bool,
}

pub(super) struct AddedTokens {
    /// Ascending by id.
    tokens: Vec<AddedToken>,
    /// The token's own text, or for a `normalized` one the normalized text; parallel to `tokens`.
    texts: Vec<String>,
    raw: Matcher,
    normalized: Matcher,
    word: SysRegex,
}

/// An automaton over the texts of some of the tokens; `None` if there are none.
struct Matcher(Option<(AhoCorasick, Vec<usize>)>);

/// A range of bytes of a text.
type Place = std::ops::Range<usize>;

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
        Ok(Self {
            raw: Matcher::new(&tokens, &texts, false)?,
            normalized: Matcher::new(&tokens, &texts, true)?,
            word: SysRegex::new(r"\w").map_err(internal)?,
            tokens,
            texts,
        })
    }

    pub fn get(&self, id: u32) -> Option<&AddedToken> {
        let i = self.tokens.binary_search_by_key(&id, |token| token.id).ok()?;
        Some(&self.tokens[i])
    }

    pub fn id(&self, content: &str) -> Option<u32> {
        self.tokens.iter().find(|token| token.content == content).map(|token| token.id)
    }

    /// The text of a token that matches in any context.
    pub fn first(&self) -> Option<&str> {
        let token = self.tokens.iter().find(|token| !token.single_word && !token.normalized)?;
        Some(&token.content)
    }

    /// `(id, text)` as decoders get them.
    pub fn texts(&self) -> impl Iterator<Item = (u32, &str)> {
        self.tokens.iter().zip(&self.texts).map(|(token, text)| (token.id, text.as_str()))
    }

    /// Cuts the tokens out of the whole text, between the user's ranges.
    pub fn split(&self, text: NormalizedString, user: &[Place]) -> tokenizers::Result<Vec<Split>> {
        let gaps = gaps(text.get().len(), user);
        self.cut(text, &self.raw, gaps)
    }

    /// Cuts the `normalized` tokens out of a normalized segment.
    pub fn split_normalized(&self, segment: NormalizedString, user: &[Place]) -> tokenizers::Result<Vec<Split>> {
        if self.normalized.0.is_none() {
            return Ok(vec![(segment, None)]);
        }
        let gaps = gaps(segment.get().len(), &normalized_user(&segment, user));
        self.cut(segment, &self.normalized, gaps)
    }

    fn cut(&self, whole: NormalizedString, matcher: &Matcher, gaps: Vec<Place>) -> tokenizers::Result<Vec<Split>> {
        let text = whole.get();
        let mut cuts = Vec::new(); // (token, start, stop)
        let mut done = 0; // everything before is cut
        for (token, found) in gaps.into_iter().flat_map(|gap| matcher.find(text, gap)) {
            let token = &self.tokens[token];
            let (before, after) = (&text[..found.start], &text[found.end..]);
            if token.single_word && (self.is_word(before.chars().next_back()) || self.is_word(after.chars().next())) {
                continue;
            }
            // A token that begins with whitespace may start inside the whitespace of the one before.
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

    /// The matches inside `gap`: the index of the token, and the range of its text.
    fn find(&self, text: &str, gap: Place) -> impl Iterator<Item = (usize, Place)> {
        let found = self.0.as_ref().map(|(automaton, tokens)| {
            automaton
                .find_iter(Input::new(text).range(gap))
                .map(|found| (tokens[found.pattern().as_usize()], found.range()))
        });
        found.into_iter().flatten()
    }
}

/// The gaps between `ranges`, ascending, in a text of `length` bytes. An empty range separates two gaps.
fn gaps(length: usize, ranges: &[Place]) -> Vec<Place> {
    let mut gaps = Vec::with_capacity(ranges.len() + 1);
    let mut start = 0;
    for range in ranges {
        gaps.push(start..range.start.min(length));
        start = range.end;
    }
    gaps.push(start..length);
    gaps.retain(|gap| gap.start < gap.end);
    gaps
}

/// The user's ranges of a normalized segment; an empty range is a place at which user text was removed.
///
/// Normalizers compose, decompose and reorder a letter and its accents. So a character and the possible accents after it
/// (all but ASCII and "▁") are the user's together. An inserted character has the place of its neighbor.
fn normalized_user(segment: &NormalizedString, user: &[Place]) -> Vec<Place> {
    if user.is_empty() {
        return Vec::new();
    }
    let (start, end) = segment.offsets_original();
    let has_user = |from: usize, to: usize| {
        let next = user.partition_point(|range| range.end <= start + from);
        user.get(next).is_some_and(|range| range.start < start + to)
    };
    // Each character, its range, and whether user text is in it, and after it up to the next one.
    let (mut letters, mut ends): (Vec<(char, Place, bool, bool)>, _) = (Vec::new(), 0);
    for (at, c) in segment.get().char_indices() {
        let range = at..at + c.len_utf8();
        let place = segment.convert_offsets(Range::Normalized(range.clone())).unwrap_or(0..end - start);
        if let Some((.., behind)) = letters.last_mut() {
            *behind = has_user(ends, place.start);
        }
        letters.push((c, range, has_user(place.start, place.end.max(place.start + 1)), false));
        ends = place.end;
    }
    if let Some((.., behind)) = letters.last_mut() {
        *behind = has_user(ends, end - start);
    }
    let is_simple = |c: char| c.is_ascii() || c == '▁';
    let mut ranges = Vec::new();
    for group in letters.chunk_by(|_, (next, ..)| !is_simple(*next)) {
        if group.iter().any(|&(c, _, inside, behind)| inside || (behind && !is_simple(c))) {
            ranges.push(group[0].1.start..group[group.len() - 1].1.end);
        } else {
            ranges.extend(group.iter().filter(|(.., behind)| *behind).map(|(_, range, ..)| range.end..range.end));
        }
    }
    ranges
}
