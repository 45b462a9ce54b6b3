//! Keys and values of the positions that are computed. It may use `compute`, which stores and reads them.

pub mod cache;
