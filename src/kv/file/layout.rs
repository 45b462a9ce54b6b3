//! Where each tensor of a file of keys and values lies. Every count, type, size and offset is checked once, against the
//! length of the file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::Range;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::*;
use crate::compute::kernels::PAGE;
use crate::error::excerpt;

/// The tensors of a file, with what its metadata says about them.
#[derive(Debug)]
pub(super) struct Layout {
    pub fingerprint: String,
    pub start: usize,
    pub computed: usize,
    /// The number of the first column.
    pub first: usize,
    pub columns: Vec<StoredColumn>,
    pub n_ids: usize,
    /// Ids, runs and the checksum, in the file.
    pub tail: Range<usize>,
    /// The value of `LAYOUT_KEY`.
    layout: String,
}

#[derive(Debug)]
pub(super) struct StoredColumn {
    pub parts: Vec<StoredPart>,
    pub checksum: u64,
}

/// A tensor of a column.
#[derive(Debug)]
pub(super) struct StoredPart {
    part: Part,
    dtype: Dtype,
    dims: Vec<usize>,
    /// In the file.
    pub range: Range<usize>,
}

impl StoredColumn {
    /// In the file.
    pub fn range(&self) -> Range<usize> {
        let end = self.parts.last().map_or(0, |part| part.range.end);
        self.parts.first().map_or(0, |part| part.range.start)..end
    }

    fn is_like(&self, other: &StoredColumn) -> bool {
        let kinds = |column: &StoredColumn| {
            let kinds = column.parts.iter().map(|part| (part.part, part.dtype, part.dims.clone()));
            kinds.collect::<Vec<_>>()
        };
        kinds(self) == kinds(other)
    }
}

impl fmt::Display for StoredColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts.first() {
            Some(part) => write!(f, "{:?} {:?}", part.dtype, part.dims),
            None => Ok(()),
        }
    }
}

impl Layout {
    /// `data` is the length of the header, `length` that of the file. Takes its own names out of `texts`. The error says
    /// what is wrong.
    pub fn new(
        tensors: &Metadata,
        data: usize,
        length: u64,
        texts: &mut BTreeMap<String, String>,
    ) -> Result<Self, String> {
        let promised = data.checked_add(tensors.data_len()).map(|end| end as u64);
        if promised != Some(length) {
            let promised = promised.map_or("too many".to_owned(), |end| end.to_string());
            return Err(format!("its header describes {promised} bytes, and the file has {length}"));
        }
        let mut text = |name: &str| texts.remove(name).ok_or_else(|| format!("its header has no `{name}`"));
        let (fingerprint, layout) = (text(FINGERPRINT_KEY)?, text(LAYOUT_KEY)?);
        let (start, computed) = (number(&text(START_KEY)?)?, number(&text(COMPUTED_KEY)?)?);
        let checksums = checksums(&text(CHECKSUMS_KEY)?)?;

        let mut tensors = tensors.tensors();
        let mut take = |name: &str| tensors.remove(name).ok_or_else(|| format!("it has no tensor `{name}`"));
        let (ids, runs, check) = (take("ids")?, take("runs")?, take("check")?);
        let n_ids = length_of("ids", ids, Dtype::U32, MAX_IDS)?;
        length_of("runs", runs, Dtype::U32, n_ids + 1)?;
        if length_of("check", check, Dtype::U8, size_of::<u64>())? != size_of::<u64>() {
            return Err("its checksum is too short".into());
        }

        let number_of = |name: &String| name.strip_prefix("k.")?.parse().ok();
        let numbers: BTreeSet<usize> = tensors.keys().filter_map(number_of).collect();
        let first = numbers.first().copied().unwrap_or(0);
        if numbers.len() != checksums.len() {
            return Err(format!("it has {} columns, and checksums of {}", numbers.len(), checksums.len()));
        }
        let mut columns: Vec<StoredColumn> = Vec::new();
        let mut offset = 0;
        for (&number, checksum) in numbers.iter().zip(checksums) {
            let column = StoredColumn { parts: take_parts(&mut tensors, number, data, &mut offset)?, checksum };
            if number != first + columns.len() {
                return Err(format!("it has no column {}", first + columns.len()));
            }
            if columns.first().is_some_and(|first| !column.is_like(first)) {
                return Err(format!("column {number} has another shape than column {first}"));
            }
            columns.push(column);
        }
        if let Some(name) = tensors.keys().next() {
            return Err(format!("it has a tensor `{}`", excerpt(name)));
        }
        let ends = [ids, runs, check].map(|tensor| {
            let begins = tensor.data_offsets.0 == offset;
            offset = tensor.data_offsets.1;
            begins
        });
        if ends != [true; 3] {
            return Err("its ids do not follow its columns".into());
        }
        if let Some(last) = columns.len().checked_sub(1) {
            // Their numbers are of any size.
            let end = (first + last).checked_mul(PAGE).filter(|&last| last < computed && computed - last <= PAGE);
            if end.is_none() || first.checked_mul(PAGE).is_none_or(|first| first < start) {
                return Err(format!("columns {first} to {} do not end at position {computed}", first + last));
            }
        }
        let tail = data + ids.data_offsets.0..data + check.data_offsets.1;
        Ok(Layout { fingerprint, start, computed, first, columns, n_ids, tail, layout })
    }

