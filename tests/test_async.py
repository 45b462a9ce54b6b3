"""Event loops share a model. No loop is blocked, no loop is kept alive, and no generation outlives its reader."""

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from candle_phi import AsyncStream, BusyError, Chunk, Phi, Progress, Result
from candle_phi.testing import FakePhi
from conftest import HAIKU, HANG, Stopwatch, run_python

LONG = [5] * 1000
"""A prompt that takes the slow model about a second."""
MANY = 200


@pytest.fixture(scope="module")
def slow() -> Iterator[Phi]:
    with Phi.demo(kernel="portable", prefix_cache=0) as phi:
        yield phi


async def read(stream: AsyncStream) -> list[Chunk]:
    return [chunk async for chunk in stream]


async def prefilling(stream: AsyncStream) -> None:
    """Returns once the stream's prompt is being read."""
    while not stream.timings.queue_seconds:
        await asyncio.sleep(0.001)


async def slowest(work: Awaitable[object], check: Callable[[], Awaitable[object]]) -> float:
    """The longest time in seconds that `check` took while `work` ran."""
    worst = 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        begin = time.monotonic()
        await check()
        worst = max(worst, time.monotonic() - begin)
    await task
    return worst


def test_two_runs_in_a_row_and_a_stream_in_both(phi: Phi) -> None:
    expected = phi.generate(HAIKU, seed=1)
    assert [asyncio.run(phi.agenerate(HAIKU, seed=1)) for _ in range(2)] == [expected] * 2
    stream = phi.astream(HAIKU, seed=1)

    async def first() -> str:
        return await anext(stream)

    assert asyncio.run(first()) + "".join(asyncio.run(read(stream))) == expected


