//! Marks: they tell the characters of a message from those of the template while a template works with them.
//!
//! Inside the template engine, each character of a message is replaced by the code point 0x40000 above it, in planes of
//! Unicode without assigned characters. A text is still one string with the same number of characters. So operations
//! that cut, join, repeat, reverse or iterate keep the marks without special care. Operations that depend on characters
//! read them unmarked ([`read`], [`letters`]), and mark a new text that they make of them ([`map`]). Only the functions
//! of this file remove marks. Their callers use unmarked text for a comparison, a number or an error message alone.
//!
//! Signs are code points that stand for no character: they show where a message is.
//!
//! Decisions: docs/design/text.md

use std::borrow::Cow;
use std::ops::Range;
use std::str::CharIndices;

use minijinja::value::{Value, ValueKind};

/// Planes 0 to 3 and 14 to 16, which have assigned characters, move to planes 4 to 7 and 8 to 10.
const SHIFT: u32 = 0x4_0000;
const HIGH_PLANES: u32 = 0xe_0000;
const HIGH_SHIFTED: u32 = 0x8_0000;
/// A code point of the planes between becomes two: its upper bits from here on, and its lower ten bits.
const UPPER: u32 = 0xb_0000;
const LOWER: u32 = 0xb_0400;
const SIGNS: u32 = 0xc_0000;

/// Ends a message to be continued.
pub(super) const CONTINUED: char = '\u{dfffd}';
/// Follows it: a space, which a template that trims its messages removes.
pub(super) const SLACK: char = '\u{dfffc}';
/// Signs that can be told apart by their number.
pub(super) const MAX_SIGNS: usize = 0x1_0000;

/// The sign of this number, below [`MAX_SIGNS`].
pub(super) fn sign(number: usize) -> char {
    char::from_u32(SIGNS + number as u32).unwrap_or(CONTINUED)
}

/// The source of a character.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    Template,
    Message,
    Sign,
}

fn origin(c: char) -> Origin {
    match c as u32 {
        SHIFT..SIGNS => Origin::Message,
        SIGNS..HIGH_PLANES => Origin::Sign,
        _ => Origin::Template,
    }
}

/// The character that `c` stands for. Half of a pair stands for U+FFFD, and [`SLACK`] for a space.
pub(super) fn plain(c: char) -> char {
    let code = match c as u32 {
        code @ SHIFT..HIGH_SHIFTED => code - SHIFT,
        code @ HIGH_SHIFTED..UPPER => code - HIGH_SHIFTED + HIGH_PLANES,
        UPPER..SIGNS => 0xfffd,
        _ if c == SLACK => 0x20,
        code => code,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

pub(super) fn is_space(c: char) -> bool {
    plain(c).is_whitespace()
}

/// `text` with every character marked.
pub(super) fn mark(text: &str) -> String {
    let mut marked = String::with_capacity(4 * text.len());
    let mut push = |code| marked.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
    for c in text.chars() {
        match c as u32 {
            code @ 0..SHIFT => push(code + SHIFT),
            code @ HIGH_PLANES.. => push(code - HIGH_PLANES + HIGH_SHIFTED),
            code => {
                push(UPPER + ((code - SHIFT) >> 10));
                push(LOWER + ((code - SHIFT) & 0x3ff));
            }
        }
    }
    marked
}

/// Whether marked characters or signs are in `text`.
pub(super) fn has_marks(text: &str) -> bool {
    // These planes begin with the bytes F1, F2 and F3, and so do 14 and 15.
    text.bytes().any(|byte| (0xf1..=0xf3).contains(&byte)) && text.chars().any(|c| origin(c) != Origin::Template)
}

/// `text` without marks and signs.
pub(super) fn unmark(text: &str) -> Cow<'_, str> {
    match has_marks(text) {
        false => Cow::Borrowed(text),
        true => letters(text).filter(|letter| letter.origin != Origin::Sign).map(|letter| letter.plain).collect(),
    }
}

/// Characters of `text` without marks and signs.
pub(super) fn count(text: &str) -> usize {
    letters(text).filter(|letter| letter.origin != Origin::Sign).count()
}

/// Bytes of `text` without marks.
pub(super) fn plain_len(text: &str) -> usize {
    match has_marks(text) {
        false => text.len(),
        true => text.chars().map(|c| plain(c).len_utf8()).sum(),
    }
}

/// A character of a text, and its range there.
pub(super) struct Letter {
    pub plain: char,
    pub origin: Origin,
    pub range: Range<usize>,
}

/// The characters of `text`, without marks.
pub(super) fn letters(text: &str) -> impl Iterator<Item = Letter> {
    struct Letters<'a>(CharIndices<'a>);
    impl Iterator for Letters<'_> {
        type Item = Letter;

        fn next(&mut self) -> Option<Letter> {
            let (start, c) = self.0.next()?;
            let mut plain = plain(c);
            let upper = (c as u32).wrapping_sub(UPPER);
            if upper < LOWER - UPPER {
                let mut rest = self.0.clone();
                let lower = rest.next().map(|(_, c)| (c as u32).wrapping_sub(LOWER)).filter(|lower| *lower < 0x400);
                if let Some(whole) = lower.and_then(|lower| char::from_u32(SHIFT + (upper << 10) + lower)) {
                    plain = whole;
                    self.0 = rest;
                }
            }
            Some(Letter { plain, origin: origin(c), range: start..self.0.offset() })
        }
    }
    Letters(text.char_indices())
}

