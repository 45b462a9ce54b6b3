//! The cache folder that Hugging Face's tools share: contents under their checksums, and names that link to them.
//!
//! ```text
//! models--org--name/blobs/<checksum>                  the contents, each once
//! models--org--name/blobs/<checksum>.incomplete       as much as has arrived
//! models--org--name/snapshots/<commit>/<file>         links into blobs
//! models--org--name/refs/<branch or tag>              the commit that it was
//! .locks/models--org--name/<checksum>.lock            held while a content is written
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use hf_hub::Repo;

use super::checksum::Checksum;
use super::name::{is_commit, is_inside};

/// One repository's place in the cache.
#[derive(Clone, Debug)]
pub struct Repository {
    folder: PathBuf,
    locks: PathBuf,
}

/// A file that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedFile {
    pub repo: String,
    pub name: String,
    pub commit: String,
    /// Branches and tags that are at this commit, as far as the cache knows.
    pub revisions: Vec<String>,
    pub path: PathBuf,
    pub size: u64,
}

impl Repository {
    pub fn new(cache_dir: &Path, repo: &str) -> Self {
        let name = Repo::model(repo.to_owned()).folder_name();
        Repository { folder: cache_dir.join(&name), locks: cache_dir.join(".locks").join(name) }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit that a revision was when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// A file of a commit, if it is there.
    pub fn file(&self, commit: &str, name: &str) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(name);
        path.is_file().then_some(path)
    }

    /// All files of a commit that are there: names and sizes.
    pub fn files(&self, commit: &str) -> Vec<(String, u64)> {
        let root = self.snapshot(commit);
        let mut found = Vec::new();
        let mut folders = vec![(root, String::new())];
        while let Some((folder, prefix)) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let name = format!("{prefix}{name}");
                // a folder is descended into, a link to one is not: it could lead in a circle
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
        names(&self.folder.join("snapshots")).into_iter().filter(|name| is_commit(name)).collect()
    }

    /// Branches and tags at a commit.
    fn revisions(&self, commit: &str) -> Vec<String> {
        let at = |revision: &String| self.commit(revision).as_deref() == Some(commit);
        names(&self.folder.join("refs")).into_iter().filter(at).collect()
    }

    pub fn blob(&self, checksum: &Checksum) -> PathBuf {
        self.folder.join("blobs").join(checksum.hex())
    }

    pub fn lock(&self, checksum: &Checksum) -> PathBuf {
        self.locks.join(format!("{}.lock", checksum.hex()))
    }

    /// All lock files of the repository.
    pub fn locks(&self) -> Vec<PathBuf> {
        names(&self.locks).into_iter().map(|name| self.locks.join(name)).collect()
    }

    /// Gives a content its name: by a link. Where the file system has none, `place` brings the content itself there: a
    /// `moved` one, so that it takes its room once and goes with its name, or a `copied` one that others link to.
    pub fn link(&self, commit: &str, name: &str, checksum: &Checksum, place: Place) -> io::Result<PathBuf> {
        if !is_commit(commit) || !is_inside(name) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the name leads out of the cache"));
        }
        let path = self.snapshot(commit).join(name);
        if path.is_file() {
            return Ok(path);
        }
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        if path.is_symlink() {
            fs::remove_file(&path)?; // it leads nowhere
        }
        let up = "../".repeat(name.split('/').count() + 1);
        let linked = symlink(Path::new(&format!("{up}blobs/{}", checksum.hex())), &path);
        if path.is_file() {
            return Ok(path); // also where another process was faster
        }
        if linked.is_ok() {
            let _ = fs::remove_file(&path); // Windows may make links and be told not to follow them
        }
        let placed = place(&self.blob(checksum), &path);
        if path.is_file() { Ok(path) } else { placed.map(|()| path) }
    }

    /// Notes that a branch or tag is at a commit.
    pub fn set_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        let new = beside(&path);
        fs::write(&new, commit)?;
        fs::rename(&new, &path)
    }

    /// The checksum of a file's content as far as the cache tells: what the file links to.
    pub fn checksum(&self, path: &Path) -> Option<Checksum> {
        let target = fs::read_link(path).ok()?;
        Checksum::parse(target.file_name()?.to_str()?)
    }

    /// Removes files of any commit, and contents that no other name links to. Returns the bytes that are free again.
    pub fn remove(&self, which: impl Fn(&str) -> bool) -> io::Result<u64> {
        let (mut gone, mut kept, mut freed) = (BTreeSet::new(), BTreeSet::new(), 0);
        let mut all_gone = true;
        for commit in self.commits() {
            for (name, size) in self.files(&commit) {
                let path = self.snapshot(&commit).join(&name);
                let content = self.checksum(&path).map(|checksum| self.blob(&checksum));
                if !which(&name) {
                    all_gone = false;
                    kept.extend(content);
                    continue;
                }
                fs::remove_file(&path)?;
                match content {
                    Some(blob) => drop(gone.insert((blob, size))),
                    None => freed += size,
                }
            }
        }
        for (blob, size) in gone.into_iter().filter(|(blob, _)| !kept.contains(blob)) {
            match fs::remove_file(&blob) {
                Ok(()) => freed += size,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if all_gone && self.folder.is_dir() {
            // what has no name: unfinished contents, and those that were linked from elsewhere
            freed += names(&self.folder.join("blobs"))
                .iter()
                .filter_map(|name| fs::metadata(self.folder.join("blobs").join(name)).ok())
                .map(|file| file.len())
                .sum::<u64>();
            fs::remove_dir_all(&self.folder)?;
        }
        Ok(freed)
    }
}

/// Every GGUF file in the cache, by repository and name.
pub fn scan(cache_dir: &Path) -> Vec<CachedFile> {
    let mut found = Vec::new();
    for folder in names(cache_dir) {
        let Some(repo) = folder.strip_prefix("models--").map(|name| name.replacen("--", "/", 1)) else { continue };
        let repository = Repository::new(cache_dir, &repo);
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

/// A path in the same folder that nobody else has.
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

/// How a content gets to where its name is.
pub type Place = fn(&Path, &Path) -> io::Result<()>;

pub fn copied(from: &Path, to: &Path) -> io::Result<()> {
    let new = beside(to);
    fs::copy(from, &new).and_then(|_| fs::rename(&new, to)).inspect_err(|_| drop(fs::remove_file(&new)))
}

pub fn moved(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to).or_else(|_| copied(from, to))
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
