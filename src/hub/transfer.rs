//! The way of a content into the cache. What has its final name is whole and has the right checksum, whatever happened
//! on the way, also to this process.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ureq::http::Method;

use super::cache::{Place, Repository, beside, copied, moved};
use super::checksum::{Checksum, Hasher};
use super::choice::bytes;
use super::client::{Answer, Ask, Client, Failure, Retry, clean};
use super::lock;
use super::remote::Remote;
use crate::error::{Error, Result};
use crate::task::{Phase, Task};

/// What came before this file, and what all files together are: progress is one count over the parts of a model.
#[derive(Copy, Clone)]
pub struct Share {
    pub before: u64,
    pub total: u64,
}

/// Gets a content into `blobs`, unless it is there, and gives it its name.
pub fn fetch(client: &Client, repository: &Repository, remote: &Remote, name: &str, share: Share) -> Result<PathBuf> {
    let blob = repository.blob(&remote.checksum);
    let link = |place: Place| {
        let linked = repository.link(&remote.commit, name, &remote.checksum, place);
        linked.map_err(|error| unwritable(repository.folder(), &error))
    };
    let there = || {
        // without links the content itself has the name
        let named = repository.file(&remote.commit, name).filter(|path| is_whole(path, remote.size));
        named.map(Ok).or_else(|| is_whole(&blob, remote.size).then(|| link(copied)))
    };
    if let Some(path) = there() {
        return path;
    }
    let task = &client.task;
    let path = blob.with_file_name(format!("{}.incomplete", remote.checksum.hex()));
    let waiting = || {
        let there = fs::metadata(&path).map_or(0, |file| file.len());
        task.report(Phase::Wait, share.before + there.min(remote.size), Some(share.total));
    };
    let lock_path = repository.lock(&remote.checksum);
    let lock = lock::wait(&lock_path, task, waiting)?.map_err(|error| unwritable(&lock_path, &error))?;
    if let Some(path) = there() {
        return path; // the other process has it
    }
    // Where locks keep nobody out, somebody else may write the same: to a file of our own, and without resuming.
    let path = if lock.is_real { path } else { beside(&blob) };
    let mut transfer = Transfer::open(client, remote, &path, share)?;
    let result = transfer.run();
    drop(transfer); // an open file cannot be renamed everywhere
    if !lock.is_real && result.is_err() {
        let _ = fs::remove_file(&path);
    }
    result?;
    fs::rename(&path, &blob).map_err(|error| unwritable(&blob, &error))?;
    sync_folder(&blob);
    link(moved)
}

fn is_whole(blob: &Path, size: u64) -> bool {
    fs::metadata(blob).is_ok_and(|file| file.is_file() && file.len() == size)
}

/// Makes a rename last, where a folder can be synced.
fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
}

pub fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::download(format!("{}: {error}; HF_HUB_CACHE or cache_dir names another cache folder", path.display()))
}

struct Transfer<'a> {
    client: &'a Client,
    remote: &'a Remote,
    path: &'a Path,
    share: Share,
    file: File,
    /// Over the bytes that are there.
    hasher: Hasher,
    have: u64,
    /// Whether a part of them came another way than in one piece, now.
    pieced: bool,
}

