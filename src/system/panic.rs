//! Panics are bugs of the engine. They are caught before they leave it and become errors that name the place. Nothing is
//! printed.
//!
//! Decisions: docs/design/engine.md

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::error::{Error, Result};

thread_local! {
    /// The place of this thread's last panic, which the payload lacks.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Prints no panics to stderr and records their places, for the rest of the process. An extension module has a panic hook of
/// its own, so no other module is affected.
pub fn silence() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
        let _ = PLACE.try_with(|last| last.replace(place)); // fails where the thread's locals are gone
    }));
}

/// Calls `work`. A panic becomes `Error::Internal` with its message, and its place if `silence` was called before.
pub fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    PLACE.take(); // the place of a panic that other code caught
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(to_error(payload)))
}

/// Unwinds with an error, where a function cannot return one: in a kernel, or after `catch` on another thread. The next
/// `catch` returns the same error.
pub fn resume(error: Error) -> ! {
    resume_unwind(Box::new(error))
}

fn to_error(payload: Box<dyn Any + Send>) -> Error {
    let text = match payload.downcast::<Error>() {
        Ok(error) => return *error, // from `resume`
        Err(payload) => match payload.downcast::<String>() {
            Ok(text) => *text,
            Err(payload) => {
                payload.downcast_ref::<&str>().map_or("a panic without a message".into(), ToString::to_string)
            }
        },
    };
    Error::Internal(text + &PLACE.take())
}
