"""The fake says what it is told, and remembers what it was asked."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from candle_phi import InternalError, Phi, Progress, UnsupportedModelError
from candle_phi.testing import Call, FakePhi
from conftest import run_python


def test_replies_of_every_kind() -> None:
    phi = FakePhi(
        ["two words ", ["chunk ", "", "by chunk"], BlockingIOError("first"), ["half a", InternalError("then")], "", []]
    )
    stream = phi.stream("one")
    assert [chunk.text for chunk in stream] == ["two", " words", " "]
    stream = phi.stream("two")
    assert [(chunk.text, len(chunk.token_ids)) for chunk in stream] == [("chunk ", 1), ("by chunk", 2)]
    assert stream.usage.completion_tokens == 3
    stream = phi.stream("three")  # a model's failure is not known at the call
    with pytest.raises(BlockingIOError, match="first"):
        next(stream)
    assert (stream.finish_reason, list(stream)) == ("error", [])
    stream = phi.stream("four")
    assert next(stream) == "half a"
    with pytest.raises(InternalError, match="then"):
        next(stream)
    assert stream.text == "half a"
    assert phi.generate("five") == phi.generate("six") == ""
    phi = FakePhi([KeyError])
    with pytest.raises(KeyError):
        phi.generate("an exception's class will do")


def test_a_function_replies() -> None:
    def reply(messages: Any, options: dict[str, Any]) -> str | list[str]:
        return [f"{len(messages)} messages, ", f"{options.get('max_tokens')} tokens"]

    phi = FakePhi(reply)
    assert phi.generate([{"role": "user", "content": "Hi"}], max_tokens=9) == "1 messages, 9 tokens"
    with pytest.raises(TypeError, match=r"reply to call 1 must be a str, a list of str or an exception, not int"):
        FakePhi(lambda *_: 5).generate("Hi")  # type: ignore[arg-type]


def test_calls_are_as_they_were() -> None:
    phi = FakePhi(["a"] * 4)
    history = [{"role": "user", "content": "Hi"}]
    phi.generate(history, max_tokens=5)
    history.append({"role": "assistant", "content": "changed later"})
    phi.stream("plain", seed=1, stop="x")
    phi.generate(message for message in history[:1])
    with pytest.raises(TypeError, match="max_new_tokens"):
        phi.generate("never made", max_new_tokens=1)  # type: ignore[arg-type]  # no such option
    assert phi.calls == [
        ([{"role": "user", "content": "Hi"}], {"max_tokens": 5}),
        ("plain", {"seed": 1, "stop": "x"}),
        ([{"role": "user", "content": "Hi"}], {}),
    ]
    assert type(phi.calls[0]) is Call
    assert phi.calls[1].options["stop"] == "x"


def test_running_out_names_the_call() -> None:
    phi = FakePhi(["one", "two"])
    phi.generate("1")
    phi.stream("2")
    for method in (phi.stream, phi.generate):
        with pytest.raises(AssertionError, match=f"FakePhi: call {len(phi.calls) + 1} has no reply; 2 were given"):
            method("3")
    with pytest.raises(AssertionError, match="call 1 has no reply; 0 were given"):
        FakePhi([]).stream("1")


def test_delay_is_for_each_chunk() -> None:
    before = time.monotonic()
    answer = FakePhi(["a b c"], delay=0.05).generate("Hi")
    assert time.monotonic() - before >= 0.14
    assert answer.timings.prefill_seconds >= 0.05
    assert answer.timings.decode_seconds >= 0.1


def test_timeout_and_progress() -> None:
    seen: list[Progress] = []
    stream = FakePhi(["one two three"], delay=60).stream("Hi", timeout=0.1)
    assert "".join(stream) == ""
    assert stream.finish_reason == "timeout"
    phi = FakePhi(["one two three"] * 3, delay=0.3)
    stream = phi.stream("Hi", timeout=60, on_progress=seen.append)
    assert "".join(stream) == "one two three"
    assert stream.finish_reason == "stop"
    prompt = stream.usage.prompt_tokens
    assert list(dict.fromkeys(p.phase for p in seen)) == ["prefill", "decode"]
    assert {(p.done, p.total) for p in seen if p.phase == "prefill"} == {(0, prompt), (prompt, prompt)}
    assert seen[-1] == Progress("decode", 3, None, "tokens")
    assert len(seen) >= 5

    def enough(p: Progress) -> None:
        raise LookupError(p.phase)

    stream = phi.stream("Hi", on_progress=enough)
    with pytest.raises(LookupError, match="prefill"):
        next(stream)
    assert stream.finish_reason == "cancelled"


def test_the_context_ends_a_reply() -> None:
    phi = FakePhi(lambda *_: ["x"] * 5000)
    answer = phi.generate([1] * (phi.n_ctx - 7))
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 7)


@pytest.mark.parametrize(
    ("replies", "says"),
    [
        ("text", "not str"),
        (5, "not int"),
        ([7], r"replies\[0\] must be a str, a list of str or an exception, not int"),
        (["a", ["b", 7]], r"replies\[1\]\[1\] must be a str, not int"),
        ([[ValueError("first"), "after"]], r"replies\[0\]\[0\] must be a str, not ValueError"),
        ([b"bytes"], "not bytes"),
    ],
)
def test_wrong_replies_are_told_at_once(replies: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        FakePhi(replies)


def test_wrong_delays_and_surrogates() -> None:
    with pytest.raises(ValueError, match="delay must be"):
        FakePhi([], delay=-1)
    with pytest.raises(ValueError, match=r"replies\[0\] has a lone surrogate"):
        FakePhi(["\ud800"])


def test_it_has_no_weights_and_opens_nothing() -> None:
    with pytest.raises(UnsupportedModelError, match="2 ids"):
        FakePhi([]).logits([1, 2])
    calls: list[Callable[[], object]] = [FakePhi.demo, lambda: FakePhi.from_pretrained("microsoft/phi")]
    for opens in calls:
        with pytest.raises(TypeError, match=r"FakePhi\(replies\)"):
            opens()
    assert isinstance(FakePhi([]), Phi)


def test_no_file_and_no_network() -> None:
    script = (
        "import sys\n"
        "import candle_phi.testing\n"
        "events = []\n"
        "sys.addaudithook(lambda event, _: events.append(event) if event.startswith(('open', 'socket')) else None)\n"
        "phi = candle_phi.testing.FakePhi(['The puck drops.'] * 100)\n"
        "texts = {phi.generate('Hi') for _ in range(100)}\n"
        "print(texts, events)\n"
    )
    assert run_python(script) == "{'The puck drops.'} []\n"
