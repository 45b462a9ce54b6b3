//! One agent for every request: who is trusted, which way it goes, where the token may go, how often it is tried.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, Method, Request, Response, Uri, header};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body, Timeout};

use super::proxy::Proxies;
use super::{environment, tls};
use crate::error::{Error, Result};
use crate::task::{Phase, Task};

const MAX_REDIRECTS: usize = 10;
/// The longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

pub struct Client {
    agent: Agent,
    pub endpoint: String,
    token: Option<String>,
    proxies: Proxies,
    pub etag_timeout: Duration,
    pub download_timeout: Duration,
    pub task: Task,
}

/// A request.
pub struct Ask<'a> {
    pub method: Method,
    pub url: &'a str,
    /// The first byte that is wanted, and the last.
    pub range: Option<(u64, Option<u64>)>,
    pub timeout: Duration,
    /// Whether to go where another host has the content.
    pub away: bool,
    /// What a browser would open in its place.
    pub page: &'a str,
}

pub struct Answer {
    pub url: String,
    pub host: String,
    pub response: Response<Body>,
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        text(self.response.headers(), name)
    }
}

/// What went wrong, and whether another try may go better.
#[derive(Debug)]
pub struct Failure {
    pub error: Error,
    pub retry: Retry,
}

#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Retry {
    No,
    /// There is no way to the host: worth another try only if there was one.
    Unreachable,
    Soon,
    After(Duration),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, retry: Retry::No }
    }
}

