//! The template engine: minijinja, set up as Hugging Face sets up Jinja2, with bounds on everything a template can use.
//!
//! A template comes out of a file that somebody else made. It cannot reach anything but its variables; what is left is
//! to keep it from hanging or filling memory. Steps are bounded by the engine's fuel, the work of a step by the meter
//! (`guard.rs` sees to it that every step pays), the source's length by `MAX_SOURCE`; and since the parser and the drop
//! of a parsed template recurse as deep as the source is nested, it all happens on a stack of its own.
use minijinja::machinery::{CodeGenerator, Vm, WhitespaceConfig, ast, make_string_output, parse};
use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, filters, functions, tests};
use minijinja_contrib::pycompat;

use super::clock;
use super::guard::{self, ADD, CONCAT, COUNT, LOOK, MULTIPLY, PLAIN, WEIGH};
use super::meter::{Meter, invalid};
use super::text::Text;

const MAX_SOURCE: usize = 64 << 10;
const FUEL: u64 = 500_000;
const MAX_MESSAGE: usize = 250;
/// 64 KiB of the most nested source there is need between 8 and 16 MiB. Pages that are not touched cost nothing.
const STACK: usize = 64 << 20;

/// What is wrong with `source` as it stands: its length or its syntax.
pub(super) fn check(source: &str) -> Result<(), String> {
    run(source, |template| guard::guard(&template).map(drop))
}

/// The text that `source` makes of `variables`.
pub(super) fn render(source: &str, variables: Value) -> Result<String, String> {
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

fn run<T: Send>(source: &str, work: impl FnOnce(ast::Stmt<'_>) -> Result<T, Error> + Send) -> Result<T, String> {
    if source.len() > MAX_SOURCE {
        return Err(format!("it is {} bytes long; the limit is {MAX_SOURCE}", source.len()));
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
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("the template engine gave up on it".to_owned()),
            Err(error) => Err(format!("no thread to render it: {error}")),
        }
    })
}

/// One line: where, and what.
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
    // What the template itself says may have lines, and any length.
    let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
    let what =
        if what.chars().count() > MAX_MESSAGE { what.chars().take(MAX_MESSAGE).chain(['…']).collect() } else { what };
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
    add_tests(&mut env);

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
        meter.emit(written.len())?;
        out.write_str(written).map_err(Error::from)
    });
    env
}

/// What `guard.rs` puts in the place of operators.
fn add_operators(env: &mut Environment<'static>, meter: &Meter) {
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
        meter.spend(left.len() + right.len())?;
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
            meter.spend(text.len().saturating_mul(n))?;
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
    env.add_filter("capitalize", filters::capitalize);
    env.add_filter("count", filters::length);
    env.add_filter("d", filters::default);
    env.add_filter("default", filters::default);
    env.add_filter("dictsort", filters::dictsort);
    env.add_filter("first", filters::first);
    env.add_filter("float", filters::float);
    env.add_filter("int", filters::int);
    env.add_filter("items", filters::items);
    env.add_filter("last", filters::last);
    env.add_filter("length", filters::length);
    env.add_filter("lower", filters::lower);
    env.add_filter("max", filters::max);
    env.add_filter("min", filters::min);
    env.add_filter("reverse", filters::reverse);
    env.add_filter("round", filters::round);
    env.add_filter("safe", filters::safe);
    env.add_filter("sum", filters::sum);
    env.add_filter("title", filters::title);
    env.add_filter("trim", filters::trim);
    env.add_filter("upper", filters::upper);

    // These take the characters of a text one by one, each a value of its own.
    macro_rules! of_list {
        ($($name:literal: $filter:path),*) => {$(
            let account = meter.clone();
            env.add_filter($name, move |state: &State, value: Value, args: Rest<Value>| {
                account.spend(value.as_str().map_or(0, str::len).saturating_mul(size_of::<Value>()))?;
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
        account.spend(width.saturating_mul(text.matches('\n').count() + 1))?;
        let margin = " ".repeat(width);
        let mut lines = text.split('\n');
        let mut result = [if first { &margin } else { "" }, lines.next().unwrap_or("")].concat();
        for line in lines {
            result += "\n";
            result += if line.is_empty() { "" } else { &margin };
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
    let found = text.matches(old).take(count).count();
    meter.spend(text.len() + found.saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, found))
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

fn add_tests(env: &mut Environment<'static>) {
    env.add_test("boolean", tests::is_boolean);
    env.add_test("defined", tests::is_defined);
    env.add_test("divisibleby", tests::is_divisibleby);
    env.add_test("even", tests::is_even);
    env.add_test("false", tests::is_false);
    env.add_test("float", tests::is_float);
    env.add_test("integer", tests::is_integer);
    env.add_test("iterable", tests::is_iterable);
    env.add_test("lower", tests::is_lower);
    env.add_test("mapping", tests::is_mapping);
    env.add_test("none", tests::is_none);
    env.add_test("number", tests::is_number);
    env.add_test("odd", tests::is_odd);
    env.add_test("sequence", tests::is_sequence);
    env.add_test("string", tests::is_string);
    env.add_test("true", tests::is_true);
    env.add_test("undefined", tests::is_undefined);
    env.add_test("upper", tests::is_upper);
    for name in ["eq", "equalto", "=="] {
        env.add_test(name, tests::is_eq);
    }
    for name in ["ne", "!="] {
        env.add_test(name, tests::is_ne);
    }
    for name in ["lt", "lessthan", "<"] {
        env.add_test(name, tests::is_lt);
    }
    for name in ["le", "<="] {
        env.add_test(name, tests::is_le);
    }
    for name in ["gt", "greaterthan", ">"] {
        env.add_test(name, tests::is_gt);
    }
    for name in ["ge", ">="] {
        env.add_test(name, tests::is_ge);
    }
    env.add_test("in", tests::is_in);
}

/// Python's methods of str, dict and list; `value` and `args` are paid for.
fn method(meter: &Meter, state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "replace") => {
            let (old, new, count) = from_args(args)?;
            replace(meter, text, old, new, count).map(Value::from)
        }
        (Some(separator), "join") => {
            let (items,): (Value,) = from_args(args)?;
            join(meter, meter.list(&items)?.into_iter().map(Ok), separator)
        }
        (Some(text), "count") => {
            let (what,): (&str,) = from_args(args)?;
            Ok(Value::from(text.matches(what).count()))
        }
        (Some(text), "split") => {
            let (separator, _): (Option<&str>, Option<i64>) = from_args(args)?;
            let parts = match separator {
                Some("") => return Err(invalid("split needs a separator that is not empty")),
                Some(separator) => text.matches(separator).count() + 1,
                None => text.split_whitespace().count(),
            };
            meter.spend(parts.saturating_mul(size_of::<Value>()))?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        (Some(text), "splitlines") => {
            meter.spend(text.matches('\n').count().saturating_mul(size_of::<Value>()))?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        // Widths in a format string are lengths that nobody has paid for.
        (Some(_), "format") => Err(Error::from(ErrorKind::UnknownMethod)),
        (None, "count") => {
            meter.weigh(value)?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}
