//! Attention of a few queries over the pages of a KV cache, for the fast kernels, written once over [`Simd`].
//!
//! ```text
//! for each page of 128 positions, in order, for each query:
//!     s  = q . K / sqrt(d)                    lanes are keys: K is (head_dim, positions)
//!     m' = max(m, s);  p = exp(s - m');  out = out * exp(m - m') + p V;  the sum of p likewise
//! ```
//! An online softmax (Milakov and Gimelshein, 2018, <https://arxiv.org/abs/1805.02867>), as FlashAttention uses it (Dao et
//! al., 2022, <https://arxiv.org/abs/2205.14135>). A group of queries shares each load of K, and of V for the keys that all of them attend to. The result of a query does not depend on its group.

use half::f16;

use super::scratch::Scratch;
use super::simd::{self, Simd};
use super::{KvPage, KvSlice, Line, PAGE, Query, view_mut};

/// Queries of a group, at most: more would not fit the registers of AVX-512.
const QUERIES: usize = 8;
/// Features of a value that a single query accumulates at a time: as many as the registers of AVX2 hold, and a whole head
/// of Phi-3-mini. A single query is bound by memory, and values are to be read sequentially.
const VALUE_BLOCK: usize = 96;

/// An element of a cache page.
///
/// # Safety
/// For the caller of `load`: the instruction set is there, and `LANES` elements can be read, see [`Simd`].
unsafe trait Element: Copy {
    unsafe fn load<V: Simd>(from: *const Self) -> V;
}

// SAFETY: it reads `LANES` elements.
unsafe impl Element for f16 {
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const Self) -> V {
        // SAFETY: the contract of this method.
        unsafe { V::load_f16(from) }
    }
}

// SAFETY: it reads `LANES` elements.
unsafe impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const Self) -> V {
        // SAFETY: the contract of this method.
        unsafe { V::load(from) }
    }
}

/// Queries with the state of their softmax, and their scores on one page.
struct Group<'a, 'b> {
    queries: &'a mut [Query<'b>],
    scores: [[f32; PAGE]; QUERIES],
}

/// As `Kernel::attention`.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and the shapes are those that `shapes::attention` accepts.
#[inline(always)]
pub unsafe fn attention<V: Simd>(queries: &mut [Query<'_>], pages: &[KvPage<'_>], head_dim: usize) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let lines = Line::count(4 * head_dim * QUERIES);
    let page_lines = Line::count(4 * head_dim * PAGE);
    let mut scratch = Scratch::take(lines + 2 * page_lines);
    let (scaled, widened) = scratch.split_at_mut(lines);
    let (k_wide, v_wide) = widened.split_at_mut(page_lines);
    let (scaled, k_wide, v_wide) = (view_mut::<f32>(scaled), view_mut::<f32>(k_wide), view_mut::<f32>(v_wide));
    for queries in queries.chunks_mut(QUERIES) {
        for (query, scaled) in queries.iter().zip(scaled.chunks_exact_mut(head_dim)) {
            for (to, q) in scaled.iter_mut().zip(query.q) {
                *to = q * scale;
            }
        }
        let mut group = Group { queries, scores: [[0.0; PAGE]; QUERIES] };
        for page in pages {
            // SAFETY: the contract of this function: pages and queries have the lengths that `page` requires.
            unsafe {
                match (page.k, page.v) {
                    (KvSlice::F16(k), KvSlice::F16(v)) => group.page::<V, f16>(page.start, scaled, k, v, head_dim),
                    (KvSlice::F32(k), KvSlice::F32(v)) => group.page::<V, f32>(page.start, scaled, k, v, head_dim),
                    (k, v) => {
                        k.widen_keys(k_wide, head_dim);
                        v.widen_values(v_wide, head_dim);
                        group.page::<V, f32>(page.start, scaled, k_wide, v_wide, head_dim);
                    }
                }
            }
        }
    }
}

