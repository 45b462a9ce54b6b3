//! Files of keys and values: round trips by the bit, and every kind of damage.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
#[cfg(unix)]
use std::process::{Command, Stdio};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
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

/// The value of a line of a map of this process, in kB: of all maps of the file.
#[cfg(target_os = "linux")]
fn mapped_kilobytes(path: &Path, name: &str) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut is_of_file = false;
    let mut sum = 0;
    for line in maps.lines() {
        match line.strip_prefix(name).and_then(|line| line.strip_prefix(':')) {
            Some(value) if is_of_file => sum += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap(),
            _ if line.split(' ').next().is_some_and(|first| first.contains('-')) => {
                is_of_file = line.ends_with(path.to_str().unwrap());
            }
            _ => {}
        }
    }
    sum
}

#[cfg(target_os = "linux")]
#[test]
fn the_memory_of_a_mapped_column_is_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap().join("a");
    let shape = child_shape();
    Chat::new(&shape, 0, 4 * PAGE + 1, 3).write(&path).unwrap();
    let file = KvFile::open(&path).unwrap();
    let columns: Vec<Column> = (0..4).map(|number| file.column(number, &shape).unwrap()).collect();
    assert_eq!(bits(&columns[3], &shape, PAGE).len(), 2 * 8 * 4 * 64 * PAGE);
    assert!(mapped_kilobytes(&path, "Rss") >= 4 * 1024, "{} kB", mapped_kilobytes(&path, "Rss"));
    assert_eq!(mapped_kilobytes(&path, "Anonymous"), 0, "pages of its own");
}

#[test]
fn a_device_of_candle_gets_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    for kv_type in [KvType::F16, KvType::F32] {
        let kernels = shape(kv_type, 2, 2, 32);
        let candle = KvShape { device: Some(Device::Cpu), ..kernels.clone() };
        let chat = Chat::new(&candle, 0, PAGE + 6, 3);
        chat.write(&path).unwrap();
        let file = KvFile::open(&path).unwrap();
        let column = file.column(1, &candle).unwrap();
        assert!(!column.is_mapped() && file.column(1, &kernels).is_err(), "keys of the kernels lie in another order");
        let numbers = |column: &Column, layer: usize, first: usize, n: usize| {
            let block = column.layer(layer);
            let part = |x: &Tensor| x.narrow(1, first, n).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            [&block.k, &block.v].map(|x| part(x.tensor().unwrap()).to_vec1::<f32>().unwrap()).concat()
        };
        for layer in 0..2 {
            assert_eq!(numbers(&column, layer, 0, 5), numbers(&chat.columns[1], layer, 0, 5));
            assert!(numbers(&column, layer, 5, PAGE - 5).iter().all(|&x| x == 0.0));
        }
    }
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
    fs::write(&cut, [&bytes[..], b"\0"].concat()).unwrap();
    assert_refused(&cut, &shape, "a byte more");
    let file = fs::File::options().write(true).open(&cut).unwrap();
    for length in (0..bytes.len()).rev() {
        file.set_len(length as u64).unwrap();
        assert_refused(&cut, &shape, &format!("a cut at {length}"));
    }
}

