//! Arguments of unequal lengths: every kernel panics with the numbers, and reads or writes nothing first.
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_phi::compute::kernels::{
    Format, Kernel, KvPage, KvSlice, KvSliceMut, Line, PAGE, Phase, Query, Weights, dequantize,
};
use half::f16;

use crate::all;

/// The message of the panic of `call`.
fn message(call: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(call)).expect_err("a call with unequal lengths must panic");
    match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => payload.downcast::<&str>().map_or(String::new(), |message| message.to_string()),
    }
}

/// Asserts that the call panics, and that the message has all of `parts`.
fn assert_refused(kernel: &dyn Kernel, parts: &[&str], call: impl FnOnce()) {
    let message = message(call);
    assert!(parts.iter().all(|part| message.contains(part)), "{}: {message:?} lacks one of {parts:?}", kernel.name());
}

/// On the heap, with the length of the allocation: a sanitizer sees an access past the end.
fn ones(len: usize) -> Box<[f32]> {
    vec![1.0; len].into()
}

#[test]
fn norms_of_unequal_lengths_are_refused() {
    for kernel in all() {
        for len in [1, 15, 64, 3072] {
            let x = ones(len);
            for other in [0, len - 1, len + 1] {
                let (mut out, mut short) = (ones(len), ones(other));
                let numbers = [&*len.to_string(), &other.to_string()];
                assert_refused(&*kernel, &["weight", numbers[0], numbers[1]], || {
                    kernel.rms_norm(&x, &ones(other), 1e-5, &mut out)
                });
                assert!(out.iter().all(|out| *out == 1.0), "{}: written", kernel.name());
                assert_refused(&*kernel, &["out", numbers[0], numbers[1]], || {
                    kernel.rms_norm(&x, &ones(len), 1e-5, &mut short)
                });
            }
        }
    }
}

#[test]
fn activations_of_unequal_lengths_are_refused() {
    for kernel in all() {
        for len in [1, 15, 64, 3072] {
            let gate = ones(len);
            for other in [0, len - 1, len + 1] {
                let (mut out, mut short) = (ones(len), ones(other));
                let numbers = [&*len.to_string(), &other.to_string()];
                assert_refused(&*kernel, &["up", numbers[0], numbers[1]], || {
                    kernel.swiglu(&gate, &ones(other), &mut out)
                });
                assert!(out.iter().all(|out| *out == 1.0), "{}: written", kernel.name());
                assert_refused(&*kernel, &["out", numbers[0], numbers[1]], || {
                    kernel.swiglu(&gate, &ones(len), &mut short)
                });
            }
        }
    }
}

/// One query over one page; each length is right unless a test changes it.
struct Attention {
    q: usize,
    out: usize,
    k: usize,
    v: usize,
    scales: usize,
    start: usize,
    head_dim: usize,
}

impl Attention {
    const RIGHT: Attention =
        Attention { q: 64, out: 64, k: 64 * PAGE, v: 64 * PAGE, scales: 2 * PAGE, start: 0, head_dim: 64 };

    fn run(&self, kernel: &dyn Kernel) {
        let halves = |len: usize| -> Box<[f16]> { vec![f16::ONE; len].into() };
        let bytes = |len: usize| -> Box<[i8]> { vec![1; len].into() };
        let (k16, v16, k32, v32) = (halves(self.k), halves(self.v), ones(self.k), ones(self.v));
        let (k8, v8, scales) = (bytes(self.k), bytes(self.v), halves(self.scales));
        let q8 = [&k8, &v8].map(|q| KvSlice::Q8 { q, scales: &scales });
        let mut refusals = Vec::new();
        for [k, v] in [[KvSlice::F16(&k16), KvSlice::F16(&v16)], [KvSlice::F32(&k32), KvSlice::F32(&v32)], q8] {
            let (q, mut out) = (ones(self.q), ones(self.out));
            let query = Query::new(&q, self.start..self.start.saturating_add(PAGE), &mut out);
            let page = KvPage { start: self.start, k, v };
            let call = || kernel.attention(&mut [query], &[page], self.head_dim);
            refusals.push(catch_unwind(AssertUnwindSafe(call)).err());
        }
        // All of the storage types, or the one that has scales.
        if let Some(refusal) = refusals.pop().expect("three") {
            std::panic::resume_unwind(refusal);
        }
        assert!(refusals.iter().all(Option::is_none), "only 8-bit pages were accepted");
    }
}

#[test]
fn attention_of_unequal_lengths_is_refused() {
    const RIGHT: Attention = Attention::RIGHT;
    for kernel in all() {
        let kernel = &*kernel;
        RIGHT.run(kernel);
        for other in [0, 63, 65] {
            let number = other.to_string();
            assert_refused(kernel, &["q has", &number, "64"], || Attention { q: other, ..RIGHT }.run(kernel));
            assert_refused(kernel, &["out has", &number, "64"], || Attention { out: other, ..RIGHT }.run(kernel));
        }
        for other in [0, 64 * PAGE - 1, 64 * PAGE + 1] {
            let number = other.to_string();
            assert_refused(kernel, &["k has", &number, "8192"], || Attention { k: other, ..RIGHT }.run(kernel));
            assert_refused(kernel, &["v has", &number, "8192"], || Attention { v: other, ..RIGHT }.run(kernel));
        }
        for other in [0, 2 * PAGE - 1, 2 * PAGE + 1] {
            let number = other.to_string();
            assert_refused(kernel, &["scales", &number, "256"], || Attention { scales: other, ..RIGHT }.run(kernel));
        }
        for head_dim in [0, 63, 65, 96, usize::MAX] {
            assert_refused(kernel, &[&head_dim.to_string()], || Attention { head_dim, ..RIGHT }.run(kernel));
        }
        let start = usize::MAX - PAGE + 1;
        assert_refused(kernel, &["page", &start.to_string()], || Attention { start, ..RIGHT }.run(kernel));
    }
}

