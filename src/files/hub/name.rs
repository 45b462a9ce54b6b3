//! Names of repositories, revisions and files. Each becomes part of a path in the cache, and some come from a server. Names
//! that lead out of the cache folder are refused here.

use crate::error::{Error, Result};
use crate::files::gguf::SplitName;

/// `organisation/name` (or a name alone), by the Hub's rules.
pub fn check_repo(repo: &str) -> Result<()> {
    let part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("--")
            && !part.contains("..")
    };
    if repo.len() <= 193 && repo.split('/').count() <= 2 && repo.split('/').all(part) {
        return Ok(());
    }
    let wanted = "must be 'organisation/name' (letters, digits, '-', '_' and '.') or a short name";
    Err(Error::option("repo_id", format!("{wanted}, not {repo:?}")))
}

/// A branch, a tag or a commit.
pub fn check_revision(revision: &str) -> Result<()> {
    let allowed = revision.chars().all(|c| c.is_alphanumeric() || "._-/+@".contains(c));
    if allowed && is_inside(revision) {
        return Ok(());
    }
    Err(Error::option("revision", format!("must be a branch, a tag or a commit, not {revision:?}")))
}

/// Whether a file's name, as the Hub writes it, stays inside the folder that it is joined to, on every platform.
pub fn is_inside(name: &str) -> bool {
    name.len() <= 1024
        && !name.contains(['\\', ':', '\0'])
        && !name.chars().any(char::is_control)
        // Windows drops dots and spaces at the end of a name
        && name.split('/').all(|part| !part.trim_end_matches(['.', ' ']).is_empty())
}

/// A commit: 40 hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

pub fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether a name is a pattern.
pub fn is_glob(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

/// Whether `name` matches a shell pattern: `*`, `?`, `[a-z]` and `[!a-z]`, where `*` matches slashes too.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // The last star, and how much of the name it covers: after a mismatch it covers one character more.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
                continue;
            }
            Some(_) => {
                let (fits, length) = fits_one(&pattern[p..], name[n]);
                if fits {
                    (p, n) = (p + length, n + 1);
                    continue;
                }
            }
            None => {}
        }
        let Some((at, taken)) = star else { return false };
        (p, n, star) = (at + 1, taken + 1, Some((at, taken + 1)));
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// Whether the first element of a pattern (not a star) matches `c`, and how many characters it has.
fn fits_one(pattern: &[char], c: char) -> (bool, usize) {
    match pattern[0] {
        '?' => (true, 1),
        '[' => {
            let negated = pattern.get(1) == Some(&'!');
            let start = 1 + usize::from(negated);
            // a leading ] belongs to the set
            let Some(end) = (start + 1..pattern.len()).find(|&i| pattern[i] == ']') else { return (c == '[', 1) };
            let set = &pattern[start..end];
            let mut found = false;
            let mut i = 0;
            while i < set.len() {
                if i + 2 < set.len() && set[i + 1] == '-' {
                    found |= (set[i]..=set[i + 2]).contains(&c);
                    i += 3;
                } else {
                    found |= set[i] == c;
                    i += 1;
                }
            }
            (found != negated, end + 1)
        }
        other => (other == c, 1),
    }
}

/// The names of all parts of a split GGUF file, given one: `x-00001-of-00003.gguf`. Any other file is its own only part.
/// A name can claim 99999 parts, so they are named one by one, as they are needed.
pub fn parts(name: &str) -> impl Iterator<Item = String> {
    let split = SplitName::parse(name);
    (1..=split.map_or(1, |split| split.count))
        .map(move |i| split.map_or_else(|| name.to_owned(), |split| split.part(i)))
}

/// Whether two names are of one model: the same file, or parts of one split file.
pub fn is_same_model(a: &str, b: &str) -> bool {
    a == b || split(a).is_some_and(|model| split(b) == Some(model))
}

/// The stem of a part's name, and the number of parts.
pub fn split(name: &str) -> Option<(&str, usize)> {
    SplitName::parse(name).map(|split| (split.stem, split.count as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_of_the_cache() {
        for name in
            ["", "/etc/passwd", "../x", "a/../../x", "a//b", "C:x", "a\\b", "a/.", "a\0b", "a\nb", "a/.. /b", "a/.../b"]
        {
            assert!(!is_inside(name), "{name:?}");
        }
        assert!(is_inside("sub/模型-q4.gguf"));
        for repo in ["", "/", "a/", "../b", "a/..", "a/b/c", "a--b/c", "-a/b", "a b/c", "a/b."] {
            assert!(check_repo(repo).is_err(), "{repo:?}");
        }
        assert!(check_repo("microsoft/Phi-3-mini-4k-instruct-gguf").is_ok());
        for revision in ["", "..", "a/../b", "/a", "a b", "a?b", "a\\b"] {
            assert!(check_revision(revision).is_err(), "{revision:?}");
        }
        assert!(check_revision("refs/pr/1").is_ok());
    }

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("*q4.gguf", "Phi-3-mini-4k-instruct-q4.gguf", true),
            ("*q4.gguf", "Phi-3-mini-4k-instruct-q4.gguf.part", false),
            ("*", "a/b", true),
            ("a*b*c", "a1b2b3c", true),
            ("a*b*c", "a1b2b3", false),
            ("?[0-9].gguf", "q4.gguf", true),
            ("q[!4].gguf", "q4.gguf", false),
            ("q[]4].gguf", "q].gguf", true),
            ("[", "[", true),
            ("**********************************************b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn parts_of_a_split_file() {
        let all = ["a/b-00001-of-00003.gguf", "a/b-00002-of-00003.gguf", "a/b-00003-of-00003.gguf"];
        assert!(parts("a/b-00002-of-00003.gguf").eq(all));
        for whole in [
            "b.gguf",
            "b-00004-of-00003.gguf",
            "b-1-of-3.gguf",
            "b-00000-of-00000.gguf",
            "-of-.gguf",
            "b-+0001-of-+0003.gguf",
        ] {
            assert!(parts(whole).eq([whole]), "{whole}");
        }
        assert!(is_same_model(all[0], all[2]) && is_same_model("b.gguf", "b.gguf"));
        assert!(!is_same_model(all[0], "a/b-00001-of-00004.gguf") && !is_same_model("b.gguf", "c.gguf"));
    }
}
