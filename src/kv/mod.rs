//! Keys and values of computed positions: tables of the sequences that are computed, and the tree of all that are held. It may use `compute`, which stores and reads them.

pub mod file;
pub mod folder;
pub mod phases;
pub mod table;
pub mod tree;
