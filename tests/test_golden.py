"""Logits and greedy ids of tiny models against Hugging Face transformers (golden/README.md says what the files are).

F32 and F16 files meet the bound under every kernel of this CPU. Quantized ones meet it under `portable`, which
multiplies the dequantized weights in f32 as the reference does; the fast kernels quantize activations too, and what
that costs is measured against llama.cpp.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from candle_phi import Phi, Result, _engine
from candle_phi.errors import PhiError, UnsupportedModelError

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
Array = NDArray[Any]
Models = Callable[..., Phi]
CASES: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())["cases"]
F32 = [name for name, case in CASES.items() if case["types"] == ["F32"]]
FLOAT = [name for name, case in CASES.items() if set(case["types"]) <= {"F32", "F16"}]
K_QUANT = [name for name, case in CASES.items() if "llama_cpp" in case]
PROMPTS = [(name, prompt) for name, case in CASES.items() for prompt in case["prompts"]]
F32_PROMPTS = [(name, prompt) for name, prompt in PROMPTS if name in F32]

KERNELS: list[str] = _engine.doctor()["kernels"]  # type: ignore[assignment]  # a mapping of mixed values

BOUND = {"f32": 1e-3, "f16": 2e-2}  # max abs error of a logit, by KV type
SAME = 1e-4  # between two of our own ways to the same logit


@functools.cache
def golden(case: str, prompt: str) -> dict[str, Array]:
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        return {key: arrays[f"{prompt}/{key}"] for key in ("ids", "first", "logits", "greedy", "steps")}


@pytest.fixture(scope="module")
def model() -> Iterator[Models]:
    """model(case, **options) -> Phi, opened once per module."""
    opened: dict[tuple[object, ...], Phi] = {}

    def get(case: str, **options: Any) -> Phi:
        if case not in F32:
            options.setdefault("kernel", "portable")
        key = (case, *sorted(options.items()))
        if key not in opened:
            opened[key] = Phi(GOLDEN / f"{case}.gguf", **options)
        return opened[key]

    yield get
    for phi in opened.values():
        phi.close()


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalized: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def logits_of(phi: Phi, ids: Sequence[int] | Array, **options: Any) -> Array:
    return np.asarray(phi.logits([int(i) for i in ids], **options))


def greedy(phi: Phi, ids: Sequence[int] | Array, n: int, **options: Any) -> Result:
    return phi.generate([int(i) for i in ids], temperature=0, max_tokens=n, ignore_eos=True, **options)


def long_factors(case: str, n: int) -> bool:
    """Whether a pass over n positions takes the long LongRoPE factors."""
    original = CASES[case]["original_context"]
    return original is not None and n > original


def test_cases_cover_every_weight_type() -> None:
    types = {kind for case in CASES.values() for kind in case["types"]}
    assert types == {
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    }


@pytest.mark.parametrize("kv_cache", ["f32", "f16"])
@pytest.mark.parametrize(("case", "prompt"), PROMPTS)
def test_logits_of_every_position(model: Models, case: str, prompt: str, kv_cache: str) -> None:
    phi, want = model(case, kv_cache=kv_cache), golden(case, prompt)
    got = logits_of(phi, want["ids"], every_position=True)
    assert got.dtype == np.float32
    assert got.shape == (len(want["ids"]), phi.n_vocab)
    error = np.abs(got[want["first"] :] - want["logits"]).max()
    print(f"largest error {error:.1e}")
    assert error <= BOUND[kv_cache]


@pytest.mark.parametrize(("case", "prompt"), PROMPTS)
def test_logits_of_the_last_position(model: Models, case: str, prompt: str) -> None:
    phi, ids = model(case, kv_cache="f32"), golden(case, prompt)["ids"]
    last = logits_of(phi, ids)
    assert last.shape == (phi.n_vocab,)
    np.testing.assert_allclose(last, logits_of(phi, ids, every_position=True)[-1], rtol=0, atol=SAME)


@pytest.mark.parametrize("kv_cache", ["f32", "f16"])
@pytest.mark.parametrize(("case", "prompt"), PROMPTS)
def test_greedy_ids_and_their_logprobs(model: Models, case: str, prompt: str, kv_cache: str) -> None:
    """Through the cache: past the window, and across the LongRoPE boundary, where everything is computed again."""
    phi, want = model(case, kv_cache=kv_cache), golden(case, prompt)
    result = greedy(phi, want["ids"], len(want["greedy"]), logprobs=True, top_logprobs=5)
    assert list(result.token_ids) == want["greedy"].tolist()
    expected = log_softmax(want["steps"])
    error = max(
        abs(logprob - row[token_id])
        for position, row in zip(result.logprobs or [], expected, strict=True)
        for token_id, logprob in [
            (position.token_id, position.logprob),
            *((top.token_id, top.logprob) for top in position.top),
        ]
    )
    print(f"largest error {error:.1e}")
    assert error <= 2 * BOUND[kv_cache]  # a logit and the normalizer, each within the bound


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("case", "prompt"), [(c, p) for c, p in PROMPTS if c in FLOAT])
def test_float_weights_under_every_kernel(model: Models, case: str, prompt: str, kernel: str) -> None:
    phi, want = model(case, kernel=kernel, kv_cache="f32"), golden(case, prompt)
    assert phi.kernel == kernel
    got = logits_of(phi, want["ids"], every_position=True)
    assert np.abs(got[want["first"] :] - want["logits"]).max() <= BOUND["f32"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("case", "prompt"), PROMPTS)
def test_greedy_ids_under_every_kernel(model: Models, case: str, prompt: str, kernel: str) -> None:
    """Every golden step has a gap between its two best logits that quantized activations do not close."""
    phi, want = model(case, kernel=kernel), golden(case, prompt)
    assert list(greedy(phi, want["ids"], len(want["greedy"])).token_ids) == want["greedy"].tolist()


@pytest.mark.parametrize("case", ["plain", "window", "gqa", "longrope"])
def test_an_8_bit_cache_costs_little(model: Models, case: str) -> None:
    """Keys and values with 8 bits for each and a scale for every 32."""
    phi = model(case, kv_cache="q8_0")
    errors = []
    for prompt in CASES[case]["prompts"]:
        want = golden(case, prompt)
        got = logits_of(phi, want["ids"], every_position=True)
        errors.append(got[want["first"] :] - want["logits"])
        assert list(greedy(phi, want["ids"], len(want["greedy"])).token_ids) == want["greedy"].tolist()
    error = np.concatenate([e.ravel() for e in errors])
    spread = np.concatenate([golden(case, p)["logits"].ravel() for p in CASES[case]["prompts"]]).std()
    rmse = float(np.sqrt(np.mean(error**2)))
    print(f"RMSE {rmse:.1e}, of logits that spread by {spread:.2f}")
    assert rmse <= 0.02 * spread


@pytest.mark.parametrize(("case", "prompt"), F32_PROMPTS)
def test_generated_text_as_one_prompt(model: Models, case: str, prompt: str) -> None:
    """Prefilling what was generated so far gives the logits of that step, on either side of the LongRoPE boundary."""
    phi, want = model(case, kv_cache="f32"), golden(case, prompt)
    for k, step in enumerate(want["steps"]):
        error = np.abs(logits_of(phi, np.concatenate([want["ids"], want["greedy"][:k]])) - step).max()
        assert error <= BOUND["f32"], f"step {k}: {error}"


@pytest.mark.parametrize(("case", "prompt"), F32_PROMPTS)
def test_token_by_token_is_the_prefill(model: Models, case: str, prompt: str) -> None:
    phi, want = model(case, kv_cache="f32"), golden(case, prompt)
    result = greedy(phi, want["ids"], len(want["greedy"]), logprobs=True)
    assert result.logprobs is not None
    for k, position in enumerate(result.logprobs):
        prefilled = log_softmax(logits_of(phi, np.concatenate([want["ids"], want["greedy"][:k]])))
        assert position.logprob == pytest.approx(prefilled[position.token_id], abs=SAME), f"step {k}"


@pytest.mark.parametrize(("case", "prompt"), [(c, p) for c, p in F32_PROMPTS if CASES[c]["prompts"][p][0] < 100])
def test_a_position_does_not_see_what_follows(model: Models, case: str, prompt: str) -> None:
    phi, ids = model(case, kv_cache="f32"), golden(case, prompt)["ids"]
    whole = logits_of(phi, ids, every_position=True)
    lengths = [n for n in range(1, len(ids) + 1) if long_factors(case, n) == long_factors(case, len(ids))]
    for n in lengths:
        np.testing.assert_allclose(logits_of(phi, ids[:n]), whole[n - 1], rtol=0, atol=SAME, err_msg=f"prefix of {n}")


@pytest.mark.parametrize("case", ["longrope", "partial_tied_longrope"])
def test_n_ctx_changes_no_rope_factor(model: Models, case: str) -> None:
    """The attention factor follows from the file's context length, the choice of factors from the positions."""
    whole, small = model(case, kv_cache="f32"), model(case, kv_cache="f32", n_ctx=40)
    want = golden(case, "crossing")
    np.testing.assert_array_equal(logits_of(small, want["ids"]), logits_of(whole, want["ids"]))
    assert list(greedy(small, want["ids"], len(want["greedy"])).token_ids) == want["greedy"].tolist()


