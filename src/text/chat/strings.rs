//! What filters and methods do to strings: marked text stays marked, and characters are compared without their marks.
//!
//! Decisions: docs/design/text.md

use std::collections::HashSet;
use std::ops::Range;

use minijinja::Error;
use minijinja::value::Value;

use super::marks;
use super::meter::Meter;
use super::text::Text;

pub(super) fn text_of(meter: &Meter, value: &Value) -> Result<String, Error> {
    let mut text = Text::new(meter);
    text.str(value)?;
    Ok(text.text)
}

pub(super) fn replace(meter: &Meter, text: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX); // negative: all
    let found = count_of(text, old).min(count);
    meter.text(text)?;
    meter.spend(found.saturating_mul(marks::plain_len(new) + size_of::<Range<usize>>()))?;
    let (mut result, mut done) = (String::new(), 0);
    for range in marks::find_all(text, old).into_iter().take(found) {
        result += &text[done..range.start];
        result += new;
        done = range.end;
    }
    Ok(result + &text[done..])
}

/// How often `what` occurs in `text`, without overlaps.
pub(super) fn count_of(text: &str, what: &str) -> usize {
    marks::unmark(text).matches(&*marks::unmark(what)).count()
}

pub(super) fn ends_line(c: char) -> bool {
    marks::plain(c) == '\n'
}

pub(super) fn capitalize(text: &str) -> String {
    let (first, rest) = text.split_at(marks::letters(text).next().map_or(0, |letter| letter.range.end));
    marks::map(first, str::to_uppercase) + &marks::map(rest, str::to_lowercase)
}

/// A word may be partly a message's and partly the template's.
pub(super) fn title(text: &str) -> String {
    let mut starts_word = true;
    marks::map(text, |run| {
        let mut titled = String::with_capacity(run.len());
        for c in run.chars() {
            if starts_word {
                titled.extend(c.to_uppercase());
            } else {
                titled.extend(c.to_lowercase());
            }
            starts_word = c.is_ascii_punctuation() || c.is_whitespace();
        }
        titled
    })
}

/// The range of `text` without these characters (None: whitespace) at its start and at its end.
pub(super) fn trimmed(text: &str, chars: Option<&str>) -> (usize, usize) {
    let chars: Option<HashSet<char>> = chars.map(|chars| marks::unmark(chars).chars().collect());
    let fits = |c: char| chars.as_ref().map_or_else(|| marks::is_space(c), |chars| chars.contains(&marks::plain(c)));
    let end = text.trim_end_matches(fits).len();
    (end - text[..end].trim_start_matches(fits).len(), end)
}

/// Python's `str.split`.
pub(super) fn split<'a>(text: &'a str, separator: Option<&str>, most: usize) -> Vec<&'a str> {
    let mut parts = Vec::new();
    match separator {
        Some(separator) => {
            let mut done = 0;
            for range in marks::find_all(text, separator).into_iter().take(most) {
                parts.push(&text[done..range.start]);
                done = range.end;
            }
            parts.push(&text[done..]);
        }
        None => {
            let mut rest = text.trim_start_matches(marks::is_space);
            while !rest.is_empty() {
                let end = if parts.len() == most { None } else { rest.find(marks::is_space) };
                let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
                parts.push(part);
                rest = after.trim_start_matches(marks::is_space);
            }
        }
    }
    parts
}

pub(super) fn join(
    meter: &Meter,
    items: impl Iterator<Item = Result<Value, Error>>,
    separator: &str,
) -> Result<Value, Error> {
    let mut text = Text::new(meter);
    for (i, item) in items.enumerate() {
        text.push(if i > 0 { separator } else { "" })?;
        text.str(&item?)?;
    }
    Ok(Value::from(text.text))
}
