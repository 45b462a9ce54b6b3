//! Each error of the engine as an exception of the package.

use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;

mod raised {
    use pyo3::import_exception;
    import_exception!(candle_phi.errors, BusyError);
    import_exception!(candle_phi.errors, ClosedError);
    import_exception!(candle_phi.errors, ContextLengthError);
    import_exception!(candle_phi.errors, DownloadError);
    import_exception!(candle_phi.errors, ForkError);
    import_exception!(candle_phi.errors, InternalError);
    import_exception!(candle_phi.errors, InvalidModelError);
    import_exception!(candle_phi.errors, ModelNotFoundError);
    import_exception!(candle_phi.errors, NotInThisVersionError);
    import_exception!(candle_phi.errors, OfflineError);
    import_exception!(candle_phi.errors, UnsupportedModelError);
    import_exception!(candle_phi.options, OptionValueError);
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::ModelNotFound(_) => raised::ModelNotFoundError::new_err(message),
            Error::InvalidModel(_) => raised::InvalidModelError::new_err(message),
            Error::UnsupportedModel(_) => raised::UnsupportedModelError::new_err(message),
            Error::NotInThisVersion(_) => raised::NotInThisVersionError::new_err(message),
            Error::ContextLength { prompt_tokens, n_ctx } => {
                raised::ContextLengthError::new_err((message, prompt_tokens, n_ctx))
            }
            Error::Busy(_) => raised::BusyError::new_err(message),
            Error::Download { url, status, host, .. } => raised::DownloadError::new_err((message, url, status, host)),
            Error::Offline(_) => raised::OfflineError::new_err(message),
            Error::Closed => raised::ClosedError::new_err(message),
            Error::Fork(_) => raised::ForkError::new_err(message),
            Error::File { kind, .. } => std::io::Error::new(kind, message).into(),
            Error::Value(_) => PyValueError::new_err(message),
            Error::Option { name, problem } => raised::OptionValueError::new_err((name, problem)),
            Error::Memory(_) => PyMemoryError::new_err(message),
            Error::Internal(_) | Error::Cancelled => raised::InternalError::new_err(message),
        }
    }
}
