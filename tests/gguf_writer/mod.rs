//! Writes GGUF files for the tests, invalid ones too: every field can have another value than the right one.
#![allow(dead_code)] // each test binary uses its own part of it

pub mod model;

use std::fs;
use std::path::{Path, PathBuf};

pub const U8: u32 = 0;
pub const I8: u32 = 1;
pub const U16: u32 = 2;
pub const I16: u32 = 3;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U64: u32 = 10;
pub const I64: u32 = 11;
pub const F64: u32 = 12;

#[derive(Clone)]
pub struct Writer {
    pub magic: Vec<u8>,
    pub version: u32,
    /// What the header says, where it is to lie.
    pub n_tensors: Option<u64>,
    pub n_keys: Option<u64>,
    pub alignment: usize,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Row>,
    data: Vec<u8>,
}

/// One row of the tensor table as it is written.
#[derive(Clone)]
pub struct Row {
    pub name: Vec<u8>,
    pub n_dims: u32,
    pub dims: Vec<u64>,
    pub dtype: u32,
    pub offset: u64,
}

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// Element type, length, elements: what follows the type of a key that is an array.
pub fn array(element: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &len.to_le_bytes(), elements].concat()
}

pub fn strings<T: AsRef<[u8]>>(texts: &[T]) -> Vec<u8> {
    array(STRING, texts.len() as u64, &texts.iter().flat_map(string).collect::<Vec<_>>())
}

impl Writer {
    pub fn new() -> Self {
        let (keys, tensors, data) = (Vec::new(), Vec::new(), Vec::new());
        Writer { magic: b"GGUF".into(), version: 3, n_tensors: None, n_keys: None, alignment: 32, keys, tensors, data }
    }

    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Everything between two keys, verbatim.
    pub fn raw_key(mut self, bytes: &[u8]) -> Self {
        self.keys.push(bytes.to_vec());
        self
    }

    pub fn key(self, key: impl AsRef<[u8]>, kind: u32, value: impl AsRef<[u8]>) -> Self {
        self.raw_key(&[&string(key)[..], &kind.to_le_bytes(), value.as_ref()].concat())
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.key(key, U32, value.to_le_bytes())
    }

    pub fn str(self, key: &str, value: &str) -> Self {
        self.key(key, STRING, string(value))
    }

    /// A tensor whose bytes follow those of the last one; `dims` in the file's order, the row first.
    pub fn tensor(mut self, name: &str, dims: &[u64], dtype: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        let (name, n_dims) = (name.into(), dims.len() as u32);
        self.row(Row { name, n_dims, dims: dims.into(), dtype, offset })
    }

    /// A row that brings no bytes.
    pub fn row(mut self, row: Row) -> Self {
        self.tensors.push(row);
        self
    }

    /// Where the tensors' bytes start.
    pub fn data_start(&self) -> usize {
        self.header().len().next_multiple_of(self.alignment)
    }

    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.clone();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        out.extend(self.keys.concat());
        for row in &self.tensors {
            out.extend(string(&row.name));
            out.extend(row.n_dims.to_le_bytes());
            out.extend(row.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(row.dtype.to_le_bytes());
            out.extend(row.offset.to_le_bytes());
        }
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        if !self.data.is_empty() {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&self.data);
        }
        out
    }

    pub fn save(&self, folder: &Path, name: &str) -> PathBuf {
        save(folder, name, &self.bytes())
    }
}

pub fn save(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    let _ = fs::remove_file(&path); // written over, it would go to the disk at once on some file systems
    fs::write(&path, bytes).expect("the test's folder is writable");
    path
}
