//! Attention, and the pages of the KV cache.
use std::ops::Range;

use candle_phi::compute::kernels::{Kernel, KvPage, KvSlice, KvSliceMut, PAGE, Query};
use half::f16;

use crate::random::Random;
use crate::{all, same};

#[derive(Copy, Clone, PartialEq, Debug)]
enum Kind {
    F16,
    F32,
    Q8,
}

const KINDS: [Kind; 3] = [Kind::F16, Kind::F32, Kind::Q8];
const HEAD_DIMS: [usize; 5] = [16, 20, 64, 96, 128];
/// Features of a position that share a scale in `Kind::Q8`.
const SHARED: usize = 32;

/// The keys and values of one head, in pages from position `start` on. Positions that were not stored are NaN.
#[derive(Clone)]
struct Cache {
    kind: Kind,
    head_dim: usize,
    start: usize,
    pages: Vec<[Half; 2]>, // keys, values
}

/// Keys or values of a page.
#[derive(Clone)]
struct Half {
    f16: Vec<f16>,
    f32: Vec<f32>,
    q: Vec<i8>,
    scales: Vec<f16>,
}

impl Half {
    fn unwritten(kind: Kind, head_dim: usize) -> Self {
        let len = |of: Kind, features: usize| if kind == of { PAGE * features } else { 0 };
        Half {
            f16: vec![f16::NAN; len(Kind::F16, head_dim)],
            f32: vec![f32::NAN; len(Kind::F32, head_dim)],
            q: vec![127; len(Kind::Q8, head_dim)],
            scales: vec![f16::NAN; len(Kind::Q8, head_dim.div_ceil(SHARED))],
        }
    }

    fn slice(&self, kind: Kind) -> KvSlice<'_> {
        match kind {
            Kind::F16 => KvSlice::F16(&self.f16),
            Kind::F32 => KvSlice::F32(&self.f32),
            Kind::Q8 => KvSlice::Q8 { q: &self.q, scales: &self.scales },
        }
    }

    fn slice_mut(&mut self, kind: Kind) -> KvSliceMut<'_> {
        match kind {
            Kind::F16 => KvSliceMut::F16(&mut self.f16),
            Kind::F32 => KvSliceMut::F32(&mut self.f32),
            Kind::Q8 => KvSliceMut::Q8 { q: &mut self.q, scales: &mut self.scales },
        }
    }
}

impl Cache {
    fn new(kind: Kind, head_dim: usize, start: usize) -> Self {
        Cache { kind, head_dim, start, pages: Vec::new() }
    }

    fn store(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let (page, at) = ((position - self.start) / PAGE, (position - self.start) % PAGE);
        while self.pages.len() <= page {
            let half = Half::unwritten(self.kind, self.head_dim);
            self.pages.push([half.clone(), half]);
        }
        let [keys, values] = &mut self.pages[page];
        keys.slice_mut(self.kind).store_key(at, key);
        values.slice_mut(self.kind).store_value(at, value);
    }

    fn pages<'a>(&'a self) -> Vec<KvPage<'a>> {
        let page = |(i, page): (usize, &'a [Half; 2])| {
            let [k, v] = [&page[0], &page[1]].map(|half| half.slice(self.kind));
            KvPage { start: self.start + i * PAGE, k, v }
        };
        self.pages.iter().enumerate().map(page).collect()
    }
}

/// Keys and values of the positions from `start` on, and a cache with them.
struct Context {
    start: usize,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    cache: Cache,
}

impl Context {
    fn random(kind: Kind, head_dim: usize, start: usize, len: usize, random: &mut Random) -> Self {
        let mut cache = Cache::new(kind, head_dim, start);
        let keys: Vec<_> = (0..len).map(|_| random.normals(head_dim)).collect();
        let values: Vec<_> = (0..len).map(|_| random.normals(head_dim)).collect();
        for (i, (key, value)) in keys.iter().zip(&values).enumerate() {
            cache.store(start + i, key, value);
        }
        Context { start, keys, values, cache }
    }

    /// Keys and values as rounded by the cache.
    fn stored(&self) -> Context {
        let round = |x: &Vec<f32>| rounded(self.cache.kind, x);
        let (keys, values) = (self.keys.iter().map(round).collect(), self.values.iter().map(round).collect());
        Context { start: self.start, keys, values, cache: self.cache.clone() }
    }

