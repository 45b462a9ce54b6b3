//! Storage of keys and values: a column has those of every layer at 128 consecutive positions. The back end decides how
//! they lie in memory, so that no operation converts them as a whole.
//!
//! Decisions: docs/design/kv.md

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::f16;

use super::mapped::{self, MappedKv, Part};
use crate::compute::kernels::kv::SHARED;
use crate::compute::kernels::{KvSlice, PAGE};
use crate::error::{Error, Result};
use crate::files::gguf::Bytes;
use crate::system::memory;

/// How keys and values are stored.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum KvType {
    F16,
    F32,
    /// 8 bits, and an f16 scale for every 32 features of a position.
    Q8_0,
}

impl KvType {
    /// By its name in the Python API.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "f16" => Ok(KvType::F16),
            "f32" => Ok(KvType::F32),
            "q8_0" => Ok(KvType::Q8_0),
            other => Err(Error::option("kv_cache", format!("must be 'f16', 'f32' or 'q8_0', not '{other}'"))),
        }
    }

    /// Bytes of the keys of one position, or of its values.
    pub fn bytes(self, heads: usize, head_dim: usize) -> usize {
        heads
            * match self {
                KvType::F16 => 2 * head_dim,
                KvType::F32 => 4 * head_dim,
                KvType::Q8_0 => head_dim + 2 * head_dim.div_ceil(SHARED),
            }
    }
}

/// The shape and storage of the columns of a model.
#[derive(Clone, Debug)]
pub struct KvShape {
    pub n_layers: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub kv_type: KvType,
    /// Candle computes on this device; None: the kernels compute.
    pub device: Option<Device>,
}

impl KvShape {
    /// Bytes of the keys and values of one position, in all layers.
    pub fn position_bytes(&self) -> usize {
        2 * self.n_layers * self.kv_type.bytes(self.n_head_kv, self.head_dim)
    }
}

/// Keys and values of all layers at the positions from `start` to `start + PAGE`.
pub struct Column {
    start: usize,
    shape: KvShape,
    /// One for each layer that was written.
    layers: Vec<KvBlock>,
}

/// The keys and values of one layer of a column.
pub struct KvBlock {
    pub k: KvBuffer,
    pub v: KvBuffer,
}

impl Column {
    /// A column without memory: each layer takes its own when it is written.
    pub fn new(start: usize, shape: &KvShape) -> Self {
        Column { start, shape: shape.clone(), layers: Vec::new() }
    }

    /// The keys and values of every layer as a file has them, in order of [`KvShape::parts`]. The kernels read them where
    /// they lie; a device of Candle gets a copy.
    pub fn mapped(start: usize, shape: &KvShape, parts: &[Bytes]) -> Result<Self> {
        let layers = (0..shape.n_layers).map(|layer| {
            let [k, v] = mapped::layer(shape, parts, layer)?;
            Ok(KvBlock { k: KvBuffer::of_file(k, shape)?, v: KvBuffer::of_file(v, shape)? })
        });
        Ok(Column { start, shape: shape.clone(), layers: layers.collect::<Result<_>>()? })
    }

    /// Whether the keys and values lie in a mapped file. They are never written.
    pub fn is_mapped(&self) -> bool {
        self.layers.iter().any(|block| block.k.is_mapped() || block.v.is_mapped())
    }

    /// The same memory for other positions.
    pub fn reuse(self, start: usize) -> Self {
        Column { start, ..self }
    }

    /// `Error::Memory` if the system has too little for a copy.
    pub fn copy(&self) -> Result<Self> {
        let layers = self.layers.iter().map(|block| Ok(KvBlock { k: block.k.copy()?, v: block.v.copy()? }));
        Ok(Column { start: self.start, shape: self.shape.clone(), layers: layers.collect::<Result<_>>()? })
    }

    pub fn start(&self) -> usize {
        self.start
    }

    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The bytes of a layer for a file. Positions of the column from `computed` on are zeros: their memory may have the
    /// keys and values of another sequence.
    pub fn bytes(&self, layer: usize, part: Part, computed: usize) -> Result<Cow<'_, [u8]>> {
        let block = self.layers.get(layer).ok_or_else(|| {
            Error::Internal(format!("a KV column of {} layers, and layer {layer} is saved", self.layers.len()))
        })?;
        let buffer = if part.is_of_keys() { &block.k } else { &block.v };
        let mut bytes = buffer.bytes(part.is_of_scales())?;
        if computed < PAGE {
            mapped::clear(bytes.to_mut(), &self.shape, part, computed);
        }
        Ok(bytes)
    }

    /// A layer that was written.
    pub fn layer(&self, layer: usize) -> &KvBlock {
        &self.layers[layer]
    }

    fn allocate(&mut self, layer: usize) -> Result<()> {
        while self.layers.len() <= layer {
            self.layers.push(KvBlock { k: KvBuffer::zeros(&self.shape)?, v: KvBuffer::zeros(&self.shape)? });
        }
        Ok(())
    }
}

