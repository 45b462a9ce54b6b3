//! A vector of f32, as much as attention, norms and float products need: they are written once (`float.rs`,
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
/// The methods are instructions: whoever calls one runs on a CPU that has them, inside a function compiled for them
/// (`#[target_feature]`), into which they are inlined. Pointers are read and written for `LANES` elements.
pub unsafe trait Simd: Copy {
    const LANES: usize;
    /// 32 of them rather than 16.
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
    /// Not a number where `other` is not; where only `self` is not, `other` or that.
    unsafe fn max(self, other: Self) -> Self;
    /// As `max`.
    unsafe fn min(self, other: Self) -> Self;
    /// `self * a + b`, rounded once.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` for integers from -126 to 127; 0 for -127, infinity for 128.
    unsafe fn exp2_of_integer(self) -> Self;
    /// The sum of the lanes, in a fixed order.
    unsafe fn sum(self) -> f32;
    /// The greatest lane.
    unsafe fn reduce_max(self) -> f32;
    /// Fetch the cache line of `at` to the second level. Any address will do.
    unsafe fn prefetch(at: *const u8);
    /// 4 x 4 floats at `from`, rows `from_stride` apart, to their transpose at `to`.
    unsafe fn transpose4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}

/// `e^x` to about 2 units in the last place; 0 below -87.7, infinity above 88.4: `2^n * e^r` with `n = round(x / ln 2)`,
/// `|r| <= ln 2 / 2` and the Taylor series of degree 7 (its remainder is 6e-9 of the value).
///
/// # Safety
/// As for the methods of [`Simd`].
#[inline(always)]
pub unsafe fn exp<V: Simd>(x: V) -> V {
    // SAFETY: the caller's promise is what every method asks for.
    unsafe {
        // To where n is -127 and 128; written so that a NaN stays one.
        let x = V::splat(88.7).min(V::splat(-88.0).max(x));
        let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        // ln 2 in two pieces, the first with few enough bits that n times it is exact.
        let r = n.mul_add(V::splat(-0.693_359_4), x);
        let r = n.mul_add(V::splat(2.121_944_4e-4), r);
        let mut sum = V::splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            sum = sum.mul_add(r, V::splat(coefficient));
        }
        sum.mul(n.exp2_of_integer())
    }
}
