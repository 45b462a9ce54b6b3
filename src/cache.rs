//! The KV cache of one sequence: pages that are allocated as the sequence grows, and given back as a sliding window
//! moves on. The full context is never allocated.
//!
//! Decisions: docs/design/kv.md

use std::collections::VecDeque;

use candle_core::{DType, Device, Tensor};
use half::f16;

use crate::error::{Error, Result};
use crate::kernels::KvSlice;
pub use crate::kernels::PAGE;
use crate::kernels::kv::SHARED;

/// How keys and values are stored.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum KvType {
    F16,
    F32,
    /// 8 bits, and an f16 scale for every 32 features of a position.
    Q8_0,
}

impl KvType {
    /// By the name that the Python API has for it.
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

/// What every layer of a cache is like.
#[derive(Clone, Debug)]
pub struct KvShape {
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub kv_type: KvType,
    /// Only so many of the newest positions will be looked at; None: all of them.
    pub window: Option<usize>,
    /// Where Candle computes; None: the kernels do.
    pub device: Option<Device>,
}

/// Keys and values of `PAGE` consecutive positions from `start`.
pub struct Page {
    pub start: usize,
    pub k: KvBuffer,
    pub v: KvBuffer,
}

/// The keys of a page, or its values, of all heads.
pub enum KvBuffer {
    /// For the kernels: head after head.
    F16(Vec<f16>),
    F32(Vec<f32>),
    Q8 {
        q: Vec<i8>,
        scales: Vec<f16>,
    },
    /// For Candle: (n_head_kv, PAGE, head_dim).
    Candle(Tensor),
}

impl KvBuffer {
    fn zeros(shape: &KvShape) -> Result<Self> {
        let KvShape { n_head_kv, head_dim, kv_type, .. } = shape;
        let values = n_head_kv * PAGE * head_dim;
        if let Some(device) = &shape.device {
            let dtype = match kv_type {
                KvType::F16 => DType::F16,
                KvType::F32 => DType::F32,
                KvType::Q8_0 => return Err(Error::Value("kv_cache 'q8_0' is for the device 'cpu'".into())),
            };
            return Ok(KvBuffer::Candle(Tensor::zeros((*n_head_kv, PAGE, *head_dim), dtype, device)?));
        }
        Ok(match kv_type {
            KvType::F16 => KvBuffer::F16(vec![f16::ZERO; values]),
            KvType::F32 => KvBuffer::F32(vec![0.0; values]),
            KvType::Q8_0 => {
                let scales = n_head_kv * PAGE * head_dim.div_ceil(SHARED);
                KvBuffer::Q8 { q: vec![0; values], scales: vec![f16::ZERO; scales] }
            }
        })
    }

    /// What one head of `heads` holds, for the kernels.
    pub fn head(&self, head: usize, heads: usize) -> Result<KvSlice<'_>> {
        Ok(match self {
            KvBuffer::F16(x) => KvSlice::F16(share(x, head, heads)),
            KvBuffer::F32(x) => KvSlice::F32(share(x, head, heads)),
            KvBuffer::Q8 { q, scales } => KvSlice::Q8 { q: share(q, head, heads), scales: share(scales, head, heads) },
            KvBuffer::Candle(_) => return Err(elsewhere()),
        })
    }

    /// The tensor, for Candle.
    pub fn tensor(&self) -> candle_core::Result<&Tensor> {
        match self {
            KvBuffer::Candle(tensor) => Ok(tensor),
            _ => candle_core::bail!("a KV page of the kernels met Candle"),
        }
    }
}

fn share<T>(all: &[T], part: usize, parts: usize) -> &[T] {
    let length = all.len() / parts;
    &all[part * length..][..length]
}

fn elsewhere() -> Error {
    Error::Internal("a KV page of Candle met the kernels".into())
}

/// The cache of one layer.
pub struct KvLayer {
    shape: KvShape,
    pages: VecDeque<Page>,
    /// Given back, to be used again.
    spare: Vec<Page>,
    /// Positions appended so far, those behind the window included.
    len: usize,
}

impl KvLayer {
    pub fn new(shape: KvShape) -> Self {
        KvLayer { shape, pages: VecDeque::new(), spare: Vec::new(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first position that is still held.
    pub fn start(&self) -> usize {
        self.pages.front().map_or(self.len, |page| page.start)
    }

    /// The page of a position that is held.
    pub fn page_of(&self, position: usize) -> &Page {
        &self.pages[(position - self.start()) / PAGE]
    }

    /// The pages held, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    /// Give back the pages that no query from position `len` on will see.
    pub fn forget_behind_window(&mut self) {
        let Some(window) = self.shape.window else { return };
        let first_seen = (self.len + 1).saturating_sub(window);
        while self.pages.front().is_some_and(|page| page.start + PAGE <= first_seen) {
            self.spare.extend(self.pages.pop_front());
        }
    }

    /// The page of position `len`, the place in it, and how many positions it has room for from there.
    pub fn next_page(&mut self) -> Result<(&mut Page, usize, usize)> {
        let at = self.len % PAGE;
        if at == 0 {
            let page = match self.spare.pop() {
                Some(page) => Page { start: self.len, ..page },
                None => self.new_page()?,
            };
            self.pages.push_back(page);
        }
        let newest = self.pages.len() - 1;
        Ok((&mut self.pages[newest], at, PAGE - at))
    }

    pub fn advance(&mut self, positions: usize) {
        self.len += positions;
    }

    pub fn clear(&mut self) {
        self.spare.extend(self.pages.drain(..));
        self.len = 0;
    }

    fn new_page(&self) -> Result<Page> {
        Ok(Page { start: self.len, k: KvBuffer::zeros(&self.shape)?, v: KvBuffer::zeros(&self.shape)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(window: Option<usize>) -> KvLayer {
        KvLayer::new(KvShape { n_head_kv: 1, head_dim: 2, kv_type: KvType::F16, window, device: None })
    }

    fn fill(layer: &mut KvLayer, mut positions: usize) {
        layer.forget_behind_window();
        while positions > 0 {
            let (_, _, room) = layer.next_page().unwrap();
            layer.advance(room.min(positions));
            positions -= room.min(positions);
        }
    }

    #[test]
    fn pages_are_allocated_as_the_sequence_grows() {
        let mut layer = layer(None);
        fill(&mut layer, 1);
        assert_eq!(layer.iter().count(), 1);
        fill(&mut layer, 2 * PAGE);
        assert_eq!(layer.iter().map(|page| page.start).collect::<Vec<_>>(), [0, PAGE, 2 * PAGE]);
        layer.clear();
        assert!(layer.is_empty() && layer.iter().count() == 0);
    }

    #[test]
    fn a_window_keeps_what_the_next_query_sees_and_no_more() {
        let mut layer = layer(Some(9));
        for len in 1..5 * PAGE {
            fill(&mut layer, 1);
            layer.forget_behind_window();
            let first_seen = (len + 1).saturating_sub(9);
            assert!(layer.start() <= first_seen && first_seen - layer.start() < PAGE, "{len}: {}", layer.start());
            assert!(layer.iter().count() + layer.spare.len() <= 2, "{len}");
        }
    }
}
