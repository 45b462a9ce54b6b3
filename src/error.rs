//! The one error type. Every message names the thing that was wrong and the number; `python.rs` maps each variant to
//! the exception class of the same name.
//!
//! Decisions: docs/design/engine.md

/// What can go wrong, by what the caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such file (`ModelNotFoundError`).
    #[error("{0}")]
    ModelNotFound(String),
    /// The file is damaged or contradicts itself (`InvalidModelError`).
    #[error("{0}")]
    InvalidModel(String),
    /// The file is sound, but is not something this build can run (`UnsupportedModelError`).
    #[error("{0}")]
    UnsupportedModel(String),
    /// Planned, and not built yet (`NotInThisVersionError`).
    #[error("{0}")]
    NotInThisVersion(String),
    /// The prompt does not fit the context (`ContextLengthError`).
    #[error("the prompt has {prompt_tokens} tokens, the context {n_ctx}; generating needs room for at least 1 more")]
    ContextLength { prompt_tokens: usize, n_ctx: usize },
    /// All places are taken (`BusyError`).
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
    /// The caller passed a value out of range (`ValueError`).
    #[error("{0}")]
    Value(String),
    /// The same for an option of the Python API, by its name (`OptionValueError`): each front end spells the name its
    /// own way.
    #[error("{name} {problem}")]
    Option { name: &'static str, problem: String },
    /// The machine has less memory than the request needs (`MemoryError`).
    #[error("{0}")]
    Memory(String),
    /// A bug of ours, caught (`InternalError`).
    #[error("internal error: {0}")]
    Internal(String),
    /// The work was cancelled. Never reaches Python as an exception.
    #[error("cancelled")]
    Cancelled,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn option(name: &'static str, problem: impl Into<String>) -> Self {
        Error::Option { name, problem: problem.into() }
    }

    /// A download that failed for a reason that is nobody's answer, such as a full disk.
    pub fn download(message: String) -> Self {
        Error::Download { message, url: None, status: None, host: None }
    }
}

/// A text out of a file, as a message shows it: on one line, and not longer than a message should be.
pub fn excerpt(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.escape_debug().take(SHOWN + 1).collect();
    if shown.chars().count() > SHOWN {
        shown.pop();
        shown.push('…');
    }
    shown
}

impl From<candle_core::Error> for Error {
    /// Shapes and types are checked at load, so an error from Candle afterwards is a bug of ours.
    fn from(error: candle_core::Error) -> Self {
        Error::Internal(error.to_string())
    }
}