impl Group<'_, '_> {
    /// Adds one page. `q` is (queries, head_dim), `k` (head_dim, PAGE), `v` (PAGE, head_dim).
    ///
    /// # Safety
    /// The instruction set is there, see [`Simd`], and the output of each query has `head_dim` elements.
    #[inline(always)]
    unsafe fn page<V: Simd, E: Element>(&mut self, start: usize, q: &[f32], k: &[E], v: &[E], head_dim: usize) {
        assert!(k.len() >= PAGE * head_dim && v.len() >= PAGE * head_dim && q.len() >= QUERIES * head_dim);
        let end = start + PAGE;
        let from = self.queries.iter().map(|query| query.keys.start).min().unwrap_or(0).max(start);
        let to = self.queries.iter().map(|query| query.keys.end).max().unwrap_or(0).min(end);
        if from >= to {
            return;
        }
        // Whole steps of `scores`: 2 vectors for a group, 8 for a single query.
        let n = self.queries.len();
        let block = if n.is_multiple_of(4) { 2 * V::LANES } else { 8 * V::LANES };
        let seen = (from - start) / block * block..(to - start).next_multiple_of(block).min(PAGE);
        // SAFETY: the assertion above and the contract of this method; `seen` is inside of the page, in whole steps.
        unsafe {
            let mut i = 0;
            while i < n {
                let q = &q[i * head_dim..];
                i += match n - i {
                    QUERIES if V::REGISTERS >= 32 => self.scores::<V, E, QUERIES, 2>(i, seen.clone(), q, k, head_dim),
                    4.. => self.scores::<V, E, 4, 2>(i, seen.clone(), q, k, head_dim),
                    _ => self.scores::<V, E, 1, 8>(i, seen.clone(), q, k, head_dim),
                };
            }
            let in_page = |key: usize| (key.clamp(start, end) - start).clamp(seen.start, seen.end);
            let mut own = [(0, 0); QUERIES];
            for ((query, scores), own) in self.queries.iter_mut().zip(&mut self.scores).zip(&mut own) {
                *own = (in_page(query.keys.start), in_page(query.keys.end));
                scores[seen.start..own.0].fill(f32::NEG_INFINITY);
                scores[own.1..seen.end].fill(f32::NEG_INFINITY);
                softmax::<V>(query, &mut scores[seen.clone()]);
            }
            // A value that some of the queries do not attend to is added to the others alone: 0 times infinity is not 0.
            let own = &own[..n];
            let first = own.iter().map(|own| own.0).max().unwrap_or(0);
            let last = own.iter().map(|own| own.1).min().unwrap_or(0);
            let shared = if first < last { first..last } else { seen.end..seen.end };
            for (i, own) in own.iter().enumerate() {
                self.values::<V, E, 1>(i, own.0..own.1.min(shared.start), v, head_dim);
            }
            let mut i = 0;
            while i < n {
                i += match n - i {
                    QUERIES if V::REGISTERS >= 32 => self.values::<V, E, QUERIES>(i, shared.clone(), v, head_dim),
                    4.. => self.values::<V, E, 4>(i, shared.clone(), v, head_dim),
                    _ => self.values::<V, E, 1>(i, shared.clone(), v, head_dim),
                };
            }
            for (i, own) in own.iter().enumerate() {
                self.values::<V, E, 1>(i, own.0.max(shared.end)..own.1, v, head_dim);
            }
        }
    }

    /// The scores of `Q` queries from query `first` on, `N` vectors of keys at a time. Returns `Q`.
    ///
    /// # Safety
    /// The instruction set is there, see [`Simd`]. `keys` are whole steps of N vectors inside of a page, `q` has `Q` rows and
    /// `k` `PAGE` columns of `head_dim`.
    #[inline(always)]
    unsafe fn scores<V: Simd, E: Element, const Q: usize, const N: usize>(
        &mut self,
        first: usize,
        keys: std::ops::Range<usize>,
        q: &[f32],
        k: &[E],
        head_dim: usize,
    ) -> usize {
        // SAFETY: the contract of this method.
        unsafe {
            for key in keys.step_by(N * V::LANES) {
                let mut sums = [[V::splat(0.0); N]; Q];
                for d in 0..head_dim {
                    let k = k.as_ptr().add(d * PAGE + key);
                    let mut vectors = [V::splat(0.0); N];
                    for n in 0..N {
                        vectors[n] = E::load::<V>(k.add(n * V::LANES));
                    }
                    for i in 0..Q {
                        let q = V::splat(*q.as_ptr().add(i * head_dim + d));
                        for n in 0..N {
                            sums[i][n] = q.mul_add(vectors[n], sums[i][n]);
                        }
                    }
                }
                for i in 0..Q {
                    for n in 0..N {
                        sums[i][n].store(self.scores[first + i].as_mut_ptr().add(key + n * V::LANES));
                    }
                }
            }
        }
        Q
    }

