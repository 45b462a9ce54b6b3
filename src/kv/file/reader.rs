//! Opens a file of keys and values. A file cannot be trusted: all of it but the columns is checked before it is used, and a
//! column at its first use.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use safetensors::tensor::Metadata;
use twox_hash::XxHash3_64;

use super::layout::Layout;
use super::*;
use crate::compute::kernels::PAGE;
use crate::error::excerpt;
use crate::files::gguf::Bytes;

/// An open file. Its ids and texts are in memory, its columns are mapped.
#[derive(Debug)]
pub struct KvFile {
    path: PathBuf,
    file: File,
    ids: Vec<u32>,
    runs: Vec<usize>,
    metadata: BTreeMap<String, String>,
    layout: Layout,
    /// For each column.
    is_verified: Vec<AtomicBool>,
    /// None without columns.
    map: Option<Arc<Mmap>>,
}

impl KvFile {
    /// Opens a file and checks everything but its columns.
    ///
    /// # Errors
    ///
    /// `ModelNotFound`: no such file. `InvalidModel`: damaged, or not a file of this kind. `UnsupportedModel`: of another
    /// version of the format.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound => Error::ModelNotFound(format!("{}: no such file", path.display())),
            _ => Error::InvalidModel(format!("{}: cannot be read: {error}", path.display())),
        };
        let invalid = |what: String| Error::InvalidModel(format!("{}: {what}", path.display()));
        let kind = std::fs::metadata(path).map_err(failed)?; // to open a pipe would wait for its writer
        if !kind.is_file() {
            return Err(invalid("this is not a regular file".into()));
        }
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();

        let mut size = [0; size_of::<u64>()];
        if length < size.len() as u64 {
            return Err(invalid(format!("damaged: its {length} bytes are too few for the file of a chat")));
        }
        file.read_exact(&mut size).map_err(failed)?;
        let size = u64::from_le_bytes(size);
        if size > length - 8 || size > MAX_HEADER as u64 {
            return Err(invalid(format!("not the file of a chat, or damaged: a header of {size} bytes in {length}")));
        }
        let mut header = size.to_le_bytes().to_vec();
        header.resize(size_of::<u64>() + size as usize, 0);
        file.read_exact(&mut header[size_of::<u64>()..]).map_err(failed)?;
        let tensors: Metadata = serde_json::from_slice(&header[size_of::<u64>()..]).map_err(|error| {
            invalid(format!("not the file of a chat, or damaged: its header: {}", excerpt(&error.to_string())))
        })?;
        let mut texts: BTreeMap<String, String> = tensors.metadata().clone().unwrap_or_default().into_iter().collect();
        match texts.remove(VERSION_KEY) {
            Some(version) if version == VERSION => {}
            Some(version) => {
                return Err(Error::UnsupportedModel(format!(
                    "{}: version {} of the format of chats; this package reads version {VERSION}",
                    path.display(),
                    excerpt(&version)
                )));
            }
            None => return Err(invalid("a safetensors file, but not one of a chat".into())),
        }
        let damaged = |what: String| invalid(format!("damaged: {what}"));
        let layout = Layout::new(&tensors, header.len(), length, &mut texts).map_err(damaged)?;

        // It is inside the file, and `MAX_IDS` bounds it.
        let mut tail = vec![0; layout.tail.len()];
        file.seek(SeekFrom::Start(layout.tail.start as u64)).map_err(failed)?;
        file.read_exact(&mut tail).map_err(failed)?;
        let (numbers, sum) = tail.split_at(tail.len() - size_of::<u64>());
        if check(&header, numbers).to_le_bytes() != sum {
            return Err(damaged("the checksum of its header and ids does not match".into()));
        }
        let numbers: Vec<u32> = numbers.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let (ids, runs) = numbers.split_at(layout.n_ids);
        let in_runs: u64 = runs.iter().map(|&run| u64::from(run)).sum();
        let (start, computed) = (layout.start as u64, layout.computed as u64);
        if in_runs > ids.len() as u64 || computed < start || computed - start > in_runs {
            let n_ids = ids.len();
            return Err(damaged(format!("{n_ids} ids from {start} on, {in_runs} in runs, computed up to {computed}")));
        }
        let map = if layout.columns.is_empty() { None } else { Some(Arc::new(map(&file).map_err(failed)?)) };
        Ok(KvFile {
            path: path.to_owned(),
            file,
            ids: ids.to_vec(),
            runs: runs.iter().map(|&run| run as usize).collect(),
            metadata: texts,
            is_verified: layout.columns.iter().map(|_| AtomicBool::new(false)).collect(),
            layout,
            map,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys and values of another fingerprint have other bits. The ids and texts are good for any model with this tokenizer.
    pub fn fingerprint(&self) -> &str {
        &self.layout.fingerprint
    }

    /// The position of the first id.
    pub fn start(&self) -> usize {
        self.layout.start
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Lengths that alternate prefill, decode, prefill, .. of the first ids.
    pub fn runs(&self) -> &[usize] {
        &self.runs
    }

    /// The columns have the positions below it.
    pub fn computed(&self) -> usize {
        self.layout.computed
    }

    /// The caller's own texts.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The numbers of the columns in the file. Number n has the positions from n * PAGE on.
    pub fn columns(&self) -> Range<usize> {
        self.layout.first..self.layout.first + self.layout.columns.len()
    }

    /// Column `number`, mapped: used where it lies in the file. Its checksum is verified at the first use.
    ///
    /// # Errors
    ///
    /// `InvalidModel`: the column is damaged, has another shape than `shape`, or the file has become shorter.
    pub fn column(&self, number: usize, shape: &KvShape) -> Result<Column> {
        let index = number.checked_sub(self.layout.first).filter(|&index| index < self.layout.columns.len());
        let (Some(index), Some(map)) = (index, &self.map) else {
            return Err(misuse(format!("column {number} of {:?}", self.columns())));
        };
        let (column, is_verified) = (&self.layout.columns[index], &self.is_verified[index]);
        let positions = number * PAGE..self.layout.computed.min((number + 1) * PAGE);
        let invalid = |what: String| Error::InvalidModel(format!("{}: {what}", self.path.display()));
        if !self.layout.fits(column, shape) {
            return Err(invalid(format!("its keys and values have another shape than those of the model: {column}")));
        }
        let length = self.file.metadata().map_or(0, |file| file.len());
        if length < map.len() as u64 {
            return Err(invalid(format!("the file shrank from {} to {length} bytes since it was opened", map.len())));
        }
        let bytes = |range: &Range<usize>| Bytes::new(map, range.clone());
        if !is_verified.load(Ordering::Acquire) {
            if XxHash3_64::oneshot(&bytes(&column.range())) != column.checksum {
                return Err(invalid(format!(
                    "damaged: the checksum of column {number}, positions {} to {}, does not match",
                    positions.start,
                    positions.end.saturating_sub(1)
                )));
            }
            is_verified.store(true, Ordering::Release);
        }
        let parts: Vec<Bytes> = column.parts.iter().map(|part| bytes(&part.range)).collect();
        Column::mapped(number * PAGE, shape, &parts)
    }
}

fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: a mapped file must not shrink or change while it is mapped: reading past a new end is a fatal signal. No code
    // here writes to a file that has its name: a new file takes the name, and the old one stays as it is while it is
    // mapped. The documentation of saved chats passes the rule on to the user.
    unsafe { Mmap::map(file) }
}
