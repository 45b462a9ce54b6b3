"""`score` and `perplexity`: what the model thinks of a text that it is given."""

import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_phi import (
    ClosedError,
    ContextLengthError,
    InvalidModelError,
    Phi,
    Progress,
    TokenLogprob,
    UnsupportedModelError,
)
from candle_phi.scores import _windows, perplexity_of
from candle_phi.testing import FakePhi
from conftest import HAIKU, Stopwatch, run_python
from test_cli import DEMO, failed, run

TEXT = "One team has a player in the box, so the other team skates with one more for a while."
QUESTION = [{"role": "user", "content": "What is icing?"}]
ANSWER = [*QUESTION, {"role": "assistant", "content": "A long shot down the ice"}]


def expected(phi: Phi, ids: list[int], start: int = 1) -> list[float]:
    """Log probabilities from the logits of every position, in float64."""
    logits = np.asarray(phi.logits(ids, every_position=True)).astype(np.float64)
    best = logits.max(axis=-1)
    total = best + np.log(np.exp(logits - best[:, None]).sum(axis=-1))
    return [float(logits[i - 1, ids[i]] - total[i - 1]) for i in range(start, len(ids))]


def logprobs(entries: list[TokenLogprob]) -> list[float]:
    return [entry.logprob for entry in entries]


