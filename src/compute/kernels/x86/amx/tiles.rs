//! The tile registers: the instructions on them, and their state.

use std::arch::asm;
use std::marker::PhantomData;

use crate::compute::kernels::Line;

/// The eight tile registers, each 16 rows of 64 bytes.
///
/// # Safety
/// For the caller: `configure` needs a CPU with AMX and the system's permission; the other methods need a thread that has
/// called it since the last `release`. A pointer is valid for reads, or for writes, of 16 lines.
///
/// For the implementer: a method accesses no memory but the lines at its pointer.
pub unsafe trait Tiles: Send + Sync {
    unsafe fn configure();
    /// Back to the initial state, in which a context switch does not save the tiles.
    unsafe fn release();
    unsafe fn zero<const TILE: usize>();
    unsafe fn load<const TILE: usize>(from: *const Line);
    unsafe fn store<const TILE: usize>(to: *mut Line);
    /// `sums[i][j] += w[i][2k] * x[k][2j] + w[i][2k + 1] * x[k][2j + 1]` over the 16 pairs k: w and x in bf16, sums in f32.
    unsafe fn dot<const SUMS: usize, const W: usize, const X: usize>();
}

pub struct Hardware;

/// The operand of `ldtilecfg`: 16 rows of 64 bytes for each of 8 tiles.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (row_bytes[tile], rows[tile]) = (64, 16);
        tile += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// A tile instruction. Tiles carry values from one instruction to the next: the compiler uses them for the intrinsics of
/// `amx-tile` alone, and keeps `asm!` in order, also relative to stores to memory.
macro_rules! tile {
    ($instruction:literal $(, $($operand:tt)+)?) => {
        // SAFETY: the contract of the method of `Tiles`. The instruction changes the tiles, or the lines at its pointer.
        unsafe {
            asm!(
                $instruction,
                $($($operand)+,)?
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags)
            )
        }
    };
}

// SAFETY: each method is the instruction of its name.
unsafe impl Tiles for Hardware {
    #[inline(always)]
    unsafe fn configure() {
        tile!("ldtilecfg [{}]", in(reg) &raw const CONFIG)
    }

    #[inline(always)]
    unsafe fn release() {
        tile!("tilerelease")
    }

    #[inline(always)]
    unsafe fn zero<const TILE: usize>() {
        tile!("tilezero tmm{t}", t = const TILE)
    }

    #[inline(always)]
    unsafe fn load<const TILE: usize>(from: *const Line) {
        tile!("tileloadd tmm{t}, [{} + {}]", in(reg) from, in(reg) size_of::<Line>(), t = const TILE)
    }

    #[inline(always)]
    unsafe fn store<const TILE: usize>(to: *mut Line) {
        tile!("tilestored [{} + {}], tmm{t}", in(reg) to, in(reg) size_of::<Line>(), t = const TILE)
    }

    #[inline(always)]
    unsafe fn dot<const SUMS: usize, const W: usize, const X: usize>() {
        tile!("tdpbf16ps tmm{s}, tmm{w}, tmm{x}", s = const SUMS, w = const W, x = const X)
    }
}

/// The tiles of this thread are configured while a value lives.
pub struct Configured<T: Tiles>(PhantomData<T>);

impl<T: Tiles> Configured<T> {
    /// # Safety
    /// As for `Tiles::configure`.
    pub unsafe fn new() -> Self {
        // SAFETY: the contract of this function.
        unsafe { T::configure() };
        Configured(PhantomData)
    }
}

impl<T: Tiles> Drop for Configured<T> {
    fn drop(&mut self) {
        // SAFETY: configured in `new`.
        unsafe { T::release() }
    }
}

/// Requests the tile registers from Linux, which permits them to a whole process at a time
/// (Documentation/arch/x86/xstate.rst). False on other systems.
pub fn permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    if !cfg!(target_os = "linux") {
        return false;
    }
    let result: isize;
    // SAFETY: a Linux system call with integers; it changes rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}
