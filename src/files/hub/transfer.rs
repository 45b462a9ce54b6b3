//! The transfer of a content into the cache. A file with its final name is complete and has the right checksum, even if
//! this process is killed at any moment.
//!
//! Decisions: docs/design/hub.md

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ureq::http::Method;

use super::cache::{PlaceFile, Repository, beside, copy_file, move_file, unwritable};
use super::checksum::{Checksum, Hasher};
use super::choice::bytes;
use super::client::{Client, Failure, Request, Response, Retry, clean};
use super::headers::{ContentRange, number};
use super::lock::{Lock, Mode};
use super::remote::Remote;
use crate::error::{Error, Result};
use crate::system::task::{Phase, Task};

/// How often a content is fetched from its first byte. The parts of two responses may not fit together, so a failure is
/// worth one more attempt.
const MAX_ATTEMPTS: u32 = 2;

/// A file's share of the progress, which is one count over the parts of a model.
#[derive(Copy, Clone)]
pub struct Share {
    /// Bytes of the files before it.
    pub before: u64,
    /// Bytes of all files.
    pub total: u64,
}

/// Fails if the disk has no room for the missing bytes of all these files. Called once, before the first download.
pub fn check_space(repository: &Repository, files: &[(String, Remote)]) -> Result<()> {
    let folder = repository.folder();
    fs::create_dir_all(&folder).map_err(|error| unwritable(&folder, &error))?;
    let mut missing = BTreeMap::new(); // by content: two names may have the same
    for (name, remote) in files {
        let blob = repository.blob(&remote.checksum);
        if find(repository, remote, name).is_none() && !is_complete(&blob, remote.size) {
            let arrived = fs::metadata(incomplete(&blob)).map_or(0, |file| file.len());
            missing.insert(blob, remote.size.saturating_sub(arrived));
        }
    }
    let missing = missing.into_values().fold(0, u64::saturating_add);
    match fs4::available_space(&folder) {
        Ok(free) if free < missing => Err(Error::download(format!(
            "{}: not enough disk space: {} to download, {} free; set HF_HUB_CACHE or cache_dir to use another folder",
            folder.display(),
            bytes(missing),
            bytes(free)
        ))),
        _ => Ok(()),
    }
}

/// Gets a content into `blobs`, unless it is there, and gives it its name.
pub fn fetch(client: &Client, repository: &Repository, remote: &Remote, name: &str, share: Share) -> Result<PathBuf> {
    let blob = repository.blob(&remote.checksum);
    let link = |place: PlaceFile| {
        let linked = repository.link(&remote.commit, name, &remote.checksum, place);
        linked.map_err(|error| unwritable(&repository.folder(), &error))
    };
    let cached = || {
        let named = find(repository, remote, name);
        named.map(Ok).or_else(|| is_complete(&blob, remote.size).then(|| link(copy_file)))
    };
    if let Some(path) = cached() {
        return path;
    }
    let task = &client.task;
    let path = incomplete(&blob);
    let waiting = || {
        let arrived = fs::metadata(&path).map_or(0, |file| file.len());
        task.report(Phase::Wait, share.before + arrived.min(remote.size), Some(share.total));
    };
    let lock = Lock::wait(&repository.lock(&remote.checksum), Mode::Exclusive, task, waiting)?;
    if let Some(path) = cached() {
        return path; // another process has fetched it
    }
    // Without real locks another process may write the same content: each writes its own file, from the start.
    let path = if lock.is_real { path } else { beside(&blob) };
    let mut transfer = Transfer::open(client, remote, name, &path, share)?;
    let result = transfer.run();
    drop(transfer); // not every system renames an open file
    if !lock.is_real && result.is_err() {
        let _ = fs::remove_file(&path);
    }
    result?;
    fs::rename(&path, &blob).map_err(|error| unwritable(&blob, &error))?;
    sync_folder(&blob);
    link(move_file)
}

/// The content under its name. Without links, it is there alone.
fn find(repository: &Repository, remote: &Remote, name: &str) -> Option<PathBuf> {
    repository.file(&remote.commit, name).filter(|path| is_complete(path, remote.size))
}

