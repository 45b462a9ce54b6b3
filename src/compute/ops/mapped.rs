//! Keys and values in a mapped file, used where they lie: how a file orders the bytes of a column, and their view as numbers.
//!
//! Numbers are little-endian in a file, as on every platform this package is built for.
//!
//! Decisions: docs/design/kv.md

use super::{KvShape, KvType};
use crate::compute::kernels::kv::SHARED;
use crate::compute::kernels::{KvSlice, PAGE};
use crate::error::{Error, Result};
use crate::files::gguf::Bytes;

#[cfg(target_endian = "big")]
compile_error!("files of keys and values are little-endian, and are used without conversion");

/// The tensors of a column in a file. Each has all layers.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Part {
    Keys,
    /// Of `q8_0` alone.
    KeyScales,
    Values,
    /// Of `q8_0` alone.
    ValueScales,
}

impl Part {
    pub fn is_of_keys(self) -> bool {
        matches!(self, Part::Keys | Part::KeyScales)
    }

    pub fn is_of_scales(self) -> bool {
        matches!(self, Part::KeyScales | Part::ValueScales)
    }
}

impl KvShape {
    /// The parts of a column, in order of their bytes in a file.
    pub fn parts(&self) -> &'static [Part] {
        match self.kv_type {
            KvType::Q8_0 => &[Part::Keys, Part::KeyScales, Part::Values, Part::ValueScales],
            KvType::F16 | KvType::F32 => &[Part::Keys, Part::Values],
        }
    }

    /// (n_layers, n_head_kv, features, PAGE) for the keys of the kernels, else (n_layers, n_head_kv, PAGE, features).
    /// Features of scales are shares of 32.
    pub fn dims(&self, part: Part) -> [usize; 4] {
        let features = if part.is_of_scales() { self.head_dim.div_ceil(SHARED) } else { self.head_dim };
        if self.has_rows_of_positions(part) {
            [self.n_layers, self.n_head_kv, features, PAGE]
        } else {
            [self.n_layers, self.n_head_kv, PAGE, features]
        }
    }

    /// The name that safetensors has for a part's type, and the bytes of an element.
    pub fn element(&self, part: Part) -> (&'static str, usize) {
        match self.kv_type {
            KvType::F16 => ("F16", 2),
            KvType::F32 => ("F32", 4),
            KvType::Q8_0 if part.is_of_scales() => ("F16", 2),
            KvType::Q8_0 => ("I8", 1),
        }
    }

    /// Bytes of one layer of a part.
    pub fn layer_bytes(&self, part: Part) -> usize {
        let [_, a, b, c] = self.dims(part);
        a * b * c * self.element(part).1
    }

    fn has_rows_of_positions(&self, part: Part) -> bool {
        self.device.is_none() && part.is_of_keys()
    }
}

/// The keys or the values of one layer, in a file. Their length and alignment are checked.
pub struct MappedKv {
    kv_type: KvType,
    values: Bytes,
    scales: Option<Bytes>,
}

impl MappedKv {
    fn new(kv_type: KvType, values: Bytes, scales: Option<Bytes>) -> Result<Self> {
        let fits = match kv_type {
            KvType::F16 => bytemuck::try_cast_slice::<u8, half::f16>(&values).is_ok(),
            KvType::F32 => bytemuck::try_cast_slice::<u8, f32>(&values).is_ok(),
            KvType::Q8_0 => {
                scales.as_deref().is_some_and(|scales| bytemuck::try_cast_slice::<u8, half::f16>(scales).is_ok())
            }
        };
        if !fits {
            return Err(Error::Internal(format!("{values:?} of a file are not keys or values of {kv_type:?}")));
        }
        Ok(MappedKv { kv_type, values, scales })
    }

    /// All heads.
    pub fn slice(&self) -> KvSlice<'_> {
        match self.kv_type {
            KvType::F16 => KvSlice::F16(bytemuck::cast_slice(&self.values)),
            KvType::F32 => KvSlice::F32(bytemuck::cast_slice(&self.values)),
            KvType::Q8_0 => {
                KvSlice::Q8 { q: bytemuck::cast_slice(&self.values), scales: bytemuck::cast_slice(self.bytes(true)) }
            }
        }
    }

    pub fn bytes(&self, scales: bool) -> &[u8] {
        if scales { self.scales.as_deref().unwrap_or_default() } else { &self.values }
    }
}

/// The keys and the values of a layer, from the parts of all layers.
pub fn layer(shape: &KvShape, parts: &[Bytes], layer: usize) -> Result<[MappedKv; 2]> {
    let of_layer = |wanted: Part| {
        let index = shape.parts().iter().position(|&part| part == wanted)?;
        let length = shape.layer_bytes(wanted);
        parts.get(index)?.part(layer * length..(layer + 1) * length)
    };
    let half = |values: Part, scales: Part| {
        let missing = || Error::Internal(format!("a file without {values:?} of layer {layer}"));
        MappedKv::new(shape.kv_type, of_layer(values).ok_or_else(missing)?, of_layer(scales))
    };
    Ok([half(Part::Keys, Part::KeyScales)?, half(Part::Values, Part::ValueScales)?])
}

/// Sets the positions from `computed` on to zero, in the bytes of one layer of a part.
pub fn clear(bytes: &mut [u8], shape: &KvShape, part: Part, computed: usize) {
    // Rows of positions, or the positions of a head.
    let runs = if shape.has_rows_of_positions(part) {
        let [_, heads, features, _] = shape.dims(part);
        heads * features
    } else {
        shape.n_head_kv
    };
    let run = bytes.len() / runs.max(1);
    if run > 0 {
        bytes.chunks_exact_mut(run).for_each(|run| {
            let position = run.len() / PAGE;
            run[computed * position..].fill(0);
        });
    }
}
