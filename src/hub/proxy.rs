//! Which proxy a request goes through: the environment's, else the system's.

use std::collections::BTreeMap;
use std::env;
use std::net::Ipv4Addr;

use ureq::Proxy;
use ureq::http::Uri;

/// The proxies that are set, by the scheme of what is asked for.
#[derive(Debug, Default)]
pub struct Proxies {
    by_scheme: BTreeMap<&'static str, Setting>,
    direct: Vec<String>,
}

/// A proxy, and where it was set.
#[derive(Clone, Debug)]
pub struct Setting {
    url: String,
    pub source: String,
}

impl Setting {
    /// The proxy without its credentials.
    pub fn shown(&self) -> String {
        match self.url.rsplit_once('@') {
            Some((before, host)) => match before.split_once("://") {
                Some((scheme, _)) => format!("{scheme}://{host}"),
                None => host.to_owned(),
            },
            None => self.url.clone(),
        }
    }

    pub fn proxy(&self) -> Result<Proxy, ureq::Error> {
        Proxy::new(&self.url)
    }
}

impl Proxies {
    /// HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, and NO_PROXY, in small letters first; where none is set, `system`: what
    /// Python's `urllib.request.getproxies()` found.
    pub fn new(system: &BTreeMap<String, String>) -> Self {
        let mut proxies = Proxies::default();
        for scheme in ["https", "http"] {
            let found = variable(&format!("{scheme}_proxy")).or_else(|| variable("all_proxy"));
            proxies.by_scheme.extend(found.map(|(source, url)| (scheme, Setting { url, source })));
        }
        if let Some((_, list)) = variable("no_proxy").or_else(|| Some((String::new(), system.get("no")?.clone()))) {
            proxies.direct = list.split([',', ';', ' ']).map(|entry| entry.trim().to_lowercase()).collect();
            proxies.direct.retain(|entry| !entry.is_empty());
        }
        if proxies.by_scheme.is_empty() {
            for scheme in ["https", "http"] {
                let found = system.get(scheme).or_else(|| system.get("all")).or_else(|| system.get("socks"));
                let source = "the system's settings".to_owned();
                proxies.by_scheme.extend(found.map(|url| (scheme, Setting { url: url.clone(), source })));
            }
        }
        proxies
    }

    /// The proxy for an address; None: the direct way.
    pub fn of(&self, uri: &Uri) -> Option<&Setting> {
        let host = uri.host()?.trim_matches(['[', ']']).to_lowercase();
        let port = uri.port_u16();
        if self.direct.iter().any(|entry| is_direct(entry, &host, port)) {
            return None;
        }
        self.by_scheme.get(uri.scheme_str()?)
    }
}

/// A variable in small or capital letters, and its name. Set but empty, it says that there is none.
fn variable(name: &str) -> Option<(String, String)> {
    let capital = name.to_uppercase();
    let found = match env::var(name) {
        Ok(value) => (name.to_owned(), value),
        // A web server passes a request's header `Proxy` to its scripts as HTTP_PROXY.
        Err(_) if name == "http_proxy" && env::var_os("REQUEST_METHOD").is_some() => return None,
        Err(_) => (capital.clone(), env::var(&capital).ok()?),
    };
    Some(found).filter(|(_, value)| !value.trim().is_empty())
}

/// Whether an entry of NO_PROXY takes a host in: `*`, a domain with all below it, an address, a network.
fn is_direct(entry: &str, host: &str, port: Option<u16>) -> bool {
    let (name, wanted) = match entry.rsplit_once(':') {
        Some((name, digits)) if !name.contains(':') => (name, digits.parse().ok()),
        _ => (entry, None),
    };
    if wanted.is_some() && wanted != port {
        return false;
    }
    if let Some((network, bits)) = name.split_once('/')
        && let (Ok(network), Ok(bits), Ok(host)) =
            (network.parse::<Ipv4Addr>(), bits.parse::<u32>(), host.parse::<Ipv4Addr>())
    {
        let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
        return u32::from(network) & mask == u32::from(host) & mask;
    }
    let domain = name.trim_start_matches('*').trim_start_matches('.');
    name == "*"
        || host == domain
        || (!domain.is_empty() && host.strip_suffix(domain).is_some_and(|sub| sub.ends_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_need_no_proxy() {
        for (entry, host, port, expected) in [
            ("*", "a.b", None, true),
            ("a.b", "a.b", None, true),
            ("a.b", "x.a.b", None, true),
            (".a.b", "x.a.b", None, true),
            ("*.a.b", "x.a.b", None, true),
            ("a.b", "xa.b", None, false),
            ("a.b:80", "a.b", Some(80), true),
            ("a.b:80", "a.b", None, false),
            ("10.0.0.0/8", "10.1.2.3", None, true),
            ("10.0.0.0/8", "11.1.2.3", None, false),
            ("0.0.0.0/0", "11.1.2.3", None, true),
            ("::1", "::1", None, true),
        ] {
            assert_eq!(is_direct(entry, host, port), expected, "{entry} {host}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        let shown = |url: &str| Setting { url: url.into(), source: String::new() }.shown();
        assert_eq!(shown("http://user:p@ss@proxy:3128"), "http://proxy:3128");
        assert_eq!(shown("user:pass@proxy:3128"), "proxy:3128");
        assert_eq!(shown("socks5h://proxy"), "socks5h://proxy");
    }
}
