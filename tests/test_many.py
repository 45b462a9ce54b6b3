"""`map` and `amap`: many prompts at once, with the texts that each would have alone."""

import asyncio
import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest

from candle_phi import ClosedError, ContextLengthError, Phi, Result
from candle_phi.options import OptionValueError
from candle_phi.testing import FakePhi
from conftest import HAIKU, HANG, Stopwatch, run_python, wait_until

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is icing?"}]
PROMPTS: list[Any] = [HAIKU, MESSAGES, [299, 312], "What is a power play?", (5, 6, 7), "Hi", "ice " * 200]
LONG = [5] * 1000
"""A prompt that takes the slow model about a second."""


@pytest.fixture(scope="module")
def slow() -> Iterator[Phi]:
    with Phi.demo(kernel="portable", n_threads=1, prefix_cache=0) as phi:
        yield phi


def mapped(phi: Phi, prompts: Any, **options: Any) -> list[Any]:
    """The results of `map`, which are the results of `amap` too. Both end within a minute."""
    found = list(phi.map(prompts, **options))
    again = asyncio.run(asyncio.wait_for(collect(phi, prompts, **options), HANG))
    assert sorted(map(described, again)) == sorted(map(described, found))
    return found


def described(outcome: Any) -> tuple[int, str, str]:
    return outcome.prompt_index, str(outcome), type(outcome).__name__


async def collect(phi: Phi, prompts: Any, **options: Any) -> list[Any]:
    return [outcome async for outcome in phi.amap(prompts, **options)]


class Prompts:
    """An iterator that counts the prompts that were drawn."""

    def __init__(self, prompts: Any) -> None:
        self._prompts = iter(prompts)
        self.drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        prompt = next(self._prompts)
        self.drawn += 1
        return prompt


