//! Reads and checks everything before the tensors' bytes.
//!
//! Decisions: docs/design/files.md

use std::collections::HashSet;
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::metadata::{Array, ElementType, Metadata, STRING_PREFIX, Value};
use super::tensor::{Bytes, GgmlType, Tensor};
use crate::error::{Error, Result, excerpt, human_size};

// Far above any real file, and low enough that no header can make the reader use more than a few times its own size.
const MAX_HEADER: usize = 256 << 20;
const MAX_STRING: usize = 16 << 20;
const MAX_ARRAY: usize = 64 << 20;
const MAX_KEYS: usize = 1 << 16;
const MAX_TENSORS: usize = 1 << 16;
const MAX_KEY: usize = (1 << 16) - 1; // the specification's limit
const MAX_NAME: usize = 64; // the specification's limit

const MIN_KEY_BYTES: usize = 8 + 1 + 4 + 1; // length, one letter, type, one byte of value
const MIN_TENSOR_BYTES: usize = 8 + 1 + 4 + 8 + 4 + 8; // length, one letter, number of dims, one dim, type, offset

const ARRAY: u32 = 9;

/// `map` holds a whole file that starts with "GGUF".
pub(super) fn read(path: &Path, map: &Arc<Mmap>) -> Result<(Metadata, Vec<Tensor>)> {
    let mut cursor = Cursor { path, map, at: 4 };
    check_version(path, cursor.u32(&"the version")?)?;
    let n_tensors = cursor.count("tensors", MAX_TENSORS)?;
    let n_keys = cursor.count("keys", MAX_KEYS)?;
    cursor.check_room(n_keys, MIN_KEY_BYTES, &"keys")?;

    let mut metadata = Metadata::new(path);
    for i in 0..n_keys {
        let at = cursor.at;
        let key = cursor.name(MAX_KEY, &format_args!("the name of key {i}"))?;
        let value = cursor.value(&key)?;
        if !metadata.insert(key.clone(), value) {
            return Err(cursor.error(format!("duplicate key `{}` at byte {at}", excerpt(&key))));
        }
    }
    let tensors = read_tensors(&mut cursor, n_tensors, &metadata)?;
    Ok((metadata, tensors))
}

fn check_version(path: &Path, version: u32) -> Result<()> {
    let path = path.display();
    match version {
        2 | 3 => Ok(()),
        0 => Err(Error::InvalidModel(format!("{path}: GGUF version 0 at 4; versions 2 and 3 are supported"))),
        _ if version.swap_bytes() < 1 << 16 => Err(Error::UnsupportedModel(format!(
            "{path}: a big-endian GGUF file (version {} at 4); only little-endian files are supported",
            version.swap_bytes()
        ))),
        _ => Err(Error::UnsupportedModel(format!(
            "{path}: GGUF version {version} at 4; versions 2 and 3 are supported, so convert the model again"
        ))),
    }
}

/// One row of the tensor table.
struct Entry {
    name: String,
    dtype: GgmlType,
    shape: Vec<usize>,
    /// None: the size of the type is unknown.
    size: Option<u64>,
    /// From the start of the tensors' bytes.
    offset: u64,
}

fn read_tensors(cursor: &mut Cursor<'_>, n_tensors: usize, metadata: &Metadata) -> Result<Vec<Tensor>> {
    cursor.check_room(n_tensors, MIN_TENSOR_BYTES, &"tensors")?;
    let mut names = HashSet::with_capacity(n_tensors);
    let mut entries = Vec::with_capacity(n_tensors);
    for i in 0..n_tensors {
        let at = cursor.at;
        let entry = cursor.entry(i)?;
        if !names.insert(entry.name.clone()) {
            return Err(cursor.error(format!("duplicate {} at byte {at}", entry.label())));
        }
        entries.push(entry);
    }

    let alignment = match metadata.u32("general.alignment")?.unwrap_or(32) as usize {
        alignment if alignment.is_power_of_two() && (8..=64 << 10).contains(&alignment) => alignment,
        other => {
            return Err(
                cursor.error(format!("key `general.alignment` is {other}; it must be a power of two from 8 to 65536"))
            );
        }
    };
    let start = cursor.at.next_multiple_of(alignment) as u64;
    check_layout(cursor, &entries, start, alignment as u64)?;

    Ok(entries
        .into_iter()
        .map(|Entry { name, dtype, shape, size, offset }| {
            let at = (start + offset) as usize;
            let data = Bytes::new(cursor.map, at..at + size.unwrap_or(0) as usize);
            Tensor { name, dtype, shape, data }
        })
        .collect())
}

