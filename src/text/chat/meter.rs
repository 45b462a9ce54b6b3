//! The cost of a template: every operation pays, before it starts, for the texts and lists that it touches.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::marks;

/// Bytes of text emitted, captured text included. So it limits the prompt too: 128 k tokens of English are half a MiB.
pub(super) const MAX_OUTPUT: usize = 8 << 20;
/// Bytes touched. A sensible template touches each message a few times.
const MAX_WORK: usize = 32 << 20;
/// The cost of one element of a list or map, in bytes of text that are copied in the same time.
pub(super) const ELEMENT: usize = 256;
/// Lists in lists, deeper than any conversation and far from the end of the stack.
pub(super) const MAX_DEPTH: usize = 32;

/// One rendering's account. A clone is the same account.
#[derive(Clone, Default)]
pub(super) struct Meter(Arc<Spent>);

#[derive(Default)]
struct Spent {
    work: AtomicUsize,
    output: AtomicUsize,
}

pub(super) fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

impl Meter {
    pub fn spend(&self, bytes: usize) -> Result<(), Error> {
        let before = self.0.work.fetch_add(bytes.min(MAX_WORK), Ordering::Relaxed);
        if before + bytes.min(MAX_WORK) >= MAX_WORK {
            return Err(invalid(format!("the template works on more than {} MiB of text", MAX_WORK >> 20)));
        }
        Ok(())
    }

    /// Pays for a text, by its length without marks.
    pub fn text(&self, text: &str) -> Result<(), Error> {
        self.spend(marks::plain_len(text))
    }

    pub fn emit(&self, text: &str) -> Result<(), Error> {
        let bytes = marks::plain_len(text);
        if self.0.output.fetch_add(bytes, Ordering::Relaxed) + bytes > MAX_OUTPUT {
            return Err(invalid(format!("the template writes more than {} MiB", MAX_OUTPUT >> 20)));
        }
        Ok(())
    }

    /// Pays for everything in `value`: for operations that look at all of it.
    pub fn weigh(&self, value: &Value) -> Result<(), Error> {
        self.weigh_at(value, 0)
    }

    fn weigh_at(&self, value: &Value, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| {
                self.spend(ELEMENT)?;
                self.weigh_at(&item, depth + 1)
            }),
            ValueKind::Map => value.try_iter()?.try_for_each(|key| {
                self.spend(ELEMENT)?;
                self.weigh_at(&key, depth + 1)?;
                self.weigh_at(&value.get_item(&key)?, depth + 1)
            }),
            _ => self.spend(1),
        }
    }

    /// Pays for the elements of `value` alone, and makes a list of a lazy value.
    pub fn count(&self, value: Value) -> Result<Value, Error> {
        match value.kind() {
            ValueKind::String => self.weigh(&value).map(|()| value),
            ValueKind::Iterable => self.list(&value).map(Value::from),
            _ => self.spend(ELEMENT * value.len().unwrap_or(1)).map(|()| value),
        }
    }

    /// [`Meter::count`] for operations whose time does not depend on the length of a list.
    pub fn look(&self, value: Value) -> Result<Value, Error> {
        match value.kind() {
            ValueKind::Seq | ValueKind::Map => Ok(value),
            _ => self.count(value),
        }
    }

    pub fn list(&self, value: &Value) -> Result<Vec<Value>, Error> {
        let paid = value.try_iter()?.map(|item| self.spend(ELEMENT).map(|()| item));
        paid.collect()
    }

    /// A copy of plain data. Only that may outlive a step of a loop: dropping a chain of objects that refer to one another
    /// would overflow the stack.
    pub fn plain(&self, value: &Value) -> Result<Value, Error> {
        self.plain_at(value, 0)
    }

    fn plain_at(&self, value: &Value, depth: usize) -> Result<Value, Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let items = self.list(value)?;
                items.iter().map(|item| self.plain_at(item, depth + 1)).collect::<Result<Vec<_>, _>>().map(Value::from)
            }
            ValueKind::Map => {
                let keys = self.list(value)?;
                let pair = |key: Value| Ok((key.clone(), self.plain_at(&value.get_item(&key)?, depth + 1)?));
                keys.into_iter().map(pair).collect::<Result<Vec<_>, Error>>().map(Value::from_iter)
            }
            ValueKind::Plain | ValueKind::Invalid => Err(invalid("a namespace holds plain data only")),
            _ => Ok(value.clone()),
        }
    }
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid(format!("lists are nested more than {MAX_DEPTH} deep")));
    }
    Ok(())
}
