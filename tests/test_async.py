"""Event loops share a model: none is held up, none is remembered, and nothing outlives its reader."""

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

import pytest

from candle_phi import AsyncStream, BusyError, Chunk, Phi, Progress, Result
from candle_phi.testing import FakePhi
from conftest import HAIKU, run_python

LONG = [5] * 1000  # takes the slow model a second
MANY = 200


@pytest.fixture(scope="module")
def slow() -> Iterator[Phi]:
    with Phi.demo(kernel="portable") as phi:
        yield phi


async def read(stream: AsyncStream) -> list[Chunk]:
    return [chunk async for chunk in stream]


async def slowest(work: Awaitable[object], check: Callable[[], Awaitable[object]]) -> float:
    """The most seconds that `check` took while `work` went on."""
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
        thread.join(60)
    assert found == expected


def test_two_loops_read_one_stream(phi: Phi) -> None:
    stream = phi.astream(HAIKU, seed=1)
    seen: list[Chunk] = []
    threads = [threading.Thread(target=lambda: seen.extend(asyncio.run(read(stream)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stream.text == phi.generate(HAIKU, seed=1)
    assert sorted(seen) == sorted(phi.stream(HAIKU, seed=1))


def test_a_loop_is_closed_while_streams_live() -> None:
    script = (
        "import asyncio\n"
        "from candle_phi import Phi\n"
        "phi = Phi.demo(kernel='portable')\n"
        "async def begin(): await asyncio.sleep(0.05)\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.set_exception_handler(lambda *_: None)\n"  # it complains of the pending task
        "task = loop.create_task(phi.agenerate([5] * 200, max_tokens=2, ignore_eos=True))\n"
        "loop.run_until_complete(begin())\n"
        "loop.close()\n"
        "print(task.done(), len(phi.generate([5] * 400, max_tokens=3, ignore_eos=True).token_ids))\n"  # takes longer
        "print(len(asyncio.run(phi.agenerate('Hi', max_tokens=3, ignore_eos=True)).token_ids))\n"
    )
    assert run_python(script) == "False 3\n3\n"


def test_streams_of_a_closed_loop_end() -> None:
    """The loop and its tasks are dropped with what they read, though nobody cancelled them."""

    async def begin(tasks: list[asyncio.Task[Result]]) -> None:
        tasks += [asyncio.create_task(phi.agenerate(LONG)) for _ in range(3)]
        await asyncio.sleep(0.05)

    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # it complains of the pending tasks
        tasks: list[asyncio.Task[Result]] = []
        loop.run_until_complete(begin(tasks))
        loop.close()
        gone = weakref.ref(loop)
        del loop, tasks
        gc.collect()
        assert gone() is None
        begun = time.monotonic()
        assert phi.generate("Hi", max_tokens=1, ignore_eos=True)
        assert time.monotonic() - begun < 1  # the three would take as many seconds


def test_a_task_that_nobody_holds_is_finished(slow: Phi) -> None:
    """The loop keeps it, as it keeps one that waits for a socket."""
    found: list[Result] = []

    async def generate() -> None:
        found.append(await slow.agenerate([5] * 300, max_tokens=2, ignore_eos=True))

    async def check() -> None:
        asyncio.ensure_future(generate())  # noqa: RUF006  # the point of it
        for _ in range(300):
            gc.collect()
            await asyncio.sleep(0.01)
            if found:
                break

    asyncio.run(check())
    assert [result.finish_reason for result in found] == ["length"]


def test_a_cancelled_task_frees_its_slot() -> None:
    async def check(phi: Phi) -> None:
        for prompt in (LONG, HAIKU):
            stream = phi.astream(prompt, ignore_eos=True)
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(0.02)
            if prompt is HAIKU:
                while not stream.text:
                    await asyncio.sleep(0.001)
            begin = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stream.finish_reason == "cancelled"
            assert await phi.agenerate("Hi", max_tokens=1, ignore_eos=True)
            assert time.monotonic() - begin < 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await phi.agenerate(LONG)
        assert await phi.agenerate("Hi", max_tokens=1, ignore_eos=True)

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))


def test_a_task_that_is_cancelled_elsewhere_ends_what_it_read(phi: Phi) -> None:
    async def serve(stream: AsyncStream) -> None:
        await anext(stream)
        await asyncio.sleep(60)  # a send that is stalled

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
        handed_on = asyncio.create_task(anext(other))  # a task that ends by itself ends no stream
        assert await handed_on + "".join(await read(other)) in other.text
        assert other.finish_reason in ("stop", "length")

    asyncio.run(check())


def test_a_dropped_stream_frees_its_slot() -> None:
    async def check(phi: Phi) -> None:
        for _ in range(20):
            await anext(phi.astream(HAIKU))
        async for _ in phi.astream(HAIKU):
            break
        assert await phi.agenerate(HAIKU, seed=1) == phi.generate(HAIKU, seed=1)

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        begin = time.monotonic()
        asyncio.run(check(phi))
        assert time.monotonic() - begin < 9  # nobody had to wait for BusyError


def test_busy_is_told() -> None:
    async def check(phi: Phi) -> None:
        unread = phi.astream(HAIKU)
        await anext(unread)
        waiting = [asyncio.create_task(phi.agenerate(HAIKU)) for _ in range(2)]
        for task in waiting:
            with pytest.raises(BusyError, match=r"1 slot is held by a stream unread for 1\d s"):
                await task
        unread.cancel()
        assert await phi.agenerate(HAIKU, max_tokens=3)

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))