impl Client {
    /// `system`: the proxies to take where the environment names none.
    pub fn new(token: Option<String>, system: &BTreeMap<String, String>, task: &Task) -> Result<Self> {
        let tls = TlsConfig::builder().root_certs(tls::roots()?).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .user_agent(concat!("candle-phi/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false);
        let agent = Agent::new_with_config(config.build());
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

    /// Asks once, and follows where it is sent: as far as the endpoint's own host, or `away` to any.
    pub fn ask(&self, ask: &Ask) -> Result<Answer, Failure> {
        let mut url = ask.url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.ask_one(ask, &url)?;
            let is_redirect = matches!(answer.status(), 301 | 302 | 303 | 307 | 308);
            let Some(location) = answer.header("location").filter(|_| is_redirect) else { return Ok(answer) };
            let next = join(&url, location);
            let (Some(from), Some(to)) = (origin(&url), origin(&next)) else {
                let message = format!("{} sends to {:?}, which is no web address", answer.host, clean(location));
                return Err(self.failure(ask, message, &answer, Retry::No));
            };
            if from.0 == "https" && to.0 != "https" {
                let message = format!("{} sends to {}, from https to an unprotected address", answer.host, to.1);
                return Err(self.failure(ask, message, &answer, Retry::No));
            }
            if !ask.away && from != to {
                return Ok(answer);
            }
            url = next;
        }
        let host = host(&url);
        let message = format!("{host} sends from address to address, more than {MAX_REDIRECTS} times");
        Err(Failure { error: error(message, &url, None, ask.page), retry: Retry::No })
    }

    fn ask_one(&self, ask: &Ask, url: &str) -> Result<Answer, Failure> {
        self.task.check()?;
        let unusable = |what: String| Failure::from(error(what, url, None, ask.page));
        let uri: Uri = url.parse().map_err(|e| unusable(format!("{:?} is no web address: {e}", clean(url))))?;
        let mut request = Request::builder().method(&ask.method).uri(&uri).header(header::ACCEPT_ENCODING, "identity");
        if let Some((first, last)) = ask.range {
            let last = last.map(|last| last.to_string()).unwrap_or_default();
            request = request.header(header::RANGE, format!("bytes={first}-{last}"));
        }
        if let Some(token) = self.token.as_ref().filter(|_| origin(url) == origin(&self.endpoint)) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(()).map_err(|e| unusable(format!("the request cannot be made: {e}")))?;
        let setting = self.proxies.of(&uri);
        let proxy = match setting.map(|setting| setting.proxy()).transpose() {
            Ok(proxy) => proxy,
            Err(_) => {
                let (shown, source) = setting.map(|s| (s.shown(), s.source.as_str())).unwrap_or_default();
                return Err(unusable(format!("{source} is {shown:?}, which is no proxy's address")));
            }
        };
        let request = self
            .agent
            .configure_request(request)
            .proxy(proxy)
            .timeout_resolve(Some(ask.timeout))
            .timeout_connect(Some(ask.timeout))
            .timeout_recv_response(Some(ask.timeout))
            .timeout_per_read(Some(self.download_timeout))
            .timeout_per_write(Some(self.download_timeout))
            .build();
        match self.agent.run(request) {
            Ok(response) => Ok(Answer { url: url.to_owned(), host: host(url), response }),
            Err(cause) => {
                self.task.check()?; // then the cause is that the agent was shut down
                Err(self.explain(&cause, url, setting.map(|s| (s.shown(), s.source.as_str())), ask))
            }
        }
    }

    /// A failure without an answer: who did not give it, and what the way out is.
    fn explain(&self, cause: &ureq::Error, url: &str, proxy: Option<(String, &str)>, ask: &Ask) -> Failure {
        let host = host(url);
        let through = proxy.as_ref().map(|(proxy, _)| format!(" through the proxy {proxy}")).unwrap_or_default();
        let set = proxy.as_ref().map(|(_, source)| format!(" (set by {source})")).unwrap_or_default();
        let text = cause.to_string();
        let is_lookup = matches!(cause, ureq::Error::HostNotFound) || text.contains("lookup");
        let (message, retry) = match cause {
            ureq::Error::ConnectProxyFailed(reason) if reason.contains("407") => (
                format!(
                    "the proxy{through_proxy}{set} wants a user name and a password to reach {host} (status 407): set \
                     HTTPS_PROXY=http://USER:PASSWORD@PROXY:PORT",
                    through_proxy = proxy.as_ref().map(|(proxy, _)| format!(" {proxy}")).unwrap_or_default()
                ),
                Retry::No,
            ),
            ureq::Error::ConnectProxyFailed(reason) => (
                format!(
                    "the proxy{through_proxy}{set} refuses to connect to {host}: {}; if it need not be used, set \
                     NO_PROXY={host}",
                    clean(reason),
                    through_proxy = proxy.as_ref().map(|(proxy, _)| format!(" {proxy}")).unwrap_or_default()
                ),
                Retry::No,
            ),
            _ if text.contains("UnknownIssuer") => (
                format!(
                    "{host}{through} shows a certificate of an unknown issuer{}: where a company's firewall reads \
                     along, set SSL_CERT_FILE to a file with its certificate",
                    tls::named()
                ),
                Retry::No,
            ),
            _ if text.contains("certificate") || matches!(cause, ureq::Error::Rustls(_) | ureq::Error::Tls(_)) => {
                (format!("{host}{through}: no trust: {}", clean(&text)), Retry::No)
            }
            _ if is_lookup => {
                (format!("no network, or no such host: {host}{through}{set} cannot be looked up"), Retry::Unreachable)
            }
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                (format!("{host}{through} cannot be reached within {:?}", ask.timeout), Retry::Unreachable)
            }
            ureq::Error::Timeout(_) => {
                (format!("{host}{through} does not answer within {:?}", ask.timeout), Retry::Soon)
            }
            ureq::Error::Io(cause) => {
                let retry = match cause.kind() {
                    ErrorKind::ConnectionRefused
                    | ErrorKind::HostUnreachable
                    | ErrorKind::NetworkUnreachable
                    | ErrorKind::NetworkDown
                    | ErrorKind::AddrNotAvailable
                    | ErrorKind::PermissionDenied => Retry::Unreachable,
                    _ => Retry::Soon,
                };
                let word = if retry == Retry::Soon { "broke off" } else { "cannot be reached" };
                (format!("{host}{through}{set} {word}: {cause}"), retry)
            }
            _ => (format!("{host}{through}: {}", clean(&text)), Retry::Soon),
        };
        Failure { error: error(message, url, None, ask.page), retry }
    }

    /// What an answer's status means; None: it is the content.
    pub fn refused(&self, ask: &Ask, answer: &Answer) -> Option<Failure> {
        let (status, host) = (answer.status(), &answer.host);
        let retry = match status {
            200 | 206 => return None,
            408 | 425 | 500 | 502 | 503 | 504 => self.retry_after(answer).unwrap_or(Retry::Soon),
            429 => self.retry_after(answer).unwrap_or(Retry::Soon),
            _ => Retry::No,
        };
        let token = if self.token.is_some() { "the token may be wrong or expired" } else { "set HF_TOKEN" };
        let what = match (status, answer.header("x-error-code")) {
            (_, Some("GatedRepo")) => format!("its terms must be accepted at its page first; {token}"),
            (_, Some("RepoNotFound")) => format!("there is no such repository, or it is private: {token}"),
            (_, Some("RevisionNotFound")) => "the repository has no such revision".into(),
            (_, Some("EntryNotFound")) => "the repository has no such file".into(),
            (401, _) => format!("there is no such repository, or it is private: {token}"),
            (403, _) => format!("access is refused, by the host or by a firewall; {token}"),
            (404, _) => "not found".into(),
            (429, _) => format!("too many requests; {token}"),
            (407, _) => {
                "a proxy wants a user name and a password: set HTTPS_PROXY=http://USER:PASSWORD@PROXY:PORT".into()
            }
            _ => "an error of the server".into(),
        };
        let asks = match retry {
            Retry::After(wait) => format!(", and asks to wait {} s", wait.as_secs()),
            _ => String::new(),
        };
        let retry = if matches!(retry, Retry::After(wait) if wait > MAX_RETRY_AFTER) { Retry::No } else { retry };
        Some(self.failure(ask, format!("{host} answers {status}{asks}: {what}"), answer, retry))
    }

    fn retry_after(&self, answer: &Answer) -> Option<Retry> {
        let seconds = answer.header("retry-after")?.trim().parse::<f64>().ok().filter(|s| (0.0..1e9).contains(s))?;
        Some(Retry::After(Duration::from_secs_f64(seconds)))
    }

    /// A failure with the answer that it is about.
    pub fn failure(&self, ask: &Ask, message: String, answer: &Answer, retry: Retry) -> Failure {
        Failure { error: error(message, &answer.url, Some(answer.status()), ask.page), retry }
    }

    /// How long to go on where nothing arrives.
    pub fn patience(&self) -> Patience {
        Patience { timeout: self.download_timeout, since: Instant::now(), tries: 0, reached: false }
    }
}

/// Tries that failed, since something arrived last.
pub struct Patience {
    /// How long a transfer may stand still. Pauses are parts of it: 0.25 s to 5 s of the usual 10 s, 30 s in all.
    timeout: Duration,
    since: Instant,
    tries: u32,
    /// Whether anything has arrived at all.
    reached: bool,
}

impl Patience {
    /// Something arrived.
    pub fn renew(&mut self) {
        *self = Patience { since: Instant::now(), tries: 0, reached: true, ..*self };
    }

