//! The keys of a file: typed values in file order, and getters whose errors name the value they found.
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::Bytes;
use crate::error::{Error, Result};

/// The keys of one file, in file order.
#[derive(Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// One value. A string is bytes, because a token may be half a character or end in NUL.
#[derive(Debug, Clone)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(Vec<u8>),
    Array(Array),
}

/// The type of a value or of an array's elements.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum ElementType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
    Bool,
    String,
}

impl ElementType {
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => ElementType::U8,
            1 => ElementType::I8,
            2 => ElementType::U16,
            3 => ElementType::I16,
            4 => ElementType::U32,
            5 => ElementType::I32,
            6 => ElementType::F32,
            7 => ElementType::Bool,
            8 => ElementType::String,
            10 => ElementType::U64,
            11 => ElementType::I64,
            12 => ElementType::F64,
            _ => return None,
        })
    }

    /// Bytes of one element; a string has no fixed size.
    pub(super) fn size(self) -> Option<usize> {
        match self {
            ElementType::U8 | ElementType::I8 | ElementType::Bool => Some(1),
            ElementType::U16 | ElementType::I16 => Some(2),
            ElementType::U32 | ElementType::I32 | ElementType::F32 => Some(4),
            ElementType::U64 | ElementType::I64 | ElementType::F64 => Some(8),
            ElementType::String => None,
        }
    }

    /// The value of `bytes`, little-endian. None: their number is not [`ElementType::size`], or a bool is not 0 or 1.
    pub(super) fn decode(self, bytes: &[u8]) -> Option<Value> {
        Some(match self {
            ElementType::U8 => Value::U8(u8::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::I8 => Value::I8(i8::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::U16 => Value::U16(u16::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::I16 => Value::I16(i16::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::U32 => Value::U32(u32::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::I32 => Value::I32(i32::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::U64 => Value::U64(u64::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::I64 => Value::I64(i64::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::F32 => Value::F32(f32::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::F64 => Value::F64(f64::from_le_bytes(bytes.try_into().ok()?)),
            ElementType::Bool => match bytes {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return None,
            },
            ElementType::String => Value::String(bytes.to_vec()),
        })
    }
}

impl fmt::Display for ElementType {
    /// The names of the GGUF specification's tools: "u32", "str".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ElementType::U8 => "u8",
            ElementType::I8 => "i8",
            ElementType::U16 => "u16",
            ElementType::I16 => "i16",
            ElementType::U32 => "u32",
            ElementType::I32 => "i32",
            ElementType::U64 => "u64",
            ElementType::I64 => "i64",
            ElementType::F32 => "f32",
            ElementType::F64 => "f64",
            ElementType::Bool => "bool",
            ElementType::String => "str",
        })
    }
}

/// An array, packed as in the file: a vocabulary of 200 000 tokens costs 4 bytes a token.
#[derive(Debug, Clone)]
pub struct Array {
    pub(super) element: ElementType,
    pub(super) len: usize,
    pub(super) data: Bytes,
    /// Of strings only: the start of each text in `data`, and one more for a next one. The lengths in the file are read
    /// once, at opening.
    pub(super) starts: Vec<u32>,
}

/// The eight bytes of length before every string.
pub(super) const STRING_PREFIX: usize = 8;

impl Array {
    pub fn element(&self) -> ElementType {
        self.element
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element `i`, or None past the end.
    pub fn get(&self, i: usize) -> Option<Value> {
        self.element.decode(self.bytes_of(i)?)
    }

    pub fn iter(&self) -> impl Iterator<Item = Value> {
        (0..self.len).map_while(|i| self.get(i))
    }

    fn bytes_of(&self, i: usize) -> Option<&[u8]> {
        match self.element.size() {
            Some(size) => self.data.get(i.checked_mul(size)?..i.checked_add(1)?.checked_mul(size)?),
            None => {
                let (start, next) = (*self.starts.get(i)?, *self.starts.get(i + 1)?);
                self.data.get(start as usize..next as usize - STRING_PREFIX)
            }
        }
    }
}

/// An array of strings, as bytes.
#[derive(Debug, Clone, Copy)]
pub struct Strings<'a>(&'a Array);

impl<'a> Strings<'a> {
    pub fn len(&self) -> usize {
        self.0.len
    }

    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    pub fn get(&self, i: usize) -> Option<&'a [u8]> {
        self.0.bytes_of(i)
    }

    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let array = self.0;
        (0..array.len).map_while(|i| array.bytes_of(i))
    }
}

impl Value {
    /// An integer of any width.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// A float of either width, or an integer: some converters write a rope base of 10000 as one.
    fn float(&self) -> Option<f32> {
        match *self {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => self.integer().map(|v| v as f32),
        }
    }
}

impl fmt::Display for Value {
    /// The value for an error message: `u32 7`, `str "phi3"`, `arr[f32, 32064]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(v) => write!(f, "u8 {v}"),
            Value::I8(v) => write!(f, "i8 {v}"),
            Value::U16(v) => write!(f, "u16 {v}"),
            Value::I16(v) => write!(f, "i16 {v}"),
            Value::U32(v) => write!(f, "u32 {v}"),
            Value::I32(v) => write!(f, "i32 {v}"),
            Value::U64(v) => write!(f, "u64 {v}"),
            Value::I64(v) => write!(f, "i64 {v}"),
            Value::F32(v) => write!(f, "f32 {v}"),
            Value::F64(v) => write!(f, "f64 {v}"),
            Value::Bool(v) => write!(f, "bool {v}"),
            Value::String(v) => match str::from_utf8(v) {
                Ok(text) if v.len() <= 64 => write!(f, "str {text:?}"),
                Ok(_) => write!(f, "str of {} bytes", v.len()),
                Err(_) => write!(f, "str of {} bytes that is not UTF-8", v.len()),
            },
            Value::Array(v) => write!(f, "arr[{}, {}]", v.element, v.len),
        }
    }
}

/// A getter returns `Ok(None)` when the key is absent, and `InvalidModel` with the value found when it has another type
/// or is out of range.
impl Metadata {
    pub(super) fn new(path: &Path) -> Self {
        Metadata { path: path.to_owned(), entries: Vec::new(), index: HashMap::new() }
    }

    /// False for a duplicate key.
    pub(super) fn insert(&mut self, key: String, value: Value) -> bool {
        let fresh = self.index.insert(key.clone(), self.entries.len()).is_none();
        self.entries.push((key, value));
        fresh
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// An integer of any width that fits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer from 0 to 4294967295", |value| value.integer()?.try_into().ok())
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a number", Value::float)
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(v) => Some(*v),
            _ => None,
        })
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a str of UTF-8", |value| match value {
            Value::String(v) => str::from_utf8(v).ok(),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>> {
        self.typed(key, "an array of str", |value| match value {
            Value::Array(v) if v.element == ElementType::String => Some(Strings(v)),
            _ => None,
        })
    }

    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of f32", |value| match value {
            Value::Array(v) => v.iter().map(|v| v.float()).collect(),
            _ => None,
        })
    }

    /// An array of integers of any width, if every one fits.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.typed(key, "an array of integers that fit i32", |value| match value {
            Value::Array(v) => v.iter().map(|v| v.integer()?.try_into().ok()).collect(),
            _ => None,
        })
    }

    fn typed<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            Error::InvalidModel(format!("{}: key `{key}` is {value}; it must be {wanted}", self.path.display()))
        })
    }
}
