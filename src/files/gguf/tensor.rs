//! Tensors as the file's table describes them, with their bytes in the file.
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// A range of the file. A clone counts a reference and copies nothing; the file stays mapped while one lives.
#[derive(Clone)]
pub struct Bytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Bytes {
    /// `range` is inside `map`: the caller has checked it. Else, reading panics.
    pub fn new(map: &Arc<Mmap>, range: Range<usize>) -> Self {
        debug_assert!(range.start <= range.end && range.end <= map.len());
        Bytes { map: Arc::clone(map), range }
    }

    /// A range of these bytes; None if it is not inside them.
    pub fn part(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) = (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end).then(|| Bytes { map: Arc::clone(&self.map), range: start..end })
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {}", self.range.len(), self.range.start)
    }
}

/// One tensor of the file. Its bytes start at a multiple of the file's alignment (at least 8).
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: GgmlType,
    /// Rows first, (out, in): ggml's `ne` reversed. 1 to 4 dimensions, none of them 0.
    pub shape: Vec<usize>,
    pub(super) data: Bytes,
}

impl Tensor {
    /// The tensor's blocks, row by row; empty when the size of its type is unknown ([`GgmlType::Other`]).
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// [`Tensor::bytes`], owned.
    pub fn data(&self) -> Bytes {
        self.data.clone()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product() // checked when the file was opened
    }
}

/// The storage format of elements. A type without kernels here is [`GgmlType::Other`], with ggml's number.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[allow(non_camel_case_types)] // ggml's own names
pub enum GgmlType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    BF16,
    Other(u32),
}

impl GgmlType {
    pub(super) fn from_id(id: u32) -> Self {
        match id {
            0 => GgmlType::F32,
            1 => GgmlType::F16,
            2 => GgmlType::Q4_0,
            3 => GgmlType::Q4_1,
            6 => GgmlType::Q5_0,
            7 => GgmlType::Q5_1,
            8 => GgmlType::Q8_0,
            10 => GgmlType::Q2K,
            11 => GgmlType::Q3K,
            12 => GgmlType::Q4K,
            13 => GgmlType::Q5K,
            14 => GgmlType::Q6K,
            30 => GgmlType::BF16,
            other => GgmlType::Other(other),
        }
    }

    /// Elements and bytes of one block; a row is a whole number of blocks.
    pub fn block(&self) -> Option<(usize, usize)> {
        Some(match self {
            GgmlType::F32 => (1, 4),
            GgmlType::F16 | GgmlType::BF16 => (1, 2),
            GgmlType::Q4_0 => (32, 18),
            GgmlType::Q4_1 => (32, 20),
            GgmlType::Q5_0 => (32, 22),
            GgmlType::Q5_1 => (32, 24),
            GgmlType::Q8_0 => (32, 34),
            GgmlType::Q2K => (256, 84),
            GgmlType::Q3K => (256, 110),
            GgmlType::Q4K => (256, 144),
            GgmlType::Q5K => (256, 176),
            GgmlType::Q6K => (256, 210),
            GgmlType::Other(_) => return None,
        })
    }

    /// ggml's name: "Q4_K"; "type 99" for a number without one.
    pub fn name(&self) -> String {
        let name = match self {
            GgmlType::F32 => "F32",
            GgmlType::F16 => "F16",
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q5_0 => "Q5_0",
            GgmlType::Q5_1 => "Q5_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q2K => "Q2_K",
            GgmlType::Q3K => "Q3_K",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
            GgmlType::BF16 => "BF16",
            GgmlType::Other(9) => "Q8_1",
            GgmlType::Other(15) => "Q8_K",
            GgmlType::Other(16) => "IQ2_XXS",
            GgmlType::Other(17) => "IQ2_XS",
            GgmlType::Other(18) => "IQ3_XXS",
            GgmlType::Other(19) => "IQ1_S",
            GgmlType::Other(20) => "IQ4_NL",
            GgmlType::Other(21) => "IQ3_S",
            GgmlType::Other(22) => "IQ2_S",
            GgmlType::Other(23) => "IQ4_XS",
            GgmlType::Other(24) => "I8",
            GgmlType::Other(25) => "I16",
            GgmlType::Other(26) => "I32",
            GgmlType::Other(27) => "I64",
            GgmlType::Other(28) => "F64",
            GgmlType::Other(29) => "IQ1_M",
            GgmlType::Other(34) => "TQ1_0",
            GgmlType::Other(35) => "TQ2_0",
            GgmlType::Other(39) => "MXFP4",
            GgmlType::Other(id) => return format!("type {id}"),
        };
        name.to_owned()
    }
}