/// `text` as runs of one origin.
pub(super) fn runs(text: &str) -> impl Iterator<Item = (Origin, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = origin(rest.chars().next()?);
        let (run, after) = rest.split_at(rest.find(|c| origin(c) != first).unwrap_or(rest.len()));
        rest = after;
        Some((first, run))
    })
}

/// `text` with `change` applied to each run without marks; the result for a message's characters is marked again.
pub(super) fn map(text: &str, mut change: impl FnMut(&str) -> String) -> String {
    let changed = runs(text).map(|(origin, run)| match origin {
        Origin::Template => change(run),
        Origin::Message => mark(&change(&unmark(run))),
        Origin::Sign => run.to_owned(),
    });
    changed.collect()
}

/// The ranges of `text` that equal `needle` without marks, from left to right and without overlaps. A sign next to a
/// range is outside it, so that the text around a match keeps it.
pub(super) fn find_all(text: &str, needle: &str) -> Vec<Range<usize>> {
    let (plain, needle) = (unmark(text), unmark(needle));
    let found = plain.match_indices(&*needle).map(|(at, found)| at..at + found.len());
    if !has_marks(text) {
        return found.collect();
    }
    // From offsets in `plain` to offsets in `text`.
    let mut letters = letters(text).filter(|letter| letter.origin != Origin::Sign).peekable();
    let mut read = 0;
    let mut read_to = |plain: usize| {
        let mut end = None;
        while read < plain {
            let Some(letter) = letters.next() else { break };
            read += letter.plain.len_utf8();
            end = Some(letter.range.end);
        }
        (end, letters.peek().map_or(text.len(), |next| next.range.start))
    };
    let place = |range: Range<usize>| {
        let (_, start) = read_to(range.start);
        start..read_to(range.end).0.unwrap_or(start)
    };
    found.map(place).collect()
}

/// `value` with every text in it unmarked, for questions about it. The meter has weighed it.
pub(super) fn read(value: &Value) -> Value {
    if !any_marks(value) {
        return value.clone();
    }
    match value.kind() {
        ValueKind::String => Value::from(&*unmark(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter().into_iter().flatten().map(|item| read(&item)).collect()
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            Value::from_iter(keys.map(|key| (read(&key), read(&value.get_item(&key).unwrap_or_default()))))
        }
        _ => value.clone(),
    }
}

fn any_marks(value: &Value) -> bool {
    let mut items = value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::String => has_marks(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => items.any(|item| any_marks(&item)),
        ValueKind::Map => items.any(|key| any_marks(&key) || value.get_item(&key).is_ok_and(|value| any_marks(&value))),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_can_be_marked_and_read() {
        let all: String = (0..=0x10_ffff).filter_map(char::from_u32).collect();
        let marked = mark(&all);
        assert!(marked.chars().all(|c| origin(c) == Origin::Message));
        assert!(unmark(&marked) == all);
        assert_eq!(letters(&marked).count(), all.chars().count());
        let assigned = |c: &char| !(SHIFT..HIGH_PLANES).contains(&(*c as u32));
        assert!(all.chars().filter(assigned).all(|c| mark(&c.to_string()).chars().map(plain).eq([c])));
        assert!(all.chars().filter(assigned).all(|c| origin(c) == Origin::Template));
    }

    #[test]
    fn half_of_a_pair_reads_as_a_replacement_character() {
        let pair = mark("\u{50123}a");
        assert_eq!(unmark(&pair), "\u{50123}a");
        let mut halves: Vec<char> = pair.chars().collect();
        assert_eq!(halves.len(), 3);
        halves.reverse();
        assert_eq!(unmark(&halves.iter().collect::<String>()), "a\u{fffd}\u{fffd}");
    }

    #[test]
    fn signs_read_as_nothing() {
        let text = format!("a{}{}{}{CONTINUED}{SLACK}", sign(0), mark("é"), sign(MAX_SIGNS - 1));
        assert_eq!((&*unmark(&text), plain_len(&mark("é<"))), ("aé", 3));
        let origins: Vec<Origin> = runs(&text).map(|(origin, _)| origin).collect();
        assert_eq!(origins, [Origin::Template, Origin::Sign, Origin::Message, Origin::Sign]);
        assert_eq!(map(&text, str::to_uppercase), text.replace('a', "A").replace(&mark("é"), &mark("É")));
    }

    #[test]
    fn places_are_found_by_what_the_text_reads() {
        let text = format!("a{}b{}b", mark("éb"), sign(1));
        let found: Vec<&str> = find_all(&text, "b").into_iter().map(|range| &text[range]).collect();
        assert_eq!(found, [&mark("b"), "b", "b"]);
        assert_eq!(find_all(&text, &mark("aé")), std::iter::once(0..5).collect::<Vec<_>>());
        let text = format!("{}{}\n{}", mark("a"), sign(0), sign(1));
        let found: Vec<&str> = find_all(&text, "\n").into_iter().map(|range| &text[range]).collect();
        assert_eq!(found, ["\n"]);
        assert_eq!(find_all("aaa", "aa"), std::iter::once(0..2).collect::<Vec<_>>());
        assert_eq!(find_all(&mark("ab"), "").len(), 3);
    }
}
