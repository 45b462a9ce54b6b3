"""Streams that share the passes of a model: each has the text, ids and log probabilities, to the last bit, that it has
alone.

A case is drawn from a number, which a failure names. Its streams are read by threads, tasks of an event loop, `map` and
`amap`, beside `score` and `logits`. They arrive at different moments. Some are cancelled, dropped or timed out. What to
expect is the outcome of the same calls, one at a time, on a model whose passes have one row.

    TOGETHER_CASES    cases of each model, kernel and KV type (default: 1)
    TOGETHER_FIRST    the number of the first case (default: 0)
    TOGETHER_MODEL    the path of a model for `test_a_model_of_your_own`
    TOGETHER_TOKENS   its longest answer in tokens (default: 40)
    TOGETHER_PROMPT   its longest prompt in tokens (default: 300)
"""

import asyncio
import contextlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from candle_phi import Chunk, Phi, Result, TokenLogprob, _engine
from conftest import HANG

GOLDEN = Path(__file__).resolve().parent / "golden"
FILES = ("plain", "window", "longrope", "partial_tied_longrope", "gqa", "k_official", "k_low", "demo")
"""Attention to all positions, a window of 8, LongRoPE past 20 positions and past 16, groups of heads, k-quants."""
KERNELS: list[str] = _engine.doctor()["kernels"]  # type: ignore[assignment]  # a mapping of mixed values
KV_CACHES = ("f16", "f32", "q8_0")
PAGE = 128
"""Positions that share a part of the KV cache."""
TEXTS: tuple[Any, ...] = (
    "Write a haiku about ice hockey",
    "Hi",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A haiku, 氷上の, about ❄️?"}],
    [{"role": "user", "content": "Write a haiku"}, {"role": "assistant", "content": "The puck"}],
)
CASES = int(os.environ.get("TOGETHER_CASES", "1"))
FIRST = int(os.environ.get("TOGETHER_FIRST", "0"))
MODEL = os.environ.get("TOGETHER_MODEL")
WAIT = 60 * HANG if MODEL else HANG
"""Seconds after which a wait counts as a hang: a large model takes minutes for a case."""


@dataclass(frozen=True)
class Limits:
    """The sizes of a case."""

    prompt: int
    tokens: int
    borders: tuple[int, ...] = (PAGE,)
    """Lengths at which the computation changes. Many prompts end near one of them."""


LIMITS = {
    "window": Limits(500, 40, (8, PAGE, PAGE + 8)),
    "longrope": Limits(300, 40, (20, PAGE)),
    "partial_tied_longrope": Limits(50, 40, (16,)),
    "k_official": Limits(150, 30),
    "k_low": Limits(150, 30),
    "demo": Limits(250, 30),
}
OTHERS = Limits(220, 40)


@dataclass
class Call:
    """A call of a case, and what was read of it."""

    kind: str
    """`generate`, `stream`, `agenerate`, `astream`, `map`, `amap`, `score` or `logits`."""
    prompts: list[Any]
    options: dict[str, Any]
    arrival: int
    """It begins once readers have read this number of pieces, or when all others wait."""
    end: str = "whole"
    """How its reader leaves: `cancel`, `close`, `with`, `drop`, `another thread` or `timeout`; `whole`: it stays."""
    pieces: int = 0
    """The reader leaves after this number of pieces, another thread at this number of pieces of all readers."""
    timeout: float | None = None
    pauses: bool = False
    """The reader waits between pieces until others have read."""
    found: list[tuple[int, Any]] = field(default_factory=list)
    """Index of a prompt and its outcome."""


def draw_prompt(draw: random.Random, n_vocab: int, limits: Limits) -> Any:
    if draw.random() < 0.25:
        return draw.choice(TEXTS)
    length = draw.choice(
        [1, draw.randint(1, 12), draw.randint(1, limits.prompt), draw.choice(limits.borders) + draw.randint(-9, 2)]
    )
    return [draw.randrange(n_vocab) for _ in range(max(1, min(length, limits.prompt)))]