    /// The textbook's attention, in f64: the output, and the logarithm of the sum of `exp(score)`.
    fn attend(&self, q: &[f32], seen: Range<usize>) -> (Vec<f64>, f64) {
        let seen = seen.start - self.start..seen.end - self.start;
        let dot = |k: &Vec<f32>| q.iter().zip(k).map(|(q, k)| *q as f64 * *k as f64).sum::<f64>();
        let scale = 1.0 / (q.len() as f64).sqrt();
        let scores: Vec<f64> = self.keys[seen.clone()].iter().map(|k| dot(k) * scale).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(*s));
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut out = vec![0.0; q.len()];
        for (score, value) in scores.iter().zip(&self.values[seen]) {
            let weight = (score - max).exp() / sum;
            out.iter_mut().zip(value).for_each(|(out, v)| *out += weight * *v as f64);
        }
        (out, max + sum.ln())
    }
}

fn rounded(kind: Kind, x: &[f32]) -> Vec<f32> {
    let f16 = |x: f32| f16::from_f32(x).to_f32();
    match kind {
        Kind::F32 => x.to_vec(),
        Kind::F16 => x.iter().map(|x| f16(*x)).collect(),
        Kind::Q8 => {
            let round = |share: &[f32]| {
                let scale = f16(share.iter().fold(0f32, |greatest, x| greatest.max(x.abs())) / 127.0);
                let to = |x: &f32| if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
                share.iter().map(|x| to(x) * scale).collect::<Vec<f32>>()
            };
            x.chunks(SHARED).flat_map(round).collect()
        }
    }
}

