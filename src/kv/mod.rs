//! Keys and values of computed positions, by sequence. It may use `compute`, which stores and reads them.

pub mod file;
pub mod table;