def draw_options(draw: random.Random, phi: Phi, limits: Limits) -> dict[str, Any]:
    logprobs = draw.random() < 0.6
    bias = {draw.randrange(phi.n_vocab): draw.uniform(-100, 5) for _ in range(draw.randint(1, 5))}
    bias[draw.choice(phi.eos_token_ids)] = draw.uniform(-5, 3)
    return {
        "seed": draw.randrange(2**32),
        "max_tokens": draw.randint(1, limits.tokens),
        "temperature": draw.choice([0.0, 0.0, 0.5, 1.0, 1.7]),
        "top_k": draw.choice([None, 1, 5, 40]),
        "top_p": draw.choice([None, 0.3, 0.9]),
        "min_p": draw.choice([None, 0.05]),
        "repeat_penalty": draw.choice([None, 1.3]),
        "repeat_last_n": draw.choice([-1, 0, 8, 64]),
        "presence_penalty": draw.choice([0.0, 0.7]),
        "frequency_penalty": draw.choice([0.0, -0.4]),
        "logit_bias": draw.choice([None, bias]),
        "ignore_eos": draw.random() < 0.3,
        "logprobs": logprobs,
        "top_logprobs": draw.choice([0, 1, 20]) if logprobs else 0,
    }


def draw_stop(draw: random.Random, text: str) -> list[str]:
    """Strings that the text has, and one that it does not have."""
    start = draw.randrange(len(text))
    return [text[start : start + draw.randint(1, 3)], "never written"]


class Alone:
    """A model that computes one call after the other, in passes of one row."""

    def __init__(self, phi: Phi) -> None:
        self.phi = phi

    def outcome(self, call: Call, index: int) -> Any:
        prompt = call.prompts[index]
        match call.kind:
            case "score":
                return described(self.phi.score(prompt, **call.options))
            case "logits":
                return bytes(self.phi.logits(prompt, **call.options))
            case _:
                return described(self.phi.generate(prompt, **call.options))


def draw_call(draw: random.Random, alone: Alone, limits: Limits, slots: int | None) -> Call:
    phi = alone.phi
    kinds = ["generate", "stream", "stream", "stream", "agenerate", "astream", "map", "amap", "score", "logits"]
    kind = draw.choice(kinds)
    count = draw.randint(1, 4) if kind in ("map", "amap") else 1
    prompts = [draw_prompt(draw, phi.n_vocab, limits) for _ in range(count)]
    call = Call(kind, prompts, {}, draw.choice([0, 0, draw.randint(0, 60)]))
    if kind == "logits":
        call.prompts = [phi.tokenize(prompt) if isinstance(prompt, (str, dict)) else prompt for prompt in prompts]
        call.prompts = [phi.tokenize(p) if p and not isinstance(p[0], int) else p for p in call.prompts]
        call.options = {"every_position": draw.random() < 0.5}
    elif kind == "score":
        call.prompts = [p if not isinstance(p, list) or len(p) > 1 else [*p, 5] for p in prompts]
        call.options = {"top_logprobs": draw.choice([0, 3])}
    else:
        call.options = draw_options(draw, phi, limits)
        if draw.random() < 0.4 and (text := str(phi.generate(prompts[0], **call.options))):
            call.options["stop"] = draw_stop(draw, text)
    if kind == "stream" and draw.random() < 0.5:
        call.end = draw.choice(["cancel", "close", "with", "drop", "another thread", "another thread", "timeout"])
        call.pieces = draw.randint(0, 80 if call.end == "another thread" else 10)
    if kind in ("astream", "map", "amap") and draw.random() < 0.25:
        call.end, call.pieces = "close", draw.randint(0, count if kind != "astream" else 10)
    if call.end == "timeout" or (kind in ("generate", "agenerate") and draw.random() < 0.1):
        call.timeout = draw.choice([0.0005, 0.005, draw.uniform(0, 0.1)])
    # A reader that waits for others must not hold a slot that they wait for.
    call.pauses = kind in ("stream", "astream") and slots is None and draw.random() < 0.3
    return call