/// The results of attention for each query: the output, the maximum and the sum.
fn attended(kernel: &dyn Kernel, q: &[Vec<f32>], seen: &[Range<usize>], pages: &[KvPage<'_>]) -> Vec<Vec<f32>> {
    let head_dim = q[0].len();
    let mut outs: Vec<Vec<f32>> = q.iter().map(|q| vec![f32::NAN; q.len()]).collect();
    let mut queries: Vec<Query<'_>> = Vec::new();
    for ((q, keys), out) in q.iter().zip(seen).zip(&mut outs) {
        queries.push(Query::new(q, keys.clone(), out));
    }
    kernel.attention(&mut queries, pages, head_dim);
    queries.iter_mut().for_each(Query::finish);
    let softmax: Vec<_> = queries.iter().map(|query| [query.max, query.sum]).collect();
    outs.iter().zip(softmax).map(|(out, softmax)| [&out[..], &softmax].concat()).collect()
}

/// What rounding may cost: some units (2^-24) of the scores, of their exponentials and of the sums.
const ROUNDING: f64 = 32.0 / (1 << 24) as f64;

fn assert_near(kernel: &dyn Kernel, context: &Context, q: &[Vec<f32>], seen: &[Range<usize>]) {
    let stored = context.stored();
    let results = attended(kernel, q, seen, &context.cache.pages());
    for ((result, q), seen) in results.iter().zip(q).zip(seen) {
        let (expected, logarithm) = stored.attend(q, seen.clone());
        let case = format!("{}, {:?}, {} features, keys {seen:?}", kernel.name(), context.cache.kind, q.len());
        let greatest = q.iter().map(|q| q.abs() as f64).sum::<f64>();
        let limit = ROUNDING * (1.0 + greatest / (q.len() as f64).sqrt());
        let (out, softmax) = result.split_at(q.len());
        for (out, expected) in out.iter().zip(&expected) {
            let error = (*out as f64 - expected).abs();
            assert!(error <= limit, "{case}: {out} is {error:e} off {expected}, limit {limit:e}");
        }
        let error = (softmax[0] as f64 + (softmax[1] as f64).ln() - logarithm).abs();
        assert!(error <= limit, "{case}: {softmax:?} is {error:e} off {logarithm}, limit {limit:e}");
    }
}

/// Consecutive queries up to position `last`; each attends to at most `window` keys, its own position included.
fn causal(count: usize, last: usize, window: usize, start: usize) -> Vec<Range<usize>> {
    (0..count).map(|i| last + 1 - count + i).map(|at| (at + 1).saturating_sub(window).max(start)..at + 1).collect()
}

#[test]
#[allow(clippy::single_range_in_vec_init)] // a list of one range
fn attention_is_within_a_few_units_of_the_formula() {
    for (kind, head_dim) in KINDS.into_iter().flat_map(|kind| HEAD_DIMS.map(|head_dim| (kind, head_dim))) {
        let mut random = Random::new(head_dim as u64);
        let (start, len) = (3 * PAGE, 5 * PAGE + 37);
        let context = Context::random(kind, head_dim, start, len, &mut random);
        let end = start + len;
        let lone = [
            start..start + 1,         // one key
            end - 1..end,             // the last
            start..end,               // all
            start + 127..start + 129, // across pages
            start + 128..start + 256, // one page
        ];
        let several = [
            vec![start + 5..start + 6, start + 130..start + 131], // one key each
            causal(9, end - 1, usize::MAX, start),                // a prompt
            causal(9, start + 8, usize::MAX, start),              // the beginning of one
            causal(7, start + 131, 3, start),                     // small windows
            causal(6, end - 1, 200, start),                       // windows
            vec![start..start + 3, end - 40..end, start + 250..start + 260, start..end], // disjoint ranges
        ];
        let masks = lone.map(|keys| vec![keys; 1]).into_iter().chain(several);
        for mask in masks {
            let q: Vec<_> = mask.iter().map(|_| random.normals(head_dim)).collect();
            for kernel in all() {
                assert_near(&*kernel, &context, &q, &mask);
            }
        }
    }
}

/// Scores differ by hundreds: weights underflow, and the maximum grows from page to page.
#[test]
fn attention_is_exact_enough_where_scores_are_large() {
    for head_dim in [64, 96] {
        let mut random = Random::new(1);
        let mut context = Context::random(Kind::F32, head_dim, 0, 400, &mut random);
        for (i, key) in context.keys.iter_mut().enumerate() {
            let scale = [1.0, 10.0, -30.0, 60.0][i / PAGE];
            key.iter_mut().for_each(|k| *k *= scale);
            context.cache.store(i, key, &context.values[i]);
        }
        for kernel in all() {
            for keys in [0..400, 0..128, 130..300, 300..400] {
                let q = random.normals(head_dim);
                let result =
                    &attended(&*kernel, std::slice::from_ref(&q), std::slice::from_ref(&keys), &context.cache.pages())
                        [0];
                let (expected, _) = context.attend(&q, keys);
                for (out, expected) in result.iter().zip(expected) {
                    // A score of 400 has an error of 3e-5, which is the relative error of its weight.
                    assert!((*out as f64 - expected).abs() < 5e-4, "{}: {out}, not {expected}", kernel.name());
                }
            }
        }
    }
}

#[test]
fn a_query_has_the_same_bits_among_any_others_and_in_any_pages() {
    for (kind, head_dim) in KINDS.into_iter().flat_map(|kind| HEAD_DIMS.map(|head_dim| (kind, head_dim))) {
        let mut random = Random::new(2);
        let (start, len) = (PAGE, 3 * PAGE + 50);
        let context = Context::random(kind, head_dim, start, len, &mut random);
        let pages = context.cache.pages();
        let q: Vec<_> = (0..9).map(|_| random.normals(head_dim)).collect();
        for seen in [
            causal(9, start + len - 1, usize::MAX, start),
            causal(9, start + 130, usize::MAX, start),
            causal(9, start + 260, 100, start),
            causal(9, start + 300, 2, start),
        ] {
            for kernel in all() {
                let alone: Vec<_> = q
                    .iter()
                    .zip(&seen)
                    .flat_map(|(q, seen)| {
                        // The pages that it attends to.
                        let needed = (seen.start - start) / PAGE..(seen.end - start).div_ceil(PAGE);
                        attended(&*kernel, std::slice::from_ref(q), std::slice::from_ref(seen), &pages[needed])
                    })
                    .collect();
                for cut in 1..pages.len() {
                    let mut outs = vec![vec![0.0; head_dim]; q.len()];
                    let given = q.iter().zip(&seen).zip(&mut outs);
                    let mut queries: Vec<_> = given.map(|((q, seen), out)| Query::new(q, seen.clone(), out)).collect();
                    kernel.attention(&mut queries, &pages[..cut], head_dim);
                    kernel.attention(&mut queries, &pages[cut..], head_dim);
                    for (query, alone) in queries.iter_mut().zip(&alone) {
                        query.finish();
                        let result = [&*query.out, &[query.max, query.sum]].concat();
                        assert!(same(&result, alone), "{} {kind:?}, cut before page {cut}", kernel.name());
                    }
                }
                for count in 1..=9 {
                    for first in 0..=9 - count {
                        let group = first..first + count;
                        let together = attended(&*kernel, &q[group.clone()], &seen[group.clone()], &pages);
                        let equal = together.iter().zip(&alone[group]).all(|(a, b)| same(a, b));
                        assert!(equal, "{} {kind:?}, {head_dim} features: {count} from {first}", kernel.name());
                    }
                }
            }
        }
    }
}

/// Also in a group with queries that do attend to the key.
#[test]
fn a_masked_key_has_no_influence_on_a_query() {
    for (kind, head_dim) in KINDS.into_iter().flat_map(|kind| HEAD_DIMS.map(|head_dim| (kind, head_dim))) {
        let mut random = Random::new(3);
        let context = Context::random(kind, head_dim, 0, 2 * PAGE, &mut random);
        for seen in [causal(4, 140, usize::MAX, 0), causal(5, 140, 20, 0), causal(4, 129, 3, 0)] {
            let q: Vec<_> = seen.iter().map(|_| random.normals(head_dim)).collect();
            for kernel in all() {
                let before = attended(&*kernel, &q, &seen, &context.cache.pages());
                for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
                    for position in [seen[0].start, seen[1].start, seen[2].end - 1, seen[3].end - 1, seen[3].end] {
                        let (mut key, mut value) = (random.normals(head_dim), random.normals(head_dim));
                        (key[3], value[head_dim - 1]) = (wrong, wrong);
                        let mut cache = context.cache.clone();
                        cache.store(position, &key, &value);
                        let after = attended(&*kernel, &q, &seen, &cache.pages());
                        for ((before, after), seen) in before.iter().zip(&after).zip(&seen) {
                            let case = format!("{} {kind:?}, {head_dim} features, {wrong}", kernel.name());
                            if !seen.contains(&position) {
                                assert!(same(before, after), "{case} at {position}: in a query of {seen:?}");
                            } else if !wrong.is_finite() {
                                let hidden = after[..head_dim].iter().all(|out| out.is_finite());
                                assert!(!hidden, "{case} at {position}: hidden in a query of {seen:?}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_without_keys_has_a_sum_of_zero_and_does_not_change_the_others() {
    let mut random = Random::new(5);
    let context = Context::random(Kind::F16, 96, PAGE, 2 * PAGE, &mut random);
    let (some, all_of_them) = (PAGE + 3..PAGE + 140, PAGE..3 * PAGE);
    let q: Vec<_> = (0..4).map(|_| random.normals(96)).collect();
    let inverted = Range { start: 4 * PAGE, end: 3 * PAGE }; // a window past the pages
    for nothing in [PAGE..PAGE, 3 * PAGE..3 * PAGE, PAGE + 7..PAGE + 7, inverted, 0..PAGE, 3 * PAGE..4 * PAGE] {
        let seen = [some.clone(), nothing.clone(), all_of_them.clone(), nothing.clone()];
        for kernel in all() {
            let results = attended(&*kernel, &q, &seen, &context.cache.pages());
            for i in [0, 2] {
                let alone = attended(&*kernel, &q[i..=i], &seen[i..=i], &context.cache.pages());
                assert!(same(&results[i], &alone[0]), "{}: beside {nothing:?}", kernel.name());
            }
            for i in [1, 3] {
                assert_eq!(results[i][97], 0.0, "{}: {nothing:?}", kernel.name());
            }
        }
    }
}

/// Pages have what was stored, rounded to half a step.
#[test]
fn pages_hold_what_is_stored() {
    let mut random = Random::new(4);
    for (kind, head_dim) in KINDS.into_iter().flat_map(|kind| HEAD_DIMS.map(|head_dim| (kind, head_dim))) {
        for scale in [0.0, 1e-6, 1e-3, 1.0, 100.0] {
            let x: Vec<f32> = random.normals(head_dim).iter().map(|x| x * scale).collect();
            let mut cache = Cache::new(kind, head_dim, 0);
            let at = random.below(PAGE);
            cache.store(at, &x, &x);
            let (mut keys, mut values) = (vec![0f32; PAGE * head_dim], vec![0f32; PAGE * head_dim]);
            let page = cache.pages()[0];
            page.k.widen_keys(&mut keys, head_dim);
            page.v.widen_values(&mut values, head_dim);
            for (d, (x, rounded)) in x.iter().zip(rounded(kind, &x)).enumerate() {
                assert_eq!(keys[d * PAGE + at], rounded, "{kind:?}: key {x}");
                assert_eq!(values[at * head_dim + d], rounded, "{kind:?}: value {x}");
            }
        }
    }
}

/// For normal features the maximum of 32 is about 2.3 standard deviations, a step is 1/127 of it, and the error 0.29 steps:
/// 0.5% of a standard deviation for keys and for values. Measured: 0.6% to 0.7% of the output.
#[test]
fn attention_over_8_bit_pages_is_within_their_rounding() {
    for head_dim in HEAD_DIMS {
        let mut random = Random::new(head_dim as u64);
        let context = Context::random(Kind::Q8, head_dim, 0, 1000, &mut random);
        let (mut errors, mut squares) = (0.0, 0.0);
        for _ in 0..100 {
            let q = random.normals(head_dim);
            let keys = 0..1 + random.below(1000);
            let (exact, _) = context.attend(&q, keys.clone());
            let best = all().last().expect("a kernel");
            let result = &attended(&*best, &[q], &[keys], &context.cache.pages())[0];
            for (out, exact) in result.iter().zip(exact) {
                errors += (*out as f64 - exact).powi(2);
                squares += exact * exact;
            }
        }
        let error = (errors / squares).sqrt();
        assert!(error < 0.01, "{head_dim} features: relative error {error}");
    }
}
