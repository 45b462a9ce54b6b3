//! Super-blocks of 256 bytes, interleaved for x86: activations as they are packed for decode, weights as they are
//! unpacked.
//!
//! Vector i of four, 64 bytes each, has piece i of every group. A 32-bit lane then has the same group in all four vectors,
//! so that their products are added before the group's scale is applied. AVX2 takes each vector in two halves.
//!
//! ```text
//! 8 groups, pieces of 8 bytes:     0  1  2  3  4  5  6  7          two lanes each
//! 16 groups, pieces of 4 bytes:    0 4 8 12  1 5 9 13  2 6 10 14  3 7 11 15
//! ```
//!
//! Decisions: docs/design/kernels.md

use crate::compute::kernels::Format;
use crate::compute::kernels::pack::{self, Activations, Line, Plain, SUPER, plain, view_mut};

plain! {
    /// 256 features of one token.
    #[repr(C, align(64))]
    pub struct InterleavedRow {
        pub q: [[i8; 64]; 4],
        pub starts: Starts,
        pub sums: Sums,
        /// dx
        pub d: f32,
        unused: [u32; 7],
    }
}

/// By lane.
#[derive(Copy, Clone)]
#[repr(C)]
pub union Starts {
    /// With 8 groups: `dx * sum of q` in the first lane of each group, 0 in the second.
    pub of_8: [f32; 16],
    /// With 16 groups: the difference between products with `weight - 32` and with `weight`.
    pub of_16: [i32; 16],
}
// SAFETY: either field is numbers and fills the union.
unsafe impl Plain for Starts {}
const _: () = assert!(size_of::<Starts>() == size_of::<[f32; 16]>() && size_of::<Starts>() == size_of::<[i32; 16]>());

/// Of each group, in order, for the mins.
#[derive(Copy, Clone)]
#[repr(C)]
pub union Sums {
    /// With 8 groups: `dx * sum of q`.
    pub of_8: [f32; 8],
    /// With 16 groups: the sum of q.
    pub of_16: [i16; 16],
}
// SAFETY: either field is numbers and fills the union.
unsafe impl Plain for Sums {}
const _: () = assert!(size_of::<Sums>() == size_of::<[f32; 8]>() && size_of::<Sums>() == size_of::<[i16; 16]>());

/// The first lane of a group in each vector. The order of 16 groups is that of a transposition of 4 x 4 lanes.
#[inline(always)]
pub const fn lane(groups: usize, group: usize) -> usize {
    if groups == 8 { 2 * group } else { group % 4 * 4 + group / 4 }
}

/// The lane, counted through all four vectors, that has the bytes `4 * i .. 4 * (i + 1)` of a group.
#[inline(always)]
pub const fn lane_of_quad(groups: usize, group: usize, i: usize) -> usize {
    let lanes = 16 / groups;
    i / lanes * 16 + lane(groups, group) + i % lanes
}

/// The activations of one token for decode.
#[inline(always)]
pub fn pack_row(format: Format, x: &[f32], row: &mut [Line]) {
    let Activations::Q8K { groups } = Activations::of(format) else { return pack::pack_row(format, x, row) };
    let mut q = [0; SUPER];
    for (x, block) in x.as_chunks::<SUPER>().0.iter().zip(view_mut::<InterleavedRow>(row)) {
        let d = pack::quantize(x, &mut q);
        block.d = d;
        if groups == 8 {
            let (mut sums, mut starts) = ([0f32; 8], [0f32; 16]);
            for (group, q) in q.as_chunks::<32>().0.iter().enumerate() {
                interleave_quants::<8>(q, group, &mut block.q);
                sums[group] = d * pack::sum(q) as f32;
                starts[lane(8, group)] = sums[group];
            }
            block.starts = Starts { of_8: starts };
            block.sums = Sums { of_8: sums };
        } else {
            let (mut sums, mut starts) = ([0i16; 16], [0i32; 16]);
            for (group, q) in q.as_chunks::<16>().0.iter().enumerate() {
                let lane = lane(16, group);
                interleave_quants::<4>(q, lane, &mut block.q);
                let sum = pack::sum(q);
                starts[lane] = -32 * sum;
                sums[group] = sum as i16;
            }
            block.starts = Starts { of_16: starts };
            block.sums = Sums { of_16: sums };
        }
    }
}

/// The pieces of a group, `P` bytes each, to index `place` of each vector.
#[inline(always)]
fn interleave_quants<const P: usize>(q: &[i8], place: usize, to: &mut [[i8; 64]; 4]) {
    for (piece, to) in q.as_chunks::<P>().0.iter().zip(to) {
        to.as_chunks_mut::<P>().0[place] = *piece;
    }
}