/// The keys of a block, or its values, of all heads.
pub enum KvBuffer {
    /// For the kernels: head after head.
    F16(Vec<f16>),
    F32(Vec<f32>),
    Q8 {
        q: Vec<i8>,
        scales: Vec<f16>,
    },
    /// For the kernels, in a file. Never written.
    Mapped(MappedKv),
    /// For Candle: (n_head_kv, PAGE, head_dim).
    Candle(Tensor),
}

impl KvBuffer {
    fn zeros(shape: &KvShape) -> Result<Self> {
        let &KvShape { n_head_kv, head_dim, kv_type, .. } = shape;
        let values = n_head_kv * PAGE * head_dim;
        let what = format_args!("a KV cache block of {n_head_kv} heads, {PAGE} positions and {head_dim} features");
        if let Some(device) = &shape.device {
            let shape = (n_head_kv, PAGE, head_dim);
            return Ok(KvBuffer::Candle(match kv_type {
                KvType::F16 => Tensor::from_vec(memory::filled(f16::ZERO, values, what)?, shape, device)?,
                KvType::F32 => Tensor::from_vec(memory::filled(0f32, values, what)?, shape, device)?,
                KvType::Q8_0 => return Err(Error::Value("kv_cache 'q8_0' is for the device 'cpu'".into())),
            }));
        }
        Ok(match kv_type {
            KvType::F16 => KvBuffer::F16(memory::filled(f16::ZERO, values, what)?),
            KvType::F32 => KvBuffer::F32(memory::filled(0.0, values, what)?),
            KvType::Q8_0 => {
                let scales = n_head_kv * PAGE * head_dim.div_ceil(SHARED);
                KvBuffer::Q8 { q: memory::filled(0, values, what)?, scales: memory::filled(f16::ZERO, scales, what)? }
            }
        })
    }

    fn of_file(mapped: MappedKv, shape: &KvShape) -> Result<Self> {
        let Some(device) = &shape.device else { return Ok(KvBuffer::Mapped(mapped)) };
        let shape = (shape.n_head_kv, PAGE, shape.head_dim);
        Ok(KvBuffer::Candle(match mapped.slice() {
            KvSlice::F16(x) => Tensor::from_slice(x, shape, device)?,
            KvSlice::F32(x) => Tensor::from_slice(x, shape, device)?,
            KvSlice::Q8 { .. } => return Err(Error::Value("kv_cache 'q8_0' is for the device 'cpu'".into())),
        }))
    }

    fn is_mapped(&self) -> bool {
        matches!(self, KvBuffer::Mapped(_))
    }

