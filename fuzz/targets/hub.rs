//! Texts of a server and of the command line: patterns and names, ranges, and the targets of redirects.
#![no_main]

use candle_phi::files::hub::headers::{ContentRange, etag};
use candle_phi::files::hub::name::{check_repo, check_revision, is_inside, is_same_model, matches, parts};
use candle_phi::files::hub::url::{escape, resolve};
use libfuzzer_sys::fuzz_target;

// The first line and the rest.
fuzz_target!(|input: &str| {
    let (first, second) = input.split_once('\n').unwrap_or((input, ""));

    if first.len() <= 200 && second.len() <= 200 && !first.contains('[') {
        let (pattern, name): (Vec<char>, Vec<char>) = (first.chars().collect(), second.chars().collect());
        assert_eq!(matches(first, second), by_table(&pattern, &name), "{first:?} {second:?}");
    } else {
        matches(first, second);
    }
    assert!(parts(first).take(100).all(|part| is_same_model(&part, first)));
    for check in [check_repo, check_revision] {
        assert!(check(first).is_err() || is_inside(first));
    }

    if let Some(range) = ContentRange::parse(first) {
        let size = range.size.map_or("*".into(), |size| size.to_string());
        assert_eq!(ContentRange::parse(&format!("bytes {}-0/{size}", range.first)), Some(range));
    }
    assert!(etag(first).is_none_or(|checksum| first.contains(checksum.hex())));

    // a target without scheme and host stays on the host; resolved once, it is absolute
    let target = resolve("https://host:8/a/b?c", second);
    let (path, _) = second.split_at(second.find(['?', '#']).unwrap_or(second.len()));
    if !path.contains(':') && !path.starts_with("//") {
        assert!(target.strip_prefix("https://host:8").is_some_and(|rest| rest.starts_with('/')), "{target}");
        let path = target.split(['?', '#']).next().unwrap_or_default();
        assert!(!path.split('/').any(|segment| segment == "." || segment == ".."), "{target}");
    }
    assert_eq!(resolve("http://other/x", &target), target);
    assert!(escape(first, "/").bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%/".contains(&b)));
});

/// `matches` without `[...]`, by a table. After i characters of the pattern, `row[j]` tells whether they match the first j
/// characters of the name.
fn by_table(pattern: &[char], name: &[char]) -> bool {
    let mut row: Vec<bool> = (0..=name.len()).map(|j| j == 0).collect();
    for &c in pattern {
        let before = row.clone();
        row[0] = c == '*' && before[0];
        for (j, &n) in name.iter().enumerate() {
            row[j + 1] = if c == '*' { before[j + 1] || row[j] } else { before[j] && (c == '?' || c == n) };
        }
    }
    row[name.len()]
}
