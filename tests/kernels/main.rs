//! Every kernel of this CPU against references in f64: products with blocks of every format, norms, activations,
//! attention. For each kernel, the bits of a token's result do not depend on how the work is divided, and arguments of
//! unequal lengths panic.
mod attention;
mod layer;
mod product;
mod products;
mod random;
mod shapes;

use candle_phi::compute::kernels::{self, Format, Kernel, Line, Phase, Weights, view_mut};

fn all() -> impl Iterator<Item = Box<dyn Kernel>> {
    kernels::available().into_iter().map(|name| kernels::by_name(name).expect(name))
}

/// Whether all numbers are equal to the last bit. All NaNs are equal.
fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

#[test]
fn a_kernel_has_the_name_it_is_asked_for_by() {
    let names = kernels::available();
    assert_eq!(names[0], "portable", "{names:?}");
    for name in &names {
        assert_eq!(kernels::by_name(name).expect(name).name(), *name);
        assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{names:?}");
    }
}

#[test]
fn an_unknown_name_gives_no_kernel() {
    for name in ["", "Portable", "avx", "avx2 ", "sse", "cuda", "avx512f"] {
        assert!(kernels::by_name(name).is_none(), "{name:?}");
    }
}

#[test]
fn the_best_kernel_is_the_last() {
    let names = kernels::available();
    let features = kernels::features();
    let has = |wanted: &[&str]| wanted.iter().all(|name| features.contains(&(*name, true)));
    let position = |name: &str| names.iter().position(|other| *other == name);
    if cfg!(target_arch = "x86_64") {
        assert_eq!(position("avx2").is_some(), has(&["avx2", "fma", "f16c"]), "{names:?} {features:?}");
        assert!(position("avx2") < position("avx512") || position("avx512").is_none(), "{names:?}");
        assert!(position("avx512") < position("amx") || position("amx").is_none(), "{names:?}");
        assert!(position("neon").is_none(), "{names:?}");
    }
    if cfg!(target_arch = "aarch64") {
        assert!(position("avx2").or(position("avx512")).or(position("amx")).is_none(), "{names:?}");
    }
}
