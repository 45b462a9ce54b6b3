//! A vector of f32 with the operations that attention, norms and float products need. They are written once (`float.rs`,
//! `attention.rs`) and compiled for each instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use half::f16;

/// A register of `LANES` floats.
///
/// # Safety
/// For the caller of any method:
/// - The CPU has the instruction set, and the calling function is compiled for it (`#[target_feature]`) or is inlined
///   into one that is. This is what "the instruction set is there" means in the SAFETY lines of the kernels.
/// - A pointer is valid for reads, or for writes, of `LANES` elements. It may have any alignment.
///
/// For the implementer: a method computes what its comment says and accesses no other memory.
pub unsafe trait Simd: Copy {
    /// 16 at most.
    const LANES: usize;
    /// Vector registers of the instruction set.
    const REGISTERS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// NaN if `other` is NaN; if only `self` is, either.
    unsafe fn max(self, other: Self) -> Self;
    /// NaN as in `max`.
    unsafe fn min(self, other: Self) -> Self;
    /// `self * a + b`, fused: rounded once.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` for integers from -126 to 127; 0 for -127, infinity for 128.
    unsafe fn exp2_of_integer(self) -> Self;
    /// The horizontal sum, in a fixed order.
    unsafe fn reduce_sum(self) -> f32;
    /// The horizontal maximum.
    unsafe fn reduce_max(self) -> f32;
    /// Prefetches the cache line of `at` into L2. The address may be invalid.
    unsafe fn prefetch(at: *const u8);
    /// Transposes 4 x 4 floats. The rows at `from` are `from_stride` floats apart, those at `to` `to_stride`; each is valid
    /// for 4 floats.
    unsafe fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}

/// Methods of [`Simd`] for one instruction set: each body is a few instructions.
macro_rules! instructions {
    ($(fn $name:ident($($args:tt)*) $(-> $result:ty)? { $($body:tt)* })*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($args)*) $(-> $result)? {
                // SAFETY: the caller keeps the contract of `Simd`: the instruction set is there, pointers are valid.
                unsafe { $($body)* }
            }
        )*
    };
}
use instructions;

/// `e^x` to about 2 units in the last place; 0 below -87.7, infinity above 88.4. Computed as `2^n * e^r` with
/// `n = round(x / ln 2)`, `|r| <= ln 2 / 2` and the Taylor series of degree 7, whose remainder is 6e-9 of the value.
///
/// # Safety
/// The instruction set is there, see [`Simd`].
#[inline(always)]
pub unsafe fn exp<V: Simd>(x: V) -> V {
    // SAFETY: the instruction set is there, by the contract of this function.
    unsafe {
        // Clamped to where n is -127 and 128. The order of the operands keeps a NaN.
        let x = V::splat(88.7).min(V::splat(-88.0).max(x));
        let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        // ln 2 as two constants, the first short enough that its product with n is exact.
        let r = n.mul_add(V::splat(-0.693_359_4), x);
        let r = n.mul_add(V::splat(2.121_944_4e-4), r);
        let mut sum = V::splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            sum = sum.mul_add(r, V::splat(coefficient));
        }
        sum.mul(n.exp2_of_integer())
    }
}
