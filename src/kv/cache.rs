//! The KV cache of one sequence: pages that are allocated as the sequence grows, and reused as a sliding window moves
//! on. The full context is never allocated.
//!
//! Decisions: docs/design/kv.md

use std::collections::VecDeque;

use candle_core::{Device, Tensor};
use half::f16;

use crate::compute::kernels::KvSlice;
pub use crate::compute::kernels::PAGE;
use crate::compute::kernels::kv::SHARED;
use crate::error::{Error, Result};
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

/// The shape and storage of every layer of a cache.
#[derive(Clone, Debug)]
pub struct KvShape {
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub kv_type: KvType,
    /// Attention reads this number of the newest positions; None: all of them.
    pub window: Option<usize>,
    /// Candle computes on this device; None: the kernels compute.
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
        let &KvShape { n_head_kv, head_dim, kv_type, .. } = shape;
        let values = n_head_kv * PAGE * head_dim;
        let what = format_args!("a KV cache page of {n_head_kv} heads, {PAGE} positions and {head_dim} features");
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

    /// The part of one head of `heads`, for the kernels.
    pub fn head(&self, head: usize, heads: usize) -> Result<KvSlice<'_>> {
        Ok(match self {
            KvBuffer::F16(x) => KvSlice::F16(share(x, head, heads)),
            KvBuffer::F32(x) => KvSlice::F32(share(x, head, heads)),
            KvBuffer::Q8 { q, scales } => KvSlice::Q8 { q: share(q, head, heads), scales: share(scales, head, heads) },
            KvBuffer::Candle(_) => return Err(Error::Internal("a KV page of Candle passed to a kernel".into())),
        })
    }

    /// The tensor, for Candle.
    pub fn tensor(&self) -> candle_core::Result<&Tensor> {
        match self {
            KvBuffer::Candle(tensor) => Ok(tensor),
            _ => candle_core::bail!("a KV page of the kernels passed to Candle"),
        }
    }
}

fn share<T>(all: &[T], part: usize, parts: usize) -> &[T] {
    let length = all.len() / parts;
    &all[part * length..][..length]
}

/// The cache of one layer.
pub struct KvLayer {
    shape: KvShape,
    pages: VecDeque<Page>,
    /// Pages for reuse.
    spare: Vec<Page>,
    /// Appended positions, those behind the window included.
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

    /// The first held position.
    pub fn start(&self) -> usize {
        self.pages.front().map_or(self.len, |page| page.start)
    }

    /// The page of a held position.
    pub fn page_of(&self, position: usize) -> &Page {
        &self.pages[(position - self.start()) / PAGE]
    }

    /// The held pages, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    /// Frees, for reuse, the pages that no query from position `len` on sees.
    pub fn forget_behind_window(&mut self) {
        let Some(window) = self.shape.window else { return };
        let first_seen = (self.len + 1).saturating_sub(window);
        while self.pages.front().is_some_and(|page| page.start + PAGE <= first_seen) {
            self.spare.extend(self.pages.pop_front());
        }
    }

    /// Bytes of the pages that `positions` more would add.
    pub fn growth(&self, positions: usize) -> u64 {
        let KvShape { n_head_kv, head_dim, kv_type, window, .. } = self.shape;
        let first_seen = window.map_or(0, |window| (self.len + 1).saturating_sub(window)).max(self.start());
        let pages = (self.len + positions).div_ceil(PAGE) - first_seen / PAGE;
        let more = pages.saturating_sub(self.pages.len() + self.spare.len()) as u64;
        more.saturating_mul((2 * PAGE * kv_type.bytes(n_head_kv, head_dim)) as u64)
    }

    /// The page of position `len`, the offset of the position in it, and its room from there.
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

    #[test]
    fn the_growth_is_that_of_the_pages_which_are_allocated() {
        const PAGE_BYTES: u64 = 2 * 2 * 2 * PAGE as u64;
        for window in [None, Some(9), Some(3 * PAGE)] {
            let mut layer = layer(window);
            for positions in [1, PAGE - 1, 1, 2 * PAGE, 5, 300] {
                let pages = |layer: &KvLayer| (layer.pages.len() + layer.spare.len()) as u64;
                let (before, growth) = (pages(&layer), layer.growth(positions));
                fill(&mut layer, positions);
                assert_eq!(growth, (pages(&layer) - before) * PAGE_BYTES, "{window:?}, {positions} more");
            }
            layer.clear();
            assert_eq!(layer.growth(1), 0, "pages are reused");
        }
        assert_eq!(layer(None).growth(1 << 28), (1 << 28) * 8);
    }
}