    /// As they lie in memory.
    fn bytes(&self, scales: bool) -> Result<Cow<'_, [u8]>> {
        Ok(match self {
            KvBuffer::F16(x) => bytemuck::cast_slice(x).into(),
            KvBuffer::F32(x) => bytemuck::cast_slice(x).into(),
            KvBuffer::Q8 { scales: x, .. } if scales => bytemuck::cast_slice(x).into(),
            KvBuffer::Q8 { q, .. } => bytemuck::cast_slice(q).into(),
            KvBuffer::Mapped(mapped) => mapped.bytes(scales).into(),
            KvBuffer::Candle(tensor) => {
                let flat = tensor.flatten_all()?;
                match tensor.dtype() {
                    DType::F16 => bytemuck::cast_slice(&flat.to_vec1::<f16>()?).to_vec().into(),
                    _ => bytemuck::cast_slice(&flat.to_vec1::<f32>()?).to_vec().into(),
                }
            }
        })
    }

    fn copy(&self) -> Result<Self> {
        fn copied<T: Copy>(from: &[T]) -> Result<Vec<T>> {
            let mut copy = Vec::new();
            memory::reserve(&mut copy, from.len(), "a copy of a KV cache block")?;
            copy.extend_from_slice(from);
            Ok(copy)
        }
        Ok(match self {
            KvBuffer::Mapped(mapped) => match mapped.slice() {
                KvSlice::F16(x) => KvBuffer::F16(copied(x)?),
                KvSlice::F32(x) => KvBuffer::F32(copied(x)?),
                KvSlice::Q8 { q, scales } => KvBuffer::Q8 { q: copied(q)?, scales: copied(scales)? },
            },
            KvBuffer::F16(x) => KvBuffer::F16(copied(x)?),
            KvBuffer::F32(x) => KvBuffer::F32(copied(x)?),
            KvBuffer::Q8 { q, scales } => KvBuffer::Q8 { q: copied(q)?, scales: copied(scales)? },
            KvBuffer::Candle(tensor) => KvBuffer::Candle(tensor.copy()?),
        })
    }

    /// The part of one head of `heads`, for the kernels.
    pub fn head(&self, head: usize, heads: usize) -> Result<KvSlice<'_>> {
        Ok(match self {
            KvBuffer::F16(x) => KvSlice::F16(share(x, head, heads)),
            KvBuffer::F32(x) => KvSlice::F32(share(x, head, heads)),
            KvBuffer::Q8 { q, scales } => KvSlice::Q8 { q: share(q, head, heads), scales: share(scales, head, heads) },
            KvBuffer::Mapped(mapped) => match mapped.slice() {
                KvSlice::F16(x) => KvSlice::F16(share(x, head, heads)),
                KvSlice::F32(x) => KvSlice::F32(share(x, head, heads)),
                KvSlice::Q8 { q, scales } => {
                    KvSlice::Q8 { q: share(q, head, heads), scales: share(scales, head, heads) }
                }
            },
            KvBuffer::Candle(_) => return Err(Error::Internal("a KV block of Candle passed to a kernel".into())),
        })
    }

    /// The tensor, for Candle.
    pub fn tensor(&self) -> candle_core::Result<&Tensor> {
        match self {
            KvBuffer::Candle(tensor) => Ok(tensor),
            _ => candle_core::bail!("a KV block of the kernels passed to Candle"),
        }
    }
}

fn share<T>(all: &[T], part: usize, parts: usize) -> &[T] {
    let length = all.len() / parts;
    &all[part * length..][..length]
}

/// The rows of a pass that belong to one sequence, with the columns of that sequence.
pub struct Segment<'a> {
    pub rows: Range<usize>,
    /// Position of the first row.
    start: usize,
    /// Consecutive. They reach from the first position that a row sees to the last row.
    columns: &'a mut VecDeque<Arc<Column>>,
}

/// The rows of a segment that go to one column.
pub struct Piece<'a> {
    pub rows: Range<usize>,
    /// The place of the first row within the column.
    pub at: usize,
    pub block: &'a mut KvBlock,
}

impl<'a> Segment<'a> {
    pub fn new(rows: Range<usize>, start: usize, columns: &'a mut VecDeque<Arc<Column>>) -> Self {
        Segment { rows, start, columns }
    }

    /// The position after the last row.
    pub fn end(&self) -> usize {
        self.start + self.rows.len()
    }

    /// The first position that is held.
    pub fn first(&self) -> usize {
        self.columns.front().map_or(self.start, |column| column.start)
    }

    /// The position of a row.
    pub fn position(&self, row: usize) -> usize {
        self.start + row - self.rows.start
    }

    /// The column of a held position.
    pub fn column(&self, position: usize) -> &Column {
        &self.columns[(position - self.first()) / PAGE]
    }

    /// The held columns, oldest first.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().map(|column| &**column)
    }

    /// The blocks of a layer that the rows are written to, with memory for them. An error if another sequence shares one,
    /// or if one lies in a file.
    pub fn pieces(&mut self, layer: usize) -> impl Iterator<Item = Result<Piece<'_>>> {
        let (start, end, row) = (self.start, self.end(), self.rows.start);
        let skipped = (start - self.first()) / PAGE;
        let written = self.columns.iter_mut().skip(skipped).take_while(move |column| column.start < end);
        written.map(move |column| {
            let shared = || Error::Internal("a KV column of two sequences is written".into());
            let column = Arc::get_mut(column).ok_or_else(shared)?;
            if column.is_mapped() {
                return Err(Error::Internal("a KV column of a file is written".into()));
            }
            column.allocate(layer)?;
            let (from, to) = (start.max(column.start), end.min(column.start + PAGE));
            let rows = row + from - start..row + to - start;
            Ok(Piece { rows, at: from - column.start, block: &mut column.layers[layer] })
        })
    }
}
