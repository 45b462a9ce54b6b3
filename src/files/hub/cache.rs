//! The cache folder that Hugging Face's tools share: contents under their checksums, and names that link to them.
//!
//! ```text
//! models--org--name/blobs/<checksum>                  the contents, each once
//! models--org--name/blobs/<checksum>.incomplete       the part of a content that has arrived
//! models--org--name/snapshots/<commit>/<file>         links into blobs
//! models--org--name/refs/<branch or tag>              its commit at the last download
//! .locks/models--org--name/<checksum>.lock            exclusive while a content is written
//! .locks/models--org--name/repository.lock            ours: shared by downloads, exclusive while files are removed
//! ```
//!
//! `hf_hub` names the folders of a repository and of a commit. Three of its functions are not used: `Cache::from_env`
//! panics without a home folder and reads HF_HOME alone, `CacheRepo::get` joins any text of a ref to a path and knows no
//! commits, and `CacheRepo::create_ref` empties a ref before it writes. Paths of blobs and URLs need its HTTP client.
//!
//! Decisions: docs/design/hub.md

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

use super::checksum::Checksum;
use super::lock::{Lock, Mode};
use super::name::{is_commit, is_inside};
use crate::error::{Error, Result};

/// The name of the lock on a whole repository.
const REPOSITORY_LOCK: &str = "repository.lock";

/// A repository at a revision, in the cache.
#[derive(Clone, Debug)]
pub struct Repository {
    id: String,
    cache: Cache,
    repo: Repo,
}

/// A file in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedFile {
    pub repo: String,
    pub name: String,
    pub commit: String,
    /// Branches and tags at this commit, as far as the cache knows.
    pub revisions: Vec<String>,
    pub path: PathBuf,
    pub size: u64,
}

