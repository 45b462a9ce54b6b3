//! Panics are bugs of ours. They are caught where they would leave the engine, and become errors that say where they
//! were; nothing is printed.

use std::any::Any;
use std::sync::Mutex;

use crate::threads::lock;

/// Where the last panic was. The payload that is caught does not say.
static PLACE: Mutex<String> = Mutex::new(String::new());

/// Keep panics off stderr, for as long as the process lives. An extension module has a panic hook of its own: no other
/// module's panics are touched.
pub fn silence() {
    std::panic::set_hook(Box::new(|panic| {
        *lock(&PLACE) = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
    }));
}

/// What a caught panic said, and where, if `silence` was called before.
pub fn message(payload: Box<dyn Any + Send>) -> String {
    let text = match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast_ref::<&str>().map_or("a panic without words".into(), |text| text.to_string()),
    };
    text + &lock(&PLACE)
}
