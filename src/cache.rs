//! The KV cache of one sequence: pages that are allocated as the sequence grows, and given back as a sliding window
//! moves on. The full context is never allocated.

use std::collections::VecDeque;

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// Positions in a page. Also the blocks in which attention walks the context: pages start at multiples of it, so that
/// sums are split at the same places however the prompt was chunked.
pub const PAGE: usize = 128;

/// What every layer of a cache is like.
#[derive(Clone, Debug)]
pub struct KvShape {
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub dtype: DType,
    /// Only so many of the newest positions will be looked at; None: all of them.
    pub window: Option<usize>,
    pub device: Device,
}

/// Keys and values of `PAGE` consecutive positions from `start`: (n_head_kv, PAGE, head_dim) each.
pub struct Page {
    pub start: usize,
    pub k: Tensor,
    pub v: Tensor,
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
    pub fn next_page(&mut self) -> Result<(&Page, usize, usize)> {
        let at = self.len % PAGE;
        if at == 0 {
            let page = match self.spare.pop() {
                Some(page) => Page { start: self.len, ..page },
                None => self.new_page()?,
            };
            self.pages.push_back(page);
        }
        Ok((&self.pages[self.pages.len() - 1], at, PAGE - at))
    }

    pub fn advance(&mut self, positions: usize) {
        self.len += positions;
    }

    pub fn clear(&mut self) {
        self.spare.extend(self.pages.drain(..));
        self.len = 0;
    }

    fn new_page(&self) -> Result<Page> {
        let KvShape { n_head_kv, head_dim, dtype, device, .. } = &self.shape;
        let zeros = || Tensor::zeros((*n_head_kv, PAGE, *head_dim), *dtype, device);
        Ok(Page { start: self.len, k: zeros()?, v: zeros()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(window: Option<usize>) -> KvLayer {
        KvLayer::new(KvShape { n_head_kv: 1, head_dim: 2, dtype: DType::F16, window, device: Device::Cpu })
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