def test_the_bare_file_lacks_the_optional_keys(model: Models) -> None:
    """Its goldens then hold the defaults: rope base 10000, no window (the rule of 2047 is for 32064 tokens)."""
    optional = {"phi3.rope.freq_base", "phi3.attention.sliding_window", "phi3.rope.scaling.original_context_length"}
    assert not optional & set(model("bare").metadata)
    assert optional <= set(model("plain").metadata)
    assert len(golden("bare", "past2047")["ids"]) > 2047


# ---- K-quants beside llama.cpp ----


@pytest.mark.parametrize("kv_cache", ["f32", "f16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", K_QUANT)
def test_k_quants_lose_no_more_than_llama_cpp(model: Models, case: str, kernel: str, kv_cache: str) -> None:
    """The RMSE to Hugging Face on the dequantized weights, averaged over the prompts, beside llama.cpp's on the same
    file and KV type."""
    phi = model(case, kernel=kernel, kv_cache=kv_cache)
    theirs = CASES[case]["llama_cpp"][f"rmse_kv_{kv_cache}"]
    ours = {}
    for prompt in theirs:
        want = golden(case, prompt)
        got = logits_of(phi, want["ids"], every_position=True).astype(np.float64)
        ours[prompt] = np.sqrt(np.mean((got - want["logits"]) ** 2))
    mean, limit = np.mean(list(ours.values())), 1.05 * np.mean(list(theirs.values()))
    print(f"mean RMSE {mean:.2e}, llama.cpp {limit / 1.05:.2e}")
    assert len(ours) >= 6
    assert mean <= limit, f"{phi.kernel}: {mean:.4f}, llama.cpp {limit / 1.05:.4f}"


# ---- the stock engine ----


@pytest.mark.parametrize(("case", "prompt"), [("plain", "one"), ("plain", "many"), ("gqa", "many"), ("bare", "many")])
def test_stock_engine_agrees_where_it_is_right(model: Models, case: str, prompt: str) -> None:
    phi, want = model(case, engine="candle"), golden(case, prompt)
    assert phi.engine == "candle"
    assert list(greedy(phi, want["ids"], len(want["greedy"])).token_ids) == want["greedy"].tolist()
    assert np.abs(logits_of(phi, want["ids"]) - want["logits"][-1]).max() <= BOUND["f32"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("longrope", "(?i)longrope|rope_factors"),
        ("rope_base", "250000"),
        ("f16", "12 of 16"),
        ("k_low", "(?i)tied|head"),
    ],
)
def test_stock_engine_refuses_what_it_computes_wrongly(case: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        Phi(GOLDEN / f"{case}.gguf", engine="candle")


def test_stock_engine_keeps_within_the_window(model: Models) -> None:
    phi, want, w = model("window", engine="candle"), golden("window", "shorter"), CASES["window"]["window"]
    n = len(want["greedy"])
    assert len(want["ids"]) + n < w
    assert list(greedy(phi, want["ids"], n).token_ids) == want["greedy"].tolist()
    with pytest.raises(PhiError, match=rf"\b{w}\b"):
        phi.stream([int(i) for i in want["ids"]], temperature=0, max_tokens=w, ignore_eos=True)
    with pytest.raises(PhiError, match=rf"\b{w}\b"):
        phi.logits(golden("window", "longer")["ids"].tolist())
