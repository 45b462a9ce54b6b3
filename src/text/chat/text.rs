//! Values as text, as Python's `str`, `repr` and `json.dumps` write them, which chat templates were made with.
use minijinja::Error;
use minijinja::value::{Value, ValueKind};

use super::marks;
use super::meter::{ELEMENT, MAX_DEPTH, Meter, invalid};

/// A text that grows, and pays as it does.
pub(super) struct Text<'a> {
    meter: &'a Meter,
    pub text: String,
}

impl<'a> Text<'a> {
    pub fn new(meter: &'a Meter) -> Self {
        Text { meter, text: String::new() }
    }

    pub fn push(&mut self, text: &str) -> Result<(), Error> {
        self.meter.text(text)?;
        self.text.push_str(text);
        Ok(())
    }

    /// `str(value)`. An undefined value adds nothing.
    pub fn str(&mut self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.push(text),
            None => self.repr(value, 0),
        }
    }

    fn repr(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            _ if depth > MAX_DEPTH => Err(invalid(format!("lists are nested more than {MAX_DEPTH} deep"))),
            ValueKind::Undefined => Ok(()),
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::String => self.quoted(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                for (i, item) in value.try_iter()?.enumerate() {
                    self.meter.spend(ELEMENT)?;
                    self.push(if i > 0 { ", " } else { "" })?;
                    self.repr(&item, depth + 1)?;
                }
                self.push("]")
            }
            ValueKind::Map => {
                self.push("{")?;
                for (i, key) in value.try_iter()?.enumerate() {
                    self.meter.spend(ELEMENT)?;
                    self.push(if i > 0 { ", " } else { "" })?;
                    self.repr(&key, depth + 1)?;
                    self.push(": ")?;
                    self.repr(&value.get_item(&key)?, depth + 1)?;
                }
                self.push("}")
            }
            ValueKind::Number => self.push(&value.to_string()),
            kind => Err(invalid(format!("a {kind} cannot be converted to text"))),
        }
    }

    fn quoted(&mut self, text: &str) -> Result<(), Error> {
        let has = |quote: char| text.chars().any(|c| marks::plain(c) == quote);
        let quote = if has('\'') && !has('"') { "\"" } else { "'" };
        self.push(quote)?;
        self.push(&marks::map(text, |run| {
            let escaped = run.chars().map(|c| match c {
                '\n' => "\\n".to_owned(),
                '\r' => "\\r".to_owned(),
                '\t' => "\\t".to_owned(),
                '\\' => "\\\\".to_owned(),
                '\'' if quote == "'" => "\\'".to_owned(),
                c if c.is_control() => format!("\\x{:02x}", c as u32),
                c => c.to_string(),
            });
            escaped.collect()
        }))?;
        self.push(quote)
    }

    fn json_string(&mut self, text: &str) -> Result<(), Error> {
        self.push("\"")?;
        self.push(&marks::map(text, |run| {
            let quoted = serde_json::Value::from(run).to_string();
            quoted[1..quoted.len() - 1].to_owned()
        }))?;
        self.push("\"")
    }

    /// `json.dumps(value, ensure_ascii=False, indent=indent)`, as Hugging Face's `tojson`: nothing is escaped for HTML.
    pub fn json(&mut self, value: &Value, indent: Option<usize>, depth: usize) -> Result<(), Error> {
        match value.kind() {
            _ if depth > MAX_DEPTH => Err(invalid(format!("lists are nested more than {MAX_DEPTH} deep"))),
            ValueKind::Undefined => Err(invalid("an undefined value cannot be converted to JSON")),
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::String => self.json_string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = self.meter.list(value)?;
                self.json_items(("[", "]"), items, indent, depth, |text, item| text.json(item, indent, depth + 1))
            }
            ValueKind::Map => {
                let keys = self.meter.list(value)?;
                self.json_items(("{", "}"), keys, indent, depth, |text, key| {
                    match key.kind() {
                        ValueKind::String => text.json(key, None, depth)?,
                        _ => {
                            text.push("\"")?;
                            text.json(key, None, depth)?;
                            text.push("\"")?;
                        }
                    }
                    text.push(": ")?;
                    text.json(&value.get_item(key)?, indent, depth + 1)
                })
            }
            ValueKind::Number => self.push(&value.to_string()),
            kind => Err(invalid(format!("a {kind} cannot be converted to JSON"))),
        }
    }

    fn json_items(
        &mut self,
        (open, close): (&str, &str),
        items: Vec<Value>,
        indent: Option<usize>,
        depth: usize,
        write: impl Fn(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth: usize| indent.map(|indent| format!("\n{}", " ".repeat(indent * depth)));
        self.push(open)?;
        for (i, item) in items.iter().enumerate() {
            match line(depth + 1) {
                None => self.push(if i > 0 { ", " } else { "" })?,
                Some(line) => {
                    self.push(if i > 0 { "," } else { "" })?;
                    self.push(&line)?;
                }
            }
            write(self, item)?;
        }
        match line(depth) {
            Some(line) if !items.is_empty() => self.push(&line)?,
            _ => {}
        }
        self.push(close)
    }
}
