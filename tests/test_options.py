"""Options are checked at the call: names, types and ranges, with messages that say what to do."""

import copy
import inspect
import math
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from candle_phi import NotInThisVersionError, Phi, hub
from candle_phi.option_names import FOREIGN, RENAMED, UNBUILT
from candle_phi.options import (
    Option,
    OptionError,
    OptionTypeError,
    OptionValueError,
    generation,
)
from candle_phi.testing import FakePhi
from conftest import HAIKU
from test_api_contract import GENERATION


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
        ("cache_scope", "tenant 1"),
        ("speculate", False),
        ("speculate", None),
        ("prediction", "ice hockey"),
        ("prediction", [299, 312]),
        ("prediction", np.array([299, 312])),
        ("prediction", {"type": "content", "content": "ice hockey"}),
        ("prediction", {"type": "content", "content": [{"type": "text", "text": "ice"}]}),
    ],
)
def test_accepted(phi: Phi, name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    assert phi.stream(HAIKU, **options).usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("max_tokens", 0, ValueError, "at least 1, not 0"),
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
        ("top_p", 0, ValueError, "above 0 and at most 1, not 0"),
        ("top_p", 1.01, ValueError, "1.01"),
        ("top_p", math.nan, ValueError, "nan"),
        ("min_p", -0.5, ValueError, "-0.5"),
        ("min_p", 2, ValueError, "from 0 to 1, not 2"),
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
        ("parse_special", False, ValueError, "needs raw=True"),
        ("add_bos", True, ValueError, "raw=True"),
        ("timeout", -1, ValueError, "-1"),
        ("timeout", float("nan"), ValueError, "finite"),
        ("timeout", 1e308, ValueError, "at most 3.4e38"),
        ("timeout", "5", TypeError, "a number"),
        ("cache_scope", "", ValueError, "is empty"),
        ("cache_scope", 7, TypeError, "a str"),
        ("speculate", 1, TypeError, "True or False"),
        ("prediction", 7, TypeError, "a str or token ids, not int"),
        ("prediction", b"ice", TypeError, "a str or token ids, not bytes"),
        ("prediction", [1.5], TypeError, r"prediction\[0\] must be a token id, an int, not float"),
        ("prediction", [1, -1], ValueError, r"prediction\[1\] must be a token id, from 0 to 4294967295, not -1"),
        ("prediction", [10**6], ValueError, r"prediction\[0\] is 1000000, which is outside the vocabulary of 2048"),
        ("prediction", {"content": "ice"}, ValueError, '{"type": "content", "content": ...}'),
        ("prediction", {"type": "content", "content": [{"type": "image"}]}, ValueError, "a part whose type is not"),
        ("on_progress", 5, TypeError, "a function"),
    ],
)
@pytest.mark.parametrize("method", ["stream", "generate", "astream", "agenerate"])
def test_rejected_at_the_call(
    phi: Phi, method: str, name: str, value: object, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        getattr(phi, method)(HAIKU, **{name: value})
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, OptionError)
    assert raised.value.name == name


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
        ("n_predict", "use max_tokens"),
        ("n_gpu_layers", r"use device, an option of Phi\(\)"),
        ("device_map", "use device"),
        ("streamer", r"\.stream\(\)"),
        ("stopping_criteria", "use stop"),
        ("logits_processor", "logit_bias"),
        ("sampler", "temperature"),
        ("n", "once per answer"),
        ("messages", "as the prompt"),
        ("json_schema", "response_format"),
        ("format", "response_format"),
        ("guided_json", "response_format"),
        ("response_model", "response_format"),
        ("output_type", "response_format"),
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
        ("n_ctx", 0, ValueError, "at least 1"),
        ("n_ctx", "4096", TypeError, "str"),
        ("n_ctx", 10**9, ValueError, "n_ctx"),
        ("n_threads", 0, ValueError, "from 1 to 1024"),
        ("n_threads", True, TypeError, "bool"),
        ("device", "gpu", ValueError, "not 'gpu'; NVIDIA's GPUs are 'cuda'"),
        ("device", "mps", ValueError, "'cuda' or 'metal', not 'mps'; Apple's GPUs are 'metal'"),
        ("device", None, TypeError, "NoneType"),
        ("engine", "torch", ValueError, "torch"),
        ("kernel", "sse9", ValueError, "sse9"),
        ("kv_cache", "q4", ValueError, "must be 'f16', 'f32' or 'q8_0', not 'q4'"),
        ("mmap", 1, TypeError, "True or False"),
        ("tokenizer", 3, TypeError, "PathLike"),
        ("chat_template", b"x", TypeError, "bytes"),
        ("max_concurrent", 0, ValueError, "at least 1"),
        ("max_concurrent", 1.0, TypeError, "an int"),
        ("max_batch", 0, ValueError, "must be from 1 to 16, not 0"),
        ("max_batch", 17, ValueError, "must be from 1 to 16, not 17"),
        ("max_batch", None, TypeError, "an int"),
        ("max_num_seqs", 4, TypeError, "use max_batch$"),
        ("prefix_cache", "2GB", TypeError, r"must be a number of bytes, such as 2 \* 2\*\*30, not str \('2GB'\)"),
        ("prefix_cache", 2.5, TypeError, "a number of bytes"),
        ("prefix_cache", True, TypeError, "a number of bytes"),
        ("prefix_cache", -1, ValueError, "must be from 0 to"),
        ("prefix_cache_dir", __file__, ValueError, "is not a folder"),
        ("prefix_cache_dir", "", ValueError, "is empty"),
        ("speculate", None, TypeError, "True or False"),
        ("speculate", 1, TypeError, "True or False"),
        ("enable_prefix_caching", True, TypeError, "use prefix_cache"),
        ("cache_prompt", True, TypeError, "use prefix_cache"),
        ("on_progress", 5, TypeError, "a function"),
        ("num_ctx", 4096, TypeError, "use n_ctx"),
        ("n_gpu_layers", -1, TypeError, "use device$"),
        ("flash_attn", True, TypeError, "leave it out"),
        ("torch_dtype", "auto", TypeError, "leave it out"),
        ("n_batch", 512, TypeError, "leave it out"),
        ("revision", "main", TypeError, r"an option of Phi.from_pretrained\(\)"),
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


