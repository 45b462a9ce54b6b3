//! The cache of the Hub on any platform: names that are links or not, names that exist already, locks, and listings whose
//! names claim too much.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::task::Poll;
use std::time::Duration;

use candle_phi::error::{Error, Result};
use candle_phi::files::hub::cache::{self, Repository};
use candle_phi::files::hub::checksum::Checksum;
use candle_phi::files::hub::listing::Listing;
use candle_phi::files::hub::lock::{Lock, Mode};
use candle_phi::files::hub::{Hub, Token, choice};
use candle_phi::system::task;
use tempfile::TempDir;

/// Counts the bytes that each thread has allocated.
struct Counting;

thread_local!(static ALLOCATED: Cell<usize> = const { Cell::new(0) });

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATED.try_with(|allocated| allocated.set(allocated.get() + layout.size()));
        // SAFETY: the caller's duties are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's duties are the same, and `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The bytes that `work` allocates, freed ones included.
fn allocated<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATED.get();
    let result = work();
    (result, ALLOCATED.get() - before)
}

const REPO: &str = "org/model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "76543210fedcba9876543210fedcba9876543210";
const CONTENT: &[u8] = b"GGUF and so on";

/// A cache in a folder whose name is not ASCII, with one content.
struct Cache {
    root: PathBuf,
    repository: Repository,
    checksum: Checksum,
    _folder: TempDir,
}

impl Cache {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("Jérôme 田中").join("hub");
        let repository = Repository::new(&hf_hub::Cache::new(root.clone()), REPO, "main");
        let checksum = Checksum::parse(&"5".repeat(64)).unwrap();
        let blob = repository.blob(&checksum);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, CONTENT).unwrap();
        repository.set_commit(COMMIT).unwrap();
        Cache { root, repository, checksum, _folder: folder }
    }

    fn hub(&self) -> Hub {
        Hub::new(None, Some(self.root.clone()), Token::None, true, Default::default()).unwrap()
    }

    fn link(&self, commit: &str, name: &str, place: cache::PlaceFile) -> PathBuf {
        let path = self.repository.link(commit, name, &self.checksum, place).unwrap();
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
        path
    }

    /// The files below the cache folder, without the locks, which stay.
    fn files(&self) -> Vec<PathBuf> {
        let (mut found, mut folders) = (Vec::new(), vec![self.root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true if path.ends_with(".locks") => {}
                    true => folders.push(path),
                    false => found.push(path),
                }
            }
        }
        found
    }
}

/// Runs work as a task, and waits for its end.
fn run<T: Send + 'static>(work: impl FnOnce(&task::Task) -> Result<T> + Send + 'static) -> Result<T> {
    let running = task::BackgroundTask::start(work)?;
    loop {
        match running.poll()? {
            Poll::Ready(result) => return Ok(result),
            Poll::Pending => running.wait()?,
        }
    }
}

