//! Models of the Hugging Face Hub: found in the cache that its tools share, or fetched into it.
//!
//! ```text
//! Hub::download             hub           what is in the cache needs no network
//!   choice::among           choice        which file, where it was not named
//!   remote::metadata        remote        its commit, checksum and size
//!     Client::ask           client        one request: tls, proxy, token, redirects
//!   transfer::fetch         transfer      resumed, checked, synced, renamed
//!     lock::wait            lock          one writer at a time
//!   Repository::link        cache         the content's name
//! ```
//!
//! Without the cargo feature `hub` there is no network in the build, and all the rest.
//!
//! Decisions: docs/design/hub.md

pub mod cache;
pub mod checksum;
pub mod choice;
#[cfg(feature = "hub")]
mod client;
pub mod environment;
pub mod lock;
pub mod name;
#[cfg(feature = "hub")]
mod proxy;
#[cfg(feature = "hub")]
mod remote;
#[cfg(feature = "hub")]
mod tls;
#[cfg(feature = "hub")]
mod transfer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;

use cache::{CachedFile, Repository};
use checksum::Checksum;
pub use environment::cache_dir;

use crate::error::{Error, Result};
use crate::task::{Phase, Task};

/// The repository and file of the model that `candle-phi PROMPT` runs.
pub const DEFAULT_REPO: &str = choice::KNOWN[0].repo;
pub const DEFAULT_FILE: &str = choice::KNOWN[0].file;

/// Which token to send to the Hub, and to no other host.
#[derive(Clone, Debug, Default)]
pub enum Token {
    /// The environment's, if it has one.
    #[default]
    Environment,
    /// The environment's, which must have one.
    Required,
    None,
    Given(String),
}

/// How to reach the Hub, and where to keep what comes from it.
#[derive(Clone, Debug)]
pub struct Hub {
    cache_dir: PathBuf,
    revision: String,
    pub token: Token,
    local_files_only: bool,
    /// By scheme, and `no`: what to take where the environment names no proxy.
    pub system_proxies: BTreeMap<String, String>,
}

/// What the Hub has in a repository.
#[derive(Debug)]
pub struct Info {
    pub repo: String,
    pub commit: String,
    /// Name, size, SHA-256 if it is a large file.
    pub files: Vec<(String, u64, Option<String>)>,
}

impl Hub {
    /// `revision` None: `main`; `cache_dir` None: the environment's.
    pub fn new(
        revision: Option<String>,
        cache_dir: Option<PathBuf>,
        token: Token,
        local_files_only: bool,
        system_proxies: BTreeMap<String, String>,
    ) -> Result<Self> {
        let revision = revision.unwrap_or_else(|| "main".into());
        name::check_revision(&revision)?;
        let cache_dir = cache_dir.or_else(environment::cache_dir).ok_or_else(|| {
            Error::download("there is no home folder to keep downloads in: set HF_HOME or pass cache_dir".into())
        })?;
        // Windows takes long paths where they are absolute
        let cache_dir = std::path::absolute(&cache_dir).unwrap_or(cache_dir);
        Ok(Hub { cache_dir, revision, token, local_files_only, system_proxies })
    }

    fn repository(&self, repo: &str) -> Repository {
        Repository::new(&self.cache_dir, repo)
    }

    /// The first part of a model, or any other file, if all parts are in the cache. Asks nobody. `filename` None: what
    /// a known repository is known for, else the only GGUF model that is there.
    pub fn cached(&self, repo: &str, filename: Option<&str>) -> Result<Option<PathBuf>> {
        let repo = choice::repo(repo);
        name::check_repo(repo)?;
        filename.map_or(Ok(()), check_file)?;
        let repository = self.repository(repo);
        let Some(commit) = repository.commit(&self.revision) else { return Ok(None) };
        let wanted = choice::filename(repo, filename);
        let parts = match wanted {
            Some(name) if !name::is_glob(name) => name::parts(name),
            _ => match choice::among(&repository.files(&commit), wanted) {
                Ok(parts) => parts,
                Err(_) => return Ok(None),
            },
        };
        let mut paths = parts.iter().map(|name| repository.file(&commit, name));
        let first = paths.next().flatten();
        Ok(first.filter(|_| paths.all(|path| path.is_some())))
    }

    /// The same, and what is not in the cache is fetched.
    pub fn download(&self, repo: &str, filename: Option<&str>, task: &Task) -> Result<PathBuf> {
        match self.cached(repo, filename)? {
            Some(path) => Ok(path),
            None => self.fetch(choice::repo(repo), filename, task),
        }
    }

