//! `Kernel` for the types of the fast kernels. A value of such a type exists only on a CPU that has its features.
//!
//! Decisions: docs/design/kernels.md

/// `kernel!(Type, "name", "features", Vector, products of K-quants, products of Q8_0, packing of a row, packing into a
/// tile, costs of decode)`: every method checks its arguments and enters a function that is compiled for the features. Everything below
/// is inlined into that function.
macro_rules! kernel {
    (
        $kernel:ident, $name:literal, $features:literal, $V:ty, $k_quant:ident, $q8:ident,
        $pack_row:path, $pack_tile:path, $costs:expr
    ) => {
        impl crate::compute::kernels::Kernel for $kernel {
            fn name(&self) -> &'static str {
                $name
            }

            fn tile(&self, format: Format, cols: usize, phase: Phase) -> Tile {
                match phase {
                    Phase::Prefill => Tile { tokens: pack::TILE, lines: pack::tile_lines(format, cols) },
                    Phase::Decode => {
                        Tile { tokens: 1, lines: pack::row_lines::<<$k_quant<blocks::Q4_K> as Products>::Row>(format, cols) }
                    }
                }
            }

            fn pack(&self, format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]) {
                #[target_feature(enable = $features)]
                fn pack(format: Format, phase: Phase, x: &[f32], at: usize, tile: &mut [Line]) {
                    match phase {
                        Phase::Prefill => $pack_tile(format, x, at, tile),
                        Phase::Decode => $pack_row(format, x, tile),
                    }
                }
                shapes::pack(self, format, phase, x, at, tile);
                // SAFETY: a value of this type exists only on a CPU that has the features.
                unsafe { pack(format, phase, x, at, tile) }
            }

            fn decode_costs(&self) -> &'static [f32; 16] {
                $costs
            }

            fn matmul(&self, weights: Weights<'_>, phase: Phase, x: &[Line], tokens: usize, out: &mut Out<'_>) {
                #[target_feature(enable = $features)]
                unsafe fn decode<P: Products>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
                    // SAFETY: this function has the features, and its caller has checked the shapes.
                    unsafe { products::decode::<P>(weights, x, tokens, out) }
                }
                #[target_feature(enable = $features)]
                unsafe fn prefill<P: Products>(weights: Weights<'_>, x: &[Line], tokens: usize, out: &mut Out<'_>) {
                    // SAFETY: this function has the features, and its caller has checked the shapes.
                    unsafe { products::prefill::<P>(weights, x, tokens, out) }
                }
                macro_rules! by {
                    ($P:ty) => {
                        match phase {
                            Phase::Decode => decode::<$P>(weights, x, tokens, out),
                            Phase::Prefill => prefill::<$P>(weights, x, tokens, out),
                        }
                    };
                }
                shapes::matmul(self, weights, phase, x, tokens);
                // SAFETY: a value of this type exists only on a CPU that has the features; the shapes were checked.
                unsafe {
                    match weights.format {
                        Format::Q4_K => by!($k_quant<blocks::Q4_K>),
                        Format::Q5_K => by!($k_quant<blocks::Q5_K>),
                        Format::Q6_K => by!($k_quant<blocks::Q6_K>),
                        Format::Q8_0 => by!($q8),
                        Format::F32 => by!(Float<$V, StoredF32>),
                        Format::F16 => by!(Float<$V, StoredF16>),
                        Format::BF16 => by!(Float<$V, StoredBf16>),
                        _ => by!(Float<$V, StoredBlocks>),
                    }
                }
            }

            fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                #[target_feature(enable = $features)]
                unsafe fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                    // SAFETY: this function has the features, and its caller has checked the shapes.
                    unsafe { float::rms_norm::<$V>(x, weight, eps, out) }
                }
                shapes::rms_norm(x, weight, out);
                // SAFETY: a value of this type exists only on a CPU that has the features; the shapes were checked.
                unsafe { rms_norm(x, weight, eps, out) }
            }

            fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
                #[target_feature(enable = $features)]
                unsafe fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
                    // SAFETY: this function has the features, and its caller has checked the shapes.
                    unsafe { float::swiglu::<$V>(gate, up, out) }
                }
                shapes::swiglu(gate, up, out);
                // SAFETY: a value of this type exists only on a CPU that has the features; the shapes were checked.
                unsafe { swiglu(gate, up, out) }
            }

            fn attention(&self, queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
                #[target_feature(enable = $features)]
                unsafe fn attention(queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
                    // SAFETY: this function has the features, and its caller has checked the shapes.
                    unsafe { attention::attention::<$V>(queries, pages, head_dim) }
                }
                shapes::attention(queries, pages, head_dim);
                // SAFETY: a value of this type exists only on a CPU that has the features; the shapes were checked.
                unsafe { attention(queries, pages, head_dim) }
            }
        }
    };
}