def test_two_loops_in_two_threads(phi: Phi) -> None:
    expected = {seed: phi.generate(HAIKU, seed=seed) for seed in range(8)}
    found: dict[int, str] = {}

    async def generate(seeds: range) -> None:
        found.update(
            zip(seeds, await asyncio.gather(*(phi.agenerate(HAIKU, seed=seed) for seed in seeds)), strict=True)
        )

    threads = [threading.Thread(target=lambda s=seeds: asyncio.run(generate(s))) for seeds in (range(4), range(4, 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert found == expected


def test_two_loops_read_one_stream(phi: Phi) -> None:
    stream = phi.astream(HAIKU, seed=1)
    seen: list[Chunk] = []
    threads = [threading.Thread(target=lambda: seen.extend(asyncio.run(read(stream)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert stream.text == phi.generate(HAIKU, seed=1)
    assert sorted(seen) == sorted(phi.stream(HAIKU, seed=1))


def test_a_loop_is_closed_while_streams_live() -> None:
    script = (
        "import asyncio\n"
        "from candle_phi import Phi\n"
        "phi = Phi.demo(kernel='portable')\n"
        "async def prefilling():\n"
        "    task = asyncio.ensure_future(anext(stream))\n"
        "    while not stream.timings.queue_seconds: await asyncio.sleep(0.001)\n"
        "    return task\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.set_exception_handler(lambda *_: None)\n"  # it logs the pending task
        "stream = phi.astream([5] * 1000, max_tokens=2, ignore_eos=True)\n"
        "task = loop.run_until_complete(prefilling())\n"
        "loop.close()\n"
        "print(task.done(), len(phi.generate([5] * 400, max_tokens=3, ignore_eos=True).token_ids))\n"
        "print(len(asyncio.run(phi.agenerate('Hi', max_tokens=3, ignore_eos=True)).token_ids))\n"
    )
    assert run_python(script) == "False 3\n3\n"


def test_streams_of_a_closed_loop_end(stopwatch: Stopwatch) -> None:
    """The loop, its tasks and the streams that they read are dropped without being cancelled."""

    async def begin(tasks: list[asyncio.Task[Chunk]]) -> None:
        streams = [phi.astream(LONG) for _ in range(3)]
        tasks += [asyncio.create_task(anext(stream)) for stream in streams]
        await prefilling(streams[0])

    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # it logs the pending tasks
        tasks: list[asyncio.Task[Chunk]] = []
        loop.run_until_complete(begin(tasks))
        loop.close()
        gone = weakref.ref(loop)
        del loop, tasks
        gc.collect()
        assert gone() is None
        begin_time = time.monotonic()
        assert phi.generate("Hi", max_tokens=1, ignore_eos=True)
        stopwatch.check(time.monotonic() - begin_time, 1.5)  # the prompts of all three would take 3 s


def test_a_task_without_a_reference_finishes(slow: Phi) -> None:
    """The loop keeps it alive, as it keeps a task that waits for a socket."""
    found: list[Result] = []

    async def generate() -> None:
        found.append(await slow.agenerate([5] * 300, max_tokens=2, ignore_eos=True))

    async def check() -> None:
        asyncio.ensure_future(generate())  # noqa: RUF006  # the point of it
        while not found:
            gc.collect()
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(check(), HANG))
    assert [result.finish_reason for result in found] == ["length"]


def test_a_cancelled_task_frees_its_slot(stopwatch: Stopwatch) -> None:
    async def check(phi: Phi) -> None:
        for prompt in (LONG, HAIKU):
            stream = phi.astream(prompt, ignore_eos=True)
            task = asyncio.create_task(read(stream))
            await prefilling(stream)
            while prompt is HAIKU and not stream.text:
                await asyncio.sleep(0.001)
            begin = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stream.finish_reason == "cancelled"
            assert await phi.agenerate("Hi", max_tokens=1, ignore_eos=True)
            stopwatch.check(time.monotonic() - begin, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await phi.agenerate(LONG)
        assert await phi.agenerate("Hi", max_tokens=1, ignore_eos=True)

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))


def test_a_task_that_is_cancelled_elsewhere_ends_what_it_read(phi: Phi) -> None:
    async def serve(stream: AsyncStream) -> None:
        await anext(stream)
        await asyncio.sleep(HANG)  # a stalled send

    async def check() -> None:
        stream, other = phi.astream(HAIKU), phi.astream(HAIKU)
        task = asyncio.create_task(serve(stream))
        while not stream.text:
            await asyncio.sleep(0.001)
        await anext(other)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert (stream.finish_reason, other.finish_reason) == ("cancelled", None)
        handed_on = asyncio.create_task(anext(other))  # a task that ends by itself does not end the stream
        assert await handed_on + "".join(await read(other)) in other.text
        assert other.finish_reason in ("stop", "length")

    asyncio.run(check())


def test_a_task_may_read_streams_without_end(phi: Phi) -> None:
    """A stream leaves nothing behind on the task that read it."""
    callbacks = 0

    class Counted(asyncio.Task[None]):
        def add_done_callback(self, *args: Any, **options: Any) -> None:
            nonlocal callbacks
            callbacks += 1
            super().add_done_callback(*args, **options)

    async def serve() -> None:
        for _ in range(20):
            await phi.agenerate(HAIKU, max_tokens=2)

    async def check() -> None:
        await Counted(serve(), loop=asyncio.get_running_loop())

    asyncio.run(check())
    assert callbacks <= 2  # `check` waits with one


def test_a_dropped_stream_frees_its_slot() -> None:
    async def check(phi: Phi) -> None:
        for _ in range(20):
            await anext(phi.astream(HAIKU))
        async for _ in phi.astream(HAIKU):
            break
        assert await phi.agenerate(HAIKU, seed=1) == phi.generate(HAIKU, seed=1)

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))  # an unread stream in the slot would be a BusyError


def test_a_waiting_task_gets_the_busy_error() -> None:
    async def check(phi: Phi) -> None:
        unread = phi.astream(HAIKU)
        await anext(unread)
        waiting = [asyncio.create_task(phi.agenerate(HAIKU)) for _ in range(2)]
        for task in waiting:
            with pytest.raises(BusyError, match=r"1 slot is held by a stream unread for \d+ s"):
                await task
        unread.cancel()
        assert await phi.agenerate(HAIKU, max_tokens=3)

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))


def test_timeout_keeps_the_text(slow: Phi, stopwatch: Stopwatch) -> None:
    async def check() -> None:
        begin = time.monotonic()
        answer = await slow.agenerate(LONG, timeout=0.05)
        assert (answer, answer.finish_reason) == ("", "timeout")
        stopwatch.check(time.monotonic() - begin, 1)
        fake = FakePhi(["one two three four five", "one two"], delay=0.1)
        answer = await fake.agenerate("Hi", timeout=0.25)
        assert answer.finish_reason == "timeout"
        assert len(answer.split()) <= 2
        assert "one two".startswith(answer)
        answer = await fake.agenerate("Hi", timeout=HANG)
        assert (answer, answer.finish_reason) == ("one two", "stop")

    asyncio.run(check())


def test_timeout_counts_the_queue() -> None:
    async def check(phi: Phi) -> None:
        stream = phi.astream(HAIKU, ignore_eos=True)
        holding = asyncio.create_task(read(stream))
        await prefilling(stream)
        answer = await phi.agenerate("Hi", timeout=0.05)
        assert (answer, answer.finish_reason) == ("", "timeout")
        holding.cancel()

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))


