//! Models of the Hugging Face Hub, in the cache that its tools share or downloaded into it.
//!
//! ```text
//! Hub::download             hub           a file in the cache needs no network
//!   choice::among           choice        the file, if none is named
//!   remote::metadata        remote        its commit, checksum and size
//!     Client::send          client        one request: tls, proxy, token, redirects (url)
//!   transfer::check_space   transfer      room for all files
//!   transfer::fetch         transfer      resumed, checked, synced, renamed
//!     Lock::wait            lock          one writer at a time
//!   Repository::link        cache         the name of a content
//! ```
//!
//! Without the cargo feature `hub` the build has everything but the network code.
//!
//! Decisions: docs/design/hub.md

pub mod cache;
pub mod checksum;
pub mod choice;
#[cfg(feature = "hub")]
mod client;
pub mod environment;
pub mod headers;
pub mod listing;
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
pub mod url;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;

use cache::{CachedFile, Repository};
use checksum::Checksum;
pub use environment::cache_dir;
use hf_hub::Cache;
#[cfg(feature = "hub")]
use lock::{Lock, Mode};

use crate::error::{Error, Result};
use crate::system::task::{Phase, Task};

/// The repository and file of the model that `candle-phi PROMPT` runs.
pub const DEFAULT_REPO: &str = choice::KNOWN[0].repo;
pub const DEFAULT_FILE: &str = choice::KNOWN[0].file;

/// The token for the Hub. No other host gets it.
#[derive(Clone, Debug, Default)]
pub enum Token {
    /// The environment's, if it has one.
    #[default]
    Environment,
    /// The environment's. It is an error if there is none.
    Required,
    None,
    Given(String),
}

/// The settings of a call: cache, revision, token, proxies.
#[derive(Clone, Debug)]
pub struct Hub {
    cache: Cache,
    revision: String,
    pub token: Token,
    local_files_only: bool,
    /// The system's proxies by scheme, and `no`. The environment's come first.
    pub system_proxies: BTreeMap<String, String>,
}

