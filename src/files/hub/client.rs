//! One agent for every request: certificates, proxies, redirects, the scope of the token, and retries.
//!
//! Decisions: docs/design/hub.md

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use rustls::CertificateError;
use ureq::config::Config;
use ureq::http::{self, HeaderMap, Method, Uri, header};
use ureq::tls::TlsConfig;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Body, Timeout};

use super::proxy::{Proxies, Setting};
use super::{environment, tls, url};
use crate::error::{Error, Result};
use crate::system::task::{Phase, Task};

const MAX_REDIRECTS: usize = 10;
/// The longest time that a server may ask to wait, in one answer or in several without progress.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Bytes that count as progress. A connection that breaks earlier each time would need too many requests.
const MIN_PROGRESS: u64 = 1 << 16;

pub struct Client {
    agent: Agent,
    pub endpoint: String,
    token: Option<String>,
    proxies: Proxies,
    pub etag_timeout: Duration,
    pub download_timeout: Duration,
    pub task: Task,
}

pub struct Request<'a> {
    pub method: Method,
    pub url: &'a str,
    /// The first byte, and the last.
    pub range: Option<(u64, Option<u64>)>,
    pub timeout: Duration,
    /// Whether to follow redirects to another scheme, host or port.
    pub follow_cross_origin: bool,
    /// The page for a browser, in error messages.
    pub browser_url: &'a str,
}

pub struct Response {
    pub url: String,
    pub host: String,
    pub inner: http::Response<Body>,
}

impl Response {
    pub fn status(&self) -> u16 {
        self.inner.status().as_u16()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        text(self.inner.headers(), name)
    }
}

/// A failed request, and whether to try again.
#[derive(Debug)]
pub struct Failure {
    pub error: Error,
    pub retry: Retry,
}

#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Retry {
    No,
    /// The host cannot be reached. Another try makes sense only if it was reached before.
    Unreachable,
    Soon,
    After(Duration),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, retry: Retry::No }
    }
}

/// The system's resolver. Its errors name the host: that of the URL or that of a proxy.
#[derive(Debug, Default)]
struct NamingResolver(DefaultResolver);

/// A host name without an address.
#[derive(Debug, thiserror::Error)]
#[error("cannot resolve {host}: {cause}")]
struct Unresolved {
    host: String,
    cause: ureq::Error,
}

impl Resolver for NamingResolver {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        self.0.resolve(uri, config, timeout).map_err(|cause| match cause {
            ureq::Error::Io(_) | ureq::Error::HostNotFound => {
                let host = uri.host().unwrap_or_default().to_owned();
                ureq::Error::Other(Box::new(Unresolved { host, cause }))
            }
            other => other,
        })
    }
}

