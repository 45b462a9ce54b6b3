//! The features of this CPU that kernels use.

/// Instruction set extensions by name, and whether this CPU and operating system have them.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let (amx_tile, amx_bf16) = amx();
        vec![
            ("sse4.2", has!("sse4.2")),
            ("avx2", has!("avx2")),
            ("fma", has!("fma")),
            ("f16c", has!("f16c")),
            ("avxvnni", has!("avxvnni")),
            ("avx512f", has!("avx512f")),
            ("avx512bw", has!("avx512bw")),
            ("avx512vnni", has!("avx512vnni")),
            ("avx512bf16", has!("avx512bf16")),
            ("amx-tile", amx_tile),
            ("amx-bf16", amx_bf16),
        ]
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as has;
        vec![
            ("neon", has!("neon")),
            ("fp16", has!("fp16")),
            ("dotprod", has!("dotprod")),
            ("i8mm", has!("i8mm")),
            ("bf16", has!("bf16")),
        ]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

/// Whether the CPU has half-precision arithmetic, which an aarch64 build with `+fp16` presupposes. In such a build the
/// answer of the standard library is a constant.
#[cfg(all(target_arch = "aarch64", target_feature = "fp16"))]
pub fn has_fp16() -> bool {
    // The auxiliary vector's AT_HWCAP, with the bits FPHP and ASIMDHP.
    #[cfg(target_os = "linux")]
    {
        use std::ffi::c_ulong;
        unsafe extern "C" {
            safe fn getauxval(kind: c_ulong) -> c_ulong;
        }
        getauxval(16) >> 9 & 3 == 3
    }
    // Windows does not report it. Every CPU that has it (ARMv8.2) has the atomics of ARMv8.1, which Windows reports.
    #[cfg(windows)]
    {
        std::arch::is_aarch64_feature_detected!("lse")
    }
    #[cfg(not(any(target_os = "linux", windows)))]
    true // every Apple CPU
}

/// Whether the CPU has the tiles of AMX, eight of 16 rows of 64 bytes, and their bf16 products. The standard library does
/// not report them yet. The bits are those of Intel's manual, volume 1, chapter 18.
#[cfg(target_arch = "x86_64")]
pub fn amx() -> (bool, bool) {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    // Where AVX-512 is reported, XGETBV may be used.
    if !std::arch::is_x86_feature_detected!("avx512f") || __cpuid(0).eax < 0x1d {
        return (false, false);
    }
    let extensions = __cpuid_count(7, 0).edx;
    // SAFETY: AVX-512 is reported, see above.
    let saved = unsafe { _xgetbv(0) } >> 17 & 3 == 3;
    let shape = __cpuid_count(0x1d, 1);
    let usual = shape.ebx == 8 << 16 | 64 && shape.ecx & 0xffff == 16;
    let tile = extensions >> 24 & 1 == 1 && saved && usual;
    (tile, tile && extensions >> 22 & 1 == 1)
}