@pytest.mark.parametrize("kv_cache", ["f16", "f32", "q8_0"])
def test_scores_are_those_of_the_logits(kv_cache: Any) -> None:
    with Phi.demo(kv_cache=kv_cache) as phi:
        many = [3 + (7 * n) % 500 for n in range(700)]  # several turns of the engine
        prompts: list[tuple[Any, list[int]]] = [
            (TEXT, phi.tokenize(TEXT)),
            (ANSWER, phi.tokenize(ANSWER)),
            (many, many),
        ]
        for prompt, ids in prompts:
            for start in (1, 2, len(ids) // 2, len(ids) - 1):
                found = phi.score(prompt, start=start)
                assert [entry.token_id for entry in found] == ids[start:]
                # each is a float32, whose last bit is worth 4e-6 at -38
                assert logprobs(found) == pytest.approx(expected(phi, ids, start), abs=1e-6, rel=1e-7)
                assert {entry.top for entry in found} == {()}


def test_the_most_likely_tokens(phi: Phi) -> None:
    ids = phi.tokenize(TEXT)
    logits = np.asarray(phi.logits(ids, every_position=True))
    for i, entry in enumerate(phi.score(TEXT, top_logprobs=3), 1):
        best = [int(token) for token in np.argsort(-logits[i - 1], kind="stable")[:3]]
        assert [top.token_id for top in entry.top] == best
        assert logprobs(list(entry.top)) == sorted(logprobs(list(entry.top)), reverse=True)
        assert [top.logprob for top in entry.top if top.token_id == entry.token_id] in ([entry.logprob], [])


def test_an_answer_is_scored_as_it_was_generated(phi: Phi) -> None:
    answer = phi.generate(QUESTION, temperature=0, logprobs=True)
    assert answer.logprobs is not None
    prompt = phi.tokenize(QUESTION)
    found = phi.score(prompt + answer.token_ids, start=len(prompt))
    assert [(entry.token_id, entry.text, entry.bytes) for entry in found] == [
        (entry.token_id, entry.text, entry.bytes) for entry in answer.logprobs
    ]
    # prompts and answers are computed by kernels that round differently
    assert logprobs(found) == pytest.approx(logprobs(answer.logprobs), abs=0.05)


def test_special_tokens_in_a_text_are_text(phi: Phi) -> None:
    text = "<|user|> and <|end|>"
    assert [entry.token_id for entry in phi.score(text)] == phi.tokenize(text)[1:]
    ids = phi.tokenize(text, parse_special=True)
    assert len(phi.score(ids)) == len(ids) - 1 < len(phi.tokenize(text)) - 1


def test_the_context_limits_a_score() -> None:
    with Phi.demo(n_ctx=16) as phi:
        assert len(phi.score(range(5, 21))) == 15
        with pytest.raises(ContextLengthError) as raised:
            phi.score(range(5, 22))
        assert (raised.value.prompt_tokens, raised.value.n_ctx) == (17, 16)


def test_candles_loop_computes_no_scores() -> None:
    with Phi.demo(engine="candle") as phi:
        for call in (phi.score, phi.perplexity):
            with pytest.raises(UnsupportedModelError, match="the logits of the last position only"):
                call(TEXT)


@pytest.fixture
def damaged(phi: Phi, tmp_path: Path) -> Iterator[Phi]:
    """The bundled model with NaN as the weights of its last norm."""
    data = bytearray(Path(phi.path).read_bytes())
    (count,) = struct.unpack_from("<Q", data, 8)
    first = re.search(rb"(token_embd|output|output_norm|blk\.0\.\w+)\.weight[\x01\x02]\0\0\0", data)
    assert first is not None
    at, norm = first.start() - 8, (0, 0)
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, at)
        name = data[at + 8 : at + 8 + length]
        (dims,) = struct.unpack_from("<I", data, at + 8 + length)
        *shape, _, offset = struct.unpack_from(f"<{dims}QIQ", data, at + 12 + length)
        at += 24 + length + 8 * dims
        if name == b"output_norm.weight":
            norm = offset, shape[0]
    begin = -(-at // 32) * 32 + norm[0]
    data[begin : begin + 4 * norm[1]] = struct.pack("<f", math.nan) * norm[1]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with Phi(path) as phi:
        yield phi


def test_damaged_weights_are_an_error(damaged: Phi) -> None:
    calls: list[Callable[[], object]] = [
        lambda: damaged.score(TEXT),
        lambda: damaged.perplexity(TEXT),
        lambda: damaged.generate(TEXT),
        lambda: list(damaged.map([TEXT])),
    ]
    for call in calls:
        with pytest.raises(InvalidModelError, match=r"NaN.*: the weights are damaged"):
            call()
    faults = list(damaged.map([TEXT, TEXT], return_exceptions=True))
    assert [type(fault) for fault in faults] == [InvalidModelError] * 2


WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("", {}, ValueError, r"the prompt has 0 tokens; score\(\) needs at least 2"),
    ([5], {}, ValueError, "the prompt has 1 token; "),
    ([], {}, ValueError, "empty list"),
    ([5, 6, 7], {"start": 0}, ValueError, "start must be at least 1, not 0"),
    ([5, 6, 7], {"start": 3}, ValueError, "start must be from 1 to 2, the index of the last token, not 3"),
    ([5, 6, 7], {"start": -1}, ValueError, "start must be at least 1, not -1"),
    ([5, 6, 7], {"start": 1.0}, TypeError, "start must be an int"),
    ([5, 6, 7], {"top_logprobs": 21}, ValueError, "top_logprobs must be from 0 to 20, not 21"),
    ([5, 6, 7], {"on_progress": 5}, TypeError, "on_progress must be a function"),
    ([5, 6, 7], {"temperature": 1}, TypeError, r"it is an option of stream\(\)"),
    ([5, 10**9], {}, ValueError, "outside the vocabulary"),
    ([5, -1], {}, ValueError, "outside the vocabulary"),
    (["a", "b"], {}, TypeError, "a list of prompts"),
    (b"ice", {}, TypeError, "decode it to str"),
    (5, {}, TypeError, "must be a str, messages or token ids"),
    ([{"role": "usr", "content": "Hi"}], {}, ValueError, "did you mean 'user'"),
    ("\ud800", {}, ValueError, "lone surrogate"),
]