impl Client {
    /// `system`: the proxies if the environment names none.
    pub fn new(token: Option<String>, system: &BTreeMap<String, String>, task: &Task) -> Result<Self> {
        let tls = TlsConfig::builder().root_certs(tls::roots()?).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .user_agent(concat!("candle-phi/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false);
        let agent = Agent::with_parts(config.build(), DefaultConnector::default(), NamingResolver::default());
        task.on_cancel({
            let agent = agent.clone();
            || agent.shutdown()
        });
        Ok(Client {
            agent,
            endpoint: environment::endpoint()?,
            token,
            proxies: Proxies::new(system),
            etag_timeout: environment::etag_timeout()?,
            download_timeout: environment::download_timeout()?,
            task: task.clone(),
        })
    }

    /// Sends a request and follows its redirects.
    pub fn send(&self, request: &Request) -> Result<Response, Failure> {
        let mut url = request.url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send_once(request, &url)?;
            let is_redirect = matches!(response.status(), 301 | 302 | 303 | 307 | 308);
            let Some(location) = response.header("location").filter(|_| is_redirect) else { return Ok(response) };
            let next = url::resolve(&url, location);
            let host = &response.host;
            let (Some(from), Some(to)) = (origin(&url), origin(&next)) else {
                let message = format!("{host} redirects to {:?}, which is not an http or https URL", clean(location));
                return Err(self.failure(request, message, &response, Retry::No));
            };
            if from.0 == "https" && to.0 != "https" {
                let message = format!("{host} redirects from https to http, which is not protected: {}", to.1);
                return Err(self.failure(request, message, &response, Retry::No));
            }
            if !request.follow_cross_origin && from != to {
                return Ok(response);
            }
            url = next;
        }
        let message = format!("{} redirected more than {MAX_REDIRECTS} times", host(&url));
        Err(Failure::from(error(message, &url, None, request.browser_url)))
    }

    fn send_once(&self, request: &Request, url: &str) -> Result<Response, Failure> {
        self.task.check()?;
        let unusable = |problem: String| Failure::from(error(problem, url, None, request.browser_url));
        let uri: Uri = url.parse().map_err(|e| unusable(format!("{:?} is not a valid URL: {e}", clean(url))))?;
        let mut builder =
            http::Request::builder().method(&request.method).uri(&uri).header(header::ACCEPT_ENCODING, "identity");
        if let Some((first, last)) = request.range {
            let last = last.map(|last| last.to_string()).unwrap_or_default();
            builder = builder.header(header::RANGE, format!("bytes={first}-{last}"));
        }
        if let Some(token) = self.token.as_ref().filter(|_| origin(url) == origin(&self.endpoint)) {
            builder = builder.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let built = builder.body(()).map_err(|e| unusable(format!("the request is not valid: {e}")))?;
        let setting = self.proxies.of(&uri);
        let proxy = setting.map(|setting| {
            let (shown, source) = (setting.shown(), &setting.source);
            setting.proxy().map_err(|_| unusable(format!("{source} is {shown:?}, which is not the URL of a proxy")))
        });
        let configured = self
            .agent
            .configure_request(built)
            .proxy(proxy.transpose()?)
            .timeout_resolve(Some(request.timeout))
            .timeout_connect(Some(request.timeout))
            .timeout_recv_response(Some(request.timeout))
            .timeout_per_read(Some(self.download_timeout))
            .timeout_per_write(Some(self.download_timeout))
            .build();
        match self.agent.run(configured) {
            Ok(inner) => Ok(Response { url: url.to_owned(), host: host(url), inner }),
            Err(cause) => {
                self.task.check()?; // a cancelled task shuts the agent down
                Err(explain(&cause, url, setting, request))
            }
        }
    }

    /// The failure that a response's status means. None: the response has the content.
    pub fn refusal(&self, request: &Request, response: &Response) -> Option<Failure> {
        let (status, host) = (response.status(), &response.host);
        let retry = match status {
            200 | 206 => return None,
            408 | 425 | 429 | 500 | 502 | 503 | 504 => retry_after(response).unwrap_or(Retry::Soon),
            _ => Retry::No,
        };
        let token = if self.token.is_some() { "the token may be wrong or expired" } else { "set HF_TOKEN" };
        let problem = match (status, response.header("x-error-code")) {
            (_, Some("GatedRepo")) => {
                format!("the terms of the repository must be accepted on its page first; {token}")
            }
            (_, Some("RepoNotFound")) => format!("the repository does not exist or is private; {token}"),
            (_, Some("RevisionNotFound")) => "the repository has no such revision".into(),
            (_, Some("EntryNotFound")) => "the repository has no such file".into(),
            (401, _) => format!("the repository does not exist or is private; {token}"),
            (403, _) => format!("the host or a firewall refuses access; {token}"),
            (404, _) => "not found".into(),
            (429, _) => format!("too many requests; {token}"),
            (407, _) => format!("a proxy requires a user name and a password; {PROXY_LOGIN}"),
            (200..=299, _) => "no content".into(),
            (300..=399, _) => "a redirect without a target".into(),
            (500..=599, _) => "server error".into(),
            _ => "the request is refused".into(),
        };
        let wait = match retry {
            Retry::After(wait) => format!(" (retry after {} s)", wait.as_secs()),
            _ => String::new(),
        };
        Some(self.failure(request, format!("{host} answers {status}{wait}: {problem}"), response, retry))
    }

    /// A failure with a response.
    pub fn failure(&self, request: &Request, message: String, response: &Response, retry: Retry) -> Failure {
        Failure { error: error(message, &response.url, Some(response.status()), request.browser_url), retry }
    }

    pub fn retry_policy(&self) -> RetryPolicy {
        RetryPolicy::new(self.download_timeout)
    }
}

const PROXY_LOGIN: &str = "set HTTPS_PROXY=http://USER:PASSWORD@PROXY:PORT";

/// The failure of a request without a response.
fn explain(cause: &ureq::Error, url: &str, setting: Option<&Setting>, request: &Request) -> Failure {
    let host = host(url);
    let proxy = setting.map(|s| format!("the proxy {} (set by {})", s.shown(), s.source)).unwrap_or_default();
    let through = if proxy.is_empty() { String::new() } else { format!(" through {proxy}") };
    let (message, retry) = match cause {
        ureq::Error::ConnectProxyFailed(reason) if proxy_status(reason) == Some(407) => (
            format!("{proxy} requires a user name and a password to connect to {host} (status 407); {PROXY_LOGIN}"),
            Retry::No,
        ),
        ureq::Error::ConnectProxyFailed(reason) => (
            format!(
                "{proxy} refuses to connect to {host}: {}; set NO_PROXY={host} to connect without it",
                clean(reason)
            ),
            Retry::No,
        ),
        ureq::Error::Other(other) if let Some(unresolved) = other.downcast_ref::<Unresolved>() => {
            let name = if unresolved.host == host { &host } else { &proxy };
            (format!("cannot resolve {name}: no network, or no such host"), Retry::Unreachable)
        }
        ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
            (format!("{host}{through} cannot be reached within {:?}", request.timeout), Retry::Unreachable)
        }
        ureq::Error::Timeout(_) => {
            (format!("{host}{through} does not answer within {:?}", request.timeout), Retry::Soon)
        }
        cause => match (tls_error(cause), cause) {
            (Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)), _) => (
                format!(
                    "{host}{through}: TLS certificate rejected: unknown issuer{}; if a company's firewall inspects \
                     TLS, set SSL_CERT_FILE to a file with its certificate",
                    tls::trusted()
                ),
                Retry::No,
            ),
            (Some(rustls::Error::InvalidCertificate(problem)), _) => {
                (format!("{host}{through}: TLS certificate rejected: {}", clean(&problem.to_string())), Retry::No)
            }
            (Some(problem), _) => {
                (format!("{host}{through}: TLS failed: {}", clean(&problem.to_string())), Retry::Soon)
            }
            (None, ureq::Error::Io(cause)) if is_unreachable(cause.kind()) => {
                (format!("{host}{through} cannot be reached: {cause}"), Retry::Unreachable)
            }
            (None, ureq::Error::Io(cause)) => (format!("{host}{through}: the connection broke: {cause}"), Retry::Soon),
            _ => (format!("{host}{through}: {}", clean(&cause.to_string())), Retry::Soon),
        },
    };
    Failure { error: error(message, url, None, request.browser_url), retry }
}

