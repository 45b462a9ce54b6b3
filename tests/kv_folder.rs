//! A folder of columns that processes share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_phi::compute::kernels::PAGE;
use candle_phi::compute::ops::{Column, KvShape, KvType};
use candle_phi::error::Error;
use candle_phi::kv::folder::{Counts, Folder, Key};
use candle_phi::kv::tree::Root;

mod kv_columns;
mod random;

use kv_columns::{bits, columns, shape};

const MINUTE: Duration = Duration::from_secs(60);

fn small() -> KvShape {
    shape(KvType::F16, 2, 1, 32)
}

fn root(scope: &str) -> Root {
    Root { long: false, scope: scope.into() }
}

fn open(path: &Path) -> Folder {
    Folder::open(path, "model 1", &small()).unwrap()
}

fn ids(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| seed * 1000 + i).collect()
}

/// Columns of a prompt in the folder: full ones, and a last one of `tail` ids.
fn put_prompt(folder: &Folder, seed: u32, full: usize, tail: usize) -> Vec<Arc<Column>> {
    let ids = ids(seed, full * PAGE + tail);
    let columns = columns(&small(), 0, ids.len(), seed.into());
    let mut key = folder.root(&root(""));
    for (ids, column) in ids.chunks(PAGE).zip(&columns) {
        assert!(folder.put(&key, ids, column.clone()));
        key = key.child(ids);
    }
    assert!(folder.flush(MINUTE));
    columns
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The full columns of a prompt that the folder has.
fn found(folder: &Folder, seed: u32, full: usize) -> Vec<Column> {
    let (ids, mut key) = (ids(seed, full * PAGE), folder.root(&root("")));
    let mut found = Vec::new();
    for ids in ids.chunks(PAGE) {
        let Some((child, column)) = folder.find(&key, ids) else { break };
        found.push(column);
        key = child;
    }
    found
}

#[test]
fn columns_are_found_by_all_that_decides_their_bits() {
    let path = tempfile::tempdir().unwrap();
    let columns = put_prompt(&open(path.path()), 1, 3, 0);
    let folder = open(path.path());
    let found = found(&folder, 1, 3);
    assert_eq!(found.len(), 3);
    for (found, before) in found.iter().zip(&columns) {
        assert!(found.is_mapped() && found.start() == before.start());
        assert_eq!(bits(found, &small(), PAGE), bits(before, &small(), PAGE));
    }
    let (first, second) = (ids(1, PAGE), &ids(1, 2 * PAGE)[PAGE..]);
    let none = |folder: &Folder, key: &Key, ids: &[u32]| assert!(folder.find(key, ids).is_none());
    let key = folder.root(&root(""));
    none(&folder, &key, second);
    none(&folder, &key, &first[..PAGE - 1]);
    none(&folder, &folder.root(&root("tenant")), &first);
    none(&folder, &folder.root(&Root { long: true, ..root("") }), &first);
    none(&folder, &key.child(&ids(2, PAGE)), second);
    let other = Folder::open(path.path(), "model 2", &small()).unwrap();
    none(&other, &other.root(&root("")), &first);
    assert_eq!(files(path.path()).len(), 3, "what is not found is not damaged");
}

#[test]
fn the_longest_common_prefix_of_a_tail_wins() {
    let path = tempfile::tempdir().unwrap();
    let folder = open(path.path());
    put_prompt(&folder, 1, 1, 20);
    put_prompt(&folder, 1, 1, 50);
    let key = folder.root(&root("")).child(&ids(1, PAGE));
    let all = ids(1, 2 * PAGE);
    let (held, column) = folder.tail(&key, &all[PAGE..]).unwrap();
    assert_eq!((held.len(), column.start()), (50, PAGE));
    let mut question = all[PAGE..PAGE + 30].to_vec();
    question.push(7);
    assert_eq!(folder.tail(&key, &question).unwrap().0.len(), 50, "30 ids of it");
    assert!(folder.tail(&key, &[7]).is_none());
    let full = folder.tail(&folder.root(&root("")), &ids(1, 100)).unwrap();
    assert_eq!(full.0, ids(1, PAGE), "100 ids of a full column");
}

#[test]
fn a_column_is_written_once() {
    let path = tempfile::tempdir().unwrap();
    let folder = open(path.path());
    put_prompt(&folder, 1, 2, 0);
    let before: Vec<_> = files(path.path()).iter().map(|file| fs::read(file).unwrap()).collect();
    put_prompt(&folder, 1, 2, 0);
    let after: Vec<_> = files(path.path()).iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(before == after && before.len() == 2);
    let Counts { written, present, dropped, failed, .. } = folder.counts();
    assert_eq!((written, present, dropped, failed), (2, 2, 0, 0));
}

#[test]
fn damage_counts_as_absence_and_is_removed() {
    let path = tempfile::tempdir().unwrap();
    let folder = open(path.path());
    put_prompt(&folder, 1, 1, 0);
    let file = files(path.path()).remove(0);
    let sound = fs::read(&file).unwrap();
    let foreign = path.path().join("notes.safetensors");
    fs::write(&foreign, "mine").unwrap();
    // A byte of the header, of a key, of an id, and of the checksum; then a cut, and the file of another column.
    put_prompt(&open(path.path()), 2, 1, 0);
    let other = files(path.path()).into_iter().find(|found| *found != file && *found != foreign).unwrap();
    let mut damaged: Vec<Vec<u8>> = Vec::new();
    for at in [100, 5000, sound.len() - 30, sound.len() - 1] {
        let mut bytes = sound.clone();
        bytes[at] ^= 4;
        damaged.push(bytes);
    }
    damaged.extend([sound[..sound.len() / 2].to_vec(), fs::read(&other).unwrap()]);
    for bytes in damaged {
        fs::write(&file, bytes).unwrap();
        assert!(found(&folder, 1, 1).is_empty());
        assert!(!file.exists() && other.exists() && foreign.exists());
        put_prompt(&folder, 1, 1, 0);
        assert_eq!(fs::read(&file).unwrap(), sound);
        assert_eq!(found(&folder, 1, 1).len(), 1);
    }
    fs::write(&file, &sound[..50]).unwrap();
    assert!(folder.tail(&folder.root(&root("")), &ids(1, PAGE)).is_none());
}

#[test]
fn the_folder_stays_within_its_limit_and_loses_what_is_not_used() {
    let path = tempfile::tempdir().unwrap();
    let size = {
        let folder = open(path.path());
        put_prompt(&folder, 0, 1, 0);
        folder.counts().written_bytes
    };
    let foreign = path.path().join("notes");
    fs::write(&foreign, "mine").unwrap();
    // Whole columns are counted, and the header of the next one is not known: room for four.
    let folder = Folder::with_limit(path.path(), "model 1", &small(), 5 * size - 1).unwrap();
    let age = |seconds: u64| {
        for file in files(path.path()) {
            let file = fs::File::options().write(true).open(file).unwrap();
            let used = file.metadata().unwrap().modified().unwrap();
            file.set_modified(used - Duration::from_secs(seconds)).unwrap();
        }
    };
    put_prompt(&folder, 1, 3, 0);
    age(1000);
    let mapped = found(&folder, 0, 1).remove(0); // a use
    let before = bits(&mapped, &small(), PAGE);
    put_prompt(&folder, 2, 1, 0);
    put_prompt(&folder, 3, 1, 0);
    assert!(files(path.path()).len() <= 5 && foreign.exists());
    let held = [0, 1, 2, 3].map(|seed| found(&folder, seed, 3).len());
    assert_eq!(held, [1, 1, 1, 1], "of the prompt of three columns the last ones are gone");
    if cfg!(unix) {
        files(path.path()).into_iter().for_each(|file| fs::remove_file(file).unwrap());
    }
    assert_eq!(bits(&mapped, &small(), PAGE), before, "a removed file stays mapped");
}

#[test]
fn a_write_that_fails_is_counted_and_stops_further_writes() {
    let path = tempfile::tempdir().unwrap();
    let folder = Folder::with_limit(path.path(), "model 1", &small(), 100).unwrap();
    let column = columns(&small(), 0, PAGE, 1).remove(0);
    let key = folder.root(&root(""));
    assert!(folder.put(&key, &ids(1, PAGE), column.clone()));
    assert!(folder.flush(MINUTE));
    assert!(!folder.put(&key, &ids(2, PAGE), column));
    let Counts { written, dropped, failed, .. } = folder.counts();
    assert_eq!((written, dropped, failed), (0, 1, 1));
    assert!(files(path.path()).is_empty());
}

#[test]
fn a_queue_holds_no_more_than_it_may_and_ends_with_the_folder() {
    let path = tempfile::tempdir().unwrap();
    let huge = shape(KvType::F16, 1 << 16, 32, 96); // without memory: a column takes it layer by layer
    let folder = Folder::open(path.path(), "model 1", &huge).unwrap();
    assert!(!folder.put(&folder.root(&root("")), &ids(1, PAGE), Arc::new(Column::new(0, &huge))));
    assert_eq!(folder.counts().dropped, 1);

    let folder = open(path.path());
    let column = columns(&small(), 0, PAGE, 1).remove(0);
    for seed in 0..50 {
        assert!(folder.put(&folder.root(&root("")), &ids(seed, PAGE), column.clone()));
    }
    drop(folder);
    let until = Instant::now() + MINUTE;
    while Arc::strong_count(&column) > 1 {
        assert!(Instant::now() < until, "{} columns are still held", Arc::strong_count(&column) - 1);
        std::thread::yield_now();
    }
}

#[test]
fn a_folder_that_cannot_be_one_is_an_error() {
    let path = tempfile::tempdir().unwrap();
    let file = path.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("in it")] {
        let error = Folder::open(&path, "model 1", &small()).map(drop).unwrap_err();
        assert!(
            matches!(&error, Error::File { message, .. } if message.starts_with(&path.display().to_string())),
            "{error}"
        );
    }
    let new = path.path().join("a/b");
    open(&new);
    #[cfg(unix)]
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&new).unwrap().permissions()) & 0o777, 0o700);
}