def described(outcome: Any) -> Any:
    """The values of a result or of a score that must be equal, with every bit of its numbers."""
    if isinstance(outcome, Result):
        usage = outcome.usage
        return (
            str(outcome),
            outcome.token_ids,
            entries(outcome.logprobs),
            outcome.finish_reason,
            (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
            outcome.seed,
        )
    return entries(outcome)


def entries(logprobs: list[TokenLogprob] | None) -> Any:
    def entry(each: TokenLogprob) -> Any:
        top = [(other.token_id, other.logprob.hex()) for other in each.top]
        return each.token_id, each.text, each.bytes, each.logprob.hex(), top

    return None if logprobs is None else [entry(each) for each in logprobs]


class Pieces:
    """The number of pieces that all readers have read. A thread may wait for a number of them."""

    def __init__(self, readers: int) -> None:
        self._changed = threading.Condition()
        self._read = 0
        self._busy = readers  # those that do not wait here

    def add(self) -> int:
        with self._changed:
            self._read += 1
            self._changed.notify_all()
            return self._read

    def wait(self, number: int) -> None:
        """Waits until this number is read. When all readers wait, one of them goes on."""
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._read >= number or self._busy == 0, WAIT), "hangs"
            self._busy += 1

    def enter(self) -> None:
        with self._changed:
            self._busy += 1

    def leave(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()


class Case:
    """The calls of one case, on one model."""

    def __init__(self, phi: Phi, calls: list[Call]) -> None:
        self._phi = phi
        self._calls = calls
        self._pieces = Pieces(len(calls))
        self._others: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._thread, args=(self._read, c)) for c in self._calls if not awaits(c)]
        threads.append(threading.Thread(target=self._loop))
        for thread in threads:
            thread.start()
        for thread in itertools.chain(threads, self._others):
            thread.join(2 * WAIT)
            assert not thread.is_alive(), "hangs"
        for error in self._errors:
            raise error

    def _thread(self, function: Callable[..., None], *args: object) -> None:
        try:
            function(*args)
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._pieces.leave()

    def _read(self, call: Call) -> None:
        self._pieces.wait(call.arrival)
        match call.kind:
            case "score":
                call.found.append((0, described(self._phi.score(call.prompts[0], **call.options))))
            case "logits":
                call.found.append((0, bytes(self._phi.logits(call.prompts[0], **call.options))))
            case "generate":
                result = self._phi.generate(call.prompts[0], timeout=call.timeout, **call.options)
                call.found.append((0, result))
            case "map":
                results = self._phi.map(call.prompts, ordered=call.pieces % 2 == 0, **call.options)
                wanted = call.pieces if call.end == "close" else None
                for result in itertools.islice(results, wanted):
                    call.found.append((result.prompt_index or 0, result))
                    self._pieces.add()
                results.close()
            case _:
                self._stream(call)
        self._pieces.add()

    def _stream(self, call: Call) -> None:
        stream = self._phi.stream(call.prompts[0], timeout=call.timeout, **call.options)
        reading = Reading(call, self._pieces)
        if call.end == "another thread":
            other = threading.Thread(target=self._thread, args=(self._cancel, call.pieces, stream))
            self._others.append(other)
            self._pieces.enter()
            other.start()
        with stream if call.end == "with" else contextlib.nullcontext():
            for chunk in stream if call.end in ("whole", "another thread", "timeout") else reading.some(stream):
                reading.take(chunk)
                if call.pauses:
                    self._pieces.wait(self._pieces.add() + 1)
        if call.end in ("cancel", "close"):
            getattr(stream, call.end)()
            assert next(stream, None) is None
        reading.end(stream)

    def _cancel(self, pieces: int, stream: Any) -> None:
        self._pieces.wait(pieces)
        stream.cancel()

    def _loop(self) -> None:
        async def read_all() -> None:
            async with asyncio.TaskGroup() as tasks:
                for call in filter(awaits, self._calls):
                    tasks.create_task(self._task(call))

        try:
            asyncio.run(read_all())
        except BaseException as error:
            self._errors.append(error)

    async def _task(self, call: Call) -> None:
        try:
            await self._await(call)
        finally:
            self._pieces.leave()

    async def _await(self, call: Call) -> None:
        await asyncio.to_thread(self._pieces.wait, call.arrival)
        if call.kind == "agenerate":
            result = await self._phi.agenerate(call.prompts[0], timeout=call.timeout, **call.options)
            call.found.append((0, result))
        elif call.kind == "amap":
            results = self._phi.amap(call.prompts, ordered=call.pieces % 2 == 0, **call.options)
            async with contextlib.aclosing(results):
                while call.end == "whole" or len(call.found) < call.pieces:
                    try:
                        result = await anext(results)
                    except StopAsyncIteration:
                        break
                    call.found.append((result.prompt_index or 0, result))
                    self._pieces.add()
        else:
            reading = Reading(call, self._pieces)
            async with contextlib.aclosing(self._phi.astream(call.prompts[0], **call.options)) as stream:
                while call.end == "whole" or len(reading.chunks) < call.pieces:
                    chunk = await anext(stream, None)
                    if chunk is None:
                        break
                    reading.take(chunk)
                    if call.pauses:
                        await asyncio.to_thread(self._pieces.wait, self._pieces.add() + 1)
            reading.end(stream)
        self._pieces.add()