    /// Adds the weighted values of `keys` to the outputs of `Q` queries from query `first` on. Returns `Q`.
    ///
    /// # Safety
    /// The instruction set is there, see [`Simd`]. `keys` are inside of a page, `v` has `PAGE` rows of `head_dim`, and the
    /// output of each query has `head_dim` elements.
    #[inline(always)]
    unsafe fn values<V: Simd, E: Element, const Q: usize>(
        &mut self,
        first: usize,
        keys: std::ops::Range<usize>,
        v: &[E],
        head_dim: usize,
    ) -> usize {
        if keys.is_empty() {
            return Q;
        }
        // SAFETY: the contract of this method; the columns end at `head_dim`.
        unsafe {
            let mut d = 0;
            while d + 2 * V::LANES <= head_dim {
                if Q == 1 && d + VALUE_BLOCK <= head_dim {
                    match V::LANES {
                        16 => self.value_columns::<V, E, Q, 6>(first, keys.clone(), v, head_dim, d),
                        8 => self.value_columns::<V, E, Q, 12>(first, keys.clone(), v, head_dim, d),
                        _ => self.value_columns::<V, E, Q, 24>(first, keys.clone(), v, head_dim, d),
                    }
                    d += VALUE_BLOCK;
                } else {
                    self.value_columns::<V, E, Q, 2>(first, keys.clone(), v, head_dim, d);
                    d += 2 * V::LANES;
                }
            }
            if d + V::LANES <= head_dim {
                self.value_columns::<V, E, Q, 1>(first, keys.clone(), v, head_dim, d);
                d += V::LANES;
            }
            for d in d..head_dim {
                let mut column = [0f32; 16];
                for key in keys.clone() {
                    column[0] = 0.0;
                    // The vector load is the one conversion that every element type has.
                    let mut padded = [*v.as_ptr(); 16];
                    padded[0] = *v.as_ptr().add(key * head_dim + d);
                    E::load::<V>(padded.as_ptr()).store(column.as_mut_ptr());
                    for i in first..first + Q {
                        self.queries[i].out[d] += self.scores[i][key] * column[0];
                    }
                }
            }
        }
        Q
    }

    /// As `values`, for `N` vectors of features from feature `d` on.
    ///
    /// # Safety
    /// As for `values`, and the columns end at `head_dim`.
    #[inline(always)]
    unsafe fn value_columns<V: Simd, E: Element, const Q: usize, const N: usize>(
        &mut self,
        first: usize,
        keys: std::ops::Range<usize>,
        v: &[E],
        head_dim: usize,
        d: usize,
    ) {
        // SAFETY: the contract of this method.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; Q];
            for i in 0..Q {
                for n in 0..N {
                    sums[i][n] = V::load(self.queries[first + i].out.as_ptr().add(d + n * V::LANES));
                }
            }
            for key in keys {
                let v = v.as_ptr().add(key * head_dim + d);
                let mut vectors = [V::splat(0.0); N];
                for n in 0..N {
                    vectors[n] = E::load::<V>(v.add(n * V::LANES));
                }
                for i in 0..Q {
                    let p = V::splat(self.scores[first + i][key]);
                    for n in 0..N {
                        sums[i][n] = p.mul_add(vectors[n], sums[i][n]);
                    }
                }
            }
            for i in 0..Q {
                for n in 0..N {
                    sums[i][n].store(self.queries[first + i].out.as_mut_ptr().add(d + n * V::LANES));
                }
            }
        }
    }
}

/// Turns scores into weights, relative to the maximum so far, and rescales the query's partial result to it.
///
/// # Safety
/// The instruction set is there, see [`Simd`], and `scores` are whole vectors.
#[inline(always)]
unsafe fn softmax<V: Simd>(query: &mut Query<'_>, scores: &mut [f32]) {
    // SAFETY: the contract of this function; `rescale` has room for the longest vector.
    unsafe {
        let mut maxima = V::splat(query.max);
        for i in (0..scores.len()).step_by(V::LANES) {
            maxima = maxima.max(V::load(scores.as_ptr().add(i)));
        }
        let max = maxima.reduce_max();
        if max == f32::NEG_INFINITY {
            return scores.fill(0.0); // all keys are masked
        }
        if max > query.max && query.sum > 0.0 {
            let mut rescale = [0f32; 16];
            simd::exp(V::splat(query.max - max)).store(rescale.as_mut_ptr());
            query.sum *= rescale[0];
            query.out.iter_mut().for_each(|out| *out *= rescale[0]);
        }
        let mut sum = V::splat(0.0);
        for i in (0..scores.len()).step_by(V::LANES) {
            let scores = scores.as_mut_ptr().add(i);
            let weight = simd::exp(V::load(scores).sub(V::splat(max)));
            weight.store(scores);
            sum = sum.add(weight);
        }
        query.max = max;
        query.sum += sum.reduce_sum();
    }
}
