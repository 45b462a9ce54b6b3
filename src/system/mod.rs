//! What every floor needs of the process and the operating system: memory that may be refused, panics, cancellation,
//! forks, and work on a thread of its own. It may use `error` alone.

pub mod memory;
pub mod panic;
pub mod task;