@pytest.mark.parametrize("max_pending", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("ordered", [True, False])
def test_texts_are_those_of_each_prompt_alone(phi: Phi, ordered: bool, max_pending: int | None) -> None:
    options: dict[str, Any] = {"seed": 5, "max_tokens": 30, "logprobs": True, "stop": ["\n\n"]}
    expected = [phi.generate(prompt, **options) for prompt in PROMPTS]
    found = mapped(phi, PROMPTS, ordered=ordered, max_pending=max_pending, **options)
    if ordered:
        assert [result.prompt_index for result in found] == list(range(len(PROMPTS)))
    found.sort(key=lambda result: result.prompt_index)
    for result, alone in zip(found, expected, strict=True):
        assert type(result) is Result
        assert (result.text, result.token_ids, result.logprobs) == (alone.text, alone.token_ids, alone.logprobs)
        assert (result.finish_reason, result.seed) == (alone.finish_reason, 5)
        assert result.usage.total_tokens == alone.usage.total_tokens
        assert result.system_fingerprint == alone.system_fingerprint
        assert alone.prompt_index is None


@pytest.mark.parametrize("options", [{"max_concurrent": 1}, {"max_concurrent": 3}, {"max_batch": 1}, {"max_batch": 16}])
def test_slots_and_passes_change_no_text(phi: Phi, options: dict[str, Any]) -> None:
    expected = [phi.generate(HAIKU, seed=1)] * 20
    with Phi.demo(**options) as other:
        assert mapped(other, [HAIKU] * 20, seed=1) == expected


def test_candles_loop_takes_one_prompt_after_the_other() -> None:
    with Phi.demo(engine="candle") as phi:
        expected = [phi.generate(prompt, seed=1, max_tokens=5) for prompt in PROMPTS[:5]]
        assert mapped(phi, PROMPTS[:5], seed=1, max_tokens=5) == expected


def test_every_prompt_draws_a_seed_of_its_own(phi: Phi) -> None:
    found = list(phi.map([HAIKU] * 5))
    assert len({result.seed for result in found}) == 5
    assert [phi.generate(HAIKU, seed=result.seed) for result in found] == found


def test_no_prompts_no_results(phi: Phi) -> None:
    assert mapped(phi, []) == []
    results = phi.map(iter(()))
    assert [next(results, "end"), next(results, "end")] == ["end", "end"]


@pytest.mark.parametrize(("given", "most"), [({"max_pending": 3}, 3), ({"max_pending": 1}, 1), ({}, 6)])
def test_prompts_are_drawn_as_results_are_read(given: dict[str, Any], most: int) -> None:
    with Phi.demo(max_batch=3) as phi:
        prompts = Prompts(itertools.repeat(HAIKU))
        results = phi.map(prompts, seed=1, max_tokens=3, **given)
        assert prompts.drawn == 0
        for n in range(20):
            next(results)
            assert n < prompts.drawn <= n + most
        results.close()
        assert list(results) == []

        async def check() -> None:
            prompts = Prompts(itertools.repeat(HAIKU))
            results = phi.amap(prompts, seed=1, max_tokens=3, **given)
            for n in range(20):
                assert prompts.drawn <= n + most
                await anext(results)
            await results.aclose()
            assert [result async for result in results] == []

        asyncio.run(check())


def test_texts_are_computed_while_the_caller_is_busy() -> None:
    with Phi.demo(max_concurrent=1) as phi:
        expected = phi.generate(HAIKU, seed=1)
        results = phi.map([HAIKU] * 4, seed=1)
        first = next(results)
        assert phi.generate(HAIKU, seed=1) == expected  # a BusyError if a text waited for its reader
        assert [first, *results] == [expected] * 4


def test_results_come_as_they_are_complete() -> None:
    phi = FakePhi(["one two three four five six", "seven"] * 2, delay=0.05)
    assert [result.prompt_index for result in phi.map(["a", "b"])] == [0, 1]
    assert [result.prompt_index for result in phi.map(["a", "b"], ordered=False)] == [1, 0]
    phi = FakePhi(["one two three four five six", "seven"], delay=0.05)
    found = asyncio.run(collect(phi, ["a", "b"], ordered=False))
    assert [(result.prompt_index, result) for result in found] == [(1, "seven"), (0, "one two three four five six")]


BAD: list[tuple[Any, type[Exception], str]] = [
    (5, TypeError, "must be a str, messages or token ids, not int"),
    ([], ValueError, "empty list"),
    ({"role": "user", "content": "Hi"}, TypeError, "a single message"),
    ([{"role": "usr", "content": "Hi"}], ValueError, "did you mean 'user'"),
    ([10**9], ValueError, "outside the vocabulary"),
    ("\ud800", ValueError, "lone surrogate"),
    ([5] * 5000, ContextLengthError, "5000 tokens"),
]


@pytest.mark.parametrize(("prompt", "error", "says"), BAD)
def test_an_exception_comes_at_its_place(phi: Phi, prompt: Any, error: type[Exception], says: str) -> None:
    prompts = [HAIKU, HAIKU, prompt, HAIKU]
    expected = phi.generate(HAIKU, seed=1)
    results = phi.map(prompts, seed=1)
    assert [next(results), next(results)] == [expected] * 2
    with pytest.raises(error, match=says) as raised:
        next(results)
    assert vars(raised.value)["prompt_index"] == 2
    assert raised.value.__notes__ == ["raised by prompts[2]"]
    assert list(results) == []

    found = mapped(phi, prompts, seed=1, return_exceptions=True)
    assert [found[0], found[1], found[3]] == [expected] * 3
    assert type(found[2]) is error
    assert [outcome.prompt_index for outcome in found[2:]] == [2, 3]
    unordered = mapped(phi, prompts, seed=1, return_exceptions=True, ordered=False)
    (fault,) = [outcome for outcome in unordered if not isinstance(outcome, Result)]
    assert (type(fault), vars(fault)["prompt_index"]) == (error, 2)

    async def check() -> None:
        results = phi.amap(prompts, seed=1)
        assert [await anext(results), await anext(results)] == [expected] * 2
        with pytest.raises(error, match=says):
            await anext(results)
        assert [result async for result in results] == []

    asyncio.run(check())


def test_an_exception_while_generating() -> None:
    def replies() -> FakePhi:
        return FakePhi(["one", ["half a", MemoryError("no more ice")], "three"])

    results = replies().map(["a", "b", "c"])
    assert next(results) == "one"
    with pytest.raises(MemoryError, match="no more ice"):
        next(results)
    outcomes = list(replies().map(["a", "b", "c"], return_exceptions=True))
    assert [str(outcome) for outcome in outcomes] == ["one", "no more ice", "three"]
    assert [getattr(outcome, "prompt_index", None) for outcome in outcomes] == [0, 1, 2]


def test_an_exception_ends_what_runs() -> None:
    with Phi.demo(max_concurrent=2, kernel="portable", n_threads=1) as phi:
        prompts: list[Any] = [5, *[LONG] * 20]
        results = phi.map(prompts[::-1], max_tokens=500, ignore_eos=True, ordered=False, max_pending=21)
        with pytest.raises(TypeError):
            next(results)
        assert phi.generate("Hi", max_tokens=1, ignore_eos=True, timeout=HANG).finish_reason == "length"


def test_no_prompt_is_drawn_after_a_bad_one(phi: Phi) -> None:
    prompts = Prompts([HAIKU, 5, HAIKU, HAIKU])
    with pytest.raises(TypeError):
        list(phi.map(prompts))
    assert prompts.drawn == 2
    prompts = Prompts([HAIKU, 5, HAIKU, HAIKU])
    with pytest.raises(TypeError):
        asyncio.run(collect(phi, prompts))
    assert prompts.drawn == 2


def test_an_exception_of_the_iterator_comes_after_the_results_before_it(phi: Phi) -> None:
    def prompts() -> Iterator[str]:
        yield HAIKU
        yield HAIKU
        raise LookupError("no more prompts")

    async def later() -> AsyncIterator[str]:
        for prompt in prompts():
            yield prompt

    for options in ({}, {"ordered": False}, {"return_exceptions": True}):
        results: Iterator[Any] = phi.map(prompts(), seed=1, **options)  # type: ignore[call-overload]  # a mixed mapping
        assert next(results) == next(results) == phi.generate(HAIKU, seed=1)
        with pytest.raises(LookupError, match="no more prompts"):
            next(results)
        assert list(results) == []

        async def check(options: Any) -> None:
            for source in (prompts(), later()):
                results = phi.amap(source, seed=1, **options)
                assert await anext(results) == await anext(results)
                with pytest.raises(LookupError, match="no more prompts"):
                    await anext(results)
                assert [result async for result in results] == []

        asyncio.run(check(options))


@pytest.mark.parametrize("method", ["map", "amap"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ordered": 1}, "ordered must be True or False"),
        ({"return_exceptions": None}, "return_exceptions must be True or False"),
        ({"max_pending": 0}, "max_pending must be at least 1, not 0"),
        ({"max_pending": 1.0}, "max_pending must be an int"),
        ({"temperature": -1}, "temperature must be"),
        ({"logit_bias": {10**6: 1}}, "outside the vocabulary"),
        ({"top_logprobs": 3}, "needs logprobs=True"),
        ({"add_bos": True}, "needs raw=True"),
        ({"max_new_tokens": 3}, "use max_tokens"),
        ({"max_pendin": 3}, "unknown option 'max_pendin'"),
        ({"start": 3}, r"it is an option of score\(\)"),
        ({"on_progress": None}, "has no option 'on_progress'"),
    ],
)
def test_a_wrong_option_is_refused_before_a_prompt_is_drawn(
    phi: Phi, method: str, options: dict[str, Any], says: str
) -> None:
    prompts = Prompts([HAIKU])
    with pytest.raises((TypeError, ValueError), match=says):
        getattr(phi, method)(prompts, **options)
    assert prompts.drawn == 0


def test_max_batch_is_from_1_to_16() -> None:
    with pytest.raises(OptionValueError, match="max_batch must be from 1 to 16, not 17") as raised:
        Phi.demo(max_batch=17)
    assert raised.value.name == "max_batch"


def test_a_closed_model() -> None:
    phi = Phi.demo()
    results = phi.map([HAIKU] * 40, return_exceptions=True, max_pending=3)
    next(results)
    phi.close()
    with pytest.raises(ClosedError):
        list(results)  # not 39 exceptions
    for call in (phi.map, phi.amap):
        with pytest.raises(ClosedError):
            call([HAIKU])


def test_timeouts_count_from_the_start_of_each_prompt(slow: Phi) -> None:
    found = mapped(slow, [LONG, LONG], timeout=0.05)
    assert [(result, result.finish_reason) for result in found] == [("", "timeout")] * 2
    found = mapped(slow, [HAIKU, HAIKU], seed=1, timeout=HANG)
    assert [result.finish_reason for result in found] == ["stop"] * 2
    whole = slow.generate(HAIKU, seed=1, ignore_eos=True, max_tokens=1)
    assert whole.timings.time_to_first_token is not None
    enough = max(0.3, 10 * whole.timings.time_to_first_token)  # for some text even on a busy machine
    (cut,) = slow.map([HAIKU], seed=1, ignore_eos=True, timeout=enough)
    assert cut.finish_reason in ("timeout", "length")
    assert cut.startswith(whole)
    assert whole
    with Phi.demo(kernel="portable", max_concurrent=1) as phi:
        holder = phi.stream(HAIKU, ignore_eos=True)
        next(holder)
        assert [result.finish_reason for result in mapped(phi, ["Hi"] * 3, timeout=0.05)] == ["timeout"] * 3


def test_leaving_the_results_ends_what_runs(stopwatch: Stopwatch) -> None:
    def leave(phi: Phi, way: str) -> None:
        results = phi.map(itertools.chain(["Hi"], itertools.repeat(LONG)), max_tokens=1, ignore_eos=True)
        next(results)
        if way == "close":
            results.close()
        elif way == "with":
            with results:
                pass
        elif way == "closing":
            with closing(results):
                pass
        del results

    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        for way in ("close", "with", "closing", "drop"):
            leave(phi, way)
            begin = time.monotonic()
            assert phi.generate("Hi", max_tokens=1, ignore_eos=True)
            stopwatch.check(time.monotonic() - begin, 1.5)  # the pending prompts would take 16 s


def test_closing_from_another_thread_ends_the_reader(slow: Phi, stopwatch: Stopwatch) -> None:
    results = slow.map(itertools.repeat(LONG))
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(results))
    reader.start()
    wait_until(lambda: len(results._batch.running) == 16)
    begin = time.monotonic()
    results.close()
    reader.join(HANG)
    assert not reader.is_alive()
    stopwatch.check(time.monotonic() - begin, 0.5)
    assert "cancelled" not in [result.finish_reason for result in found]


