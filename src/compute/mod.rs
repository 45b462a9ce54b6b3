//! Computation: the operations that models are written in, the thread pool, and the kernels. It may use `files`, whose
//! bytes are the weights, and `system`. `kernels` knows neither of files nor of threads.

pub mod bandwidth;
#[allow(unsafe_code)] // instructions, and files and buffers viewed as blocks
pub mod kernels;
pub mod ops;
#[allow(unsafe_code)] // workers borrow a job from the thread that waits for them
pub mod pool;
