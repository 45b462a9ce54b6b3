//! What the Hub says of a repository and its files.

use serde_json::Value;
use ureq::http::Method;

use super::checksum::Checksum;
use super::client::{Answer, Ask, Client, Failure, Retry, clean, escape};
use super::name::{is_commit, is_inside};
use crate::error::{Error, Result};
use crate::task::Task;

/// A listing is some kilobytes.
const MAX_LISTING: u64 = 64 << 20;

/// A file of the Hub.
#[derive(Debug)]
pub struct Remote {
    /// At its commit, so that content and checksum belong together.
    pub url: String,
    pub commit: String,
    pub checksum: Checksum,
    pub size: u64,
}

/// A repository at a commit.
#[derive(Debug)]
pub struct Listing {
    pub commit: String,
    pub files: Vec<ListedFile>,
}

#[derive(Debug)]
pub struct ListedFile {
    pub name: String,
    pub size: u64,
    /// None: the Hub does not say.
    pub checksum: Option<Checksum>,
}

impl Listing {
    pub fn sizes(&self) -> Vec<(String, u64)> {
        self.files.iter().map(|file| (file.name.clone(), file.size)).collect()
    }
}

/// Tries until it goes well or is no use.
fn persist<T>(client: &Client, mut once: impl FnMut() -> Result<T, Failure>) -> Result<T> {
    let mut patience = client.patience();
    loop {
        match once() {
            Ok(found) => return Ok(found),
            Err(failure) => patience.wait(failure, &client.task, 0, None)?,
        }
    }
}

/// Which content a file has.
pub fn metadata(client: &Client, repo: &str, revision: &str, name: &str) -> Result<Remote> {
    let url =
        |revision: &str| format!("{}/{repo}/resolve/{}/{}", client.endpoint, escape(revision, ""), escape(name, "/"));
    let page = url(revision);
    persist(client, || {
        let mut ask = Ask {
            method: Method::HEAD,
            url: &page,
            range: None,
            timeout: client.etag_timeout,
            away: false,
            page: &page,
        };
        let mut answer = client.ask(&ask)?;
        // Some firewalls let no HEAD through. The Hub's own refusals carry a code.
        if matches!(answer.status(), 400 | 403 | 405 | 501) && answer.header("x-error-code").is_none() {
            (ask.method, ask.range) = (Method::GET, Some((0, Some(0))));
            answer = client.ask(&ask)?;
        }
        if !(300..400).contains(&answer.status())
            && let Some(failure) = client.refused(&ask, &answer)
        {
            return Err(failure);
        }
        let missing = |what: &str| {
            let message = format!("{} answers {} without {what}: it is no Hub", answer.host, answer.status());
            client.failure(&ask, message, &answer, Retry::No)
        };
        let commit = answer.header("x-repo-commit").ok_or_else(|| missing("x-repo-commit"))?;
        if !is_commit(commit) {
            let message = format!("{}: x-repo-commit is {:?}, which is no commit", answer.host, clean(commit));
            return Err(client.failure(&ask, message, &answer, Retry::No));
        }
        let etag =
            answer.header("x-linked-etag").or_else(|| answer.header("etag")).ok_or_else(|| missing("an etag"))?;
        let Some(checksum) = Checksum::parse(etag.trim_start_matches("W/").trim_matches('"')) else {
            let message = format!("{}: the etag is {:?}, which is no checksum", answer.host, clean(etag));
            return Err(client.failure(&ask, message, &answer, Retry::No));
        };
        let size = answer.header("x-linked-size").map(str::to_owned).or_else(|| content_size(&answer));
        let size = size.and_then(|size| size.parse().ok()).ok_or_else(|| missing("a size"))?;
        Ok(Remote { url: url(commit), commit: commit.to_owned(), checksum, size })
    })
}

/// The size of the whole content, of which an answer may be a part.
fn content_size(answer: &Answer) -> Option<String> {
    match answer.header("content-range") {
        Some(range) => range.rsplit_once('/').map(|(_, size)| size.to_owned()),
        None => answer.header("content-length").map(str::to_owned),
    }
}

/// Which files a repository has.
pub fn listing(client: &Client, repo: &str, revision: &str) -> Result<Listing> {
    let url = format!("{}/api/models/{repo}/revision/{}?blobs=true", client.endpoint, escape(revision, ""));
    let page = format!("{}/{repo}", client.endpoint);
    persist(client, || {
        let ask =
            Ask { method: Method::GET, url: &url, range: None, timeout: client.etag_timeout, away: true, page: &page };
        let mut answer = client.ask(&ask)?;
        if let Some(failure) = client.refused(&ask, &answer) {
            return Err(failure);
        }
        let body = answer.response.body_mut().with_config().limit(MAX_LISTING).read_to_vec();
        let wrong = |what: &str, retry| {
            let message = format!("{}: the list of files {what}", answer.host);
            client.failure(&ask, message, &answer, retry)
        };
        let body = match body {
            Ok(body) => body,
            Err(error) => {
                client.task.check()?;
                return Err(wrong(&format!("breaks off: {error}"), Retry::Soon));
            }
        };
        let json: Value = serde_json::from_slice(&body).map_err(|_| wrong("is no JSON", Retry::No))?;
        let commit = json["sha"].as_str().filter(|sha| is_commit(sha));
        let commit = commit.ok_or_else(|| wrong("names no commit", Retry::No))?.to_owned();
        let listed = json["siblings"].as_array().ok_or_else(|| wrong("has no `siblings`", Retry::No))?;
        let mut files = Vec::new();
        for entry in listed {
            let name = entry["rfilename"].as_str().ok_or_else(|| wrong("has one without a name", Retry::No))?;
            if !is_inside(name) {
                return Err(wrong(&format!("has {:?}, which leads out of the cache", clean(name)), Retry::No));
            }
            let hash = entry["lfs"]["sha256"].as_str().or_else(|| entry["blobId"].as_str());
            let size = entry["size"].as_u64().or_else(|| entry["lfs"]["size"].as_u64()).unwrap_or_default();
            files.push(ListedFile { name: name.to_owned(), size, checksum: hash.and_then(Checksum::parse) });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Listing { commit, files })
    })
}

/// An error that a missing file explains, with the files that there are.
pub fn with_listing(error: Error, client: &Client, repo: &str, revision: &str, task: &Task) -> Error {
    let Error::Download { message, url, status: Some(404), host } = error else { return error };
    let files = task.check().and_then(|()| listing(client, repo, revision));
    let message = match files {
        Ok(files) => format!("{message}; {repo} has: {}", super::choice::listing(&files.sizes())),
        Err(_) => message,
    };
    Error::Download { message, url, status: Some(404), host }
}
