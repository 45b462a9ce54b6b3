//! Values of the HTTP headers that say what a response holds.

use super::checksum::Checksum;

/// `Content-Range: bytes 5-9/10`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// The first byte.
    pub first: u64,
    /// The size of the whole content. None: the server does not know it.
    pub size: Option<u64>,
}

impl ContentRange {
    pub fn parse(text: &str) -> Option<Self> {
        let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (first, _) = range.split_once('-')?;
        let size = if size == "*" { None } else { Some(number(size)?) };
        Some(ContentRange { first: number(first)?, size })
    }
}

/// A number as HTTP writes one: without a sign.
pub fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|_| !text.contains('+'))
}

/// The checksum in an ETag, which may be weak: `W/"5d41..."`.
pub fn etag(text: &str) -> Option<Checksum> {
    Checksum::parse(text.trim_start_matches("W/").trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = |first, size| Some(ContentRange { first, size });
        for (text, expected) in [
            ("bytes 5-9/10", range(5, Some(10))),
            (" bytes 0-0/*", range(0, None)),
            ("bytes 18446744073709551615-/1", range(u64::MAX, Some(1))),
            ("bytes 18446744073709551616-/1", None),
            ("bytes +5-9/10", None),
            ("bytes -5-9/10", None),
            ("bytes */10", None),
            ("bytes 5-9", None),
            ("bytes", None),
            ("items 5-9/10", None),
            ("", None),
        ] {
            assert_eq!(ContentRange::parse(text), expected, "{text}");
        }
    }
}
