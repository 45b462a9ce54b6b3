//! The cache of the Hub on any platform: names that are links or not, names that exist already, and locks.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::task::Poll;
use std::time::Duration;

use candle_phi::error::{Error, Result};
use candle_phi::hub::cache::{self, Repository};
use candle_phi::hub::checksum::Checksum;
use candle_phi::hub::{Hub, Token, lock};
use candle_phi::task;
use tempfile::TempDir;

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
        let repository = Repository::new(&root, REPO);
        let checksum = Checksum::parse(&"5".repeat(64)).unwrap();
        let blob = repository.blob(&checksum);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, CONTENT).unwrap();
        repository.set_commit("main", COMMIT).unwrap();
        Cache { root, repository, checksum, _folder: folder }
    }

    fn hub(&self) -> Hub {
        Hub::new(None, Some(self.root.clone()), Token::None, true, Default::default()).unwrap()
    }

    fn link(&self, commit: &str, name: &str, place: cache::Place) -> PathBuf {
        let path = self.repository.link(commit, name, &self.checksum, place).unwrap();
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
        path
    }

    /// What is left below the cache folder.
    fn files(&self) -> Vec<PathBuf> {
        let (mut found, mut folders) = (Vec::new(), vec![self.root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { found.push(path) }
            }
        }
        found
    }
}

/// Runs work as a task whose caller waits to its end.
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
        let path = cache.link(COMMIT, name, cache::moved);
        assert_eq!(cache.link(COMMIT, name, cache::moved), path, "again");
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
    cache.link(COMMIT, "a.gguf", cache::copied);
    let other = cache.link(OTHER, "b.gguf", cache::copied);
    cache.hub().remove(REPO, Some("a.gguf")).unwrap();
    assert_eq!(fs::read(other).unwrap(), CONTENT);
    cache.hub().remove(REPO, Some("b.gguf")).unwrap();
    assert_eq!(cache.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_content_is_brought_to_its_name_where_there_are_no_links() {
    let cache = Cache::new();
    let (blob, at) = (cache.repository.blob(&cache.checksum), |name| cache.root.join(name));
    cache::copied(&blob, &at("copy")).unwrap();
    cache::moved(&blob, &at("moved")).unwrap();
    fs::write(at("old"), "old").unwrap();
    cache::moved(&at("moved"), &at("old")).unwrap(); // what is there is replaced
    for name in ["copy", "old"] {
        assert_eq!(fs::read(at(name)).unwrap(), CONTENT, "{name}");
    }
    assert!(!blob.exists() && !at("moved").exists());
}

#[test]
fn a_branch_moves_on() {
    let cache = Cache::new();
    for commit in [OTHER, COMMIT, COMMIT] {
        cache.repository.set_commit("main", commit).unwrap();
        assert_eq!(cache.repository.commit("main").as_deref(), Some(commit));
    }
    let left: Vec<_> = fs::read_dir(cache.repository.folder().join("refs")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn one_holds_a_lock_and_the_next_waits_for_it() {
    let cache = Cache::new();
    let path = cache.repository.lock(&cache.checksum);
    let first = {
        let path = path.clone();
        run(move |task| Ok(lock::wait(&path, task, || panic!("nobody has it"))?.unwrap())).unwrap()
    };
    assert!(first.is_real && lock::is_held(&path));
    cache.link(COMMIT, "model.gguf", cache::moved);
    assert!(matches!(cache.hub().remove(REPO, None), Err(Error::Busy(_))));

    let (waits, waiting) = channel();
    let theirs = path.clone();
    let second = std::thread::spawn(move || {
        run(move |task| Ok(lock::wait(&theirs, task, || waits.send(()).unwrap_or(()))?.unwrap().is_real))
    });
    waiting.recv_timeout(Duration::from_secs(10)).expect("it has to wait");
    drop(first);
    assert_eq!(second.join().unwrap(), Ok(true));
    assert!(!lock::is_held(&path));
    cache.hub().remove(REPO, None).unwrap();
}
