//! Requests for the list of a repository's files, and for the checksum and the size of one.

use ureq::http::Method;

use super::checksum::Checksum;
use super::client::{Client, Request, Response, Retry, clean, retry};
use super::headers::{ContentRange, etag, number};
use super::listing::Listing;
use super::name::is_commit;
use super::url::escape;
use crate::error::{Error, Result};
use crate::system::task::Task;

/// Bytes of a listing. 16 MiB have room for 50 000 files; in memory they take about ten times as much.
const MAX_LISTING: u64 = 16 << 20;

/// A file of the Hub.
#[derive(Debug)]
pub struct Remote {
    /// At its commit, so that content and checksum belong together.
    pub url: String,
    pub commit: String,
    pub checksum: Checksum,
    pub size: u64,
}

/// Commit, checksum and size of a file.
pub fn metadata(client: &Client, repo: &str, revision: &str, name: &str) -> Result<Remote> {
    let url =
        |revision: &str| format!("{}/{repo}/resolve/{}/{}", client.endpoint, escape(revision, ""), escape(name, "/"));
    let browser_url = url(revision);
    retry(client, || {
        let mut request = Request {
            method: Method::HEAD,
            url: &browser_url,
            range: None,
            timeout: client.etag_timeout,
            follow_cross_origin: false,
            browser_url: &browser_url,
        };
        let mut response = client.send(&request)?;
        // Some firewalls block HEAD. The Hub's own refusals carry a code.
        if matches!(response.status(), 400 | 403 | 405 | 501) && response.header("x-error-code").is_none() {
            (request.method, request.range) = (Method::GET, Some((0, Some(0))));
            response = client.send(&request)?;
        }
        if !(300..400).contains(&response.status())
            && let Some(failure) = client.refusal(&request, &response)
        {
            return Err(failure);
        }
        let (host, status) = (&response.host, response.status());
        let invalid = |problem: String| {
            let message = format!("{host} is not a Hugging Face Hub endpoint: status {status}, {problem}");
            client.failure(&request, message, &response, Retry::No)
        };
        let required = |name: &str| response.header(name).ok_or_else(|| invalid(format!("no header {name}")));
        let commit = required("x-repo-commit")?;
        if !is_commit(commit) {
            return Err(invalid(format!("x-repo-commit is {:?}, not a commit", clean(commit))));
        }
        let tag = response.header("x-linked-etag").map_or_else(|| required("etag"), Ok)?;
        let checksum = etag(tag).ok_or_else(|| invalid(format!("the etag is {:?}, not a checksum", clean(tag))))?;
        let size = response.header("x-linked-size").map_or_else(|| content_size(&response), number);
        let size = size.ok_or_else(|| invalid("no size of the file".into()))?;
        Ok(Remote { url: url(commit), commit: commit.to_owned(), checksum, size })
    })
}

/// The size of the whole content, of which a response may have a part.
fn content_size(response: &Response) -> Option<u64> {
    match response.header("content-range") {
        Some(range) => ContentRange::parse(range)?.size,
        None => number(response.header("content-length")?),
    }
}

/// The files of a repository.
pub fn listing(client: &Client, repo: &str, revision: &str) -> Result<Listing> {
    let url = format!("{}/api/models/{repo}/revision/{}?blobs=true", client.endpoint, escape(revision, ""));
    let browser_url = format!("{}/{repo}", client.endpoint);
    retry(client, || {
        let request = Request {
            method: Method::GET,
            url: &url,
            range: None,
            timeout: client.etag_timeout,
            follow_cross_origin: true,
            browser_url: &browser_url,
        };
        let mut response = client.send(&request)?;
        if let Some(failure) = client.refusal(&request, &response) {
            return Err(failure);
        }
        let body = response.inner.body_mut().with_config().limit(MAX_LISTING).read_to_vec();
        let failed = |problem: &str, retry| {
            let message = format!("{}: the list of files is not valid: {problem}", response.host);
            client.failure(&request, message, &response, retry)
        };
        let body = match body {
            Ok(body) => body,
            Err(ureq::Error::BodyExceedsLimit(limit)) => {
                return Err(failed(&format!("it has more than {limit} bytes"), Retry::No));
            }
            Err(error) => {
                client.task.check()?;
                return Err(failed(&format!("the connection broke: {error}"), Retry::Soon));
            }
        };
        Listing::parse(&body, || client.task.check())?.map_err(|problem| failed(&problem, Retry::No))
    })
}

/// Adds the files of the repository to an error about a missing file.
pub fn with_listing(error: Error, client: &Client, repo: &str, revision: &str, task: &Task) -> Error {
    let Error::Download { message, url, status: Some(404), host } = error else { return error };
    let files = task.check().and_then(|()| listing(client, repo, revision));
    let message = match files {
        Ok(files) => format!("{message}; {repo} has: {}", super::choice::listing(&files.sizes())),
        Err(_) => message,
    };
    Error::Download { message, url, status: Some(404), host }
}