def test_the_callback_runs_in_the_loops_thread(slow: Phi, stopwatch: Stopwatch) -> None:
    seen: list[tuple[float, Progress]] = []

    def note(p: Progress) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert asyncio.get_running_loop()
        seen.append((time.monotonic(), p))

    begin = time.monotonic()
    asyncio.run(slow.agenerate(LONG, max_tokens=3, ignore_eos=True, on_progress=note))
    took = time.monotonic() - begin
    phases = [p.phase for _, p in seen]
    assert list(dict.fromkeys(phases)) == ["wait", "prefill", "decode"]
    assert all(p.unit == "tokens" for _, p in seen)
    prefill = [p for _, p in seen if p.phase == "prefill"]
    assert prefill[-1].total == len(LONG)
    assert [p.done for p in prefill] == sorted(p.done for p in prefill)
    assert len(seen) <= 4 + 20 * took
    pauses = sorted(b - a for (a, _), (b, _) in itertools.pairwise(seen))
    stopwatch.check(pauses[len(pauses) // 2], 0.2)


def test_the_callback_goes_on_when_nothing_moves(stopwatch: Stopwatch) -> None:
    times: list[float] = []
    phi = FakePhi(["late"], delay=1)
    begin = time.monotonic()
    asyncio.run(phi.agenerate("Hi", on_progress=lambda _: times.append(time.monotonic())))
    assert 2 < len(times) <= 4 + 20 * (time.monotonic() - begin)
    stopwatch.check(max(b - a for a, b in itertools.pairwise(times)), 0.4)


def test_an_exception_of_the_callback_ends_the_stream(slow: Phi) -> None:
    class EnoughError(Exception):
        pass

    def enough(p: Progress) -> None:
        if p.phase == "prefill":
            raise EnoughError

    async def check() -> None:
        stream = slow.astream(LONG, on_progress=enough)
        with pytest.raises(EnoughError):
            await anext(stream)
        assert stream.finish_reason == "cancelled"
        assert await slow.agenerate("Hi", max_tokens=1, ignore_eos=True)

    asyncio.run(check())


def test_a_stop_iteration_of_the_callback_becomes_a_runtime_error(slow: Phi) -> None:
    async def check() -> None:
        for error in (StopIteration, StopAsyncIteration):

            def stop(_: Progress, error: type[Exception] = error) -> None:
                raise error

            with pytest.raises(RuntimeError, match=f"on_progress raised {error.__name__}"):
                await read(slow.astream(HAIKU, on_progress=stop))

    asyncio.run(check())


@pytest.mark.timing
def test_the_loop_runs_while_a_prompt_is_read(slow: Phi, stopwatch: Stopwatch) -> None:
    stopwatch.check(asyncio.run(slowest(slow.agenerate(LONG, max_tokens=1), lambda: asyncio.sleep(0))), 0.5)


def test_text_that_is_always_ready_does_not_block_the_loop() -> None:
    async def check() -> None:
        others = 0
        task = asyncio.create_task(read(FakePhi(["word " * 1000]).astream("Hi")))
        while not task.done():
            others += 1
            await asyncio.sleep(0)
        assert others > 100

    asyncio.run(check())


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts the threads in /proc")
def test_many_waiting_streams_take_no_threads(stopwatch: Stopwatch) -> None:
    async def check(phi: Phi) -> tuple[float, int]:
        threads = 0

        async def to_thread() -> None:
            nonlocal threads
            threads = max(threads, len(os.listdir("/proc/self/task")))
            await asyncio.to_thread(int)

        tasks = [asyncio.create_task(phi.agenerate(HAIKU, max_tokens=8)) for _ in range(MANY)]
        latency = await slowest(asyncio.wait_for(asyncio.gather(*tasks), HANG), to_thread)
        return latency, threads

    with Phi.demo() as phi:
        before = len(os.listdir("/proc/self/task"))
        latency, threads = asyncio.run(check(phi))
    assert threads < before + 10
    stopwatch.check(latency, 1)  # of asyncio.to_thread


def test_no_loop_is_kept(slow: Phi) -> None:
    async def cut_off() -> weakref.ref[asyncio.AbstractEventLoop]:
        streams = [slow.astream(LONG) for _ in range(5)]
        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        await prefilling(streams[0])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(cut_off())
    gc.collect()
    assert loop() is None


def test_the_thread_comes_with_the_first_wait() -> None:
    script = (
        "import asyncio, threading\n"
        "from candle_phi import Phi\n"
        "phi = Phi.demo()\n"
        "names = lambda: [thread.name for thread in threading.enumerate()]\n"
        "stream = phi.astream('Hi', max_tokens=3)\n"
        "print(names())\n"
        "for _ in range(3): asyncio.run(phi.agenerate('Hi', max_tokens=3))\n"
        "print(names())\n"
    )
    assert run_python(script) == "['MainThread']\n['MainThread', 'candle-phi-async']\n"


@pytest.mark.parametrize("where", ["MainThread", "daemon"])
def test_exit_during_a_stream(where: str, stopwatch: Stopwatch) -> None:
    script = (
        "import asyncio, sys, threading, time\n"
        "from candle_phi import Phi\n"
        "phi = Phi.demo(kernel='portable')\n"
        "streams = [phi.astream([5] * 1000) for _ in range(3)]\n"
        "async def begin():\n"
        "    tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]\n"
        "    while not streams[0].timings.queue_seconds: await asyncio.sleep(0.001)\n"
        "    running.set()\n"
        f"    if {where == 'daemon'}: await asyncio.sleep({HANG})\n"
        "running = threading.Event()\n"
        f"if {where == 'daemon'}:\n"
        "    threading.Thread(target=asyncio.run, args=(begin(),), daemon=True).start()\n"
        f"    assert running.wait({HANG})\n"
        "else: asyncio.run(begin())\n"
        "print(time.time(), flush=True)\n"
        "sys.exit(7)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (7, "")
    stopwatch.check(time.time() - float(done.stdout), 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
def test_a_forked_child_has_its_own_thread() -> None:
    script = (
        "import asyncio, os, sys\n"
        "from candle_phi import ForkError, Phi\n"
        "phi = Phi.demo()\n"
        "text = asyncio.run(phi.agenerate('Hi', seed=1))\n"
        "stream = phi.astream('Hi')\n"
        "if os.fork() == 0:\n"
        "    try: asyncio.run(anext(stream))\n"
        "    except ForkError: pass\n"
        "    else: os._exit(3)\n"
        "    os._exit(0 if asyncio.run(Phi.demo().agenerate('Hi', seed=1)) == text else 4)\n"
        "code = os.waitstatus_to_exitcode(os.wait()[1])\n"
        "print(asyncio.run(phi.agenerate('Hi', seed=1)) == text)\n"
        "sys.exit(code)\n"
    )
    assert run_python(script, warnings="ignore") == "True\n"  # Python 3.12 warns of a fork with threads


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_while_a_task_waits(stopwatch: Stopwatch) -> None:
    script = (
        "import asyncio, os, signal, threading, time\n"
        "from candle_phi import Phi\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "phi = Phi.demo(kernel='portable')\n"
        "stream = phi.astream([5] * 1000)\n"
        "async def first(): await anext(stream)\n"
        "at = []\n"
        "def interrupt():\n"
        "    while not stream.timings.queue_seconds: time.sleep(0.001)\n"
        "    at.append(time.monotonic())\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt).start()\n"
        "try: asyncio.run(first())\n"
        "except KeyboardInterrupt: print(stream.finish_reason, time.monotonic() - at[0])\n"
    )
    reason, seconds = run_python(script).split()
    assert reason == "cancelled"
    stopwatch.check(float(seconds), 1)


def test_an_unawaited_call_does_no_work(phi: Phi) -> None:
    coroutine = phi.agenerate(HAIKU)
    coroutine.close()
    stream = phi.astream(HAIKU)
    assert stream.usage.prompt_tokens > 0
    assert stream.timings.time_to_first_token is None