    /// Why the network may not be used, if so.
    fn offline(&self, what: &str) -> Result<()> {
        let why = if self.local_files_only { Some("local_files_only") } else { environment::offline() };
        let Some(why) = why else { return Ok(()) };
        let cache = self.cache_dir.display();
        Err(Error::Offline(format!(
            "{what} is not in the cache {cache} at revision {:?}, and {why} is set",
            self.revision
        )))
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, repo: &str, filename: Option<&str>, _: &Task) -> Result<PathBuf> {
        self.offline(&described(repo, filename))?;
        Err(without_network())
    }

    #[cfg(feature = "hub")]
    fn fetch(&self, repo: &str, filename: Option<&str>, task: &Task) -> Result<PathBuf> {
        self.offline(&described(repo, filename))?;
        let client = self.client(task)?;
        let repository = self.repository(repo);
        let mut revision = self.revision.clone();
        let parts = match choice::filename(repo, filename) {
            Some(name) if !name::is_glob(name) => name::parts(name),
            wanted => {
                let listing = remote::listing(&client, repo, &revision)?;
                let found = choice::among(&listing.sizes(), wanted);
                revision = listing.commit; // one commit for the list and the files
                found.map_err(|why| {
                    Error::ModelNotFound(format!("{repo}: {why}; filename= takes one of them, or a pattern"))
                })?
            }
        };
        let mut remotes = Vec::new();
        for name in &parts {
            let remote = remote::metadata(&client, repo, &revision, name)
                .map_err(|error| remote::with_listing(error, &client, repo, &self.revision, task))?;
            revision.clone_from(&remote.commit); // and for all parts
            remotes.push(remote);
        }
        let mut share = transfer::Share { before: 0, total: remotes.iter().map(|remote| remote.size).sum() };
        let mut first = None;
        for (remote, name) in remotes.iter().zip(&parts) {
            let path = transfer::fetch(&client, &repository, remote, name, share)?;
            share.before += remote.size;
            first.get_or_insert(path);
        }
        let noted = repository.set_commit(&self.revision, &revision);
        noted.map_err(|error| transfer::unwritable(repository.folder(), &error))?;
        first.ok_or_else(|| Error::Internal("a model has no parts".into()))
    }

