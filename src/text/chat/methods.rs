//! Python's methods of str, dict and list.
//!
//! Decisions: docs/design/text.md

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::marks;
use super::meter::{Meter, invalid};
use super::strings::{capitalize, count_of, ends_line, join, replace, split, title, trimmed};

/// Calls a method. `value` and `args` are paid for.
pub(super) fn method(meter: &Meter, state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match value.as_str() {
        Some(text) => text_method(meter, state, text, name, args),
        None => {
            let mut args = args.to_vec();
            let counts = name == "count";
            if counts {
                meter.weigh(value)?;
            }
            // The value to count, or the key of `get`.
            if let Some(first) = args.first_mut() {
                *first = marks::read(first);
            }
            let value = if counts { &marks::read(value) } else { value };
            pycompat::unknown_method_callback(state, value, name, &args)
        }
    }
}

fn text_method(meter: &Meter, state: &State, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "replace" => {
            let (old, new, count) = from_args(args)?;
            replace(meter, text, old, new, count).map(Value::from)
        }
        "join" => {
            let (items,): (Value,) = from_args(args)?;
            join(meter, meter.list(&items)?.into_iter().map(Ok), text)
        }
        "count" => {
            let (what,): (&str,) = from_args(args)?;
            Ok(Value::from(count_of(text, what)))
        }
        "find" | "rfind" => {
            let (what,): (&str,) = from_args(args)?;
            let (text, what) = (marks::unmark(text), marks::unmark(what));
            let at = if name == "find" { text.find(&*what) } else { text.rfind(&*what) };
            Ok(at.map_or(Value::from(-1), |at| Value::from(text[..at].chars().count())))
        }
        "split" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX); // negative: all
            let parts = match separator {
                Some("") => return Err(invalid("split needs a separator that is not empty")),
                Some(separator) => count_of(text, separator) + 1,
                None => text.split(marks::is_space).filter(|part| !part.is_empty()).count(),
            };
            meter.spend(parts.saturating_mul(size_of::<Value>()))?;
            Ok(split(text, separator, most).into_iter().map(Value::from).collect())
        }
        "splitlines" => {
            let (keeps_ends,): (Option<bool>,) = from_args(args)?;
            meter.spend(text.chars().filter(|&c| ends_line(c)).count().saturating_mul(size_of::<Value>()))?;
            let lines = text.split_inclusive(ends_line).map(|line| match line.strip_suffix(ends_line) {
                Some(text) if keeps_ends != Some(true) => {
                    text.strip_suffix(|c| marks::plain(c) == '\r').unwrap_or(text)
                }
                _ => line,
            });
            Ok(lines.map(Value::from).collect())
        }
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let (start, end) = trimmed(text, chars);
            Ok(Value::from(match name {
                "strip" => &text[start..end],
                "lstrip" => &text[if start == end { text.len() } else { start }..],
                _ => &text[..end],
            }))
        }
        "lower" | "upper" | "title" | "capitalize" => {
            let () = from_args(args)?;
            Ok(Value::from(match name {
                "lower" => marks::map(text, str::to_lowercase),
                "upper" => marks::map(text, str::to_uppercase),
                "title" => title(text),
                _ => capitalize(text),
            }))
        }
        // A width in a format string is a length that nothing pays for.
        "format" => Err(Error::from(ErrorKind::UnknownMethod)),
        // The others return a bool: `startswith`, `isdigit` and similar ones.
        _ => {
            let args: Vec<Value> = args.iter().map(marks::read).collect();
            let answer = pycompat::unknown_method_callback(state, &Value::from(&*marks::unmark(text)), name, &args)?;
            match answer.kind() {
                ValueKind::Bool => Ok(answer),
                kind => Err(invalid(format!("{name} returns a {kind}"))),
            }
        }
    }
}