fn is_complete(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == size)
}

/// The file for as much of a content as has arrived.
fn incomplete(blob: &Path) -> PathBuf {
    blob.with_added_extension("incomplete")
}

/// Makes a rename durable, if the system can sync a folder.
fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
}

struct Transfer<'a> {
    client: &'a Client,
    remote: &'a Remote,
    name: &'a str,
    path: &'a Path,
    share: Share,
    file: File,
    /// Over the bytes in the file.
    hasher: Hasher,
    /// Bytes in the file.
    have: u64,
    /// Bytes that this call has received.
    received: u64,
    /// Whether the bytes in the file come from more than one response.
    is_pieced: bool,
    attempts: u32,
}

impl<'a> Transfer<'a> {
    fn open(client: &'a Client, remote: &'a Remote, name: &'a str, path: &'a Path, share: Share) -> Result<Self> {
        let folder = path.parent().unwrap_or(path);
        fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let file = file.map_err(|error| unwritable(path, &error))?;
        let hasher = remote.checksum.hasher(remote.size);
        let arrived = file.metadata().map_or(0, |file| file.len());
        let mut transfer = Transfer {
            client,
            remote,
            name,
            path,
            share,
            file,
            hasher,
            have: 0,
            received: 0,
            is_pieced: false,
            attempts: 1,
        };
        if arrived > remote.size {
            transfer.discard()?;
        } else if arrived > 0 {
            transfer.resume()?;
        }
        Ok(transfer)
    }

    fn report(&self, phase: Phase) -> Result<()> {
        self.client.task.report(phase, self.share.before + self.have, Some(self.share.total));
        self.client.task.check()
    }

    fn stored(&self, error: io::Error) -> Error {
        unwritable(self.path, &error)
    }

    /// Continues with what an earlier call left.
    fn resume(&mut self) -> Result<()> {
        self.is_pieced = true;
        let (task, share): (&Task, Share) = (&self.client.task, self.share);
        let mut have = 0;
        let mut cancelled = None;
        let read = self.hasher.read(&mut self.file, |n| {
            have += n;
            task.report(Phase::Verify, share.before + have, Some(share.total));
            task.check().map_err(|error| {
                cancelled = Some(error);
                io::Error::from(io::ErrorKind::Interrupted)
            })
        });
        if let Some(error) = cancelled {
            return Err(error);
        }
        self.have = have;
        read.map_err(|error| self.stored(error))
    }

    fn discard(&mut self) -> Result<()> {
        self.hasher = self.remote.checksum.hasher(self.remote.size);
        self.have = 0;
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map(drop).map_err(|error| self.stored(error))
    }

    /// Begins another attempt, from the first byte; or fails with `problem` after the last one.
    fn restart(&mut self, problem: &Error) -> Result<()> {
        if self.attempts == MAX_ATTEMPTS {
            return Err(problem.clone());
        }
        self.attempts += 1;
        self.is_pieced = false;
        self.discard()
    }

    /// Receives the content, checks it and syncs it.
    fn run(&mut self) -> Result<()> {
        let mut policy = self.client.retry_policy();
        loop {
            self.report(Phase::Download)?;
            while self.have < self.remote.size {
                let before = self.received;
                let result = self.receive();
                policy.received(self.received - before);
                if let Err(failure) = result {
                    policy.wait(failure, &self.client.task, self.share.before + self.have, Some(self.share.total))?;
                    self.is_pieced = self.have > 0;
                }
            }
            let hasher = std::mem::replace(&mut self.hasher, self.remote.checksum.hasher(self.remote.size));
            let found = hasher.finish();
            if found == self.remote.checksum {
                return self.file.sync_all().map_err(|error| self.stored(error));
            }
            let error = self.mismatch(&found);
            // one response has all that the server has: another try would bring the same
            let again = if self.is_pieced { self.restart(&error) } else { Err(error) };
            if again.is_err() {
                self.discard()?;
            }
            again?;
        }
    }