/// The files of a repository on the Hub.
#[derive(Debug)]
pub struct Info {
    pub repo: String,
    pub commit: String,
    /// Name, size, and the SHA-256 of a large file.
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
            Error::download("no home folder to keep downloads in: set HF_HOME or pass cache_dir".into())
        })?;
        // Windows accepts long paths if they are absolute
        let cache_dir = std::path::absolute(&cache_dir).unwrap_or(cache_dir);
        Ok(Hub { cache: Cache::new(cache_dir), revision, token, local_files_only, system_proxies })
    }

    fn repository(&self, repo: &str) -> Repository {
        Repository::new(&self.cache, repo, &self.revision)
    }

    /// The path of a file, or of a model's first part, if all parts are in the cache. Uses no network. `filename` None: the
    /// default of a well-known repository, else the only GGUF model in the cache.
    pub fn cached(&self, repo: &str, filename: Option<&str>) -> Result<Option<PathBuf>> {
        let repo = choice::repo(repo);
        name::check_repo(repo)?;
        filename.map_or(Ok(()), check_file)?;
        let repository = self.repository(repo);
        let Some(commit) = repository.commit() else { return Ok(None) };
        let found = match choice::filename(repo, filename) {
            Some(name) if !name::is_glob(name) => name.to_owned(),
            wanted => match choice::among(repo, &repository.files(&commit), wanted, || Ok(())) {
                Ok(mut parts) => parts.swap_remove(0),
                Err(_) => return Ok(None),
            },
        };
        let mut paths = name::parts(&found).map(|name| repository.file(&commit, &name));
        let first = paths.next().flatten();
        Ok(first.filter(|_| paths.all(|path| path.is_some())))
    }

    /// The same. A file that is not in the cache is downloaded.
    pub fn download(&self, repo: &str, filename: Option<&str>, task: &Task) -> Result<PathBuf> {
        match self.cached(repo, filename)? {
            Some(path) => Ok(path),
            None => self.fetch(choice::repo(repo), filename, task),
        }
    }

    /// Fails if the network may not be used.
    fn check_online(&self, what: &str) -> Result<()> {
        let why = if self.local_files_only { Some("local_files_only") } else { environment::offline() };
        let Some(why) = why else { return Ok(()) };
        let cache = self.cache.path().display();
        Err(Error::Offline(format!(
            "{what} is not in the cache {cache} at revision {:?}, and {why} is set",
            self.revision
        )))
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, repo: &str, filename: Option<&str>, _: &Task) -> Result<PathBuf> {
        self.check_online(&described(repo, filename))?;
        Err(without_network())
    }

    #[cfg(feature = "hub")]
    fn fetch(&self, repo: &str, filename: Option<&str>, task: &Task) -> Result<PathBuf> {
        self.check_online(&described(repo, filename))?;
        let client = self.client(task)?;
        let repository = self.repository(repo);
        let mut revision = self.revision.clone();
        let found = match choice::filename(repo, filename) {
            Some(name) if !name::is_glob(name) => name.to_owned(),
            wanted => {
                let listing = remote::listing(&client, repo, &revision)?;
                revision.clone_from(&listing.commit); // one commit for the list and the files
                choice::among(repo, &listing.sizes(), wanted, || task.check())?.swap_remove(0)
            }
        };
        let mut files = Vec::new();
        for name in name::parts(&found) {
            let remote = remote::metadata(&client, repo, &revision, &name)
                .map_err(|error| remote::with_listing(error, &client, repo, &self.revision, task))?;
            revision.clone_from(&remote.commit); // one commit for all parts
            files.push((name, remote));
        }
        let mut share = transfer::Share {
            before: 0,
            total: files.iter().fold(0, |total, (_, remote)| remote.size.saturating_add(total)),
        };
        let waiting = || task.report(Phase::Wait, 0, Some(share.total));
        // no removal may start until all files are there
        let _lock = Lock::wait(&repository.repository_lock(), Mode::Shared, task, waiting)?;
        transfer::check_space(&repository, &files)?;
        let mut first = None;
        for (name, remote) in &files {
            let path = transfer::fetch(&client, &repository, remote, name, share)?;
            share.before += remote.size;
            first.get_or_insert(path);
        }
        repository.set_commit(&revision).map_err(|error| cache::unwritable(&repository.folder(), &error))?;
        first.ok_or_else(|| Error::Internal("a model has no parts".into()))
    }

    #[cfg(feature = "hub")]
    fn client(&self, task: &Task) -> Result<client::Client> {
        let token = match &self.token {
            Token::None => None,
            Token::Environment if environment::token_is_explicit() => None,
            Token::Environment => environment::token(),
            Token::Required => Some(environment::token().ok_or_else(|| {
                Error::option("token", "is True, and no token is set: set HF_TOKEN or log in with Hugging Face's tools")
            })?),
            Token::Given(token) => Some(token.trim().to_owned()),
        };
        if token.as_ref().is_some_and(|token| token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic())) {
            const PROBLEM: &str = "must be printable ASCII characters without spaces";
            return Err(match self.token {
                Token::Given(_) => Error::option("token", PROBLEM),
                _ => Error::Value(format!("the token of HF_TOKEN or of a login {PROBLEM}")),
            });
        }
        client::Client::new(token, &self.system_proxies, task)
    }

    /// The files of a repository. Always asks the Hub.
    #[cfg(feature = "hub")]
    pub fn info(&self, repo: &str, task: &Task) -> Result<Info> {
        let repo = choice::repo(repo);
        name::check_repo(repo)?;
        self.check_online(&format!("the list of files of {repo}"))?;
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
        cache::scan(&self.cache)
    }

    /// The GGUF files in the cache with this name or pattern, of one repository or of all.
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
                self.cache.path().display()
            )));
        }
        Ok(files)
    }

    /// Hashes files in the cache again. The error names all that are damaged.
    pub fn verify(&self, repo: Option<&str>, filename: Option<&str>, task: &Task) -> Result<Vec<CachedFile>> {
        let files = self.select(repo, filename)?;
        let total = files.iter().map(|file| file.size).sum();
        let mut before = 0;
        let mut damaged = Vec::new();
        for file in &files {
            let hash = |checksum: &Checksum| -> Result<Checksum> {
                let unreadable = |error| Error::download(format!("{}: cannot be read: {error}", file.path.display()));
                let mut open = File::open(&file.path).map_err(unreadable)?;
                let mut hasher = checksum.hasher(file.size);
                let mut done = before;
                let read = hasher.read(&mut open, |n| {
                    done += n;
                    task.report(Phase::Verify, done, Some(total));
                    task.check().map_err(Stop::Cancelled)
                });
                read.map_err(|stop| match stop {
                    Stop::Cancelled(error) => error,
                    Stop::Unreadable(error) => unreadable(error),
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
                damaged.push(format!("{path} has the checksum {found}, expected {expected}"));
            }
            before += file.size;
        }
        if damaged.is_empty() {
            return Ok(files);
        }
        Err(Error::InvalidModel(format!(
            "{}; remove them with `candle-phi rm` and download them again",
            damaged.join("; ")
        )))
    }

    /// The checksum of a file that is not a link, as on a file system without links. Asks the Hub.
    #[cfg(feature = "hub")]
    fn expected(&self, file: &CachedFile, task: &Task) -> Result<Checksum> {
        self.check_online(&format!("the checksum of {}", file.path.display()))?;
        let listing = remote::listing(&self.client(task)?, &file.repo, &file.commit)?;
        let listed = listing.files.into_iter().find(|listed| listed.name == file.name);
        listed.and_then(|listed| listed.checksum).ok_or_else(|| {
            Error::download(format!("the Hub names no checksum of {} in {} at {}", file.name, file.repo, file.commit))
        })
    }

    #[cfg(not(feature = "hub"))]
    fn expected(&self, file: &CachedFile, _: &Task) -> Result<Checksum> {
        self.check_online(&format!("the checksum of {}", file.path.display()))?;
        Err(without_network())
    }

    /// Removes a repository from the cache, or its files with this name or pattern. Returns the bytes that became free.
    pub fn remove(&self, repo: &str, filename: Option<&str>) -> Result<u64> {
        let repo = choice::repo(repo);
        name::check_repo(repo)?;
        let repository = self.repository(repo);
        if !repository.folder().is_dir() || filename.is_some() {
            self.select(Some(repo), filename)?;
        }
        repository.remove(|name| {
            filename.is_none_or(|wanted| name::is_same_model(wanted, name) || name::matches(wanted, name))
        })
    }
}

/// The reason for an early end of hashing.
enum Stop {
    Cancelled(Error),
    Unreadable(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Unreadable(error)
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
    Error::NotInThisVersion("this build cannot download: it lacks the cargo feature `hub`".into())
}
