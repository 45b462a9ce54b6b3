//! Files of keys and values: round trips by the bit, and every kind of damage.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_phi::compute::kernels::{KvSlice, PAGE};
use candle_phi::compute::ops::{Column, KvShape, KvType, Segment};
use candle_phi::error::{Error, Result};
use candle_phi::kv::file::{Contents, KvFile, write};
use candle_phi::kv::table::Table;
use candle_phi::system::task::Task;

mod kv_columns;
mod random;

use kv_columns::{bits, columns, shape};

const FINGERPRINT: &str = "model 1, f16, avx2";

struct Chat {
    ids: Vec<u32>,
    runs: Vec<usize>,
    columns: Vec<Arc<Column>>,
    computed: usize,
    metadata: BTreeMap<String, String>,
}

impl Chat {
    /// `positions` ids, of which the last one is not computed; columns from number `first` on.
    fn new(shape: &KvShape, first: usize, positions: usize, seed: u64) -> Self {
        let computed = positions - 1;
        Chat {
            ids: (0..positions as u32).map(|i| i * 7 % 1000).collect(),
            runs: vec![computed / 2, computed - computed / 2],
            columns: columns(shape, first, computed, seed),
            computed,
            metadata: BTreeMap::from([("messages".into(), "[{\"role\": \"user\", \"content\": \"é\\n\"}]".into())]),
        }
    }

    fn contents(&self) -> Contents<'_> {
        let Chat { ids, runs, columns, computed, metadata } = self;
        Contents { fingerprint: FINGERPRINT, start: 0, ids, runs, columns, computed: *computed, metadata }
    }

    fn write(&self, path: &Path) -> Result<u64> {
        write(path, &self.contents(), &Task::default())
    }
}

fn small() -> (KvShape, Chat) {
    let shape = shape(KvType::Q8_0, 1, 1, 2);
    let chat = Chat::new(&shape, 0, 6, 1);
    (shape, chat)
}

/// Opens a file and uses all of it.
fn read(path: &Path, shape: &KvShape) -> Result<(Vec<u32>, Vec<Vec<u32>>)> {
    let file = KvFile::open(path)?;
    let columns = file.columns().map(|number| file.column(number, shape).map(|column| bits(&column, shape, PAGE)));
    Ok((file.ids().to_vec(), columns.collect::<Result<_>>()?))
}

#[test]
fn a_chat_comes_back_by_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    for kv_type in [KvType::F16, KvType::F32, KvType::Q8_0] {
        for (layers, heads, head_dim) in [(1, 1, 2), (3, 2, 96), (2, 1, 40)] {
            for (first, positions) in [(0, 2), (0, PAGE + 1), (0, 3 * PAGE + 60), (5, 7 * PAGE + 9)] {
                let shape = shape(kv_type, layers, heads, head_dim);
                let chat = Chat::new(&shape, first, positions, 7);
                let path = folder.path().join("a.safetensors");
                assert_eq!(chat.write(&path).unwrap(), fs::metadata(&path).unwrap().len());
                let file = KvFile::open(&path).unwrap();
                assert_eq!((file.fingerprint(), file.start()), (FINGERPRINT, 0));
                assert_eq!((file.ids(), file.runs(), file.computed()), (&chat.ids[..], &chat.runs[..], chat.computed));
                assert_eq!(file.metadata(), &chat.metadata);
                assert_eq!(file.columns(), first..first + chat.columns.len());
                for (number, before) in file.columns().zip(&chat.columns) {
                    let column = file.column(number, &shape).unwrap();
                    let held = (chat.computed - number * PAGE).min(PAGE);
                    assert_eq!(column.start(), number * PAGE);
                    assert_eq!(bits(&column, &shape, held), bits(before, &shape, held), "{shape:?}, column {number}");
                }
            }
        }
    }
}

#[test]
fn memory_behind_the_last_position_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    for kv_type in [KvType::F16, KvType::F32, KvType::Q8_0] {
        let shape = shape(kv_type, 2, 2, 40);
        let chat = Chat::new(&shape, 0, PAGE + 6, 3);
        chat.write(&path).unwrap();
        let column = KvFile::open(&path).unwrap().column(1, &shape).unwrap();
        let all = bits(&column, &shape, PAGE);
        let numbers = all.iter().filter(|&&bits| bits != 0 && bits != (-0f32).to_bits()).count();
        assert!(numbers <= 2 * 2 * 2 * 40 * 5, "{kv_type:?}: {numbers} numbers of 5 positions");
    }
}

#[test]
fn the_format_is_that_of_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let shape = shape(KvType::Q8_0, 2, 1, 32);
    let chat = Chat::new(&shape, 1, 3 * PAGE, 3);
    chat.write(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    let parts = ["check", "ids", "k.0001", "k.0002", "k_scales.0001", "k_scales.0002", "runs"];
    assert_eq!(names, [&parts[..], &["v.0001", "v.0002", "v_scales.0001", "v_scales.0002"]].concat());
    let data = bytes.as_ptr() as usize;
    for (name, tensor) in tensors.tensors() {
        let offset = tensor.data().as_ptr() as usize - data;
        assert!(name.len() < 6 || name == "check" || offset.is_multiple_of(64), "{name} at {offset}");
    }
    assert_eq!(tensors.tensor("k.0001").unwrap().shape(), [2, 1, 32, PAGE]);
    assert_eq!(tensors.tensor("v_scales.0001").unwrap().shape(), [2, 1, PAGE, 1]);
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) + 8;
    assert!(header.is_multiple_of(4096));
}

