//! Maps or reads a file, and recognizes other formats.
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use memmap2::{Mmap, MmapMut};

use crate::error::{Error, Result, human_size};
use crate::system::memory;
use crate::system::task::{Phase, Task};

/// Bytes per read, between two checks of the task: about 10 ms from a fast disk.
const READ: usize = 16 << 20;

/// The whole file, which starts with "GGUF": mapped (then the file is returned too), or read into private memory,
/// which is page-aligned as well.
pub(super) fn load(task: &Task, path: &Path, mmap: bool) -> Result<(Mmap, Option<File>)> {
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => Error::ModelNotFound(format!("{}: no such file", path.display())),
        _ => Error::InvalidModel(format!("{}: cannot be read: {error}", path.display())),
    };
    let invalid = |what: &str| Error::InvalidModel(format!("{}: {what}", path.display()));

    let kind = std::fs::metadata(path).map_err(failed)?;
    if kind.is_dir() {
        return Err(Error::ModelNotFound(format!("{}: this is a directory; {}", path.display(), models_in(path))));
    }
    if !kind.is_file() {
        return Err(invalid("this is not a regular file"));
    }
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if length == 0 {
        return Err(invalid("the file is empty"));
    }
    // "Cannot allocate memory" says nothing about the file, and has no number
    let refused = |error: std::io::Error| match error.kind() {
        ErrorKind::OutOfMemory => Error::Memory(format!(
            "{}: the file needs {length} bytes of address space, which the system refused",
            path.display()
        )),
        _ => failed(error),
    };
    let map = if mmap {
        // SAFETY: a mapped file must not shrink or change while it is mapped: reading past a new end is a fatal signal.
        // No code here writes to a model file, `Phi`'s documentation passes the rule on to the user, and `mmap = false`
        // is there for files that cannot promise it.
        unsafe { Mmap::map(&file) }.map_err(refused)?
    } else {
        let too_large = || invalid(&format!("its {length} bytes exceed this machine's address space"));
        memory::check(length, format_args!("{}: a copy in memory (mmap is off)", path.display()))?;
        let mut memory = MmapMut::map_anon(usize::try_from(length).map_err(|_| too_large())?).map_err(refused)?;
        for (i, part) in memory[..].chunks_mut(READ).enumerate() {
            task.check()?;
            task.report(Phase::Load, (i * READ) as u64, Some(length));
            file.read_exact(part).map_err(failed)?;
        }
        memory.make_read_only().map_err(failed)?
    };
    match map.get(..4) {
        Some(b"GGUF") => Ok((map, mmap.then_some(file))),
        _ => Err(diagnose(path, &map)),
    }
}

/// The hint for a directory: "pass one of the GGUF files in it: a.gguf, b.gguf".
fn models_in(folder: &Path) -> String {
    const SHOWN: usize = 8;
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    match names.len() {
        0 => "pass the path of a .gguf file (the directory has none)".to_owned(),
        1..=SHOWN => format!("pass one of the GGUF files in it: {}", names.join(", ")),
        more => format!("pass one of the {more} GGUF files in it: {}, …", names[..SHOWN].join(", ")),
    }
}

/// The error for a file that does not start with "GGUF": its probable format, and a remedy.
fn diagnose(path: &Path, bytes: &[u8]) -> Error {
    let start = &bytes[..bytes.len().min(1024)];
    let path = path.display();
    let unsupported = match start {
        [b'F', b'U', b'G', b'G', ..] => Some("a big-endian GGUF file; only little-endian files are supported"),
        // the words "ggml", "ggmf", "ggjt" and "ggla", written as little-endian integers
        [b'l' | b'f', b'm', b'g', b'g', ..] | [b't', b'j', b'g', b'g', ..] | [b'a', b'l', b'g', b'g', ..] => {
            Some("a model in an old GGML format, from before GGUF (2023); convert the original model again")
        }
        _ => None,
    };
    if let Some(what) = unsupported {
        return Error::UnsupportedModel(format!("{path}: {what}"));
    }
    let text = String::from_utf8_lossy(start);
    let text = text.trim_start_matches('\u{feff}').trim_start().to_ascii_lowercase();
    let what = if text.starts_with("<!doctype html") || text.starts_with("<html") || text.contains("<head>") {
        "this is an HTML page, not a model; download the file itself, not the page about it".to_owned()
    } else if text.starts_with("<?xml") {
        "this is an XML text, not a model; a server's error message was saved in its place".to_owned()
    } else if text.starts_with("version https://git-lfs") {
        match text.lines().find_map(|line| line.strip_prefix("size ")?.trim().parse().ok()) {
            Some(size) => format!(
                "this is a Git LFS pointer, not the model of {} it stands for; run `git lfs pull`",
                human_size(size)
            ),
            None => "this is a Git LFS pointer, not the model it stands for; run `git lfs pull`".to_owned(),
        }
    } else if is_safetensors(bytes) {
        "this is a safetensors file; only GGUF files are supported, so look for the GGUF version of the model"
            .to_owned()
    } else if ["{{", "{%", "{#"].iter().any(|start| text.starts_with(start)) {
        "this is a Jinja template, not a model".to_owned()
    } else if text.starts_with('{') {
        "this is a JSON text, not a model; a server's error message or a configuration was saved in its place"
            .to_owned()
    } else if start.starts_with(b"PK\x03\x04") {
        "this is a zip archive or a PyTorch checkpoint; only GGUF files are supported".to_owned()
    } else if start.starts_with(b"\x80\x02") || start.starts_with(b"\x80\x04") {
        "this is a Python pickle, probably a PyTorch checkpoint; only GGUF files are supported".to_owned()
    } else if [&b"\x1f\x8b"[..], b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"BZh"]
        .iter()
        .any(|m| start.starts_with(m))
    {
        "this is a compressed file; unpack it first".to_owned()
    } else if start.iter().all(|&b| b == 0) {
        format!("the first {} bytes are zeros; the download did not finish", start.len())
    } else if b"GGUF".starts_with(bytes) {
        format!("the file ends at {}, inside the first word of a GGUF file (is the download incomplete?)", bytes.len())
    } else {
        format!("not a GGUF file: it starts with \"{}\", not with \"GGUF\"", start[..start.len().min(4)].escape_ascii())
    };
    Error::InvalidModel(format!("{path}: {what}"))
}

/// A length of eight bytes, then that many bytes of JSON.
fn is_safetensors(bytes: &[u8]) -> bool {
    match bytes.split_first_chunk::<8>() {
        Some((length, rest)) => rest.first() == Some(&b'{') && u64::from_le_bytes(*length) <= rest.len() as u64,
        None => false,
    }
}