@pytest.mark.parametrize(("prompt", "options", "error", "says"), WRONG)
def test_wrong_calls_of_score(
    phi: Phi, prompt: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    for model in (phi, FakePhi([])):
        with pytest.raises(error, match=says):
            model.score(prompt, **options)


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ("", {}, ValueError, "the text has 0 tokens, and a perplexity needs at least 2"),
        ("a", {}, ValueError, "the text has 1 token, "),
        ([5, 6], {}, TypeError, r"takes a str, not list; score\(\) takes messages and token ids"),
        ("ice hockey", {"stride": 0}, ValueError, "stride must be at least 1, not 0"),
        ("ice hockey", {"stride": 4096}, ValueError, r"stride must be less than n_ctx, \d+, not 4096"),
        ("ice hockey", {"stride": "1"}, TypeError, "stride must be an int"),
        ("ice hockey", {"strid": 1}, TypeError, "did you mean 'stride'"),
    ],
)
def test_wrong_calls_of_perplexity(
    phi: Phi, text: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    for model in (phi, FakePhi([])):
        with pytest.raises(error, match=says):
            model.perplexity(text, **options)


def test_progress_of_a_score(phi: Phi) -> None:
    seen: list[Progress] = []
    ids = [5] * 900
    phi.score(ids, on_progress=seen.append)
    assert seen[-1] == Progress("prefill", 899, 899, "tokens")  # nothing comes after the last one
    assert {p.phase for p in seen} <= {"wait", "prefill"}
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    enough = LookupError("enough")

    def stop(_: Progress) -> None:
        raise enough

    with pytest.raises(LookupError) as raised:
        phi.score(ids, on_progress=stop)
    assert raised.value is enough
    assert phi.generate(HAIKU, max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def test_a_score_waits_for_a_slot() -> None:
    with Phi.demo(max_concurrent=1) as phi:
        stream = phi.stream(HAIKU, seed=1, max_tokens=3, ignore_eos=True)
        next(stream)
        assert len(phi.score(TEXT)) == len(phi.tokenize(TEXT)) - 1
        assert len(stream.token_ids + list(stream)) >= 3


def test_ctrl_c(stopwatch: Stopwatch) -> None:
    script = """
import signal, threading, time
from candle_phi import Phi
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
phi = Phi.demo(kernel="portable", n_threads=1, max_concurrent=1)
text = "ice hockey " * 3000
for call in (lambda: [phi.score([5] * 1000) for _ in range(99)], lambda: phi.perplexity(text, stride=5)):
    at = []
    def interrupt():
        at.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)
    threading.Timer(0.3, interrupt).start()
    try:
        call()
        print("not interrupted")
    except KeyboardInterrupt:
        print(time.monotonic() - at[0])
print(phi.generate("Hi", max_tokens=2, ignore_eos=True).usage.completion_tokens)
"""
    *took, last = run_python(script).splitlines()
    assert last == "2"
    for seconds in took:
        stopwatch.check(float(seconds), 0.4)


def test_a_closed_model() -> None:
    phi = Phi.demo()
    phi.close()
    for model in (phi, closed_fake()):
        with pytest.raises(ClosedError):
            model.score(TEXT)
        with pytest.raises(ClosedError):
            model.perplexity(TEXT)


def closed_fake() -> FakePhi:
    with FakePhi([]) as phi:
        return phi


def test_a_perplexity_is_of_all_tokens_but_the_first(phi: Phi) -> None:
    for text in (TEXT, "ice hockey", "Ünïcödé 田中 \U0001f3d2"):
        scores = expected(phi, phi.tokenize(text))
        assert phi.perplexity(text) == pytest.approx(math.exp(-sum(scores) / len(scores)), rel=1e-6)
    assert phi.perplexity(TEXT) < phi.perplexity("skates One more a so box, team")


@pytest.mark.parametrize("stride", [None, 1, 8, 31])
def test_a_text_longer_than_the_context_is_scored_in_windows(phi: Phi, stride: int | None) -> None:
    text = " ".join([TEXT] * 4)
    with Phi.demo(n_ctx=32) as short:
        ids = short.tokenize(text)
        step, scores, scored = stride or 16, list[float](), 1
        for begin in itertools.count(0, step):
            window = ids[begin : begin + 32]
            scores += expected(short, window, scored - begin)
            scored = begin + len(window)
            if scored == len(ids):
                break
        assert len(scores) == len(ids) - 1
        found = short.perplexity(text, stride=stride)
        assert found == pytest.approx(math.exp(-sum(scores) / len(scores)), rel=1e-6)
        counts: list[int] = []
        assert perplexity_of(short._model, ids, stride, counts.append) == found
        assert counts[-1] == len(ids) - 1
    assert phi.perplexity(text) == pytest.approx(phi.perplexity(text, stride=5), rel=1e-9)  # one window holds it all


def test_windows_score_every_token_once_with_enough_before_it() -> None:
    for tokens, n_ctx in itertools.product(range(2, 40), range(2, 12)):
        for stride in range(1, n_ctx):
            scored: list[int] = []
            for begin, end, start in _windows(tokens, n_ctx, stride):
                assert end - begin <= n_ctx
                assert start >= (1 if begin == 0 else n_ctx - stride)
                scored += range(begin + start, end)
            assert scored == list(range(1, tokens))


def test_the_fake_is_certain_of_every_text() -> None:
    phi = FakePhi([])
    seen: list[Progress] = []
    first, second = phi.score("ice hockey is", top_logprobs=1, on_progress=seen.append)
    assert (first.text, first.logprob, first.top[0].text, second.text) == (" hockey", 0.0, " hockey", " is")
    assert seen == [Progress("prefill", 2, 2, "tokens")]
    assert phi.perplexity("ice hockey " * 5000) == 1.0  # longer than its context
    with pytest.raises(ContextLengthError):
        phi.score("ice hockey " * 5000)
    assert len(phi.score(QUESTION)) == len(phi.tokenize(QUESTION)) - 1
    assert phi.calls == []


def test_the_command(phi: Phi, tmp_path: Path) -> None:
    path = tmp_path / "text Ü.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # with a byte order mark
    tokens = len(phi.tokenize(TEXT))
    line = f"{phi.perplexity(TEXT):.4f} over {tokens - 1} tokens\n"
    assert run("perplexity", str(path), *DEMO).stdout.decode() == line
    assert run("perplexity", "-", *DEMO, input=TEXT.encode()).stdout.decode() == line
    assert run("perplexity", *DEMO, input=TEXT.encode()).stdout.decode() == line
    found = json.loads(run("perplexity", str(path), "--json", "--n-ctx=16", "--stride=4", *DEMO).stdout)
    with Phi.demo(n_ctx=16) as short:
        assert found == {
            "perplexity": short.perplexity(TEXT, stride=4),
            "scored_tokens": tokens - 1,
            "tokens": tokens,
            "n_ctx": 16,
            "model": phi.path,
        }


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["none.txt"], b"", "'none.txt' cannot be read: No such file or directory"),
        (["a.txt", "b.txt"], b"", "candle-phi perplexity takes one file"),
        (["-"], b"", "there is no text, stdin is empty"),
        ([], b"", "there is no text, stdin is empty: candle-phi perplexity FILE"),
        (["-"], b"\xff", "stdin is not UTF-8 text: byte 0xff at 0"),
        (["-"], b"a", "the text has 1 token, and a perplexity needs at least 2"),
        (["-", "--stride=0"], b"ice hockey", "--stride must be at least 1, not 0"),
        (["-", "--stride=x"], b"ice hockey", "--stride must be a whole number, not 'x'"),
        (["-", "--stride=1024"], b"ice hockey", "--stride must be less than n_ctx, 1024, not 1024"),
        (["-", "--temperature=0"], b"ice hockey", "candle-phi perplexity has no option --temperature"),
    ],
)
def test_mistakes_of_the_command(arguments: list[str], stdin: bytes, says: str) -> None:
    assert says in failed(run("perplexity", *arguments, *DEMO, input=stdin), 2)
