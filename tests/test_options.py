"""Options are checked at the call: names, types and ranges, with messages that say what to do."""

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from candle_phi import Phi
from candle_phi.options import SAMPLING, sampling
from conftest import HAIKU
from test_api_contract import GENERATION

DEFAULTS = {name: GENERATION[name] for name in SAMPLING}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", np.int64(7)),
        ("temperature", 0),
        ("temperature", 2),
        ("temperature", np.float32(0.5)),
        ("top_k", 0),
        ("top_k", 40),
        ("top_p", 1),
        ("top_p", 0.1),
        ("min_p", 0),
        ("min_p", 1.0),
        ("repeat_penalty", 0.5),
        ("repeat_last_n", -1),
        ("repeat_last_n", 0),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("logit_bias", {}),
        ("logit_bias", {5: -100, "6": 100.0}),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("stop", "end"),
        ("stop", ["a", "b"]),
        ("stop", ()),
        ("ignore_eos", True),
    ],
)
def test_accepted(phi: Phi, name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    assert phi.stream(HAIKU, **options).usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("max_tokens", 0, ValueError, "not 0"),
        ("max_tokens", -1, ValueError, "not -1"),
        ("max_tokens", 1.5, TypeError, "float"),
        ("max_tokens", True, TypeError, "bool"),
        ("max_tokens", "5", TypeError, "str"),
        ("max_tokens", 10**30, ValueError, "2147483647"),
        pytest.param("max_tokens", 10**5000, ValueError, "too large to print", id="max_tokens-huge"),
        ("temperature", -0.1, ValueError, "-0.1"),
        ("temperature", math.nan, ValueError, "nan"),
        ("temperature", math.inf, ValueError, "inf"),
        ("temperature", 10**400, ValueError, "finite"),
        ("temperature", None, TypeError, "NoneType"),
        ("temperature", False, TypeError, "bool"),
        ("temperature", "hot", TypeError, "hot"),
        ("temperature", Decimal(1), TypeError, "Decimal"),
        ("top_k", -1, ValueError, "-1"),
        ("top_k", 1.0, TypeError, "float"),
        ("top_p", 0, ValueError, "above 0"),
        ("top_p", 1.01, ValueError, "1.01"),
        ("top_p", math.nan, ValueError, "nan"),
        ("min_p", -0.5, ValueError, "-0.5"),
        ("min_p", 2, ValueError, "to 1"),
        ("repeat_penalty", 0, ValueError, "above 0"),
        ("repeat_penalty", -1.0, ValueError, "-1"),
        ("repeat_last_n", -2, ValueError, "-2"),
        ("presence_penalty", 2.5, ValueError, "2.5"),
        ("frequency_penalty", -3, ValueError, "-3"),
        ("logit_bias", [1], TypeError, "mapping"),
        ("logit_bias", {1: 101}, ValueError, r"logit_bias\[1\]"),
        ("logit_bias", {1: math.nan}, ValueError, "nan"),
        ("logit_bias", {-1: 0}, ValueError, "-1"),
        ("logit_bias", {"x": 0}, TypeError, "'x'"),
        ("logit_bias", {10**9: 0}, ValueError, "outside the vocabulary of"),
        ("seed", -1, ValueError, "-1"),
        ("seed", 2**64, ValueError, "18446744073709551615"),
        ("seed", 1.0, TypeError, "float"),
        ("stop", "", ValueError, r"stop\[0\] is empty"),
        ("stop", ["a", ""], ValueError, r"stop\[1\] is empty"),
        ("stop", ["a", 7], TypeError, r"stop\[1\]"),
        ("stop", b"end", TypeError, "bytes"),
        ("stop", 7, TypeError, "int"),
        ("stop", "\ud800", ValueError, "surrogate"),
        ("ignore_eos", 1, TypeError, "True or False"),
        ("logprobs", 5, TypeError, "True or False"),
        ("top_logprobs", 21, ValueError, "20"),
        ("top_logprobs", 3, ValueError, "needs logprobs=True"),
        ("raw", "yes", TypeError, "True or False"),
        ("parse_special", 0, TypeError, "True or False"),
        ("parse_special", False, ValueError, "raw=True"),
        ("add_bos", True, ValueError, "raw=True"),
        ("timeout", -1, ValueError, "-1"),
        ("timeout", float("nan"), ValueError, "finite"),
        ("timeout", 1e308, ValueError, "to 3.4e38"),
        ("timeout", "5", TypeError, "a number"),
        ("on_progress", 5, TypeError, "a function"),
    ],
)
@pytest.mark.parametrize("method", ["stream", "generate", "astream", "agenerate"])
def test_rejected_at_the_call(
    phi: Phi, method: str, name: str, value: object, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        getattr(phi, method)(HAIKU, **{name: value})
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("max_new_tokens", "max_tokens"),
        ("num_predict", "max_tokens"),
        ("max_length", "max_tokens"),
        ("temp", "temperature"),
        ("repetition_penalty", "repeat_penalty"),
        ("stop_sequences", "stop"),
        ("stop_seqs", "stop"),
        ("do_sample", "temperature=0"),
        ("stream", r"stream\(\)"),
        ("n_gpu_layers", "device"),
        ("verbose", "logging"),
        ("num_ctx", "n_ctx"),
        ("context_length", "n_ctx"),
        ("system", '"role": "system"'),
        ("max_token", "did you mean 'max_tokens'"),
        ("tempature", "did you mean 'temperature'"),
        ("n_ctx", r"option of Phi\(\)"),
        ("zebra", "unknown option 'zebra'$"),
    ],
)
def test_foreign_names_have_answers(phi: Phi, name: str, answer: str) -> None:
    options: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=answer) as raised:
        phi.stream(HAIKU, **options)
    assert repr(name) in str(raised.value)
    with pytest.raises(TypeError, match=answer):
        phi.generate(HAIKU, **options)


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("n_ctx", 0, ValueError, "from 1"),
        ("n_ctx", "4096", TypeError, "str"),
        ("n_ctx", 10**9, ValueError, "n_ctx"),
        ("n_threads", 0, ValueError, "from 1"),
        ("n_threads", True, TypeError, "bool"),
        ("device", "gpu", ValueError, "gpu"),
        ("device", None, TypeError, "NoneType"),
        ("engine", "torch", ValueError, "torch"),
        ("kernel", "sse9", ValueError, "sse9"),
        ("kv_cache", "q4", ValueError, "q4"),
        ("mmap", 1, TypeError, "True or False"),
        ("tokenizer", 3, TypeError, "PathLike"),
        ("chat_template", b"x", TypeError, "bytes"),
        ("max_concurrent", 0, ValueError, "from 1"),
        ("max_concurrent", 1.0, TypeError, "an int"),
        ("on_progress", 5, TypeError, "a function"),
        ("num_ctx", 4096, TypeError, "use n_ctx"),
        ("n_gpu_layers", -1, TypeError, "use device"),
        ("verbose", False, TypeError, "logging"),
        ("temperature", 1.0, TypeError, r"option of stream\(\)"),
        ("n_thread", 4, TypeError, "did you mean 'n_threads'"),
    ],
)
def test_constructor_rejects(name: str, value: Any, error: type[Exception], says: str) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(error, match=says) as raised:
        Phi.demo(**options)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("given", "penalty"),
    [
        ({}, 1.2),
        ({"temperature": 0}, 1.0),
        ({"temperature": 0, "repeat_penalty": 1.3}, 1.3),
        ({"repeat_penalty": 1}, 1.0),
    ],
)
def test_repeat_penalty_depends_on_sampling(given: dict[str, Any], penalty: float) -> None:
    assert sampling(DEFAULTS | given)["repeat_penalty"] == penalty


def test_off_is_the_same_whichever_way_it_is_written() -> None:
    assert sampling(DEFAULTS) == sampling(DEFAULTS | {"top_k": 0, "top_p": 1, "min_p": 0, "logit_bias": {}, "stop": []})