#[test]
fn products_of_unequal_lengths_are_refused() {
    for (kernel, phase) in all().flat_map(|kernel| [Phase::Decode, Phase::Prefill].map(|phase| (kernel.name(), phase)))
    {
        let kernel = candle_phi::compute::kernels::by_name(kernel).expect("it is there");
        for format in Format::ALL {
            let cols = 256;
            let (row, tile) = (format.row_bytes(cols), kernel.tile(format, cols, phase));
            let bytes: Box<[u8]> = vec![0; 3 * row].into();
            let x: Box<[Line]> = vec![Line::ZERO; 2 * tile.lines].into();
            let tokens = tile.tokens + 1; // two tiles
            let run = |bytes: &[u8], cols: usize, x: &[Line], tokens: usize| {
                let mut results = 0;
                kernel.matmul(Weights { format, cols, bytes }, phase, x, tokens, &mut |_, _, values| {
                    results += values.len();
                });
                results
            };
            assert_eq!(run(&bytes, cols, &x, tokens), 3 * tokens);
            assert_eq!(run(&bytes, cols, &[], 0), 0, "no tokens");
            assert_eq!(run(&[], cols, &x, tokens), 0, "no rows");
            let refused = |parts: &[&str], bytes: &[u8], cols: usize, x: &[Line], tokens: usize| {
                assert_refused(&*kernel, parts, || _ = run(bytes, cols, x, tokens));
            };
            for len in [1, row - 1, 3 * row - 1] {
                refused(&[&len.to_string(), &row.to_string()], &bytes[..len], cols, &x, tokens);
            }
            for lines in [0, tile.lines, 2 * tile.lines - 1] {
                refused(&["lines", &lines.to_string(), &tokens.to_string()], &bytes, cols, &x[..lines], tokens);
            }
            for tokens in [0, 2 * tile.tokens + 1, usize::MAX] {
                refused(&["lines", &tokens.to_string()], &bytes, cols, &x, tokens);
            }
            refused(&["features", "0"], &bytes, 0, &x, tokens);
            refused(&["features", &usize::MAX.to_string()], &bytes, usize::MAX, &x, tokens);
            if format.block_len() > 1 {
                refused(&["blocks", &(cols - 1).to_string()], &bytes, cols - 1, &x, tokens);
                let half = format.block_len() / 2;
                refused(&["blocks", &half.to_string()], &bytes, half, &x, tokens);
            }
        }
    }
}

#[test]
fn packing_of_unequal_lengths_is_refused() {
    for kernel in all() {
        for (format, phase) in
            Format::ALL.into_iter().flat_map(|format| [(format, Phase::Decode), (format, Phase::Prefill)])
        {
            let (x, tile) = (ones(256), kernel.tile(format, 256, phase));
            let lines = || vec![Line::ZERO; tile.lines];
            kernel.pack(format, phase, &x, tile.tokens - 1, &mut lines());
            assert_refused(&*kernel, &["token", &tile.tokens.to_string()], || {
                kernel.pack(format, phase, &x, tile.tokens, &mut lines())
            });
            for wrong in [0, tile.lines - 1, tile.lines + 1] {
                assert_refused(&*kernel, &["lines", &wrong.to_string(), &tile.lines.to_string()], || {
                    kernel.pack(format, phase, &x, 0, &mut vec![Line::ZERO; wrong])
                });
            }
            assert_refused(&*kernel, &["features", "0"], || kernel.pack(format, phase, &[], 0, &mut lines()));
            if format.block_len() > 1 {
                assert_refused(&*kernel, &["blocks", "255"], || kernel.pack(format, phase, &x[..255], 0, &mut lines()));
            }
        }
    }
}

#[test]
fn positions_and_features_that_a_page_lacks_are_refused() {
    let refused = |parts: &[&str], features: usize, at: usize, scales: usize| {
        let (mut f16, mut f32) = (vec![f16::ZERO; 64 * PAGE], ones(64 * PAGE));
        let (mut q, mut s) = (vec![0i8; 64 * PAGE], vec![f16::ZERO; scales]);
        for (i, mut slice) in
            [KvSliceMut::F16(&mut f16), KvSliceMut::F32(&mut f32), KvSliceMut::Q8 { q: &mut q, scales: &mut s }]
                .into_iter()
                .enumerate()
        {
            if scales != 2 * PAGE && i < 2 {
                continue;
            }
            for message in
                [message(|| slice.store_key(at, &ones(features))), message(|| slice.store_value(at, &ones(features)))]
            {
                assert!(parts.iter().all(|part| message.contains(part)), "{message:?} lacks one of {parts:?}");
            }
        }
    };
    refused(&["position", "128"], 64, PAGE, 2 * PAGE);
    refused(&["63", "8192"], 63, 0, 2 * PAGE);
    refused(&["65", "8192"], 65, 0, 2 * PAGE);
    refused(&["255", "256"], 64, 0, 2 * PAGE - 1);
}

#[test]
fn numbers_of_another_count_than_the_weights_are_refused() {
    for format in Format::ALL {
        let bytes = vec![0; format.row_bytes(512)];
        let weights = Weights { format, cols: 512, bytes: &bytes };
        dequantize(weights, &mut ones(512));
        for len in [0, 1, 256, 511, 513, 768] {
            let message = message(|| dequantize(weights, &mut ones(len)));
            assert!(
                message.contains(&format!("{} bytes", bytes.len())) && message.contains(&len.to_string()),
                "{message}"
            );
        }
    }
}
