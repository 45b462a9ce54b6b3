//! The proxy of a request: the environment's, else the system's.
//!
//! `ureq::Proxy` parses the address of a proxy, speaks to it and matches the names of NO_PROXY. `Proxy::try_from_env` is
//! not used: it takes ALL_PROXY before HTTPS_PROXY, sends https through HTTP_PROXY, passes over an address that is not
//! valid, and cannot tell which variable it read.

use std::collections::BTreeMap;
use std::env;
use std::net::{Ipv4Addr, Ipv6Addr};

use ureq::http::Uri;
use ureq::{Proxy, ProxyProtocol};

/// The proxies by the scheme of a URL, and the hosts that need none.
#[derive(Debug, Default)]
pub struct Proxies {
    by_scheme: BTreeMap<&'static str, Setting>,
    /// The entries of NO_PROXY.
    direct: Vec<String>,
}

/// The URL of a proxy, and the name of the variable that has it.
#[derive(Clone, Debug)]
pub struct Setting {
    url: String,
    pub source: String,
}

impl Setting {
    /// The URL without credentials.
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
    /// HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in small letters first. If no proxy is set: `system`, the result of
    /// Python's `urllib.request.getproxies()`.
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

    /// The proxy for a URL. None: connect to its host.
    pub fn of(&self, uri: &Uri) -> Option<&Setting> {
        let setting = self.by_scheme.get(uri.scheme_str()?)?;
        (!self.is_direct(uri)).then_some(setting)
    }

    /// Whether NO_PROXY covers the host of a URL.
    fn is_direct(&self, uri: &Uri) -> bool {
        // a list of names is a property of ureq's proxies; this one serves for nothing else
        let mut names = Proxy::builder(ProxyProtocol::Http);
        for entry in &self.direct {
            let (name, port) = match entry.rsplit_once(':') {
                Some((name, digits)) if !name.contains(':') => (name, digits.parse().ok()),
                _ => (entry.as_str(), None),
            };
            if port.is_some() && port != uri.port_u16() {
                continue;
            }
            if is_in_network(name, uri) {
                return true;
            }
            names = match name.trim_start_matches('*').trim_start_matches('.') {
                "" if name == "*" => names.no_proxy("*"),
                "" => names,
                ip if ip.parse::<Ipv6Addr>().is_ok() => names.no_proxy(&format!("[{ip}]")),
                // a domain and every host in it, as curl and Python have it; for ureq these are two entries
                domain => names.no_proxy(domain).no_proxy(&format!(".{domain}")),
            };
        }
        names.build().is_ok_and(|names| names.is_no_proxy(uri))
    }
}

/// The name and the value of a variable, in small or capital letters. An empty one means: no proxy.
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

/// Whether an entry such as `10.0.0.0/8` covers the host of a URL.
fn is_in_network(entry: &str, uri: &Uri) -> bool {
    let bits = |address: &str| address.parse::<Ipv4Addr>().ok().map(u32::from);
    let Some((network, length)) = entry.split_once('/') else { return false };
    let (Some(network), Ok(length), Some(host)) = (bits(network), length.parse(), uri.host().and_then(bits)) else {
        return false;
    };
    let mask = u32::MAX.checked_shl(32 - u32::min(length, 32)).unwrap_or(0);
    network & mask == host & mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_need_no_proxy() {
        for (entry, host, expected) in [
            ("*", "a.b", true),
            ("a.b", "a.b", true),
            ("a.b", "A.B", true),
            ("a.b", "x.a.b", true),
            (".a.b", "x.a.b", true),
            (".a.b", "a.b", true),
            ("*.a.b", "x.a.b", true),
            ("a.b", "xa.b", false),
            ("a.b:80", "a.b:80", true),
            ("a.b:80", "a.b", false),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.0.0.0/8", "a.b", false),
            ("10.0.0.0/99", "10.0.0.0", true),
            ("0.0.0.0/0", "11.1.2.3", true),
            ("::1", "[::1]", true),
            ("::1", "[::2]", false),
            (".", "a.b", false),
        ] {
            let setting = Setting { url: "http://proxy".into(), source: String::new() };
            let proxies = Proxies { by_scheme: [("https", setting)].into(), direct: vec![entry.into()] };
            let uri: Uri = format!("https://{host}/x").parse().unwrap();
            assert_eq!(proxies.of(&uri).is_none(), expected, "{entry} {host}");
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
