//! The template engine: minijinja, set up as Hugging Face sets up Jinja2, with bounds on everything a template can use.
//!
//! A template comes from a file that cannot be trusted. It reaches only its variables. Fuel bounds its steps, the meter
//! bounds the work of each step (`guard.rs` makes every step pay), and `MAX_SOURCE` bounds its length. The parser and
//! the drop of a parsed template recurse as deep as the source is nested, so both run on a stack of their own.
//!
//! The texts of messages are marked (`marks.rs`). Operators, filters, tests and methods that look at the characters of a
//! text are replaced here by ones that read marked text. The others are minijinja's and keep the marks: sorting then
//! compares marked texts by code points, without folding case.
use std::collections::HashSet;
use std::ops::Range;

use minijinja::machinery::{CodeGenerator, Vm, WhitespaceConfig, ast, make_string_output, parse};
use minijinja::value::{Kwargs, Rest, StringInput, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, filters, functions, tests};
use minijinja_contrib::pycompat;

use super::clock;
use super::guard::{self, ADD, CONCAT, COUNT, LOOK, MULTIPLY, PLAIN, READ, WEIGH};
use super::marks;
use super::meter::{Meter, invalid};
use super::text::Text;
use crate::error::one_line;

const MAX_SOURCE: usize = 64 << 10;
const FUEL: u64 = 500_000;
const MAX_MESSAGE: usize = 250;
/// 64 KiB of the most nested source there is need between 8 and 16 MiB. Pages that are not touched cost nothing.
const STACK: usize = 64 << 20;

/// Checks the length and the syntax of `source`.
pub(super) fn check(source: &str) -> Result<(), Fault> {
    run(source, |template| guard::guard(&template).map(drop))
}

/// Why a template was not compiled or gave no text.
pub(super) enum Fault {
    /// The template's: the line and the problem.
    Template(String),
    /// The system's, which says nothing about the template.
    System(crate::error::Error),
}

impl Fault {
    /// The error, made by `error` if the template is at fault.
    pub(super) fn error(self, error: impl FnOnce(String) -> crate::error::Error) -> crate::error::Error {
        match self {
            Fault::Template(what) => error(what),
            Fault::System(other) => other,
        }
    }
}

/// The text that `source` makes of `variables`; marked characters are still marked.
pub(super) fn render(source: &str, variables: Value) -> Result<String, Fault> {
    run(source, |template| {
        let template = guard::guard(&template)?;
        let mut compiler = CodeGenerator::new("chat template", source);
        compiler.compile_stmt(&template);
        let (instructions, blocks) = compiler.finish();
        let environment = environment();
        let mut text = String::new();
        let mut output = make_string_output(&mut text);
        Vm::new(&environment).eval(&instructions, variables, &blocks, &mut output, AutoEscape::None)?;
        Ok(text)
    })
}

fn run<T: Send>(source: &str, work: impl FnOnce(ast::Stmt<'_>) -> Result<T, Error> + Send) -> Result<T, Fault> {
    if source.len() > MAX_SOURCE {
        return Err(Fault::Template(format!("it is {} bytes long; the limit is {MAX_SOURCE}", source.len())));
    }
    let source = &source.replace("\r\n", "\n").replace('\r', "\n"); // as Jinja2 does
    let whitespace = WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true };
    let work = || {
        let template = parse(source, "chat template", Default::default(), whitespace).map_err(explain)?;
        work(template).map_err(explain)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
        match thread.spawn_scoped(scope, work).map(|thread| thread.join()) {
            Ok(Ok(result)) => result.map_err(Fault::Template),
            Ok(Err(_)) => Err(Fault::Template("the template engine failed".to_owned())),
            Err(error) => Err(Fault::System(crate::error::Error::Memory(format!(
                "the chat template needs a thread with {STACK} bytes of stack, which the system refused: {error}"
            )))),
        }
    })
}