#[test]
fn a_file_has_its_content_its_place_in_the_list_and_goes_with_its_bytes() {
    for name in ["model.gguf", "sub/folder/模型-q4.gguf"] {
        let cache = Cache::new();
        let path = cache.link(COMMIT, name, cache::move_file);
        assert_eq!(cache.link(COMMIT, name, cache::move_file), path, "again");
        let hub = cache.hub();
        assert_eq!(hub.cached(REPO, Some(name)).unwrap(), Some(path.clone()));
        let [listed] = &hub.list()[..] else { panic!("{:?}", hub.list()) };
        assert_eq!((listed.name.as_str(), &listed.path, listed.size), (name, &path, CONTENT.len() as u64));
        assert_eq!(listed.revisions, ["main"]);
        assert_eq!(hub.remove(REPO, None).unwrap(), CONTENT.len() as u64);
        assert_eq!(cache.files(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_content_of_two_names_stays_for_the_second() {
    let cache = Cache::new();
    cache.link(COMMIT, "a.gguf", cache::copy_file);
    let other = cache.link(OTHER, "b.gguf", cache::copy_file);
    cache.hub().remove(REPO, Some("a.gguf")).unwrap();
    assert_eq!(fs::read(other).unwrap(), CONTENT);
    cache.hub().remove(REPO, Some("b.gguf")).unwrap();
    assert_eq!(cache.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_content_is_brought_to_its_name_where_there_are_no_links() {
    let cache = Cache::new();
    let (blob, at) = (cache.repository.blob(&cache.checksum), |name| cache.root.join(name));
    cache::copy_file(&blob, &at("copy")).unwrap();
    cache::move_file(&blob, &at("moved")).unwrap();
    fs::write(at("old"), "old").unwrap();
    cache::move_file(&at("moved"), &at("old")).unwrap(); // what is there is replaced
    for name in ["copy", "old"] {
        assert_eq!(fs::read(at(name)).unwrap(), CONTENT, "{name}");
    }
    assert!(!blob.exists() && !at("moved").exists());
}

#[test]
fn a_branch_moves_on() {
    let cache = Cache::new();
    for commit in [OTHER, COMMIT, COMMIT] {
        cache.repository.set_commit(commit).unwrap();
        assert_eq!(cache.repository.commit().as_deref(), Some(commit));
    }
    let left: Vec<_> = fs::read_dir(cache.repository.folder().join("refs")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn hf_hub_finds_ours_and_we_find_its_refs() {
    let cache = Cache::new();
    let path = cache.link(COMMIT, "sub/model.gguf", cache::move_file);
    let theirs = hf_hub::Cache::new(cache.root.clone()).model(REPO.into());
    assert_eq!(theirs.get("sub/model.gguf"), Some(path));
    theirs.create_ref(OTHER).unwrap();
    assert_eq!(cache.repository.commit().as_deref(), Some(OTHER));
}

#[test]
fn a_content_has_one_writer_and_the_next_waits() {
    let cache = Cache::new();
    let path = cache.repository.lock(&cache.checksum);
    let first = Lock::try_new(&path, Mode::Exclusive).unwrap().unwrap();
    assert!(first.is_real);
    cache.link(COMMIT, "model.gguf", cache::move_file);
    assert!(matches!(cache.hub().remove(REPO, None), Err(Error::Busy(message)) if message.contains(REPO)));

    let (waits, waiting) = channel();
    let theirs = path.clone();
    let second = std::thread::spawn(move || {
        run(move |task| Ok(Lock::wait(&theirs, Mode::Exclusive, task, || waits.send(()).unwrap_or(()))?.is_real))
    });
    waiting.recv_timeout(Duration::from_secs(10)).expect("it has to wait");
    drop(first);
    assert_eq!(second.join().unwrap(), Ok(true));
    assert!(Lock::try_new(&path, Mode::Exclusive).unwrap().is_some());
    cache.hub().remove(REPO, None).unwrap();
}

#[test]
fn downloads_share_the_lock_of_a_repository_and_a_removal_does_not() {
    let cache = Cache::new();
    let path = cache.repository.repository_lock();
    let downloads = [(); 2].map(|()| Lock::try_new(&path, Mode::Shared).unwrap().unwrap());
    assert!(downloads.iter().all(|lock| lock.is_real));
    cache.link(COMMIT, "model.gguf", cache::move_file);
    assert!(matches!(cache.hub().remove(REPO, None), Err(Error::Busy(_))));
    assert!(matches!(cache.hub().remove(REPO, Some("model.gguf")), Err(Error::Busy(_))));
    drop(downloads);
    cache.hub().remove(REPO, None).unwrap();
}

#[test]
fn a_download_that_starts_during_a_removal_waits_for_its_end() {
    let cache = Cache::new();
    cache.link(COMMIT, "model.gguf", cache::move_file);
    // a download that was interrupted: its content has a lock file, and no name
    let other = Checksum::parse(&"6".repeat(64)).unwrap();
    drop(Lock::try_new(&cache.repository.lock(&other), Mode::Exclusive).unwrap());
    let paths = [
        (cache.repository.repository_lock(), Mode::Shared),
        (cache.repository.lock(&other), Mode::Exclusive), // as other tools lock
    ];
    let (root, (waits, waiting)) = (cache.repository.folder(), channel());
    let mut downloads = Vec::new();
    let started = std::cell::RefCell::new(&mut downloads);
    let freed = cache.repository.remove(|name| {
        assert_eq!(name, "model.gguf");
        for (path, mode) in paths.clone() {
            let (waits, root) = (waits.clone(), root.clone());
            started.borrow_mut().push(std::thread::spawn(move || {
                run(move |task| {
                    let _lock = Lock::wait(&path, mode, task, || waits.send(()).unwrap_or(()))?;
                    Ok(root.exists())
                })
            }));
            waiting.recv_timeout(Duration::from_secs(10)).expect("it has to wait");
        }
        true
    });
    assert_eq!(freed, Ok(CONTENT.len() as u64));
    assert_eq!(downloads.len(), 2);
    for download in downloads {
        assert_eq!(download.join().unwrap(), Ok(false), "it ran before the end of the removal");
    }
    assert_eq!(cache.files(), Vec::<PathBuf>::new());
}

/// A listing as the Hub writes it.
fn listing(names: impl Iterator<Item = String>) -> Vec<u8> {
    let files: Vec<_> = names.map(|name| format!(r#"{{"rfilename":"{name}","size":5}}"#)).collect();
    format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, files.join(",")).into_bytes()
}

#[test]
fn a_listing_takes_memory_by_its_own_size_whatever_its_names_claim() {
    let claims = |n: usize| listing((0..n).map(|i| format!("a{i:04}-00001-of-99999.gguf")));
    for (names, wanted, expected) in [
        (2000, None, "there are 2000 GGUF models"),
        (2000, Some("*.gguf"), "2000 models match"),
        (1, None, r#""a0000-00002-of-99999.gguf" is missing"#),
        (2000, Some("a1999*"), r#""a1999-00002-of-99999.gguf" is missing"#),
        (2000, Some("a1999-00001-of-99999.gguf"), r#""a1999-00002-of-99999.gguf" is missing"#),
    ] {
        let body = claims(names);
        let (found, bytes) = allocated(|| {
            let files = Listing::parse(&body, || Ok(())).unwrap().unwrap().sizes();
            choice::among(REPO, &files, wanted, || Ok(()))
        });
        let Err(Error::ModelNotFound(message)) = found else { panic!("{found:?}") };
        assert!(message.contains(expected), "{message}");
        assert!(message.len() < 2000, "{} characters", message.len());
        assert!(bytes < 40 * body.len() + 10_000, "{bytes} bytes for a listing of {}", body.len());
    }
}

#[test]
fn a_large_listing_can_be_cancelled() {
    let body = listing((0..100).map(|i| format!("a{i}.gguf")));
    let calls = Cell::new(0);
    let check = || {
        calls.set(calls.get() + 1);
        if calls.get() == 50 { Err(Error::Cancelled) } else { Ok(()) }
    };
    assert!(matches!(Listing::parse(&body, check), Err(Error::Cancelled)));
    let files = Listing::parse(&body, || Ok(())).unwrap().unwrap().sizes();
    calls.set(0);
    assert_eq!(choice::among(REPO, &files, None, check), Err(Error::Cancelled));
}

#[test]
fn all_parts_of_the_one_model() {
    let files = |names: &[&str]| names.iter().map(|&name| (name.to_owned(), 5)).collect::<Vec<_>>();
    let parts = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"];
    for names in [parts, [parts[1], parts[0]]] {
        for wanted in [None, Some("*"), Some(parts[0]), Some(parts[1])] {
            assert_eq!(choice::among(REPO, &files(&names), wanted, || Ok(())).unwrap(), parts);
        }
    }
    // one stem, two models
    let both = files(&[parts[0], parts[1], "a-00001-of-00001.gguf"]);
    assert!(choice::among(REPO, &both, None, || Ok(())).is_err());
    assert_eq!(choice::among(REPO, &both, Some("*-of-00001.gguf"), || Ok(())).unwrap(), ["a-00001-of-00001.gguf"]);
}