/// The status of a proxy that refuses CONNECT, out of ureq's only record of it: `proxy server responded 407/407`.
fn proxy_status(reason: &str) -> Option<u16> {
    reason.strip_prefix("proxy server responded ")?.split('/').next()?.parse().ok()
}

/// A handshake fails inside an I/O error.
fn tls_error(cause: &ureq::Error) -> Option<&rustls::Error> {
    match cause {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

fn is_unreachable(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
            | ErrorKind::AddrNotAvailable
            | ErrorKind::PermissionDenied
    )
}

fn retry_after(response: &Response) -> Option<Retry> {
    let seconds = response.header("retry-after")?.trim().parse::<f64>().ok().filter(|s| (0.0..1e9).contains(s))?;
    Some(Retry::After(Duration::from_secs_f64(seconds)))
}

/// How often and how long to retry.
pub struct RetryPolicy {
    /// The longest time without progress is three times this, pauses included. A pause is a 40th of it, and doubles up to
    /// half of it: 0.25 s to 5 s, 30 s in all, with the default of 10 s.
    timeout: Duration,
    /// The last progress.
    since: Instant,
    /// Failures since then.
    tries: u32,
    /// The waits that the server has asked for since then.
    asked: Duration,
    was_reached: bool,
}

impl RetryPolicy {
    fn new(timeout: Duration) -> Self {
        RetryPolicy { timeout, since: Instant::now(), tries: 0, asked: Duration::ZERO, was_reached: false }
    }

    /// Notes what a request brought.
    pub fn received(&mut self, bytes: u64) {
        self.was_reached |= bytes > 0;
        if bytes >= MIN_PROGRESS {
            (self.since, self.tries, self.asked) = (Instant::now(), 0, Duration::ZERO);
        }
    }

    /// Waits before the next try, or gives up with the failure's error.
    pub fn wait(&mut self, failure: Failure, task: &Task, done: u64, total: Option<u64>) -> Result<()> {
        let pause = self.pause(failure)?;
        task.report(Phase::Wait, done, total);
        task.sleep(pause)
    }

    /// The time to the next try.
    fn pause(&mut self, failure: Failure) -> Result<Duration> {
        let usual = (self.timeout / 40 * 2u32.saturating_pow(self.tries)).min(self.timeout / 2);
        let pause = match failure.retry {
            Retry::After(wait) => {
                self.asked += wait;
                if self.asked > MAX_RETRY_AFTER {
                    return Err(failure.error);
                }
                self.since += wait; // the network is not to blame for it
                wait.max(usual)
            }
            Retry::Soon => usual,
            Retry::Unreachable if self.was_reached => usual,
            Retry::No | Retry::Unreachable => return Err(failure.error),
        };
        if Instant::now() + pause > self.since + self.timeout * 3 {
            return Err(failure.error);
        }
        self.tries = (self.tries + 1).min(8); // the pause is at its maximum by then
        Ok(pause)
    }
}

/// Retries a request until it succeeds or the policy gives up.
pub fn retry<T>(client: &Client, mut once: impl FnMut() -> Result<T, Failure>) -> Result<T> {
    let mut policy = client.retry_policy();
    loop {
        match once() {
            Ok(found) => return Ok(found),
            Err(failure) => policy.wait(failure, &client.task, 0, None)?,
        }
    }
}

fn error(message: String, url: &str, status: Option<u16>, browser_url: &str) -> Error {
    let way_out = match status {
        Some(401 | 404) => String::new(), // a browser would get the same answer
        _ => format!("; or download the file from {browser_url} in a browser and give its path instead"),
    };
    // a query may hold a signature that is as good as a key
    let url = url.split(['?', '#']).next().unwrap_or(url);
    let url = clean(&match url
        .split_once("://")
        .map(|(scheme, rest)| (scheme, rest.split_once('/').unwrap_or((rest, ""))))
    {
        Some((scheme, (host, path))) => format!("{scheme}://{}/{path}", host.rsplit('@').next().unwrap_or(host)),
        None => url.to_owned(),
    });
    Error::Download { message: message + &way_out, host: Some(host(&url)), url: Some(url), status }
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = match scheme.as_str() {
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    Some((scheme, uri.host()?.to_ascii_lowercase(), uri.port_u16().unwrap_or(port)))
}

pub fn host(url: &str) -> String {
    url.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default()
}

pub fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Text of a server, on one line and short enough for an error.
pub fn clean(text: &str) -> String {
    crate::error::one_line(text, 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_in_an_error_has_no_secrets() {
        let error = error("x".into(), "https://user:key@cdn.host:8/path?Signature=secret", Some(403), "page");
        let Error::Download { url, host, message, .. } = error else { panic!() };
        assert_eq!(url.as_deref(), Some("https://cdn.host:8/path"));
        assert_eq!(host.as_deref(), Some("cdn.host"));
        assert!(!message.contains("secret"));
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert_eq!(origin("https://A.b/x"), origin("https://a.B:443/"));
        assert_ne!(origin("http://a.b"), origin("https://a.b"));
        assert_ne!(origin("http://a.b"), origin("http://a.b:81"));
        assert_eq!(origin("file:///etc/passwd"), None);
    }

    #[test]
    fn the_waits_that_a_server_asks_for_have_limits() {
        let seconds = Duration::from_secs;
        let mut policy = RetryPolicy::new(seconds(400));
        let mut pause = |wait: u64, received: u64| {
            policy.received(received);
            policy.pause(Failure { error: Error::Closed, retry: Retry::After(seconds(wait)) })
        };
        assert_eq!([pause(200, 0), pause(0, 0), pause(100, 0)], [200, 20, 100].map(|wait| Ok(seconds(wait))));
        assert_eq!(pause(1, MIN_PROGRESS - 1), Err(Error::Closed));
        assert_eq!([pause(300, MIN_PROGRESS), pause(0, 0)], [300, 20].map(|wait| Ok(seconds(wait))));
        assert_eq!(pause(301, MIN_PROGRESS), Err(Error::Closed));
    }

    #[test]
    fn the_status_of_a_proxy() {
        assert_eq!(proxy_status("proxy server responded 407/407"), Some(407));
        assert_eq!(proxy_status("proxy server did not respond in 407 ms"), None);
    }
}
