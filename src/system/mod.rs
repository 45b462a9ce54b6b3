//! What every floor needs of the process and the operating system: memory that may be refused, panics, cancellation,
//! forks, and work on a thread of its own. It may use `error` alone.

#[allow(unsafe_code)] // registers a handler that adds to an atomic
pub mod fork;
pub mod memory;
pub mod panic;
pub mod sync;
pub mod task;