/// Checks that every tensor is at an aligned offset and inside the file, and that no two overlap.
fn check_layout(cursor: &Cursor<'_>, entries: &[Entry], start: u64, alignment: u64) -> Result<()> {
    let length = cursor.map.len() as u64;
    let mut ranges = Vec::with_capacity(entries.len());
    for entry in entries {
        let (label, offset) = (entry.label(), entry.offset);
        if !offset.is_multiple_of(alignment) {
            return Err(cursor
                .error(format!("{label} has offset {offset}, which is not a multiple of the alignment {alignment}")));
        }
        // An unknown type takes a byte at least.
        let end = start.checked_add(offset).and_then(|at| at.checked_add(entry.size.unwrap_or(1)));
        match end {
            Some(end) => ranges.push((start + offset..end, entry)),
            None => return Err(cursor.error(format!("{label} has offset {offset}, which overflows"))),
        }
    }
    let needed = ranges.iter().map(|(range, _)| range.end).max().unwrap_or(0);
    if let Some((range, entry)) = ranges.iter().find(|(range, _)| range.end > length) {
        return Err(cursor.error(format!(
            "{} needs {} bytes at {}; the file ends at {length} ({} short: is the download incomplete?)",
            entry.label(),
            range.end - range.start,
            range.start,
            human_size(needed - length)
        )));
    }
    ranges.sort_by_key(|(range, _)| range.start);
    for pair in ranges.windows(2) {
        let [(one, first), (two, second)] = pair else { continue };
        if one.end > two.start {
            return Err(cursor.error(format!(
                "{} (at {}) overlaps {} (ends at {})",
                second.label(),
                two.start,
                first.label(),
                one.end
            )));
        }
    }
    Ok(())
}

impl Entry {
    fn label(&self) -> String {
        format!("tensor `{}`", excerpt(&self.name))
    }
}

