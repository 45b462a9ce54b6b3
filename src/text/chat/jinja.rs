//! The template engine: minijinja, set up as Hugging Face sets up Jinja2, with bounds on everything a template can use.
//!
//! A template comes from a file that cannot be trusted. It reaches only its variables. Fuel bounds its steps, the meter
//! bounds the work of each step (`guard.rs` makes every step pay), and `MAX_SOURCE` bounds its length. The parser and
//! the drop of a parsed template recurse as deep as the source is nested, so both run on a stack of their own.
//!
//! The texts of messages are marked (`marks.rs`). Operators and tests that look at the characters of a text are replaced
//! here by ones that read marked text, filters in `filters.rs` and methods in `methods.rs`. The others are minijinja's
//! and keep the marks: sorting then compares marked texts by code points, without folding case.

use minijinja::machinery::{CodeGenerator, Vm, WhitespaceConfig, ast, make_string_output, parse};
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, functions, tests};

use super::clock;
use super::filters::add_filters;
use super::guard::{self, ADD, CONCAT, COUNT, LOOK, MULTIPLY, PLAIN, READ, WEIGH};
use super::marks;
use super::meter::{Meter, invalid};
use super::methods::method;
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