def test_timeout_keeps_the_text(slow: Phi) -> None:
    async def check() -> None:
        begin = time.monotonic()
        answer = await slow.agenerate(LONG, timeout=0.05)
        assert (answer, answer.finish_reason) == ("", "timeout")
        assert time.monotonic() - begin < 1
        fake = FakePhi(["one two three four five"] * 2, delay=0.1)
        answer = await fake.agenerate("Hi", timeout=0.25)
        assert (answer, answer.finish_reason) == ("one two", "timeout")
        answer = await fake.agenerate("Hi", timeout=60)
        assert answer.finish_reason == "stop"

    asyncio.run(check())


def test_timeout_counts_the_queue() -> None:
    async def check(phi: Phi) -> None:
        holding = asyncio.create_task(read(phi.astream(LONG)))
        await asyncio.sleep(0.01)
        answer = await phi.agenerate("Hi", timeout=0.05)
        assert (answer, answer.finish_reason) == ("", "timeout")
        holding.cancel()

    with Phi.demo(max_concurrent=1, kernel="portable") as phi:
        asyncio.run(check(phi))


def test_progress_is_told_in_the_loops_thread(slow: Phi) -> None:
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
    assert len(seen) <= 3 + 20 * took
    pauses = sorted(b - a for (a, _), (b, _) in itertools.pairwise(seen))
    assert pauses[len(pauses) // 2] < 0.2


def test_progress_goes_on_when_nothing_moves() -> None:
    times: list[float] = []
    phi = FakePhi(["late"], delay=1)
    asyncio.run(phi.agenerate("Hi", on_progress=lambda _: times.append(time.monotonic())))
    assert 5 < len(times) < 21


def test_an_exception_of_on_progress_ends_it(slow: Phi) -> None:
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


def test_what_would_pass_for_the_end_is_no_end(slow: Phi) -> None:
    async def check() -> None:
        for error in (StopIteration, StopAsyncIteration):

            def stop(_: Progress, error: type[Exception] = error) -> None:
                raise error

            with pytest.raises(RuntimeError, match=f"on_progress raised {error.__name__}"):
                await read(slow.astream(HAIKU, on_progress=stop))

    asyncio.run(check())


def test_the_loop_runs_on_while_a_prompt_is_read(slow: Phi) -> None:
    latency = asyncio.run(slowest(slow.agenerate(LONG, max_tokens=1), lambda: asyncio.sleep(0)))
    print(f"latency {1000 * latency:.1f} ms")
    assert latency < 0.5


def test_text_that_is_always_there_keeps_nobody_waiting() -> None:
    async def check() -> None:
        others = 0
        task = asyncio.create_task(read(FakePhi(["word " * 1000]).astream("Hi")))
        while not task.done():
            others += 1
            await asyncio.sleep(0)
        assert others > 100

    asyncio.run(check())


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts the threads in /proc")
def test_many_waiting_streams_leave_the_executor_alone() -> None:
    async def check(phi: Phi) -> tuple[float, int]:
        tasks = [asyncio.create_task(phi.agenerate(HAIKU, max_tokens=8)) for _ in range(MANY)]
        await asyncio.sleep(0.05)
        threads = len(os.listdir("/proc/self/task"))
        latency = await slowest(asyncio.wait_for(asyncio.gather(*tasks), 60), lambda: asyncio.to_thread(int))
        return latency, threads

    with Phi.demo() as phi:
        before = len(os.listdir("/proc/self/task"))
        latency, threads = asyncio.run(check(phi))
    assert threads < before + 10
    print(f"to_thread {1000 * latency:.1f} ms")
    assert latency < 1


def test_no_loop_is_kept(slow: Phi) -> None:
    async def cut_off() -> weakref.ref[asyncio.AbstractEventLoop]:
        streams = [slow.astream(LONG) for _ in range(5)]
        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(0.05)
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
def test_exit_with_a_stream_under_way(where: str) -> None:
    script = (
        "import asyncio, sys, threading, time\n"
        "from candle_phi import Phi\n"
        "phi = Phi.demo(kernel='portable')\n"
        "streams = [phi.astream([5] * 1000) for _ in range(3)]\n"
        "async def begin():\n"
        "    tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]\n"
        "    await asyncio.sleep(0.05)\n"
        f"    if {where == 'daemon'}: await asyncio.sleep(60)\n"
        f"if {where == 'daemon'}:\n"
        "    threading.Thread(target=asyncio.run, args=(begin(),), daemon=True).start()\n"
        "    time.sleep(0.2)\n"
        "else: asyncio.run(begin())\n"
        "print(time.time(), flush=True)\n"
        "sys.exit(7)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    assert time.time() - float(done.stdout) < 1


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
    assert run_python(script, warnings="ignore") == "True\n"  # newer Pythons warn of a fork with threads


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_while_a_task_waits() -> None:
    script = (
        "import asyncio, os, signal, threading, time\n"
        "from candle_phi import Phi\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "phi = Phi.demo(kernel='portable')\n"
        "stream = phi.astream([5] * 1000)\n"
        "async def first(): await anext(stream)\n"
        "threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "before = time.monotonic()\n"
        "try: asyncio.run(first())\n"
        "except KeyboardInterrupt: print(stream.finish_reason, time.monotonic() - before < 1.2)\n"
    )
    assert run_python(script) == "cancelled True\n"


def test_an_unawaited_call_does_no_work(phi: Phi) -> None:
    coroutine = phi.agenerate(HAIKU)
    coroutine.close()
    stream = phi.astream(HAIKU)
    assert stream.usage.prompt_tokens > 0
    assert stream.timings.time_to_first_token is None