    /// Waits before the next try, or gives up with the failure's error.
    pub fn wait(&mut self, failure: Failure, task: &Task, done: u64, total: Option<u64>) -> Result<()> {
        let usual = (self.timeout / 40 * 2u32.saturating_pow(self.tries)).min(self.timeout / 2);
        let pause = match failure.retry {
            Retry::After(asked) => {
                self.since += asked; // that is not the network's fault
                asked
            }
            Retry::Soon => usual,
            Retry::Unreachable if self.reached => usual,
            Retry::No | Retry::Unreachable => return Err(failure.error),
        };
        if Instant::now() + pause > self.since + self.timeout * 3 {
            return Err(failure.error);
        }
        self.tries = (self.tries + 1).min(8); // from there on the pause is as long as it gets
        task.report(Phase::Wait, done, total);
        task.sleep(pause)
    }
}

fn error(message: String, url: &str, status: Option<u16>, page: &str) -> Error {
    let way_out = match status {
        Some(401 | 404) => String::new(), // a browser would be told the same
        _ => format!("; {page} opened in a browser gives the file too, and Phi('file.gguf') opens it"),
    };
    // what follows a ? may be a signature that is as good as a key
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

/// Where a redirect leads, which may be given without scheme, host or folder.
fn join(base: &str, location: &str) -> String {
    let (scheme, rest) = base.split_once("://").unwrap_or(("https", base));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let path = rest[authority.len()..].split(['?', '#']).next().unwrap_or_default();
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    }
}

pub fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// A server's words, as much of them as an error should hold.
pub fn clean(text: &str) -> String {
    crate::error::one_line(text, 200)
}

/// As a part of a URL's path; `keep` stays as it is.
pub fn escape(text: &str, keep: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte);
    text.bytes().map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_redirects_lead() {
        for (base, location, expected) in [
            ("https://a/b/c?d", "https://x/y", "https://x/y"),
            ("https://a/b/c?d", "//x/y", "https://x/y"),
            ("https://a:1/b/c?d", "/y", "https://a:1/y"),
            ("https://a/b/c?d/e", "y", "https://a/b/y"),
            ("https://a", "y", "https://a/y"),
        ] {
            assert_eq!(join(base, location), expected);
        }
    }

    #[test]
    fn a_url_in_an_error_gives_nothing_away() {
        let error = error("x".into(), "https://user:key@cdn.host:8/path?Signature=secret", Some(403), "page");
        let Error::Download { url, host, message, .. } = error else { panic!() };
        assert_eq!(url.as_deref(), Some("https://cdn.host:8/path"));
        assert_eq!(host.as_deref(), Some("cdn.host"));
        assert!(!message.contains("secret"));
    }

    #[test]
    fn ports_and_schemes_tell_hosts_apart() {
        assert_eq!(origin("https://A.b/x"), origin("https://a.B:443/"));
        assert_ne!(origin("http://a.b"), origin("https://a.b"));
        assert_ne!(origin("http://a.b"), origin("http://a.b:81"));
        assert_eq!(origin("file:///etc/passwd"), None);
    }
}