impl<'a> Transfer<'a> {
    fn open(client: &'a Client, remote: &'a Remote, path: &'a Path, share: Share) -> Result<Self> {
        let folder = path.parent().unwrap_or(path);
        fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let file = file.map_err(|error| unwritable(path, &error))?;
        let hasher = remote.checksum.hasher(remote.size);
        let mut transfer = Transfer { client, remote, path, share, file, hasher, have: 0, pieced: false };
        let there = transfer.file.metadata().map_or(0, |file| file.len());
        if there > remote.size {
            transfer.restart()?;
        } else if there > 0 {
            transfer.resume()?;
        }
        if let Ok(free) = fs4::available_space(folder)
            && free < remote.size - transfer.have
        {
            return Err(Error::download(format!(
                "{}: {} are missing and {} are free; HF_HUB_CACHE or cache_dir names another cache folder",
                folder.display(),
                bytes(remote.size - transfer.have),
                bytes(free)
            )));
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

    /// Takes up what an earlier run left.
    fn resume(&mut self) -> Result<()> {
        self.pieced = true;
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

    /// Begins anew.
    fn restart(&mut self) -> Result<()> {
        self.hasher = self.remote.checksum.hasher(self.remote.size);
        self.have = 0;
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map(drop).map_err(|error| self.stored(error))
    }

    /// Until the content is there, synced, and has its checksum.
    fn run(&mut self) -> Result<()> {
        let mut patience = self.client.patience();
        loop {
            self.report(Phase::Download)?;
            while self.have < self.remote.size {
                let before = self.have;
                let result = self.piece();
                if self.have > before {
                    patience.renew();
                }
                if let Err(failure) = result {
                    patience.wait(failure, &self.client.task, self.share.before + self.have, Some(self.share.total))?;
                    self.pieced = true;
                }
            }
            let hasher = std::mem::replace(&mut self.hasher, self.remote.checksum.hasher(self.remote.size));
            let found = hasher.finish();
            if found == self.remote.checksum {
                return self.file.sync_all().map_err(|error| self.stored(error));
            }
            self.restart()?;
            // Content of two runs, or of two answers, may not fit together; content of one is what there is to get.
            if !std::mem::take(&mut self.pieced) {
                return Err(self.wrong(&found));
            }
        }
    }

    fn wrong(&self, found: &Checksum) -> Error {
        let (url, host) = (&self.remote.url, super::client::host(&self.remote.url));
        let message = format!(
            "{url} arrived damaged: its checksum is {}, and {host} says {}; nothing of it was kept",
            found.hex(),
            self.remote.checksum.hex()
        );
        Error::Download { message, url: Some(url.clone()), status: None, host: Some(host) }
    }

    /// One request, and what it brings.
    fn piece(&mut self) -> Result<(), Failure> {
        let client = self.client;
        let ask = Ask {
            method: Method::GET,
            url: &self.remote.url,
            range: (self.have > 0).then_some((self.have, None)),
            timeout: client.download_timeout,
            away: true,
            page: &self.remote.url,
        };
        let mut answer = client.ask(&ask)?;
        if answer.status() == 416 && self.have > 0 {
            self.restart()?; // what is there is none of theirs
            return Err(client.failure(&ask, format!("{} has no such range", answer.host), &answer, Retry::Soon));
        }
        if let Some(failure) = client.refused(&ask, &answer) {
            return Err(failure);
        }
        self.check_piece(&ask, &answer)?;
        let host = answer.host.clone();
        let status = answer.status();
        let broken = |what: String| {
            let error = Error::Download {
                message: format!("{host} {what}; the next call takes it up where it broke off"),
                url: Some(self.remote.url.clone()),
                status: Some(status),
                host: Some(host.clone()),
            };
            Failure { error, retry: Retry::Soon }
        };
        let mut body = answer.response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        while self.have < self.remote.size {
            let n = match body.read(&mut buffer) {
                Ok(0) => return Err(broken(format!("broke off at {} of {} bytes", self.have, self.remote.size))),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    client.task.check()?;
                    return Err(broken(format!("broke off at {} of {} bytes: {error}", self.have, self.remote.size)));
                }
            };
            let wanted = n.min((self.remote.size - self.have).try_into().unwrap_or(usize::MAX));
            self.file.write_all(&buffer[..wanted]).map_err(|error| unwritable(self.path, &error))?;
            self.hasher.update(&buffer[..wanted]);
            self.have += wanted as u64;
            client.task.report(Phase::Download, self.share.before + self.have, Some(self.share.total));
            client.task.check()?;
        }
        Ok(())
    }

    /// Whether an answer is what was asked for: the rest of this content, or all of it, from which we then begin anew.
    fn check_piece(&mut self, ask: &Ask, answer: &Answer) -> Result<(), Failure> {
        let size = self.remote.size;
        let length = answer.header("content-length").and_then(|length| length.parse::<u64>().ok());
        if answer.status() == 206 {
            let range = answer.header("content-range").unwrap_or_default();
            let (first, total) = parse_range(range).unwrap_or((u64::MAX, None));
            if first == self.have && total.is_none_or(|total| total == size) {
                return Ok(());
            }
            let message = format!(
                "{} answers with the range {:?} where {}- of {size} was asked for",
                answer.host,
                clean(range),
                self.have
            );
            let again = self.have > 0;
            self.restart()?;
            return Err(self.client.failure(ask, message, answer, if again { Retry::Soon } else { Retry::No }));
        }
        if length.is_some_and(|length| length != size) {
            let kind = answer.header("content-type").unwrap_or("something");
            let message = format!(
                "{} answers with {} bytes of {:?} where {size} bytes were due: perhaps a login page of the network",
                answer.host,
                length.unwrap_or_default(),
                clean(kind)
            );
            return Err(self.client.failure(ask, message, answer, Retry::No));
        }
        if self.have > 0 {
            self.restart()?;
        }
        Ok(())
    }
}

/// The first byte of `bytes 5-9/10`, and the size of the whole, if it is given.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((first.trim().parse().ok()?, total))
}
