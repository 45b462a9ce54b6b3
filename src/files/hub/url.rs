//! References between URLs, as RFC 3986 resolves them: a redirect may leave out the scheme, the host or the folder.
//!
//! Decisions: docs/design/hub.md

/// The components of a URL, or of a reference to one.
#[derive(Copy, Clone)]
struct Components<'a> {
    scheme: Option<&'a str>,
    authority: Option<&'a str>,
    path: &'a str,
    query: Option<&'a str>,
    fragment: Option<&'a str>,
}

impl<'a> Components<'a> {
    /// RFC 3986, appendix B.
    fn of(text: &'a str) -> Self {
        let cut = |text: &'a str, at| text.split_once(at).map_or((text, None), |(head, tail)| (head, Some(tail)));
        let (text, fragment) = cut(text, '#');
        let (text, query) = cut(text, '?');
        let (scheme, text) = match text.split_once(':') {
            Some((scheme, rest)) if is_scheme(scheme) => (Some(scheme), rest),
            _ => (None, text),
        };
        let (authority, path) = match text.strip_prefix("//") {
            Some(rest) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                (Some(authority), path)
            }
            None => (None, text),
        };
        Components { scheme, authority, path, query, fragment }
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

/// The URL that `reference` means in the document `base` (RFC 3986, 5.2.2 and 5.3).
pub fn resolve(base: &str, reference: &str) -> String {
    let (base, reference) = (Components::of(base), Components::of(reference));
    let is_full = reference.scheme.is_some();
    let has_authority = is_full || reference.authority.is_some();
    let keeps_path = !has_authority && reference.path.is_empty();
    let path = if keeps_path {
        base.path.to_owned()
    } else if has_authority || reference.path.starts_with('/') {
        without_dots(reference.path)
    } else {
        let folder = base.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        without_dots(&format!("{folder}/{}", reference.path))
    };
    let query = if keeps_path { reference.query.or(base.query) } else { reference.query };
    let mut url = String::new();
    let mut push = |before: &str, component: Option<&str>, after: &str| {
        if let Some(component) = component {
            url.extend([before, component, after]);
        }
    };
    push("", if is_full { reference.scheme } else { base.scheme }, ":");
    push("//", if has_authority { reference.authority } else { base.authority }, "");
    push("", Some(&path), "");
    push("?", query, "");
    push("#", reference.fragment, "");
    url
}

/// An absolute path without `.` and `..` (RFC 3986, 5.2.4). Any other path stays as it is.
fn without_dots(path: &str) -> String {
    let Some(relative) = path.strip_prefix('/') else { return path.to_owned() };
    let mut kept = Vec::new();
    let mut segments = relative.split('/').peekable();
    while let Some(segment) = segments.next() {
        if segment == ".." {
            kept.pop();
        }
        if segment != "." && segment != ".." {
            kept.push(segment);
        } else if segments.peek().is_none() {
            kept.push(""); // a folder ends with a slash
        }
    }
    format!("/{}", kept.join("/"))
}

/// `text` as a part of a URL's path. The characters in `keep` are not escaped.
pub fn escape(text: &str, keep: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte);
    text.bytes().map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_rfc_3986() {
        for (reference, expected) in [
            // 5.4.1, normal
            ("g:h", "g:h"),
            ("g", "http://a/b/c/g"),
            ("./g", "http://a/b/c/g"),
            ("g/", "http://a/b/c/g/"),
            ("/g", "http://a/g"),
            ("//g", "http://g"),
            ("?y", "http://a/b/c/d;p?y"),
            ("g?y", "http://a/b/c/g?y"),
            ("#s", "http://a/b/c/d;p?q#s"),
            ("g#s", "http://a/b/c/g#s"),
            ("g?y#s", "http://a/b/c/g?y#s"),
            (";x", "http://a/b/c/;x"),
            ("g;x", "http://a/b/c/g;x"),
            ("g;x?y#s", "http://a/b/c/g;x?y#s"),
            ("", "http://a/b/c/d;p?q"),
            (".", "http://a/b/c/"),
            ("./", "http://a/b/c/"),
            ("..", "http://a/b/"),
            ("../", "http://a/b/"),
            ("../g", "http://a/b/g"),
            ("../..", "http://a/"),
            ("../../", "http://a/"),
            ("../../g", "http://a/g"),
            // 5.4.2, abnormal
            ("../../../g", "http://a/g"),
            ("../../../../g", "http://a/g"),
            ("/./g", "http://a/g"),
            ("/../g", "http://a/g"),
            ("g.", "http://a/b/c/g."),
            (".g", "http://a/b/c/.g"),
            ("g..", "http://a/b/c/g.."),
            ("..g", "http://a/b/c/..g"),
            ("./../g", "http://a/b/g"),
            ("./g/.", "http://a/b/c/g/"),
            ("g/./h", "http://a/b/c/g/h"),
            ("g/../h", "http://a/b/c/h"),
            ("g;x=1/./y", "http://a/b/c/g;x=1/y"),
            ("g;x=1/../y", "http://a/b/c/y"),
            ("g?y/./x", "http://a/b/c/g?y/./x"),
            ("g?y/../x", "http://a/b/c/g?y/../x"),
            ("g#s/./x", "http://a/b/c/g#s/./x"),
            ("g#s/../x", "http://a/b/c/g#s/../x"),
            ("http:g", "http:g"),
        ] {
            assert_eq!(resolve("http://a/b/c/d;p?q", reference), expected, "{reference}");
        }
    }

    #[test]
    fn redirects() {
        for (base, location, expected) in [
            ("https://a/b/c?d", "https://x/y", "https://x/y"),
            ("https://a:1/b/c?d", "/y", "https://a:1/y"),
            ("https://a/b/c?d/e", "y", "https://a/b/y"),
            ("https://a", "y", "https://a/y"),
            ("https://a", "?y", "https://a?y"),
            // the scheme of a URL in the query is not the scheme of the whole
            ("https://a/b", "/x?from=https://y", "https://a/x?from=https://y"),
            ("https://a/b", "login?next=https://a/b", "https://a/login?next=https://a/b"),
            ("https://a/b", "?https://y", "https://a/b?https://y"),
            ("https://a/b", "#https://y", "https://a/b#https://y"),
            ("https://a/b/", "x/https://y", "https://a/b/x/https://y"),
        ] {
            assert_eq!(resolve(base, location), expected, "{base} {location}");
        }
    }
}