impl Repository {
    pub fn new(cache: &Cache, id: &str, revision: &str) -> Self {
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        Repository { id: id.to_owned(), cache: cache.clone(), repo }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn revision(&self) -> &str {
        self.repo.revision()
    }

    pub fn folder(&self) -> PathBuf {
        self.cache.path().join(self.repo.folder_name())
    }

    /// The commit of the revision at the last download.
    pub fn commit(&self) -> Option<String> {
        self.commit_of(self.revision())
    }

    fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder().join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.repo.clone()).pointer_path(commit)
    }

    /// A file of a commit, if the cache has it.
    pub fn file(&self, commit: &str, name: &str) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(name);
        path.is_file().then_some(path)
    }

    /// The files of a commit that the cache has: names and sizes.
    pub fn files(&self, commit: &str) -> Vec<(String, u64)> {
        let root = self.snapshot(commit);
        let mut found = Vec::new();
        let mut folders = vec![(root, String::new())];
        while let Some((folder, prefix)) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let name = format!("{prefix}{name}");
                // links to folders are not followed: they could form a circle
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push((entry.path(), name + "/"));
                } else if let Some(file) = fs::metadata(entry.path()).ok().filter(fs::Metadata::is_file) {
                    found.push((name, file.len()));
                }
            }
        }
        found.sort();
        found
    }

    pub fn commits(&self) -> Vec<String> {
        names(&self.folder().join("snapshots")).into_iter().filter(|name| is_commit(name)).collect()
    }

    /// Branches and tags at a commit.
    fn revisions(&self, commit: &str) -> Vec<String> {
        let at = |revision: &String| self.commit_of(revision).as_deref() == Some(commit);
        names(&self.folder().join("refs")).into_iter().filter(at).collect()
    }

    pub fn blob(&self, checksum: &Checksum) -> PathBuf {
        self.folder().join("blobs").join(checksum.hex())
    }

    fn locks(&self) -> PathBuf {
        self.cache.path().join(".locks").join(self.repo.folder_name())
    }

    /// The lock file of a content.
    pub fn lock(&self, checksum: &Checksum) -> PathBuf {
        self.locks().join(format!("{}.lock", checksum.hex()))
    }

    /// The lock file of the whole repository.
    pub fn repository_lock(&self) -> PathBuf {
        self.locks().join(REPOSITORY_LOCK)
    }

    /// Gives a content its name by a link. Where the file system has no links, `place` puts the content itself there:
    /// `move_file`, so that it takes its space once and goes with its name, or `copy_file` if others link to it.
    pub fn link(&self, commit: &str, name: &str, checksum: &Checksum, place: PlaceFile) -> io::Result<PathBuf> {
        if !is_commit(commit) || !is_inside(name) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the file name leads out of the cache"));
        }
        let path = self.snapshot(commit).join(name);
        if path.is_file() {
            return Ok(path);
        }
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        if path.is_symlink() {
            fs::remove_file(&path)?; // a broken link
        }
        let up = "../".repeat(name.split('/').count() + 1);
        let linked = symlink(Path::new(&format!("{up}blobs/{}", checksum.hex())), &path);
        if path.is_file() {
            return Ok(path); // also if another process was faster
        }
        if linked.is_ok() {
            let _ = fs::remove_file(&path); // Windows can make links and refuse to follow them
        }
        let placed = place(&self.blob(checksum), &path);
        if path.is_file() { Ok(path) } else { placed.map(|()| path) }
    }

    /// Records the commit of the revision.
    pub fn set_commit(&self, commit: &str) -> io::Result<()> {
        if self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder().join("refs").join(self.revision());
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        let new = beside(&path);
        fs::write(&new, commit)?;
        fs::rename(&new, &path)
    }

    /// The checksum of a file's content, if the file is a link: the name of the link's target.
    pub fn checksum(&self, path: &Path) -> Option<Checksum> {
        let target = fs::read_link(path).ok()?;
        Checksum::parse(target.file_name()?.to_str()?)
    }

    /// Removes the files of any commit that `select` returns true for, and contents that no other name links to. Returns the bytes
    /// that became free. Fails if a download is under way; a download that starts meanwhile waits.
    pub fn remove(&self, select: impl Fn(&str) -> bool) -> Result<u64> {
        // Held to the end. Other tools have no lock on the repository, but they lock each content.
        let _locks = self.lock_all()?;
        self.remove_unlocked(select).map_err(|error| {
            Error::download(format!("{}: some files could not be removed: {error}", self.folder().display()))
        })
    }

    /// The exclusive locks on the repository and on every content.
    fn lock_all(&self) -> Result<Vec<Lock>> {
        let contents = names(&self.locks()).into_iter().filter(|name| name != REPOSITORY_LOCK);
        let paths = std::iter::once(self.repository_lock()).chain(contents.map(|name| self.locks().join(name)));
        let lock = |path: PathBuf| {
            let busy = || Error::Busy(format!("{} is in use: another download or removal is under way", self.id));
            Lock::try_new(&path, Mode::Exclusive)?.ok_or_else(busy)
        };
        paths.map(lock).collect()
    }

    fn remove_unlocked(&self, select: impl Fn(&str) -> bool) -> io::Result<u64> {
        let (mut unlinked, mut kept, mut freed) = (BTreeSet::new(), BTreeSet::new(), 0);
        let mut is_empty = true;
        for commit in self.commits() {
            for (name, size) in self.files(&commit) {
                let path = self.snapshot(&commit).join(&name);
                let content = self.checksum(&path).map(|checksum| self.blob(&checksum));
                if !select(&name) {
                    is_empty = false;
                    kept.extend(content);
                    continue;
                }
                fs::remove_file(&path)?;
                match content {
                    Some(blob) => drop(unlinked.insert((blob, size))),
                    None => freed += size,
                }
            }
        }
        for (blob, size) in unlinked.into_iter().filter(|(blob, _)| !kept.contains(blob)) {
            match fs::remove_file(&blob) {
                Ok(()) => freed += size,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let folder = self.folder();
        if is_empty && folder.is_dir() {
            // contents without a name: incomplete ones, and those that are linked from elsewhere
            let blobs = folder.join("blobs");
            let size = |name: String| fs::metadata(blobs.join(name)).map_or(0, |file| file.len());
            freed += names(&blobs).into_iter().map(size).sum::<u64>();
            fs::remove_dir_all(&folder)?;
        }
        Ok(freed)
    }
}

/// Every GGUF file in the cache, by repository and name.
pub fn scan(cache: &Cache) -> Vec<CachedFile> {
    let mut found = Vec::new();
    for folder in names(cache.path()) {
        let Some(repo) = folder.strip_prefix("models--").map(|name| name.replacen("--", "/", 1)) else { continue };
        let repository = Repository::new(cache, &repo, "main");
        for commit in repository.commits() {
            let revisions = repository.revisions(&commit);
            for (name, size) in repository.files(&commit) {
                if name.ends_with(".gguf") {
                    let path = repository.snapshot(&commit).join(&name);
                    let (repo, commit, revisions) = (repo.clone(), commit.clone(), revisions.clone());
                    found.push(CachedFile { repo, name, commit, revisions, path, size });
                }
            }
        }
    }
    found.sort_by(|a, b| (&a.repo, &a.name, &a.commit).cmp(&(&b.repo, &b.name, &b.commit)));
    found
}

/// An error of the file system, with a way out.
pub fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::download(format!("{}: {error}; set HF_HUB_CACHE or cache_dir to use another folder", path.display()))
}

/// A path in the same folder that no other process uses.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    let unique = getrandom::u64().unwrap_or_default();
    name.push(format!(".{}-{unique:016x}.incomplete", std::process::id()));
    path.with_file_name(name)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Puts a content where its name is.
pub type PlaceFile = fn(&Path, &Path) -> io::Result<()>;

pub fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let new = beside(to);
    fs::copy(from, &new).and_then(|_| fs::rename(&new, to)).inspect_err(|_| drop(fs::remove_file(&new)))
}

pub fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to).or_else(|_| copy_file(from, to))
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target.to_string_lossy().replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}
