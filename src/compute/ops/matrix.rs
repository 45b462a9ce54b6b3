//! A weight matrix: on the CPU the bytes of the file, on other devices Candle's quantized tensor.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use super::Backend;
use crate::compute::kernels::{Format, Weights};
use crate::error::{Error, Result};
use crate::files::gguf::{Bytes, GgmlType, Tensor};
use crate::system::memory;

/// (rows, cols): rows are output features.
pub enum Matrix {
    Mapped(Mapped),
    Candle(Arc<QTensor>),
}

/// Weights in the mapped file.
pub struct Mapped {
    bytes: Bytes,
    format: Format,
    pub rows: usize,
    pub cols: usize,
}

impl Mapped {
    pub fn weights(&self) -> Weights<'_> {
        Weights { format: self.format, cols: self.cols, bytes: &self.bytes }
    }
}

impl Matrix {
    /// A two-dimensional tensor of the file. `gguf` has checked its size.
    pub fn load(tensor: &Tensor, backend: &Backend) -> Result<Self> {
        let format = format(tensor)?;
        let &[rows, cols] = tensor.shape.as_slice() else {
            return Err(Error::InvalidModel(format!(
                "tensor `{}` has shape {:?}; expected two dimensions",
                tensor.name, tensor.shape
            )));
        };
        Ok(match backend {
            Backend::Cpu { .. } => Matrix::Mapped(Mapped { bytes: tensor.data(), format, rows, cols }),
            Backend::Candle(device) => {
                let bytes = aligned(tensor)?;
                memory::probe(bytes.len() as u64, format_args!("tensor `{}`", tensor.name))?; // Candle copies it
                let storage = QStorage::from_data(Cow::Borrowed(&bytes), device, ggml_dtype(format))?;
                Matrix::Candle(Arc::new(QTensor::new(storage, (rows, cols))?))
            }
        })
    }

    pub(super) fn mapped(&self) -> Result<&Mapped> {
        match self {
            Matrix::Mapped(mapped) => Ok(mapped),
            Matrix::Candle(_) => Err(Error::Internal("a matrix of another device passed to the CPU".into())),
        }
    }

    pub(super) fn candle(&self) -> candle_core::Result<&Arc<QTensor>> {
        match self {
            Matrix::Candle(tensor) => Ok(tensor),
            Matrix::Mapped(_) => candle_core::bail!("a matrix of the CPU passed to another device"),
        }
    }
}

/// The kernels' name for a tensor's type, or an error that lists the supported types.
pub fn format(tensor: &Tensor) -> Result<Format> {
    Ok(match tensor.dtype {
        GgmlType::F32 => Format::F32,
        GgmlType::F16 => Format::F16,
        GgmlType::BF16 => Format::BF16,
        GgmlType::Q4_0 => Format::Q4_0,
        GgmlType::Q4_1 => Format::Q4_1,
        GgmlType::Q5_0 => Format::Q5_0,
        GgmlType::Q5_1 => Format::Q5_1,
        GgmlType::Q8_0 => Format::Q8_0,
        GgmlType::Q2K => Format::Q2_K,
        GgmlType::Q3K => Format::Q3_K,
        GgmlType::Q4K => Format::Q4_K,
        GgmlType::Q5K => Format::Q5_K,
        GgmlType::Q6K => Format::Q6_K,
        GgmlType::Other(_) => {
            return Err(Error::UnsupportedModel(format!(
                "tensor `{}` is stored as {}; this version reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, \
                 Q4_K, Q5_K and Q6_K",
                tensor.name,
                tensor.dtype.name()
            )));
        }
    })
}

fn ggml_dtype(format: Format) -> GgmlDType {
    match format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::BF16 => GgmlDType::BF16,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q5_0 => GgmlDType::Q5_0,
        Format::Q5_1 => GgmlDType::Q5_1,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q2_K => GgmlDType::Q2K,
        Format::Q3_K => GgmlDType::Q3K,
        Format::Q4_K => GgmlDType::Q4K,
        Format::Q5_K => GgmlDType::Q5K,
        Format::Q6_K => GgmlDType::Q6K,
    }
}

/// The bytes of a tensor, aligned to 8: Candle views them as structs and asserts their alignment, which a file does not
/// guarantee.
fn aligned(tensor: &Tensor) -> Result<Cow<'_, [u8]>> {
    let bytes = tensor.bytes();
    if bytes.as_ptr().align_offset(8) == 0 {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut copy = Vec::new();
    memory::reserve(&mut copy, bytes.len(), format_args!("an aligned copy of tensor `{}`", tensor.name))?;
    copy.extend_from_slice(bytes);
    Ok(Cow::Owned(copy))
}
