//! The one error type, and how messages show texts and sizes. Every message names the thing and the number; `python/errors.rs`
//! maps each variant to the exception class of the same name.
//!
//! Decisions: docs/design/engine.md

/// Errors, by what the caller can do about them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such file (`ModelNotFoundError`).
    #[error("{0}")]
    ModelNotFound(String),
    /// The file is damaged or contradicts itself (`InvalidModelError`).
    #[error("{0}")]
    InvalidModel(String),
    /// The file is valid, but this build cannot run it (`UnsupportedModelError`).
    #[error("{0}")]
    UnsupportedModel(String),
    /// Planned, but not implemented yet (`NotInThisVersionError`).
    #[error("{0}")]
    NotInThisVersion(String),
    /// The prompt does not fit the context (`ContextLengthError`).
    #[error("the prompt has {prompt_tokens} tokens, the context {n_ctx}; generating needs room for at least 1 more")]
    ContextLength { prompt_tokens: usize, n_ctx: usize },
    /// All slots are taken (`BusyError`).
    #[error("{0}")]
    Busy(String),
    /// The model was closed (`ClosedError`).
    #[error("the model is closed")]
    Closed,
    /// The process forked after the model was loaded (`ForkError`).
    #[error("{0}")]
    Fork(String),
    /// A download failed (`DownloadError`).
    #[error("{message}")]
    Download { message: String, url: Option<String>, status: Option<u16>, host: Option<String> },
    /// The file is not here, and the network may not be used (`OfflineError`).
    #[error("{0}")]
    Offline(String),
    /// A file cannot be written (`OSError`, or its class for the kind).
    #[error("{message}")]
    File { message: String, kind: std::io::ErrorKind },
    /// The caller passed a value out of range (`ValueError`).
    #[error("{0}")]
    Value(String),
    /// The same for an option of the Python API, by its name (`OptionValueError`): each front end spells the name its
    /// own way.
    #[error("{name} {problem}")]
    Option { name: &'static str, problem: String },
    /// The machine has less memory than the request needs, or too few threads (`MemoryError`).
    #[error("{0}")]
    Memory(String),
    /// A bug of the engine, caught (`InternalError`).
    #[error("internal error: {0}")]
    Internal(String),
    /// The work was cancelled. Never reaches Python as an exception.
    #[error("cancelled")]
    Cancelled,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A problem with the option `name`, which each front end spells in its own way.
    pub fn option(name: &'static str, problem: impl Into<String>) -> Self {
        Error::Option { name, problem: problem.into() }
    }

    /// A download that failed without an HTTP response, such as on a full disk.
    pub fn download(message: String) -> Self {
        Error::Download { message, url: None, status: None, host: None }
    }
}

/// A text from a file, for a message: escaped, so that it is on one line, and at most 80 characters of it.
pub fn excerpt(text: &str) -> String {
    cut(text.escape_debug(), 80)
}

/// A text of several lines, such as the message of a server, on one line of at most `most` characters.
pub fn one_line(text: &str, most: usize) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    cut(words.collect::<Vec<_>>().join(" ").chars(), most)
}

fn cut(mut text: impl Iterator<Item = char>, most: usize) -> String {
    let mut shown: String = text.by_ref().take(most).collect();
    if text.next().is_some() {
        shown.push('…');
    }
    shown
}

/// 2393231072 as "2.39 GB", 21 900 000 as "22 MB".
pub fn human_size(bytes: u64) -> String {
    let units = [("kB", 1e3, 0), ("MB", 1e6, 0), ("GB", 1e9, 2), ("TB", 1e12, 2), ("PB", 1e15, 2), ("EB", 1e18, 2)];
    match units.iter().rfind(|(_, unit, _)| bytes as f64 >= *unit) {
        Some((name, unit, digits)) => format!("{:.digits$} {name}", bytes as f64 / unit),
        None => format!("{bytes} bytes"),
    }
}

impl From<candle_core::Error> for Error {
    /// Shapes and types are checked at load. An error from Candle afterwards is a bug of the engine.
    fn from(error: candle_core::Error) -> Self {
        Error::Internal(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_fit_a_message() {
        assert_eq!(excerpt("a\n\u{1b}é"), "a\\n\\u{1b}é");
        assert_eq!(excerpt(&"x".repeat(81)), "x".repeat(80) + "…");
        assert_eq!(excerpt(&"x".repeat(80)), "x".repeat(80));
        assert_eq!(one_line(" a\r\n\tb\0c ", 5), "a b c");
        assert_eq!(one_line("a b c", 3), "a b…");
    }

    #[test]
    fn sizes_are_read_by_people() {
        let cases = [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1_500, "2 kB"),
            (21_900_000, "22 MB"),
            (2_393_231_072, "2.39 GB"),
            (u64::MAX, "18.45 EB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(human_size(bytes), expected);
        }
    }
}