#[test]
fn without_keys_and_values_a_chat_takes_kilobytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let chat = Chat { columns: Vec::new(), ..Chat::new(&shape(KvType::F16, 1, 1, 2), 0, 1000, 1) };
    assert!(chat.write(&path).unwrap() < 10_000);
    let file = KvFile::open(&path).unwrap();
    assert_eq!((file.ids(), file.columns()), (&chat.ids[..], 0..0));
}

#[test]
fn a_mapped_column_is_used_where_it_lies_and_never_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let shape = shape(KvType::F16, 2, 2, 32);
    let chat = Chat::new(&shape, 0, PAGE + 6, 3);
    chat.write(&path).unwrap();
    let file = KvFile::open(&path).unwrap();
    let addresses = |column: &Column| match column.layer(1).v.head(1, 2).unwrap() {
        KvSlice::F16(x) => x.as_ptr_range().start as usize,
        _ => unreachable!(),
    };
    let load = |number| Arc::new(file.column(number, &shape).unwrap());
    let (first, second) = (load(1), load(1));
    assert!(first.is_mapped() && !first.copy().unwrap().is_mapped() && !chat.columns[0].is_mapped());
    assert_eq!(addresses(&first), addresses(&second), "the same memory: nothing is copied");
    assert_ne!(addresses(&first), addresses(&first.copy().unwrap()));
    assert_eq!(bits(&first.copy().unwrap(), &shape, PAGE), bits(&first, &shape, PAGE));
    drop(second);

    let mut unshared = VecDeque::from([first]);
    let error = Segment::new(0..1, PAGE + 5, &mut unshared).pieces(0).next().unwrap().map(drop).unwrap_err();
    assert!(matches!(error, Error::Internal(_)), "{error}");

    let saved = fs::read(&path).unwrap();
    let mut table = Table::new(&shape, None);
    table.adopt(VecDeque::from([load(0), load(1)]), PAGE + 5);
    assert_eq!(table.growth(1), (PAGE * shape.position_bytes()) as u64, "a copy of the last one");
    table.reserve(1).unwrap();
    assert!(table.segment(0..1).pieces(0).all(|piece| piece.is_ok()));
    assert_eq!(table.columns().map(|column| column.is_mapped()).collect::<Vec<_>>(), [true, false]);
    table.clear(); // a mapped column is no memory for others
    table.reserve(2 * PAGE).unwrap();
    for layer in 0..2 {
        assert!(table.segment(0..2 * PAGE).pieces(layer).all(|piece| piece.is_ok()));
    }
    assert_eq!(fs::read(&path).unwrap(), saved);
}

#[test]
fn another_fingerprint_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (shape, chat) = small();
    write(&path, &Contents { fingerprint: "model 2", ..chat.contents() }, &Task::default()).unwrap();
    let file = KvFile::open(&path).unwrap();
    assert_eq!((file.fingerprint(), file.ids()), ("model 2", &chat.ids[..]));
    // A model of another shape with the same fingerprint is not possible; a file of one is refused all the same.
    for other in [KvShape { n_head_kv: 2, ..shape.clone() }, KvShape { kv_type: KvType::F16, ..shape }] {
        let error = file.column(0, &other).map(drop).unwrap_err();
        assert!(matches!(&error, Error::InvalidModel(message) if message.contains("another shape")), "{error}");
    }
}

/// The message names the file.
fn assert_refused(path: &Path, shape: &KvShape, what: &str) {
    match read(path, shape) {
        Err(Error::InvalidModel(message) | Error::UnsupportedModel(message)) => {
            assert!(message.starts_with(&path.display().to_string()) && message.len() < 1000, "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        Err(error) => panic!("{what}: {error}"),
        Ok(_) => panic!("{what} is not found"),
    }
}

#[test]
fn every_cut_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (shape, chat) = small();
    chat.write(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let cut = folder.path().join("cut");
    for length in 0..bytes.len() {
        fs::write(&cut, &bytes[..length]).unwrap();
        assert_refused(&cut, &shape, &format!("a cut at {length}"));
    }
    fs::write(&cut, [&bytes[..], b"\0"].concat()).unwrap();
    assert_refused(&cut, &shape, "a byte more");
}

#[test]
fn every_flipped_byte_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (shape, chat) = small();
    chat.write(&path).unwrap();
    let sound = read(&path, &shape).unwrap();
    let bytes = fs::read(&path).unwrap();
    let flipped = folder.path().join("flipped");
    let mut random = random::Random::new(5);
    for i in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[i] ^= 1 << random.below(8);
        fs::write(&flipped, &bytes).unwrap();
        assert_refused(&flipped, &shape, &format!("a flip at {i}"));
    }
    assert_eq!(read(&path, &shape).unwrap(), sound);
}

#[test]
fn a_damaged_column_is_named_and_the_others_are_good() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let shape = shape(KvType::F16, 1, 1, 2);
    let chat = Chat::new(&shape, 0, 2 * PAGE + 10, 1);
    chat.write(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let column = PAGE * shape.position_bytes();
    bytes[4096 + column + 3] ^= 1;
    fs::write(&path, bytes).unwrap();
    let file = KvFile::open(&path).unwrap();
    assert!(file.column(0, &shape).is_ok() && file.column(2, &shape).is_ok());
    let message =
        format!("{}: damaged: the checksum of column 1, positions 128 to 255, does not match", path.display());
    assert_eq!(file.column(1, &shape).map(drop), Err(Error::InvalidModel(message)));
}