    fn mismatch(&self, found: &Checksum) -> Error {
        let (url, host) = (&self.remote.url, super::client::host(&self.remote.url));
        let message = format!(
            "{} arrived damaged from {url} in attempt {}: its checksum is {}, and {host} says {}; nothing was kept",
            self.name,
            self.attempts,
            found.hex(),
            self.remote.checksum.hex()
        );
        Error::Download { message, url: Some(url.clone()), status: None, host: Some(host) }
    }

    /// Sends one request, and writes the bytes of its response to the file.
    fn receive(&mut self) -> Result<(), Failure> {
        let client = self.client;
        let request = Request {
            method: Method::GET,
            url: &self.remote.url,
            range: (self.have > 0).then_some((self.have, None)),
            timeout: client.download_timeout,
            follow_cross_origin: true,
            browser_url: &self.remote.url,
        };
        let mut response = client.send(&request)?;
        if response.status() == 416 && self.have > 0 {
            let (host, size, attempts) = (&response.host, self.remote.size, self.attempts);
            let have = self.have;
            let message =
                format!("{host} has no bytes from {have} on, of the file's {size} bytes (attempt {attempts})");
            let failure = client.failure(&request, message, &response, Retry::Soon);
            self.restart(&failure.error)?; // the file has another content than the server's
            return Err(failure);
        }
        if let Some(failure) = client.refusal(&request, &response) {
            return Err(failure);
        }
        self.check_response(&request, &response)?;
        let host = response.host.clone();
        let status = response.status();
        let broken = |have: u64, cause: String| {
            let size = self.remote.size;
            let error = Error::Download {
                message: format!(
                    "{host}: the connection broke at {have} of {size} bytes{cause}; the next call resumes it"
                ),
                url: Some(self.remote.url.clone()),
                status: Some(status),
                host: Some(host.clone()),
            };
            Failure { error, retry: Retry::Soon }
        };
        let mut body = response.inner.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        while self.have < self.remote.size {
            let n = match body.read(&mut buffer) {
                Ok(0) => return Err(broken(self.have, String::new())),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    client.task.check()?;
                    return Err(broken(self.have, format!(": {error}")));
                }
            };
            let wanted = n.min((self.remote.size - self.have).try_into().unwrap_or(usize::MAX));
            self.file.write_all(&buffer[..wanted]).map_err(|error| unwritable(self.path, &error))?;
            self.hasher.update(&buffer[..wanted]);
            self.have += wanted as u64;
            self.received += wanted as u64;
            client.task.report(Phase::Download, self.share.before + self.have, Some(self.share.total));
            client.task.check()?;
        }
        Ok(())
    }

    /// Checks that a response has the rest of this content, or all of it. With all of it, the file begins anew.
    fn check_response(&mut self, request: &Request, response: &Response) -> Result<(), Failure> {
        let (host, size, attempts) = (&response.host, self.remote.size, self.attempts);
        let length = response.header("content-length").and_then(number);
        if response.status() == 206 {
            let range = response.header("content-range").unwrap_or_default();
            let first = self.have;
            let fits = |range: ContentRange| range.first == first && range.size.is_none_or(|total| total == size);
            if ContentRange::parse(range).is_some_and(fits) {
                return Ok(());
            }
            let (range, retry) = (clean(range), if first > 0 { Retry::Soon } else { Retry::No });
            let message = format!(
                "{host} sends the range {range:?}, not the bytes from {first} on of {size} (attempt {attempts})"
            );
            let failure = self.client.failure(request, message, response, retry);
            if first > 0 {
                self.restart(&failure.error)?;
            }
            return Err(failure);
        }
        if length.is_some_and(|length| length != size) {
            let kind = response.header("content-type").unwrap_or_default();
            let message = format!(
                "{host} sends {} bytes of the type {:?}, not the file's {size} bytes: perhaps the login page of a network",
                length.unwrap_or_default(),
                clean(kind)
            );
            return Err(self.client.failure(request, message, response, Retry::No));
        }
        if self.have > 0 {
            let message = format!(
                "{host} cannot resume a download: it sends all {size} bytes, not those from {} on (attempt {attempts})",
                self.have
            );
            self.restart(&self.client.failure(request, message, response, Retry::No).error)?;
        }
        Ok(())
    }
}