    #[cfg(feature = "hub")]
    fn client(&self, task: &Task) -> Result<client::Client> {
        let token = match &self.token {
            Token::None => None,
            Token::Environment if environment::token_is_explicit() => None,
            Token::Environment => environment::token(),
            Token::Required => Some(environment::token().ok_or_else(|| {
                Error::option("token", "is True, and none is set: set HF_TOKEN, or log in with Hugging Face's tools")
            })?),
            Token::Given(token) => Some(token.trim().to_owned()),
        };
        if token.as_ref().is_some_and(|token| token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::option("token", "is empty, or has characters that no token has"));
        }
        client::Client::new(token, &self.system_proxies, task)
    }

    /// Which files a repository has. Always asks the Hub.
    #[cfg(feature = "hub")]
    pub fn info(&self, repo: &str, task: &Task) -> Result<Info> {
        let repo = choice::repo(repo);
        name::check_repo(repo)?;
        self.offline(&format!("the list of files of {repo}"))?;
        let listing = remote::listing(&self.client(task)?, repo, &self.revision)?;
        let sha256 = |checksum| match checksum {
            Some(Checksum::Sha256(hex)) => Some(hex),
            _ => None,
        };
        let files = listing.files.into_iter().map(|file| (file.name, file.size, sha256(file.checksum))).collect();
        Ok(Info { repo: repo.to_owned(), commit: listing.commit, files })
    }

    #[cfg(not(feature = "hub"))]
    pub fn info(&self, _: &str, _: &Task) -> Result<Info> {
        Err(without_network())
    }

    /// Every GGUF file in the cache.
    pub fn list(&self) -> Vec<CachedFile> {
        cache::scan(&self.cache_dir)
    }

    /// The GGUF files in the cache of a repository, or of all, with this name or pattern.
    fn select(&self, repo: Option<&str>, filename: Option<&str>) -> Result<Vec<CachedFile>> {
        let repo = repo.map(choice::repo);
        repo.map_or(Ok(()), name::check_repo)?;
        let mut files = self.list();
        files.retain(|file| {
            repo.is_none_or(|repo| file.repo == repo)
                && filename.is_none_or(|wanted| file.name == wanted || name::matches(wanted, &file.name))
        });
        if files.is_empty() && repo.is_some() {
            return Err(Error::ModelNotFound(format!(
                "{} is not in the cache {}",
                described(repo.unwrap_or_default(), filename),
                self.cache_dir.display()
            )));
        }
        Ok(files)
    }

    /// Hashes what is in the cache anew. Every file is looked at; the error names those that are damaged.
    pub fn verify(&self, repo: Option<&str>, filename: Option<&str>, task: &Task) -> Result<Vec<CachedFile>> {
        let files = self.select(repo, filename)?;
        let total = files.iter().map(|file| file.size).sum();
        let mut before = 0;
        let mut damaged = Vec::new();
        for file in &files {
            let hash = |checksum: &Checksum| -> Result<Checksum> {
                let unreadable = |error: io::Error| Error::download(format!("{}: {error}", file.path.display()));
                let mut open = File::open(&file.path).map_err(unreadable)?;
                let mut hasher = checksum.hasher(file.size);
                let mut done = before;
                hasher.read(&mut open, |n| {
                    done += n;
                    task.report(Phase::Verify, done, Some(total));
                    task.check().map_err(Stop::Cancelled)
                })?;
                Ok(hasher.finish())
            };
            let expected = match self.repository(&file.repo).checksum(&file.path) {
                Some(expected) => expected,
                None => self.expected(file, task)?,
            };
            let found = hash(&expected)?;
            if found != expected {
                let (path, found, expected) = (file.path.display(), found.hex(), expected.hex());
                damaged.push(format!("{path} has the checksum {found} where {expected} is due"));
            }
            before += file.size;
        }
        if damaged.is_empty() {
            return Ok(files);
        }
        Err(Error::InvalidModel(format!("{}; `candle-phi rm` makes room for a new download", damaged.join("; "))))
    }

    /// The checksum of a file that is no link, as where the file system has none: the Hub knows it.
    #[cfg(feature = "hub")]
    fn expected(&self, file: &CachedFile, task: &Task) -> Result<Checksum> {
        self.offline(&format!("the checksum of {}", file.path.display()))?;
        let listing = remote::listing(&self.client(task)?, &file.repo, &file.commit)?;
        let listed = listing.files.into_iter().find(|listed| listed.name == file.name);
        listed.and_then(|listed| listed.checksum).ok_or_else(|| {
            Error::download(format!("the Hub has no checksum of {} in {} at {}", file.name, file.repo, file.commit))
        })
    }

    #[cfg(not(feature = "hub"))]
    fn expected(&self, file: &CachedFile, _: &Task) -> Result<Checksum> {
        self.offline(&format!("the checksum of {}", file.path.display()))?;
        Err(without_network())
    }

    /// Removes a repository's files from the cache, or those with this name or pattern. Returns the bytes that are free
    /// again.
    pub fn remove(&self, repo: &str, filename: Option<&str>) -> Result<u64> {
        let repo = choice::repo(repo);
        name::check_repo(repo)?;
        let repository = self.repository(repo);
        if !repository.folder().is_dir() || filename.is_some() {
            self.select(Some(repo), filename)?;
        }
        if repository.locks().iter().any(|path| lock::is_held(path)) {
            return Err(Error::Busy(format!("{repo} is being downloaded by another process")));
        }
        let wanted = filename.map(name::parts).unwrap_or_default();
        let which = |name: &str| {
            filename.is_none_or(|pattern| wanted.iter().any(|part| part == name) || name::matches(pattern, name))
        };
        repository.remove(which).map_err(|error| {
            Error::download(format!("{}: not all could be removed: {error}", repository.folder().display()))
        })
    }
}

/// Why hashing ended early.
enum Stop {
    Cancelled(Error),
    Unreadable(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Unreadable(error)
    }
}

impl From<Stop> for Error {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Cancelled(error) => error,
            Stop::Unreadable(error) => Error::download(format!("the file cannot be read: {error}")),
        }
    }
}

fn described(repo: &str, filename: Option<&str>) -> String {
    choice::filename(repo, filename).map_or_else(|| format!("a model of {repo}"), |name| format!("{name} of {repo}"))
}

fn check_file(name: &str) -> Result<()> {
    if name::is_inside(name) {
        return Ok(());
    }
    Err(Error::option("filename", format!("must be the name of a file in the repository, not {name:?}")))
}

#[cfg(not(feature = "hub"))]
fn without_network() -> Error {
    Error::NotInThisVersion("this build does not download: it takes the cargo feature `hub`".into())
}
