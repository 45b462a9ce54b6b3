//! The rows of drafts that a pass takes, over all of its streams.
//!
//! Decisions: docs/design/runtime.md

/// What more rows must gain: costs are known to a few percent.
const GAIN: f32 = 1.02;
/// The drafts of some streams may make a pass of several this much longer: the others get one id from it all the same.
const LONGER: f32 = 2.0;

/// The number of drafts to compute for each stream. `rows`: those of the pass without drafts. `products`: for the drafts of
/// each stream, the probability that each is accepted with all before it. `cost` of a number of rows, `most` at most.
///
/// The pass with the most ids in its time is chosen: of `rows + sum of products` ids, in `cost` of all its rows.
pub fn share(rows: usize, most: usize, products: &[Vec<f32>], cost: impl Fn(usize) -> f32) -> Vec<usize> {
    // The greatest first; a stream's drafts stay in order, since their products fall.
    let mut drafts: Vec<(f32, usize)> =
        products.iter().enumerate().flat_map(|(stream, products)| products.iter().map(move |p| (*p, stream))).collect();
    drafts.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    drafts.truncate(most.saturating_sub(rows));
    let most_cost = if products.len() > 1 { LONGER * cost(rows) } else { f32::INFINITY };
    let mut ids = rows as f32;
    let mut best = (GAIN * ids / cost(rows), 0);
    for (i, (product, _)) in drafts.iter().enumerate() {
        ids += product;
        let cost = cost(rows + i + 1);
        if ids / cost > best.0 && cost <= most_cost {
            best = (ids / cost, i + 1);
        }
    }
    let mut taken = vec![0; products.len()];
    drafts[..best.1].iter().for_each(|(_, stream)| taken[*stream] += 1);
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AVX-512, of docs/design/kernels.md.
    fn avx512(rows: usize) -> f32 {
        [1.0, 1.06, 1.18, 1.18, 1.63, 1.76, 2.0, 2.0][rows - 1]
    }

    fn products(acceptance: f32, n: i32) -> Vec<f32> {
        (1..=n).map(|i| acceptance.powi(i)).collect()
    }

    #[test]
    fn a_good_draft_takes_all_rows_and_a_bad_one_none() {
        assert_eq!(share(1, 8, &[products(0.95, 15)], avx512), [7]);
        assert_eq!(share(1, 8, &[products(0.6, 15)], avx512), [3], "the fifth row costs more than it brings");
        assert_eq!(share(1, 8, &[products(0.02, 15)], avx512), [0]);
        assert_eq!(share(1, 8, &[vec![]], avx512), [0]);
    }

    #[test]
    fn a_dear_row_before_cheap_ones_is_no_border() {
        let cost = |rows: usize| [1.0, 1.9, 1.9, 1.9][rows - 1];
        assert_eq!(share(1, 4, &[products(0.8, 3)], cost), [3]);
    }

    #[test]
    fn streams_share_the_rows_by_their_chances() {
        let three = [products(0.95, 5), products(0.3, 5), vec![]];
        assert_eq!(share(3, 8, &three, |rows| rows as f32 / 2.0 + 0.5), [3, 0, 0]);
        let equal = [products(0.9, 5), products(0.9, 5)];
        assert_eq!(share(2, 6, &equal, |_| 1.0), [2, 2]);
        assert_eq!(share(8, 8, &vec![products(0.9, 5); 8], |_| 1.0), [0; 8], "no room");
    }

    #[test]
    fn a_stream_without_drafts_waits_at_most_twice_as_long() {
        let cost = |rows: usize| 0.5 + 0.5 * rows as f32;
        assert_eq!(share(1, 16, &[vec![1.0; 15]], cost), [15], "alone");
        assert_eq!(share(2, 16, &[vec![1.0; 15], vec![]], cost), [3, 0], "five rows cost 3, two cost 1.5");
    }

    #[test]
    fn rows_that_gain_less_than_is_known_are_not_taken() {
        assert_eq!(share(1, 2, &[vec![0.5]], |rows| [1.0, 1.48][rows - 1]), [0]);
        assert_eq!(share(1, 2, &[vec![0.5]], |rows| [1.0, 1.46][rows - 1]), [1]);
    }
}