#[test]
fn what_a_killed_process_left_is_removed_when_the_folder_opens() {
    let path = tempfile::tempdir().unwrap();
    put_prompt(&open(path.path()), 1, 1, 0);
    let file = files(path.path()).remove(0);
    let left = format!("{}.77-0123456789abcdef.incomplete", file.display());
    let foreign = path.path().join("mine.77-0123456789abcdef.incomplete");
    fs::write(&left, "a part").unwrap();
    fs::write(&foreign, "mine").unwrap();
    open(path.path());
    assert!(!Path::new(&left).exists() && foreign.exists() && file.exists());
}

#[test]
#[ignore = "the process that another test starts"]
fn child() {
    let Some(path) = std::env::var_os("KV_FOLDER_PATH") else { return };
    let folder = open(Path::new(&path));
    for seed in 0..20 {
        put_prompt(&folder, seed, 2, 10);
    }
}

#[test]
fn processes_share_a_folder() {
    let path = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let spawn = || {
        let mut command = Command::new(&program);
        command.args(["--exact", "child", "--ignored"]).env("KV_FOLDER_PATH", path.path());
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let children = [spawn(), spawn()];
    let folder = open(path.path());
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    for seed in 0..20 {
        let before = columns(&small(), 0, 2 * PAGE + 10, seed.into());
        let found = found(&folder, seed, 2);
        assert_eq!(found.len(), 2, "prompt {seed}");
        for (found, before) in found.iter().zip(&before) {
            assert_eq!(bits(found, &small(), PAGE), bits(before, &small(), PAGE));
        }
    }
    assert_eq!(files(path.path()).len(), 60);
}
