//! GGUF, the file format of llama.cpp: a header of typed keys, a table of tensors, and the bytes of the tensors.
//!
//! ```text
//! "GGUF" · version u32 · number of tensors u64 · number of keys u64
//! per key:    name str · type u32 · value                    str: length u64, bytes
//! per tensor: name str · number of dims u32 · dims u64.. · type u32 · offset u64
//! padding to `general.alignment` (32) · the tensors' bytes, each at its offset, little-endian
//! ```
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.) A file cannot be trusted: every count, length, type
//! and offset is checked once, against the length of the file, before anything is allocated for it. So a [`Gguf`] can be
//! used without further checks. The tensors are not copied.
//!
//! Decisions: docs/design/files.md

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result, excerpt};
use crate::system::task::Task;

#[allow(unsafe_code)] // the file is mapped into memory
mod file;
mod header;
mod metadata;
mod names;
mod tensor;

pub use metadata::{Array, ElementType, Metadata, Strings, Value};
pub use names::SplitName;
pub use tensor::{Bytes, GgmlType, Tensor};

/// One model: a file, or all parts of a split one. Its bytes stay mapped while this or any [`Bytes`] of it lives.
#[derive(Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    index: HashMap<String, usize>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    map: Arc<Mmap>,
    /// The mapped file; None for a private copy.
    file: Option<File>,
}

impl Gguf {
    /// Opens and checks `path`; of a split model (`name-00001-of-00003.gguf`) the first part, which brings the others.
    ///
    /// `mmap = false` reads the file into private memory: for network mounts, and for files that may be rewritten while
    /// the model is in use.
    ///
    /// # Errors
    ///
    /// `ModelNotFound` (no such file, a missing part, a directory), `InvalidModel` (damaged,
    /// cut, or not a GGUF file at all), `UnsupportedModel` (big-endian, or a version that is not 2 or 3).
    pub fn open(path: &Path, mmap: bool) -> Result<Gguf> {
        Gguf::open_for(&Task::default(), path, mmap)
    }

    /// The same with a task, which learns how much of a file was read into memory and can cancel.
    pub fn open_for(task: &Task, path: &Path, mmap: bool) -> Result<Gguf> {
        let (first, metadata, mut tensors) = Part::open(task, path, mmap)?;
        let mut parts = vec![first];
        let split = path.file_name().and_then(|name| SplitName::parse(name.to_str()?));
        // A model in one part is not split.
        match split.filter(|split| split.count > 1) {
            Some(split) if split.number != 1 => {
                return Err(Error::InvalidModel(format!(
                    "{}: this is part {} of {}; open the first part, {}",
                    path.display(),
                    split.number,
                    split.count,
                    path.with_file_name(split.part(1)).display()
                )));
            }
            Some(split) => {
                check_part(path, &metadata, 0, split.count)?;
                for number in 2..=split.count {
                    let path = path.with_file_name(split.part(number));
                    if !path.exists() {
                        let count = split.count;
                        return Err(Error::ModelNotFound(format!(
                            "{}: no such file; it is part {number} of {count} of this model",
                            path.display()
                        )));
                    }
                    let (part, metadata, more) = Part::open(task, &path, mmap)?;
                    check_part(&path, &metadata, number - 1, split.count)?;
                    parts.push(part);
                    tensors.extend(more);
                }
            }
            None => {
                let (count, number) = (metadata.u32("split.count")?, metadata.u32("split.no")?);
                if let Some(count) = count.filter(|&count| count > 1) {
                    return Err(Error::InvalidModel(format!(
                        "{}: this is part {} of {count}, but its name does not end in -00001-of-{count:05}.gguf, so the \
                         other parts cannot be found; give the parts their names back",
                        path.display(),
                        number.unwrap_or(0).saturating_add(1)
                    )));
                }
            }
        }
        if let Some(promised) = metadata.u32("split.tensors.count")?
            && promised as usize != tensors.len()
        {
            return Err(Error::InvalidModel(format!(
                "{}: key `split.tensors.count` is {promised}, but the {} parts hold {} tensors",
                path.display(),
                parts.len(),
                tensors.len()
            )));
        }
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            if index.insert(tensor.name.clone(), i).is_some() {
                return Err(Error::InvalidModel(format!(
                    "{}: tensor `{}` is in two parts",
                    path.display(),
                    excerpt(&tensor.name)
                )));
            }
        }
        Ok(Gguf { parts, metadata, tensors, index })
    }

    /// The file that was opened; of a split model its first part.
    pub fn path(&self) -> &Path {
        self.metadata.path()
    }

    /// The keys, in file order; of a split model those of the first part.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &Tensor> {
        self.tensors.iter()
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// Checks that the mapped files have not become shorter: a read past the new end kills the process. Called before each
    /// piece of work, this catches a file that was overwritten in the meantime, not one that shrinks during the work.
    pub fn check_length(&self) -> Result<()> {
        for Part { path, map, file } in &self.parts {
            let length = file.as_ref().and_then(|file| file.metadata().ok()).map(|file| file.len());
            if let Some(length) = length.filter(|&length| length < map.len() as u64) {
                return Err(Error::InvalidModel(format!(
                    "{}: the file shrank from {} to {length} bytes since it was opened; open it again, without mmap \
                     if it may change",
                    path.display(),
                    map.len()
                )));
            }
        }
        Ok(())
    }

    /// Path and whole content of every part.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = (&Path, &[u8])> {
        self.parts.iter().map(|part| (part.path.as_path(), &part.map[..]))
    }
}

impl Part {
    fn open(task: &Task, path: &Path, mmap: bool) -> Result<(Part, Metadata, Vec<Tensor>)> {
        let (map, file) = file::load(task, path, mmap)?;
        let map = Arc::new(map);
        let (metadata, tensors) = header::read(path, &map)?;
        Ok((Part { path: path.to_owned(), map, file }, metadata, tensors))
    }
}

/// Checks that the keys of a part agree with its name.
fn check_part(path: &Path, metadata: &Metadata, number: u32, count: u32) -> Result<()> {
    for (key, expected) in [("split.no", number), ("split.count", count)] {
        if let Some(found) = metadata.u32(key)?
            && found != expected
        {
            return Err(Error::InvalidModel(format!(
                "{}: key `{key}` is {found}, but by its name the file is part {} of {count}, so it should be {expected}",
                path.display(),
                number + 1
            )));
        }
    }
    Ok(())
}
