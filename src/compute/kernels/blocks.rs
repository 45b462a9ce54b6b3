//! The storage formats of GGUF weights: block structs as they lie in the file, sizes asserted at compile time.
//!
//! Every struct consists of bytes (alignment 1, no invalid bit pattern), so that a file's bytes can be viewed as blocks at
//! any address. The layouts are ggml's (`ggml-common.h`). Half floats are two little-endian bytes until they are used.

/// The storage format of the weights of a matrix.
#[allow(non_camel_case_types)] // ggml's names
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Format {
    pub const ALL: [Format; 13] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2_K,
        Format::Q3_K,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
    ];

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => size_of::<Q4_0>(),
            Format::Q4_1 => size_of::<Q4_1>(),
            Format::Q5_0 => size_of::<Q5_0>(),
            Format::Q5_1 => size_of::<Q5_1>(),
            Format::Q8_0 => size_of::<Q8_0>(),
            Format::Q2_K => size_of::<Q2_K>(),
            Format::Q3_K => size_of::<Q3_K>(),
            Format::Q4_K => size_of::<Q4_K>(),
            Format::Q5_K => size_of::<Q5_K>(),
            Format::Q6_K => size_of::<Q6_K>(),
        }
    }

    /// Bytes of a row of `cols` weights; `cols` is a multiple of `block_len`.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_len() * self.block_bytes()
    }
}

/// A half float as stored in the file.
#[derive(Copy, Clone)]
#[repr(transparent)]
pub struct Half([u8; 2]);

impl Half {
    pub fn bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    pub fn f32(self) -> f32 {
        half::f16::from_le_bytes(self.0).to_f32()
    }
}

/// A block of weights as stored in the file.
///
/// # Safety
/// Alignment 1, no padding, every bit pattern is valid.
pub unsafe trait Block {}

/// The bytes of a row as blocks, without a remainder shorter than a block.
pub fn blocks<B: Block>(bytes: &[u8]) -> &[B] {
    // SAFETY: a `Block` has alignment 1 and no invalid bit pattern; the length is rounded down.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<B>()) }
}

/// Block `i` of a row.
///
/// # Safety
/// The row has more than `i` blocks.
#[inline(always)]
pub unsafe fn block<B: Block>(bytes: &[u8], i: usize) -> &B {
    debug_assert!((i + 1) * size_of::<B>() <= bytes.len());
    // SAFETY: as in `blocks`, and inside of the row, by the contract of this function.
    unsafe { &*bytes.as_ptr().cast::<B>().add(i) }
}

macro_rules! block {
    ($name:ident, $bytes:literal, { $($field:ident: $type:ty),+ }) => {
        #[allow(non_camel_case_types)] // ggml's names
        #[derive(Copy, Clone)]
        #[repr(C)]
        pub struct $name { $(pub $field: $type),+ }
        // SAFETY: repr(C) over bytes only; the assertions below leave no room for padding.
        unsafe impl Block for $name {}
        const _: () = assert!(size_of::<$name>() == $bytes && align_of::<$name>() == 1);
    };
}

block!(Q4_0, 18, { d: Half, qs: [u8; 16] });
block!(Q4_1, 20, { d: Half, m: Half, qs: [u8; 16] });
block!(Q5_0, 22, { d: Half, qh: [u8; 4], qs: [u8; 16] });
block!(Q5_1, 24, { d: Half, m: Half, qh: [u8; 4], qs: [u8; 16] });
block!(Q8_0, 34, { d: Half, qs: [i8; 32] });
block!(Q2_K, 84, { scales: [u8; 16], qs: [u8; 64], d: Half, dmin: Half });
block!(Q3_K, 110, { hmask: [u8; 32], qs: [u8; 64], scales: [u8; 12], d: Half });
block!(Q4_K, 144, { d: Half, dmin: Half, scales: [u8; 12], qs: [u8; 128] });
block!(Q5_K, 176, { d: Half, dmin: Half, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128] });
block!(Q6_K, 210, { ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: Half });

/// Scales and mins of Q4_K and Q5_K: from 8 of 6 bits each in 12 bytes to 8 bytes each.
#[inline(always)]
pub fn scales_and_mins(packed: &[u8; 12]) -> (u64, u64) {
    let word = |i: usize| u32::from_le_bytes([packed[i], packed[i + 1], packed[i + 2], packed[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let high_scales = c & 0x0f0f_0f0f | (a >> 6 & 0x0303_0303) << 4;
    let high_mins = c >> 4 & 0x0f0f_0f0f | (b >> 6 & 0x0303_0303) << 4;
    let join = |low: u32, high: u32| (low & 0x3f3f_3f3f) as u64 | (high as u64) << 32;
    (join(a, high_scales), join(b, high_mins))
}