#[test]
fn every_flipped_byte_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (shape, chat) = small();
    chat.write(&path).unwrap();
    let sound = read(&path, &shape).unwrap();
    let bytes = fs::read(&path).unwrap();
    let mut file = fs::File::options().write(true).open(&path).unwrap();
    let mut set = |i: usize, byte: u8| {
        file.seek(SeekFrom::Start(i as u64)).unwrap();
        file.write_all(&[byte]).unwrap();
    };
    let mut random = random::Random::new(5);
    for (i, &byte) in bytes.iter().enumerate() {
        set(i, byte ^ 1 << random.below(8));
        assert_refused(&path, &shape, &format!("a flip at {i}"));
        set(i, byte);
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

#[test]
fn a_hostile_header_is_refused_whatever_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (shape, chat) = small();
    chat.write(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let size = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let json = str::from_utf8(&bytes[8..8 + size]).unwrap().trim_end();
    let with_header = |json: &str| [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &bytes[8 + size..]].concat();
    let refuse = |bytes: Vec<u8>, what: &str| {
        fs::remove_file(&path).unwrap(); // ext4 flushes a file that is cut to nothing and written again
        fs::write(&path, bytes).unwrap();
        assert_refused(&path, &shape, what);
    };
    for size in [0, 1, 8 << 20, u64::MAX, u64::MAX - 7, 1 << 63] {
        refuse([&size.to_le_bytes(), &bytes[8..]].concat(), &format!("a header of {size} bytes"));
    }
    refuse(with_header(&"[".repeat(100_000)), "brackets");
    refuse(with_header("{}"), "no tensors");
    refuse(with_header(r#"{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}"#), "another safetensors file");
    let mut random = random::Random::new(3);
    let numbers =
        ["0", "1", "64", "127", "4294967296", "18446744073709551615", "9223372036854775807", "-1", "1e9", "null"];
    for _ in 0..2000 {
        // One of the numbers becomes another one.
        let digits: Vec<usize> = json.char_indices().filter(|(_, c)| c.is_ascii_digit()).map(|(i, _)| i).collect();
        let at = digits[random.below(digits.len())];
        let is_digit = |i: usize| json.as_bytes()[i].is_ascii_digit();
        let from = (0..=at).rev().take_while(|&i| is_digit(i)).last().unwrap();
        let to = (at..json.len()).find(|&i| !is_digit(i)).unwrap();
        let number = numbers[random.below(numbers.len())];
        if number != &json[from..to] {
            let changed = format!("{}{number}{}", &json[..from], &json[to..]);
            refuse(with_header(&changed), &changed);
        }
    }
}

#[test]
fn what_is_no_file_of_a_chat_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (shape, chat) = small();
    let missing = read(&folder.path().join("b"), &shape).unwrap_err();
    assert!(matches!(&missing, Error::ModelNotFound(message) if message.ends_with("b: no such file")), "{missing}");
    assert_refused(folder.path(), &shape, "a folder");
    let path = folder.path().join("a");
    chat.write(&path).unwrap();
    let mut later = fs::read(&path).unwrap();
    let version = br#"kv_version":"1"#;
    let at = later.windows(version.len()).position(|bytes| bytes == version).unwrap();
    later[at + version.len() - 1] = b'2';
    fs::write(&path, later).unwrap();
    let error = read(&path, &shape).unwrap_err();
    assert!(matches!(&error, Error::UnsupportedModel(message) if message.contains("version 2")), "{error}");
}

/// The error of a save, which leaves no file behind.
fn refused(chat: &Chat, path: &Path, kind: std::io::ErrorKind, what: &str) {
    let entries = || fs::read_dir(path.parent().unwrap()).map_or(0, Iterator::count);
    let before = entries();
    match chat.write(path) {
        Err(Error::File { message, kind: found }) => {
            assert!(found == kind && message.contains(what), "{message} ({found:?})");
            assert!(message.starts_with(&path.display().to_string()), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(entries(), before);
}

#[test]
fn a_target_that_cannot_be_replaced_is_an_error() {
    use std::io::ErrorKind;
    let folder = tempfile::tempdir().unwrap();
    let (_, chat) = small();
    refused(&chat, folder.path(), ErrorKind::IsADirectory, "this is a folder");
    refused(&chat, &folder.path().join("no/a"), ErrorKind::NotFound, "no is not a folder");
    let path = folder.path().join("a");
    fs::write(&path, "old").unwrap();
    refused(&chat, &path.join("b"), ErrorKind::NotADirectory, "a is not a folder");
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&path, permissions).unwrap();
    refused(&chat, &path, ErrorKind::PermissionDenied, "read-only");
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[cfg(unix)]
#[test]
fn a_symbolic_link_leads_to_the_target_and_a_file_is_its_owners() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let (_, chat) = small();
    let (link, target) = (folder.path().join("link"), folder.path().join("target"));
    symlink(&target, &link).unwrap();
    refused(&chat, &link, std::io::ErrorKind::NotFound, "a symbolic link");
    fs::write(&target, "old").unwrap();
    chat.write(&link).unwrap();
    assert!(link.is_symlink() && !target.is_symlink());
    assert_eq!(KvFile::open(&target).unwrap().ids(), &chat.ids[..]);
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_save_that_is_cancelled_leaves_the_old_file() {
    use candle_phi::system::task::BackgroundTask;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (shape, chat) = small();
    chat.write(&path).unwrap();
    let sound = fs::read(&path).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let target = path.clone();
    let save = BackgroundTask::start(move |task| {
        let _ = gate.recv();
        let other = Chat::new(&shape, 0, 3, 9);
        send.send(write(&target, &other.contents(), task)).unwrap();
        Ok(())
    });
    save.unwrap().cancel();
    drop(go);
    assert_eq!(receive.recv().unwrap(), Err(Error::Cancelled));
    assert_eq!(fs::read(&path).unwrap(), sound);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn two_writers_at_once_leave_one_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let shape = shape(KvType::F32, 2, 2, 32);
    let chats = [1, 2].map(|seed| Chat::new(&shape, 0, PAGE + seed as usize * 20, seed));
    chats[0].write(&path).unwrap();
    std::thread::scope(|scope| {
        for chat in &chats {
            scope.spawn(|| (0..20).map(|_| chat.write(&path).unwrap()).max());
        }
        for _ in 0..40 {
            let (ids, columns) = read(&path, &shape).unwrap();
            let chat = chats.iter().find(|chat| chat.ids == ids).expect("one of the two");
            let positions = chat.computed - PAGE;
            let before = bits(&chat.columns[0], &shape, PAGE);
            assert!(positions > 0 && columns[0] == before);
        }
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// The shape of what child processes save: 1 MiB a column.
fn child_shape() -> KvShape {
    shape(KvType::F16, 8, 4, 64)
}

/// This program, which runs the test `child` alone.
#[cfg(unix)]
fn start_child(before: &str, task: &str, path: &Path) -> Command {
    let mut command = Command::new("sh");
    let program = std::env::current_exe().unwrap();
    command.arg("-c").arg(format!("{before} exec \"$0\" --exact child --ignored --nocapture")).arg(program);
    command.env("KV_FILES_CHILD", task).env("KV_FILES_PATH", path).stdout(Stdio::null());
    command
}

#[test]
#[ignore = "the process that other tests start"]
fn child() {
    let (Ok(task), Some(path)) = (std::env::var("KV_FILES_CHILD"), std::env::var_os("KV_FILES_PATH")) else { return };
    let path = Path::new(&path);
    let shape = child_shape();
    match task.as_str() {
        "save" => {
            let chat = Chat::new(&shape, 0, 8 * PAGE, 2);
            for _ in 0..2000 {
                chat.write(path).unwrap();
            }
        }
        "save without space" => {
            let error = Chat::new(&shape, 0, 8 * PAGE, 2).write(path).unwrap_err();
            assert!(matches!(&error, Error::File { message, .. } if message.contains("not saved: ")), "{error}");
        }
        other => panic!("{other}"),
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let shape = child_shape();
    let chat = Chat::new(&shape, 0, PAGE + 1, 1);
    chat.write(&path).unwrap();
    let before = read(&path, &shape).unwrap();
    // A limit of 2 MiB (4096 blocks) stands for the disk: a write beyond it is refused when the file is half written.
    let status = start_child("trap '' XFSZ; ulimit -f 4096;", "save without space", &path).status().unwrap();
    assert!(status.success());
    assert_eq!(read(&path, &shape).unwrap(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn a_writer_that_is_killed_leaves_a_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let shape = child_shape();
    let old = Chat::new(&shape, 0, PAGE + 1, 1);
    let new = Chat::new(&shape, 0, 8 * PAGE, 2);
    let size = new.write(&path).unwrap();
    let sound_new = read(&path, &shape).unwrap();
    old.write(&path).unwrap();
    let sound_old = read(&path, &shape).unwrap();
    let unfinished = || {
        let entries = fs::read_dir(folder.path()).unwrap().flatten();
        let sizes = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".incomplete"));
        sizes.filter_map(|entry| Some(entry.metadata().ok()?.len())).max()
    };
    let mut left = 0;
    for point in 0..20 {
        old.write(&path).unwrap();
        assert_eq!(unfinished(), None, "what the killed one left is removed");
        let mut writer = start_child("", "save", &path).spawn().unwrap();
        while unfinished().is_none_or(|length| length < size * point / 20) {
            assert!(writer.try_wait().unwrap().is_none(), "the writer has ended");
            std::thread::yield_now();
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        left += u32::from(unfinished().is_some());
        let found = read(&path, &shape).unwrap();
        assert!(found == sound_old || found == sound_new, "killed at {point}/20");
    }
    assert!(left > 0, "no writer was killed while it wrote");
}