class Reading:
    """The chunks of a stream."""

    def __init__(self, call: Call, pieces: Pieces) -> None:
        self.chunks: list[Chunk] = []
        self._call = call
        self._pieces = pieces

    def some(self, stream: Any) -> Iterator[Chunk]:
        """As many as the reader takes before it leaves."""
        yield from itertools.islice(stream, self._call.pieces)

    def take(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self._pieces.add()

    def end(self, stream: Any) -> None:
        """Records the result, or the part of it that was read."""
        assert "".join(self.chunks) == stream.text
        if stream.finish_reason is None:
            assert self._call.end in ("drop", "with", "cancel", "close"), "its reader left"
        self._call.found.append((0, stream._result()))


def awaits(call: Call) -> bool:
    return call.kind in ("agenerate", "astream", "amap")


def check(case: int, where: str, alone: Alone, open_model: Callable[..., Phi], limits: Limits) -> int:
    """Draws a case, runs it, and compares each of its outcomes. Returns the number of outcomes."""
    draw = random.Random(f"{case}, {where}")
    slots = draw.choice([None, None, None, draw.randint(1, 4)])
    max_batch = draw.choice([1, 2, 8, draw.randint(3, 16), 16])
    calls = [draw_call(draw, alone, limits, slots) for _ in range(draw.randint(2, 12))]
    with open_model(max_batch=max_batch, max_concurrent=slots, n_threads=draw.randint(1, 2)) as phi:
        Case(phi, calls).run()
    for number, call in enumerate(calls):
        if call.end == "whole":
            assert sorted(index for index, _ in call.found) == list(range(len(call.prompts)))
        for index, found in call.found:
            expected = alone.outcome(call, index)
            complaint = difference(found, expected)
            assert complaint is None, (
                f"{where}, TOGETHER_FIRST={case}, max_batch {max_batch}, max_concurrent {slots}, call {number} of "
                f"{len(calls)}, {call.kind}, {call.end}: {complaint}\nprompt {call.prompts[index]}\n{call.options}"
            )
    return sum(len(call.found) for call in calls)


def difference(found: Any, expected: Any) -> str | None:
    """How an outcome differs from that of the call alone; None: it does not."""
    if not isinstance(found, Result):
        return None if found == expected else f"{found!r:.500}, alone {expected!r:.500}"
    values = described(found)
    if found.finish_reason not in ("stop", "length"):  # a part: of the text, of the ids, of the log probabilities
        for part, whole in zip(values[:3], expected[:3], strict=True):
            if part is not None and part != whole[: len(part)]:
                return f"{part!r:.500} does not begin {whole!r:.500}"
        return None
    names = ("text", "ids", "logprobs", "finish_reason", "usage", "seed")
    for name, value, other in zip(names, values, expected, strict=True):
        if value != other:
            return f"{name} {value!r:.500}, alone {other!r:.500}"
    return None


def run(name: str, path: Path | None, kernel: str, kv_cache: Any, limits: Limits) -> None:
    def open_model(**options: Any) -> Phi:
        given = {"kernel": kernel, "kv_cache": kv_cache, **options}
        return Phi.demo(**given) if path is None else Phi(path, **given)

    with open_model(max_batch=1) as phi:
        alone, where = Alone(phi), f"{name}, {kernel}, {kv_cache}"
        equal = sum(check(case, where, alone, open_model, limits) for case in range(FIRST, FIRST + CASES))
    print(f"{where}: {CASES} cases, {equal} equal outcomes")


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("file", FILES)
def test_calls_together_are_those_of_each_alone(file: str, kernel: str, kv_cache: str) -> None:
    path = None if file == "demo" else GOLDEN / f"{file}.gguf"
    run(file, path, kernel, kv_cache, LIMITS.get(file, OTHERS))


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_of_your_own(kernel: str, kv_cache: str) -> None:
    if not MODEL:
        pytest.skip("TOGETHER_MODEL names no file")
    limits = Limits(int(os.environ.get("TOGETHER_PROMPT", "300")), int(os.environ.get("TOGETHER_TOKENS", "40")))
    run(Path(MODEL).name, Path(MODEL), kernel, kv_cache, limits)
