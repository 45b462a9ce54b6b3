//! The kernels of aarch64.

mod neon;

pub use neon::neon;