def test_the_repeat_penalty_is_off_by_default() -> None:
    for temperature in (0, 1.0):
        assert generation(GENERATION | {"temperature": temperature}).sampling["repeat_penalty"] == 1.0
    assert generation(GENERATION | {"repeat_penalty": 1.3}).sampling["repeat_penalty"] == 1.3


def test_off_is_the_same_whichever_way_it_is_written() -> None:
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1, "logit_bias": {}, "stop": []}
    assert generation(GENERATION) == generation(GENERATION | off)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Phi.from_pretrained("x/y", file_name="z"), "did you mean 'filename'"),  # type: ignore[call-arg]
        (lambda: Phi.from_pretrained("x/y", cache="z"), "use cache_dir$"),  # type: ignore[call-arg]
        (lambda: Phi.from_pretrained("x/y", use_auth_token="z"), "use token$"),  # type: ignore[call-arg]
        (lambda: Phi.from_pretrained("x/y", n_gpu_layers=-1), "use device$"),  # type: ignore[call-arg]
    ],
)
def test_from_pretrained_knows_the_options_of_both(call: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


@pytest.mark.parametrize("name", UNBUILT)
def test_options_of_later_versions_are_named(phi: Phi, name: str) -> None:
    options: dict[str, Any] = {name: None}
    for call in (lambda: phi.generate(HAIKU, **options), lambda: FakePhi(["a"]).stream(HAIKU, **options)):
        with pytest.raises(NotInThisVersionError, match=f"option '{name}' is not in this version"):
            call()
    with pytest.raises(NotInThisVersionError, match=name):
        Phi.demo(**options)
    with pytest.raises(NotInThisVersionError, match=name):
        Phi.from_pretrained("x/y", **options)
    with pytest.raises(NotInThisVersionError, match=name):
        phi.logits([1], **options)
    for model in (phi, FakePhi(["a"])):
        with pytest.raises(NotInThisVersionError, match=name):
            model.map([HAIKU], **options)
        with pytest.raises(NotInThisVersionError, match=name):
            model.amap([HAIKU], **options)
        with pytest.raises(NotInThisVersionError, match=name):
            model.score("ice hockey", **options)


def test_answers_name_options_that_exist() -> None:
    known = {*GENERATION, *inspect.signature(Phi.from_pretrained).parameters}
    assert set(RENAMED.values()) <= known | UNBUILT.keys()
    assert not (FOREIGN.keys() | RENAMED.keys() | UNBUILT.keys()) & known
    assert not FOREIGN.keys() & RENAMED.keys()


@pytest.mark.parametrize("method", ["stream", "generate", "astream", "agenerate"])
@pytest.mark.parametrize("name", ["main_gpu", "question", "store", "verbosity", "vocab_only", "mirostat"])
def test_a_foreign_option_is_not_mistaken_for_a_short_or_unrelated_name(phi: Phi, method: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{name}'") as raised:
        getattr(phi, method)(HAIKU, **{name: 1})
    assert "min_p" not in str(raised.value)
    assert "did you mean" not in str(raised.value)
    assert "is an option of" not in str(raised.value).replace("use device, an option of Phi()", "")


class Unprintable:
    """A value whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no words for it")


class TwoLines:
    """A value whose repr has several lines, as that of an array."""

    def __repr__(self) -> str:
        return "[[1 2]\n [3 4]]"


@pytest.mark.parametrize("name", [name for name in GENERATION if name != "on_progress"])
def test_a_value_with_an_unusual_repr_is_a_type_error_on_one_line(phi: Phi, name: str) -> None:
    for value, shown in ((Unprintable(), "no repr: no words for it"), (TwoLines(), "[[1 2] [3 4]]")):
        with pytest.raises(OptionTypeError, match=f"^{name} must be .*, not test_options") as raised:
            phi.stream(HAIKU, **cast(Any, {name: value}))
        assert f"({shown})" in str(raised.value)


def test_an_array_without_dimensions_is_no_list_of_stop_strings(phi: Phi) -> None:
    class Scalar:
        def __iter__(self) -> Any:
            raise TypeError("iteration over a 0-d array")

    with pytest.raises(OptionTypeError, match=r"^stop must be a str or a list of str, not"):
        phi.stream(HAIKU, stop=Scalar())


@pytest.mark.parametrize("call", [hub.list_cached, lambda cache_dir: hub.cached("phi-4", cache_dir=cache_dir)])
def test_a_path_that_no_file_system_has_names_the_option(call: Any) -> None:
    with pytest.raises(OptionValueError, match=r"^cache_dir has a lone surrogate, '\\ud800', at position 2$"):
        call(cache_dir="a/\ud800")
    with pytest.raises(OptionValueError, match=r"^model_path has a lone surrogate"):
        Phi("\ud800.gguf")


def test_a_token_of_the_wrong_type_is_not_shown() -> None:
    with pytest.raises(OptionTypeError, match=r"^token must be a str, True or False, not bytes$"):
        hub.info("phi-4", token=b"hf_secret")  # type: ignore[arg-type]


def typed(name: str, value: str | None) -> str:
    """As a command line spells an option."""
    flag = "--" + name.replace("_", "-")
    return flag if value in (None, "True") else f"{flag} {value}"


@pytest.mark.parametrize(
    ("options", "python", "command_line"),
    [
        ({"stop": [""]}, "stop[0] is empty", "--stop is empty"),
        ({"top_logprobs": 3}, "top_logprobs=3 needs logprobs=True", "--top-logprobs 3 needs --logprobs"),
        (
            {"max_tokens": "top_k"},
            "max_tokens must be an int, not str ('top_k')",
            "--max-tokens must be an int, not str",
        ),
        ({"add_bos": True}, "add_bos needs raw=True", "--add-bos needs --raw"),
    ],
)
def test_a_front_end_spells_options_and_nothing_else(
    phi: Phi, options: dict[str, Any], python: str, command_line: str
) -> None:
    with pytest.raises(OptionError) as raised:
        phi.stream(HAIKU, **options)
    assert str(raised.value).startswith(python)
    assert raised.value.spelled(typed).startswith(command_line)


def test_the_engines_errors_are_spelled_too() -> None:
    with pytest.raises(OptionValueError) as raised:
        Phi.demo(n_ctx=10**6)
    assert raised.value.name == "n_ctx"
    assert raised.value.spelled(typed).startswith("--n-ctx must be from 1 to 1024")
    with pytest.raises(OptionValueError, match="kernel 'top_k' is not available") as raised:
        Phi.demo(kernel="top_k")
    assert raised.value.spelled(typed).startswith("--kernel 'top_k' is not available")
    with pytest.raises(OptionValueError) as raised:
        Phi.demo(chat_template="{{ raise_exception('use stop') }}{% for %}")
    assert raised.value.spelled(typed).startswith("--chat-template is not valid")


@pytest.mark.parametrize("error", [OptionTypeError, OptionValueError])
@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copies_can_be_spelled(error: type[OptionError], again: Any) -> None:
    before = error(Option("top_logprobs", "3"), "needs ", Option("logprobs", "True"))
    after = again(before)
    assert (type(after), str(after), after.name) == (error, str(before), "top_logprobs")
    assert after.spelled(typed) == "--top-logprobs 3 needs --logprobs"


def test_a_device_is_checked_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match="device must be"):
        Phi(path, device="mps")  # type: ignore[arg-type]