/// A position in the header. Reads stop at the end of the file and at `MAX_HEADER`.
struct Cursor<'a> {
    path: &'a Path,
    map: &'a Arc<Mmap>,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, what: impl Display) -> Error {
        Error::InvalidModel(format!("{}: {what}", self.path.display()))
    }

    fn remaining(&self) -> usize {
        self.map.len() - self.at
    }

    fn take(&mut self, n: usize, what: &dyn Display) -> Result<&'a [u8]> {
        if n > self.remaining() {
            return Err(self.error(format!(
                "{what} needs {n} bytes at {}; the file ends at {} (is the download incomplete?)",
                self.at,
                self.map.len()
            )));
        }
        if self.at + n > MAX_HEADER {
            return Err(self.error(format!("{what} at {} makes the header larger than 256 MiB", self.at)));
        }
        let bytes = &self.map[self.at..self.at + n];
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &dyn Display) -> Result<[u8; N]> {
        let mut word = [0; N];
        word.copy_from_slice(self.take(N, what)?);
        Ok(word)
    }

    fn u32(&mut self, what: &dyn Display) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &dyn Display) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// The number of keys or tensors that the file declares.
    fn count(&mut self, what: &str, limit: usize) -> Result<usize> {
        let at = self.at;
        let count = self.u64(&format_args!("the number of {what}"))?;
        if count > limit as u64 {
            return Err(self.error(format!("{count} {what} declared at {at}; the limit is {limit}")));
        }
        Ok(count as usize)
    }

    /// Checks that `count` items of at least `size` bytes can follow, before anything is allocated for them.
    fn check_room(&self, count: usize, size: usize, what: &dyn Display) -> Result<()> {
        match count.checked_mul(size) {
            Some(bytes) if bytes <= self.remaining() => Ok(()),
            _ => Err(self.error(format!(
                "{count} {what} declared, at least {size} bytes each, but only {} bytes follow at {} (is the download \
                 incomplete?)",
                self.remaining(),
                self.at
            ))),
        }
    }

    fn string(&mut self, limit: usize, what: &dyn Display) -> Result<&'a [u8]> {
        let at = self.at;
        let length = self.u64(&format_args!("the length of {what}"))?;
        if length > limit as u64 {
            return Err(self.error(format!("{what} at {at} is {length} bytes long; the limit is {limit}")));
        }
        self.take(length as usize, what)
    }

    /// The name of a key or a tensor.
    fn name(&mut self, limit: usize, what: &dyn Display) -> Result<String> {
        let at = self.at;
        let bytes = self.string(limit, what)?;
        match str::from_utf8(bytes) {
            Ok("") => Err(self.error(format!("{what} at {at} is empty"))),
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(self.error(format!("{what} at {at} is not UTF-8"))),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let what = format!("key `{}`", excerpt(key));
        let at = self.at;
        let id = self.u32(&format_args!("the type of {what}"))?;
        if id == ARRAY {
            return self.array_value(&what).map(Value::Array);
        }
        let Some(element) = ElementType::from_id(id) else {
            return Err(self.error(format!("{what} has value type {id} at {at}; expected 0 to 12")));
        };
        let at = self.at;
        let bytes = match element.size() {
            Some(size) => self.take(size, &what)?,
            None => self.string(MAX_STRING, &what)?,
        };
        element
            .decode(bytes)
            .ok_or_else(|| self.error(format!("{what} is a bool of byte {bytes:?} at {at}; expected 0 or 1")))
    }

    fn array_value(&mut self, what: &str) -> Result<Array> {
        let at = self.at;
        let id = self.u32(&format_args!("the element type of {what}"))?;
        if id == ARRAY {
            return Err(Error::UnsupportedModel(format!(
                "{}: {what} is an array of arrays at {at}; nested arrays are not supported",
                self.path.display()
            )));
        }
        let Some(element) = ElementType::from_id(id) else {
            return Err(self.error(format!("{what} has elements of type {id} at {at}; expected 0 to 12")));
        };
        let at = self.at;
        let len = self.u64(&format_args!("the number of elements of {what}"))?;
        if len > MAX_ARRAY as u64 {
            return Err(self.error(format!("{what} has {len} elements (byte {at}); the limit is {MAX_ARRAY}")));
        }
        let len = len as usize;
        self.check_room(len, element.size().unwrap_or(STRING_PREFIX), &format_args!("elements of {what}"))?;
        let start = self.at;
        let mut starts = Vec::new();
        match element.size() {
            Some(size) => {
                let bytes = self.take(len * size, &what)?;
                if element == ElementType::Bool
                    && let Some(i) = bytes.iter().position(|&b| b > 1)
                {
                    return Err(
                        self.error(format!("element {i} of {what} is a bool of byte {}; expected 0 or 1", bytes[i]))
                    );
                }
            }
            None => {
                starts.reserve_exact(len + 1);
                for i in 0..len {
                    starts.push((self.at - start + STRING_PREFIX) as u32); // a header is 256 MiB at most
                    self.string(MAX_STRING, &format_args!("element {i} of {what}"))?;
                }
                starts.push((self.at - start + STRING_PREFIX) as u32);
            }
        }
        Ok(Array { element, len, data: Bytes::new(self.map, start..self.at), starts })
    }

    /// Row `i` of the tensor table.
    fn entry(&mut self, i: usize) -> Result<Entry> {
        let name = self.name(MAX_NAME, &format_args!("the name of tensor {i}"))?;
        let what = format!("tensor `{}`", excerpt(&name));
        let at = self.at;
        let n_dims = self.u32(&format_args!("the number of dimensions of {what}"))?;
        if !(1..=4).contains(&n_dims) {
            return Err(self.error(format!("{what} has {n_dims} dimensions (byte {at}); expected 1 to 4")));
        }
        let mut dims = Vec::with_capacity(4);
        for _ in 0..n_dims {
            dims.push(self.u64(&format_args!("the dimensions of {what}"))?);
        }
        let id = self.u32(&format_args!("the type of {what}"))?;
        let offset = self.u64(&format_args!("the offset of {what}"))?;
        let dtype = GgmlType::from_id(id);

        let elements = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let elements = match elements.filter(|&n| n <= isize::MAX as u64) {
            Some(0) => return Err(self.error(format!("{what} has a dimension of 0: {dims:?}, at {at}"))),
            Some(n) => n,
            None => {
                return Err(
                    self.error(format!("{what} has dimensions {dims:?} at {at}, whose number of elements overflows"))
                );
            }
        };
        let size = match dtype.block() {
            None => None,
            Some((block, bytes)) => {
                if !dims[0].is_multiple_of(block as u64) {
                    return Err(self.error(format!(
                        "{what} has rows of {} elements, which is not a multiple of {block}, the block size of its type {}",
                        dims[0],
                        dtype.name()
                    )));
                }
                match (elements / block as u64).checked_mul(bytes as u64) {
                    Some(size) => Some(size),
                    None => {
                        return Err(self.error(format!(
                            "{what} has dimensions {dims:?} at {at}, whose number of bytes overflows"
                        )));
                    }
                }
            }
        };
        let shape = dims.iter().rev().map(|&dim| dim as usize).collect();
        Ok(Entry { name, dtype, shape, size, offset })
    }
}