    /// Whether a column has this shape.
    pub fn fits(&self, column: &StoredColumn, shape: &KvShape) -> bool {
        let parts = shape.parts();
        self.layout == layout_name(shape)
            && column.parts.len() == parts.len()
            && column.parts.iter().zip(parts).all(|(stored, &part)| {
                stored.part == part
                    && format!("{:?}", stored.dtype) == shape.element(part).0
                    && stored.dims == shape.dims(part)
                    && stored.range.len() == shape.n_layers * shape.layer_bytes(part)
            })
    }
}

/// The tensors of a column, which follow each other from `offset` on.
fn take_parts(
    tensors: &mut HashMap<String, &TensorInfo>,
    number: usize,
    data: usize,
    offset: &mut usize,
) -> Result<Vec<StoredPart>, String> {
    let mut parts = Vec::new();
    for part in [Part::Keys, Part::KeyScales, Part::Values, Part::ValueScales] {
        let name = tensor_name(part, number);
        let Some(tensor) = tensors.remove(&name) else {
            if part.is_of_scales() {
                continue;
            }
            return Err(format!("it has no tensor `{name}`"));
        };
        let (from, to) = tensor.data_offsets;
        if from != *offset || !(data + from).is_multiple_of(ALIGNMENT) {
            return Err(format!("tensor `{name}` is at {from}, not at {offset}"));
        }
        if tensor.shape.len() != 4 || to == from {
            return Err(format!("tensor `{name}` is {:?} {:?}", tensor.dtype, cut(&tensor.shape)));
        }
        *offset = to;
        let range = data + from..data + to;
        parts.push(StoredPart { part, dtype: tensor.dtype, dims: tensor.shape.clone(), range });
    }
    Ok(parts)
}

fn length_of(name: &str, tensor: &TensorInfo, dtype: Dtype, most: usize) -> Result<usize, String> {
    match tensor.shape[..] {
        [length] if tensor.dtype == dtype && length <= most => Ok(length),
        _ => Err(format!("tensor `{name}` is {:?} {:?}", tensor.dtype, cut(&tensor.shape))),
    }
}

/// The first dimensions: a hostile shape has any number of them.
fn cut(shape: &[usize]) -> &[usize] {
    &shape[..shape.len().min(4)]
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("its header has \"{}\" where a number goes", excerpt(text)))
}

fn checksums(text: &str) -> Result<Vec<u64>, String> {
    let (digits, rest) = text.as_bytes().as_chunks::<16>();
    let parsed = digits.iter().map(|digits| u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
    match parsed.collect() {
        Some(checksums) if rest.is_empty() => Ok(checksums),
        _ => Err("its checksums are not hexadecimal numbers".into()),
    }
}
