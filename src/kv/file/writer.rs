//! Writes a file of keys and values. The header is written last, so that checksums are taken of bytes on their way to the
//! disk.

use std::hash::Hasher;
use std::path::Path;

use serde_json::{Map, Value, json};
use twox_hash::XxHash3_64;

use super::*;
use crate::compute::kernels::PAGE;
use crate::files::new_file::NewFile;

pub(super) struct Writer {
    file: NewFile,
    /// Of each column.
    checksums: Vec<u64>,
    /// Where the columns begin.
    data: usize,
    /// Bytes of the columns.
    columns: usize,
}

impl Writer {
    pub fn create(path: &Path, contents: &Contents<'_>, task: &Task) -> Result<Self> {
        validate(contents)?;
        task.check()?;
        let data = header(contents, &vec![0; contents.columns.len()])?.len();
        let columns = contents.columns.iter().map(|column| column_bytes(column.shape())).sum();
        let size = data + columns + tail(contents).len() + size_of::<u64>();
        let mut file = NewFile::create(path, size as u64)?;
        file.seek(data as u64)?;
        Ok(Writer { file, checksums: Vec::new(), data, columns })
    }

    pub fn columns(&mut self, contents: &Contents<'_>, task: &Task) -> Result<()> {
        for column in contents.columns {
            let mut hash = XxHash3_64::new();
            let computed = (contents.computed - column.start()).min(PAGE);
            for &part in column.shape().parts() {
                for layer in 0..column.shape().n_layers {
                    task.check()?;
                    let bytes = column.bytes(layer, part, computed)?;
                    if bytes.len() != column.shape().layer_bytes(part) {
                        return Err(misuse(format!("{part:?} of layer {layer} have {} bytes", bytes.len())));
                    }
                    hash.write(&bytes);
                    self.file.write(&bytes)?;
                }
            }
            self.checksums.push(hash.finish());
        }
        Ok(())
    }

    pub fn finish(mut self, contents: &Contents<'_>) -> Result<u64> {
        let header = header(contents, &self.checksums)?;
        debug_assert_eq!(header.len(), self.data);
        let mut tail = tail(contents);
        tail.extend(check(&header, &tail).to_le_bytes());
        self.file.write(&tail)?;
        self.file.seek(0)?;
        self.file.write(&header)?;
        self.file.sync()?;
        self.file.place()?;
        Ok((self.data + self.columns + tail.len()) as u64)
    }
}

fn validate(contents: &Contents<'_>) -> Result<()> {
    let Contents { start, ids, runs, columns, computed, metadata, .. } = contents;
    let in_runs = runs.iter().sum::<usize>();
    if in_runs > ids.len() || !(*start..=start + in_runs).contains(computed) || ids.len() > MAX_IDS {
        return Err(misuse(format!("{} ids from {start}, {in_runs} in runs, {computed} computed", ids.len())));
    }
    if let Some(name) = metadata.keys().find(|name| name.starts_with(OWN)) {
        return Err(misuse(format!("the name {name} is taken")));
    }
    let (Some(first), Some(last)) = (columns.first(), columns.last()) else { return Ok(()) };
    let follow = columns.windows(2).all(|pair| pair[0].start() + PAGE == pair[1].start());
    let reach = first.start() >= *start && (last.start() + 1..=last.start() + PAGE).contains(computed);
    let shape = first.shape();
    let alike = columns.iter().all(|column| {
        let other = column.shape();
        shape.parts() == other.parts()
            && shape
                .parts()
                .iter()
                .all(|&part| (shape.dims(part), shape.element(part)) == (other.dims(part), other.element(part)))
    });
    if !follow || !reach || !alike || column_bytes(shape) == 0 {
        let starts: Vec<usize> = columns.iter().map(|column| column.start()).collect();
        return Err(misuse(format!("columns at {starts:?} of {computed} positions")));
    }
    Ok(())
}

/// Ids and runs as they lie in the file.
fn tail(contents: &Contents<'_>) -> Vec<u8> {
    let runs = contents.runs.iter().map(|&run| run as u32); // `validate`: not more than the ids
    contents.ids.iter().copied().chain(runs).flat_map(u32::to_le_bytes).collect()
}

/// The header with its length, padded.
fn header(contents: &Contents<'_>, checksums: &[u64]) -> Result<Vec<u8>> {
    let mut metadata: Map<String, Value> = contents.metadata.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    let checksums: String = checksums.iter().map(|checksum| format!("{checksum:016x}")).collect();
    let own = [
        (VERSION_KEY, VERSION.to_owned()),
        (FINGERPRINT_KEY, contents.fingerprint.to_owned()),
        (START_KEY, contents.start.to_string()),
        (COMPUTED_KEY, contents.computed.to_string()),
        (LAYOUT_KEY, contents.columns.first().map_or("kernels", |column| layout_name(column.shape())).to_owned()),
        (CHECKSUMS_KEY, checksums),
    ];
    metadata.extend(own.map(|(name, value)| (name.to_owned(), Value::String(value))));

    let mut tensors = Map::new();
    tensors.insert("__metadata__".into(), Value::Object(metadata));
    let mut offset = 0;
    let mut add = |name: String, element: &str, dims: &[usize], bytes: usize| {
        let value = json!({"dtype": element, "shape": dims, "data_offsets": [offset, offset + bytes]});
        tensors.insert(name, value);
        offset += bytes;
    };
    for column in contents.columns {
        let shape = column.shape();
        for &part in shape.parts() {
            let (name, bytes) = (tensor_name(part, column.start() / PAGE), shape.n_layers * shape.layer_bytes(part));
            add(name, shape.element(part).0, &shape.dims(part), bytes);
        }
    }
    for (name, numbers) in [("ids", contents.ids.len()), ("runs", contents.runs.len())] {
        add(name.into(), "U32", &[numbers], 4 * numbers);
    }
    add("check".into(), "U8", &[size_of::<u64>()], size_of::<u64>());

    let json = Value::Object(tensors).to_string();
    let length = (size_of::<u64>() + json.len()).next_multiple_of(PAGE_BYTES) - size_of::<u64>();
    if length > MAX_HEADER {
        let size = json.len();
        return Err(Error::Value(format!("a chat of {size} bytes of text cannot be saved; the limit is {MAX_HEADER}")));
    }
    let mut header = (length as u64).to_le_bytes().to_vec();
    header.extend(json.as_bytes());
    header.resize(size_of::<u64>() + length, b' ');
    Ok(header)
}