def test_two_readers_are_one_too_many(slow: Phi) -> None:
    results = slow.map([LONG])
    reader = threading.Thread(target=lambda: list(results))
    reader.start()
    wait_until(lambda: results._batch.running)
    with pytest.raises(ValueError, match="are being read already"):
        next(results)
    results.close()
    reader.join(HANG)

    def prompts() -> Iterator[Any]:
        yield next(itself)

    itself = slow.map(prompts())
    with pytest.raises(ValueError, match="are being read already"):
        next(itself)

    async def check() -> None:
        results = slow.amap([LONG])
        reader = asyncio.create_task(anext(results))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="are being read already"):
            await anext(results)
        results.cancel()
        with pytest.raises(StopAsyncIteration):
            await reader

    asyncio.run(check())


@pytest.mark.skipif(os.name != "posix", reason="on Windows a thread cannot interrupt a loop that waits")
def test_ctrl_c(stopwatch: Stopwatch) -> None:
    script = """
import asyncio, itertools, os, signal, threading, time
from candle_phi import Phi
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
phi = Phi.demo(kernel="portable", n_threads=1, max_concurrent=1)
async def read():
    async for _ in phi.amap(itertools.repeat([5] * 1000)): pass
for call in (lambda: list(phi.map(itertools.repeat([5] * 1000))), lambda: asyncio.run(read())):
    at = []
    def interrupt():
        at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
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
    assert len(took) == 2
    for seconds in took:
        stopwatch.check(float(seconds), 0.4)


def test_a_slow_iterator_delays_a_result_by_one_prompt(phi: Phi) -> None:
    """As lines that are typed, or messages of a queue."""
    seen: list[Result] = []

    def prompts() -> Iterator[str]:
        for n in range(10):
            wait_until(lambda n=n: len(seen) >= n - 1)  # type: ignore[misc]  # a default is not a parameter
            if n:
                time.sleep(0.05)
            yield "Hi"

    for result in phi.map(prompts(), max_tokens=1, ignore_eos=True):
        seen.append(result)
    assert len(seen) == 10


def test_a_slow_asynchronous_iterator_delays_no_result(phi: Phi) -> None:
    async def check() -> None:
        got = asyncio.Event()

        async def prompts() -> AsyncIterator[str]:
            for _ in range(5):
                yield "Hi"
                async with asyncio.timeout(HANG):  # the iterator is drawn by one task
                    await got.wait()
                got.clear()

        n = 0
        async with aclosing(phi.amap(prompts(), max_tokens=1, ignore_eos=True)) as results:
            async for result in results:
                assert result.prompt_index == n
                n += 1
                got.set()
        assert n == 5

    asyncio.run(check())


def test_a_task_takes_no_thread_and_blocks_no_loop(phi: Phi) -> None:
    async def check() -> None:
        await phi.agenerate("Hi", max_tokens=1)  # the one thread that wakes loops
        before = threading.active_count()
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        task = asyncio.create_task(others())
        async for result in phi.amap([HAIKU] * 30, seed=1):
            assert threading.active_count() == before
            assert turns > result.prompt_index  # type: ignore[operator]  # it is not None here
        task.cancel()

    asyncio.run(check())


def test_cancelling_the_task_ends_what_runs(stopwatch: Stopwatch) -> None:
    async def check(phi: Phi, wait: bool) -> None:
        results = phi.amap(itertools.chain(["Hi"], itertools.repeat(LONG)), max_tokens=1, ignore_eos=True)

        async def read() -> None:
            async for _ in results:
                if not wait:
                    await asyncio.sleep(HANG)  # a stalled send

        task = asyncio.create_task(read())
        while results._drawing is None or results._batch.has_room():
            await asyncio.sleep(0.001)
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert await phi.agenerate("Hi", max_tokens=1, ignore_eos=True)
        stopwatch.check(time.monotonic() - begin, 1.5)  # the pending prompts would take 16 s
        assert [result async for result in results] == []

    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        for wait in (True, False):
            asyncio.run(check(phi, wait))


def test_closing_ends_the_iterator_of_prompts(phi: Phi) -> None:
    async def check() -> None:
        ended, waiting = [], asyncio.Event()

        async def prompts() -> AsyncIterator[str]:
            try:
                yield "Hi"
                waiting.set()
                await asyncio.sleep(HANG)
            finally:
                ended.append(True)

        async with phi.amap(prompts(), max_tokens=1, ignore_eos=True) as results:
            await anext(results)
            await waiting.wait()
        assert ended == [True]

    asyncio.run(check())


def test_dropping_the_results_of_a_loop_ends_what_runs(stopwatch: Stopwatch) -> None:
    async def check(phi: Phi) -> None:
        async for _ in phi.amap(itertools.chain(["Hi"], itertools.repeat(LONG)), max_tokens=1, ignore_eos=True):
            break
        begin = time.monotonic()
        assert await phi.agenerate("Hi", max_tokens=1, ignore_eos=True)
        stopwatch.check(time.monotonic() - begin, 1.5)  # the pending prompts would take 16 s
        assert len(asyncio.all_tasks()) == 1

    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        asyncio.run(check(phi))


def test_a_task_without_a_reference_finishes(slow: Phi) -> None:
    """The loop keeps it alive, as it keeps a task that waits for a socket."""
    found: list[Result] = []

    async def generate() -> None:
        found.extend([result async for result in slow.amap([[5] * 300] * 2, max_tokens=2, ignore_eos=True)])

    async def check() -> None:
        asyncio.ensure_future(generate())  # noqa: RUF006  # the point of it
        while not found:
            gc.collect()
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(check(), HANG))
    assert [result.finish_reason for result in found] == ["length"] * 2


def test_dropped_results_hold_nothing(phi: Phi) -> None:
    """Without a garbage collection: the streams of what was pending end with the results."""
    gc.collect()
    gc.disable()
    try:
        results = phi.map(itertools.repeat("Hi"), max_tokens=1)
        next(results)
        pending = [weakref.ref(stream) for stream in results._batch.running.values()]
        batch = weakref.ref(results._batch)
        del results
        assert batch() is None
        assert [stream() for stream in pending] == [None] * len(pending)
    finally:
        gc.enable()


def test_the_fake_records_every_prompt() -> None:
    phi = FakePhi(["one", "two", "three"])
    history = [{"role": "user", "content": "Hi"}]
    assert [str(result) for result in phi.map(["a", history], seed=5, max_pending=7)] == ["one", "two"]
    history[0]["content"] = "changed later"
    assert phi.calls == [("a", {"seed": 5}), ([{"role": "user", "content": "Hi"}], {"seed": 5})]
    results = phi.map(["c", "d"])
    assert next(results) == "three"
    with pytest.raises(AssertionError, match="call 4 has no reply; 3 were given"):
        next(results)


def test_the_fake_takes_prompts_one_by_one_too() -> None:
    phi = FakePhi(lambda messages, _: f"{messages}!")
    endless = phi.map(str(n) for n in itertools.count())
    assert [str(result) for result in itertools.islice(endless, 50)] == [f"{n}!" for n in range(50)]
    assert asyncio.run(collect(phi, [str(n) for n in range(50)])) == [f"{n}!" for n in range(50)]