/// The line number and the problem, on one line.
fn explain(error: Error) -> String {
    let mut error = &error;
    // An error inside a macro is the source of one about the call.
    while let Some(inner) = std::error::Error::source(error).and_then(|source| source.downcast_ref::<Error>()) {
        error = inner;
    }
    let kind = error.kind();
    let what = match (kind, error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("it takes more than {FUEL} steps"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (_, Some(detail)) => format!("{kind}: {detail}"),
        (_, None) => kind.to_string(),
    };
    // A message of the template itself may have several lines and any length.
    let what = one_line(&marks::unmark(&what), MAX_MESSAGE);
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

fn environment() -> Environment<'static> {
    let meter = Meter::default();
    let mut env = Environment::empty();
    env.set_debug(false);
    env.set_fuel(Some(FUEL));
    add_operators(&mut env, &meter);
    add_functions(&mut env, &meter);
    add_filters(&mut env, &meter);
    add_tests(&mut env, &meter);

    let account = meter.clone();
    env.set_unknown_method_callback(move |state, value, name, args| method(&account, state, value, name, args));
    env.set_formatter(move |out, _, value| {
        let (mut text, computed);
        let written = match value.as_str() {
            Some(written) => written,
            None => {
                text = Text::new(&meter);
                text.str(value)?;
                computed = text.text;
                &computed
            }
        };
        meter.emit(written)?;
        out.write_str(written).map_err(Error::from)
    });
    env
}

/// The functions that `guard.rs` puts in the place of operators.
fn add_operators(env: &mut Environment<'static>, meter: &Meter) {
    let account = meter.clone();
    env.add_function(READ, move |value: Value| account.weigh(&value).map(|()| marks::read(&value)));
    let account = meter.clone();
    env.add_function(WEIGH, move |value: Value| account.weigh(&value).map(|()| value));
    let account = meter.clone();
    env.add_function(COUNT, move |value: Value| account.count(value));
    let account = meter.clone();
    env.add_function(LOOK, move |value: Value| account.look(value));
    let account = meter.clone();
    env.add_function(PLAIN, move |value: Value| account.plain(&value));
    let account = meter.clone();
    env.add_function(CONCAT, move |left: Value, right: Value| {
        let mut text = Text::new(&account);
        text.str(&left)?;
        text.str(&right)?;
        Ok::<_, Error>(Value::from(text.text))
    });
    let account = meter.clone();
    env.add_function(ADD, move |left: Value, right: Value| add(&account, &left, &right));
    let account = meter.clone();
    env.add_function(MULTIPLY, move |left: Value, right: Value| multiply(&account, &left, &right));
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn add(meter: &Meter, left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        meter.text(left)?;
        meter.text(right)?;
        return Ok(Value::from([left, right].concat()));
    }
    if is_list(left) && is_list(right) {
        let mut items = meter.list(left)?;
        items.extend(meter.list(right)?);
        return Ok(Value::from(items));
    }
    arithmetic("add", left, right, i64::checked_add, |a, b| a + b)
}

fn multiply(meter: &Meter, left: &Value, right: &Value) -> Result<Value, Error> {
    let times = |value: &Value| value.as_i64().map(|n| usize::try_from(n).unwrap_or(0)); // none if negative
    let pairs = [(left, times(right)), (right, times(left))];
    for (value, n) in pairs {
        if let (Some(text), Some(n)) = (value.as_str(), n) {
            meter.spend(marks::plain_len(text).saturating_mul(n))?;
            return Ok(Value::from(text.repeat(n)));
        }
        if let (true, Some(n)) = (is_list(value), n) {
            let items = meter.list(value)?;
            meter.spend(items.len().saturating_mul(n).saturating_mul(size_of::<Value>()))?;
            return Ok(Value::from_iter(std::iter::repeat_n(items, n).flatten()));
        }
    }
    arithmetic("multiply", left, right, i64::checked_mul, |a, b| a * b)
}

fn arithmetic(
    verb: &str,
    left: &Value,
    right: &Value,
    integers: fn(i64, i64) -> Option<i64>,
    floats: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    if left.kind() != ValueKind::Number || right.kind() != ValueKind::Number {
        return Err(invalid(format!("cannot {verb} {} and {}", left.kind(), right.kind())));
    }
    if left.is_integer() && right.is_integer() {
        let result = left.as_i64().zip(right.as_i64()).and_then(|(a, b)| integers(a, b));
        return result.map(Value::from).ok_or_else(|| invalid(format!("cannot {verb} {left} and {right}: too large")));
    }
    Ok(Value::from(floats(f64::try_from(left.clone())?, f64::try_from(right.clone())?)))
}

fn add_functions(env: &mut Environment<'static>, meter: &Meter) {
    let account = meter.clone();
    env.add_function("range", move |first: i64, second: Option<i64>, step: Option<i64>| {
        let (start, stop) = second.map_or((0, first), |second| (first, second));
        let step = step.unwrap_or(1);
        let distance = if step < 0 { start.saturating_sub(stop) } else { stop.saturating_sub(start) };
        let Some(size) = step.checked_abs().filter(|&size| size > 0) else {
            return Err(invalid("range() needs a step that is not 0"));
        };
        let length = usize::try_from(distance.max(0)).unwrap_or(usize::MAX).div_ceil(size as usize);
        account.spend(length.saturating_mul(size_of::<Value>()))?;
        Ok(Value::from_iter((0..length as i64).map(|i| start + i * step)))
    });
    let account = meter.clone();
    env.add_function("namespace", move |values: Option<Value>| {
        functions::namespace(values.map(|values| account.plain(&values)).transpose()?)
    });
    let account = meter.clone();
    env.add_function("dict", move |values: Option<Value>| match values {
        Some(values) => account.plain(&values),
        None => Ok(Value::from_iter(Vec::<(Value, Value)>::new())),
    });
    env.add_function("raise_exception", |message: String| Err::<Value, _>(invalid(message)));
    env.add_function("strftime_now", |format: String| clock::strftime_now(&format).map_err(invalid));
}

fn add_filters(env: &mut Environment<'static>, meter: &Meter) {
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

fn text_of(meter: &Meter, value: &Value) -> Result<String, Error> {
    let mut text = Text::new(meter);
    text.str(value)?;
    Ok(text.text)
}

fn replace(meter: &Meter, text: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
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
fn count_of(text: &str, what: &str) -> usize {
    marks::unmark(text).matches(&*marks::unmark(what)).count()
}

fn ends_line(c: char) -> bool {
    marks::plain(c) == '\n'
}

fn capitalize(text: &str) -> String {
    let (first, rest) = text.split_at(marks::letters(text).next().map_or(0, |letter| letter.range.end));
    marks::map(first, str::to_uppercase) + &marks::map(rest, str::to_lowercase)
}

/// A word may be partly a message's and partly the template's.
fn title(text: &str) -> String {
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

/// The range of `text` without these characters (None: whitespace) at its start and at its end.
fn trimmed(text: &str, chars: Option<&str>) -> (usize, usize) {
    let chars: Option<HashSet<char>> = chars.map(|chars| marks::unmark(chars).chars().collect());
    let fits = |c: char| chars.as_ref().map_or_else(|| marks::is_space(c), |chars| chars.contains(&marks::plain(c)));
    let end = text.trim_end_matches(fits).len();
    (end - text[..end].trim_start_matches(fits).len(), end)
}

/// Python's `str.split`.
fn split<'a>(text: &'a str, separator: Option<&str>, most: usize) -> Vec<&'a str> {
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

fn join(meter: &Meter, items: impl Iterator<Item = Result<Value, Error>>, separator: &str) -> Result<Value, Error> {
    let mut text = Text::new(meter);
    for (i, item) in items.enumerate() {
        text.push(if i > 0 { separator } else { "" })?;
        text.str(&item?)?;
    }
    Ok(Value::from(text.text))
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

fn add_tests(env: &mut Environment<'static>, meter: &Meter) {
    // These look at texts: they pay, and see them without marks.
    macro_rules! of_text {
        ($($names:expr => $test:expr),*) => {$(
            for name in $names {
                let account = meter.clone();
                env.add_test(name, move |state: &State, value: Value, other: Option<Value>| {
                    account.weigh(&value)?;
                    other.iter().try_for_each(|other| account.weigh(other))?;
                    let other = other.map(|other| marks::read(&other));
                    let test: fn(&State, &Value, Option<&Value>) -> Result<bool, Error> = $test;
                    test(state, &marks::read(&value), other.as_ref())
                });
            }
        )*};
    }
    fn text(value: &Value) -> Result<&str, Error> {
        value.as_str().ok_or_else(|| invalid(format!("a {} is not a text", value.kind())))
    }
    fn second(value: Option<&Value>) -> Result<&Value, Error> {
        value.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
    }
    of_text!(
        ["eq", "equalto", "=="] => |_, a, b| Ok(tests::is_eq(a, second(b)?)),
        ["ne", "!="] => |_, a, b| Ok(tests::is_ne(a, second(b)?)),
        ["lt", "lessthan", "<"] => |_, a, b| Ok(tests::is_lt(a, second(b)?)),
        ["le", "<="] => |_, a, b| Ok(tests::is_le(a, second(b)?)),
        ["gt", "greaterthan", ">"] => |_, a, b| Ok(tests::is_gt(a, second(b)?)),
        ["ge", ">="] => |_, a, b| Ok(tests::is_ge(a, second(b)?)),
        ["in"] => |state, a, b| tests::is_in(state, a, second(b)?),
        ["lower"] => |_, a, _| text(a).map(tests::is_lower),
        ["upper"] => |_, a, _| text(a).map(tests::is_upper)
    );
    env.add_test("boolean", tests::is_boolean);
    env.add_test("defined", tests::is_defined);
    env.add_test("divisibleby", tests::is_divisibleby);
    env.add_test("even", tests::is_even);
    env.add_test("false", tests::is_false);
    env.add_test("float", tests::is_float);
    env.add_test("integer", tests::is_integer);
    env.add_test("iterable", tests::is_iterable);
    env.add_test("mapping", tests::is_mapping);
    env.add_test("none", tests::is_none);
    env.add_test("number", tests::is_number);
    env.add_test("odd", tests::is_odd);
    env.add_test("sequence", tests::is_sequence);
    env.add_test("string", tests::is_string);
    env.add_test("true", tests::is_true);
    env.add_test("undefined", tests::is_undefined);
}

/// Python's methods of str, dict and list; `value` and `args` are paid for.
fn method(meter: &Meter, state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
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
