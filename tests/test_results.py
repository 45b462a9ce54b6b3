"""Chunks and results are strs that know their tokens."""

import copy
import json
import pickle
from typing import Any

import pytest

from candle_phi import Chunk, NotInThisVersionError, Phi, Result, Timings, TokenLogprob, Usage
from conftest import HAIKU

OWN = ("text", "token_ids", "logprobs", "finish_reason", "usage", "timings", "seed", "system_fingerprint")


def chunk() -> Chunk:
    top = (TokenLogprob(5, "ice", b"ice", -0.5, ()),)
    return Chunk("ice", [5], [TokenLogprob(5, "ice", b"ice", -0.5, top)])


def result() -> Result:
    timings = Timings(0.0, 0.1, 0.2, 0.1, 30.0, 5.0)
    return Result("cold\nice", [4, 5], None, "stop", Usage(3, 2, 5, 0), timings, 7, "abc")


@pytest.mark.parametrize("made", [chunk(), result()])
def test_it_is_a_str(made: Any) -> None:
    assert issubclass(type(made), str)
    assert type(made.text) is str
    assert made == made.text
    assert hash(made) == hash(made.text)
    assert f"{made}!" == made.text + "!"
    assert json.loads(json.dumps({"text": made})) == {"text": made.text}
    assert {made: 1}[made.text] == 1


@pytest.mark.parametrize("made", [chunk(), result()])
def test_no_attribute_hides_a_method(made: Any) -> None:
    assert not [name for name in OWN if hasattr(str, name)]
    assert made.index("c") == made.text.index("c")
    assert made.count("c") == made.text.count("c")
    assert made.upper() == made.text.upper()


@pytest.mark.parametrize("made", [chunk(), result()])
@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, *(lambda made, p=p: pickle.loads(pickle.dumps(made, p)) for p in range(6))],
)
def test_copies_keep_everything(made: Any, again: Any) -> None:
    other = again(made)
    assert type(other) is type(made)
    assert other == made
    for name in OWN:
        assert getattr(other, name, None) == getattr(made, name, None)


class Printer:
    """IPython's, as far as a result uses it."""

    def __init__(self, depth: int) -> None:
        self.stack = list(range(depth))
        self.shown = ""

    def text(self, text: str) -> None:
        self.shown += text


@pytest.mark.parametrize(("depth", "shown"), [(1, "cold\nice"), (2, "'cold\\nice'")])
def test_a_result_displays_as_text_and_quoted_inside_others(depth: int, shown: str) -> None:
    printer = Printer(depth)
    result()._repr_pretty_(printer, cycle=False)
    assert printer.shown == shown


@pytest.mark.parametrize("name", ["parsed", "tool_calls", "reasoning"])
def test_attributes_of_later_versions(name: str) -> None:
    assert not hasattr(result(), name)
    with pytest.raises(NotInThisVersionError, match=f"Result.{name} is not in this version"):
        getattr(result(), name)


def test_other_attributes_are_answered() -> None:
    with pytest.raises(AttributeError, match="'Result' object has no attribute 'choices': a Result is the text"):
        _ = result().choices  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"'Chunk' object has no attribute 'choices'$"):
        _ = chunk().choices  # type: ignore[attr-defined]


def test_a_real_result(phi: Phi) -> None:
    answer = phi.generate(HAIKU, seed=1, logprobs=True, top_logprobs=2)
    assert type(answer) is Result
    assert answer.text == answer
    assert answer.finish_reason == "stop"
    assert answer.seed == 1
    assert answer.usage == Usage(
        len(phi.tokenize([{"role": "user", "content": HAIKU}])),
        len(answer.token_ids),
        answer.usage.prompt_tokens + len(answer.token_ids),
        answer.usage.cached_tokens,
        answer.usage.draft_tokens,
        answer.usage.accepted_tokens,
    )
    assert answer.system_fingerprint
    assert "\n" not in answer.system_fingerprint
    timings = answer.timings
    assert timings.prefill_seconds > 0
    assert timings.decode_seconds > 0
    assert timings.time_to_first_token is not None
    assert timings.time_to_first_token >= timings.prefill_seconds
    computed = answer.usage.prompt_tokens - answer.usage.cached_tokens
    assert timings.prefill_tokens_per_second == pytest.approx(computed / timings.prefill_seconds)
    assert timings.decode_tokens_per_second is not None
    assert pickle.loads(pickle.dumps(answer)).logprobs == answer.logprobs


def test_the_fingerprint_tells_configurations_apart(phi: Phi) -> None:
    with Phi.demo() as same, Phi.demo(kv_cache="f32") as other:
        assert (
            same.generate("Hi", seed=1, max_tokens=1).system_fingerprint
            == phi.generate("Hi", seed=2, max_tokens=1).system_fingerprint
        )
        assert (
            other.generate("Hi", seed=1, max_tokens=1).system_fingerprint
            != same.generate("Hi", seed=1, max_tokens=1).system_fingerprint
        )


def test_a_logprob_is_a_value() -> None:
    one, same = (TokenLogprob(5, "ice", b"ice", -0.5, ()) for _ in range(2))
    assert {one, same} == {one}


def test_attributes_of_later_versions_are_named(phi: Phi) -> None:
    result = phi.generate(HAIKU, max_tokens=1, seed=1)
    for name in ("reasoning", "parsed"):
        with pytest.raises(NotInThisVersionError, match=rf"Result\.{name} is not in this version"):
            getattr(result, name)
        assert not hasattr(result, name)
    with pytest.raises(AttributeError, match="has no attribute 'tokens'"):
        result.usage.tokens  # type: ignore[attr-defined]  # noqa: B018
