//! The filters of templates. Those that look at characters, or make a text or a list, are ours: they read marked text,
//! keep its marks and pay the meter. The others are minijinja's.
//!
//! Decisions: docs/design/text.md

use minijinja::value::{Kwargs, Rest, StringInput, Value, from_args};
use minijinja::{Environment, Error, State, filters};

use super::marks;
use super::meter::{Meter, invalid};
use super::strings::{capitalize, ends_line, join, replace, text_of, title, trimmed};
use super::text::Text;

pub(super) fn add_filters(env: &mut Environment<'static>, meter: &Meter) {
    env.add_filter("abs", filters::abs);
    env.add_filter("capitalize", |text: StringInput| capitalize(text.as_str()));
    env.add_filter("count", length);
    env.add_filter("d", filters::default);
    env.add_filter("default", filters::default);
    env.add_filter("dictsort", filters::dictsort);
    env.add_filter("first", filters::first);
    env.add_filter("float", |state: &State, value: Value| filters::float(state, unmarked(&value)?));
    env.add_filter("int", |state: &State, value: Value| filters::int(state, unmarked(&value)?));
    env.add_filter("items", filters::items);
    env.add_filter("last", filters::last);
    env.add_filter("length", length);
    env.add_filter("lower", |text: StringInput| marks::map(text.as_str(), str::to_lowercase));
    env.add_filter("max", filters::max);
    env.add_filter("min", filters::min);
    env.add_filter("reverse", filters::reverse);
    env.add_filter("round", filters::round);
    env.add_filter("safe", filters::safe);
    env.add_filter("sum", filters::sum);
    env.add_filter("title", |text: StringInput| title(text.as_str()));
    env.add_filter("trim", |text: StringInput, chars: Option<&str>| {
        let (start, end) = trimmed(text.as_str(), chars);
        text.as_str()[start..end].to_owned()
    });
    env.add_filter("upper", |text: StringInput| marks::map(text.as_str(), str::to_uppercase));

    // These make a value of each character of a text.
    macro_rules! of_list {
        ($($name:literal: $filter:path),*) => {$(
            let account = meter.clone();
            env.add_filter($name, move |state: &State, value: Value, args: Rest<Value>| {
                account.spend(value.as_str().map_or(0, marks::plain_len).saturating_mul(size_of::<Value>()))?;
                $filter(state, value, args)
            });
        )*};
    }
    of_list!("list": list, "map": map, "select": select, "reject": reject, "selectattr": selectattr,
        "rejectattr": rejectattr, "sort": sort, "unique": unique);

    let account = meter.clone();
    env.add_filter("string", move |value: Value| text_of(&account, &value));
    let account = meter.clone();
    env.add_filter("replace", move |text: &str, old: &str, new: &str, count: Option<i64>| {
        replace(&account, text, old, new, count)
    });
    let account = meter.clone();
    env.add_filter("join", move |items: Value, separator: Option<&str>, options: Kwargs| {
        let attribute: Option<String> = options.get("attribute")?;
        options.assert_all_used()?;
        let items = account.list(&items)?.into_iter().map(|item| match &attribute {
            Some(name) => item.get_attr(name),
            None => Ok(item),
        });
        join(&account, items, separator.unwrap_or(""))
    });
    let account = meter.clone();
    env.add_filter("tojson", move |value: Value, indent: Option<usize>, options: Kwargs| {
        // Of json.dumps's options, `ensure_ascii=False` is the rule here, and others change only the spelling.
        let indent = options.get::<Option<usize>>("indent")?.or(indent);
        if indent.is_some_and(|indent| indent > 16) {
            return Err(invalid("tojson indents by 16 at most"));
        }
        let mut text = Text::new(&account);
        text.json(&value, indent, 0)?;
        Ok(text.text)
    });
    let account = meter.clone();
    env.add_filter("indent", move |text: &str, width: Option<usize>, first: Option<bool>, options: Kwargs| {
        let width = options.get::<Option<usize>>("width")?.or(width).unwrap_or(4);
        let first = options.get::<Option<bool>>("first")?.or(first).unwrap_or(false);
        account.spend(width.saturating_mul(text.chars().filter(|&c| ends_line(c)).count() + 1))?;
        let margin = " ".repeat(width);
        let mut result = if first { margin.clone() } else { String::new() };
        for (i, line) in text.split_inclusive(ends_line).enumerate() {
            result += if i > 0 && !line.starts_with(ends_line) { &margin } else { "" };
            result += line;
        }
        Ok(result)
    });
}

fn length(value: &Value) -> Result<usize, Error> {
    value.as_str().map_or_else(|| filters::length(value), |text| Ok(marks::count(text)))
}

/// A value that becomes a number. The digits of a number are not marked, so a message's text cannot become one.
fn unmarked(value: &Value) -> Result<&Value, Error> {
    match value.as_str() {
        Some(text) if marks::has_marks(text) => Err(invalid("a message's text cannot be converted to a number")),
        _ => Ok(value),
    }
}

fn list(_: &State, value: Value, _: Rest<Value>) -> Result<Value, Error> {
    value.try_iter().map(|items| Value::from(items.collect::<Vec<_>>()))
}

fn map(state: &State, value: Value, args: Rest<Value>) -> Result<Value, Error> {
    filters::map(state, value, args).map(Value::from)
}

fn select(state: &State, value: Value, Rest(args): Rest<Value>) -> Result<Value, Error> {
    let (name, args) = from_args(&args)?;
    filters::select(state, value, name, args).map(Value::from)
}

fn reject(state: &State, value: Value, Rest(args): Rest<Value>) -> Result<Value, Error> {
    let (name, args) = from_args(&args)?;
    filters::reject(state, value, name, args).map(Value::from)
}

fn selectattr(state: &State, value: Value, Rest(args): Rest<Value>) -> Result<Value, Error> {
    let (attribute, name, args) = from_args(&args)?;
    filters::selectattr(state, value, attribute, name, args).map(Value::from)
}

fn rejectattr(state: &State, value: Value, Rest(args): Rest<Value>) -> Result<Value, Error> {
    let (attribute, name, args) = from_args(&args)?;
    filters::rejectattr(state, value, attribute, name, args).map(Value::from)
}

fn sort(state: &State, value: Value, Rest(args): Rest<Value>) -> Result<Value, Error> {
    let (options,) = from_args(&args)?;
    filters::sort(state, value, options)
}

fn unique(state: &State, value: Value, Rest(args): Rest<Value>) -> Result<Value, Error> {
    let (options,) = from_args(&args)?;
    filters::unique(state, value, options)
}
