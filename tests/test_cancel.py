"""Any long operation can be ended in every phase, and the model stays usable."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import candle_phi
from candle_phi import ClosedError, Phi, Progress, Stream
from conftest import HAIKU, HANG, Stopwatch, run_python, wait_until

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

SOON = 1.5
"""The limit for what the contract promises within 250 ms, with a margin for a busy machine."""

LONG = [5] * 20_000
"""A prompt that takes about 15 seconds."""

TIMEOUT = 0.7
"""Shorter than any of the phases that it ends."""


@pytest.fixture(scope="module")
def path(phi: Phi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a larger context."""
    data = bytearray(Path(phi.path).read_bytes())
    at = data.index(b"phi3.context_length") + len(b"phi3.context_length") + 4
    data[at : at + 4] = (100_000).to_bytes(4, "little")
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    path.write_bytes(data)
    return path


SLOW: dict[str, Any] = {"kernel": "portable", "n_threads": 1, "prefix_cache": 0}
"""It holds nothing: each long prompt is computed as a whole, whatever was computed before."""


@pytest.fixture(scope="module")
def slow(path: Path) -> Iterator[Phi]:
    with Phi(path, **SLOW) as slow:
        yield slow


def works(phi: Phi) -> None:
    assert phi.generate(HAIKU, max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def first_token_seconds(phi: Phi) -> float:
    begin = time.monotonic()
    next(phi.stream(HAIKU, ignore_eos=True))
    return time.monotonic() - begin


class Reading(threading.Thread):
    """Reads a stream to its end, and records the time of the end and what was raised."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.raised: BaseException | None = None
        self.end = 0.0
        self.start()

    def run(self) -> None:
        try:
            for _ in self.stream:
                pass
        except BaseException as error:
            self.raised = error
        self.end = time.monotonic()

    def took(self, since: float) -> float:
        self.join(HANG)
        assert not self.is_alive(), "hangs"
        return self.end - since


class Phases:
    """An `on_progress` that records its calls, and raises `error` once that is set."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self.error: Exception | None = None

    def __call__(self, p: Progress) -> None:
        self.seen.append(p)
        if self.error is not None:
            raise self.error

    def wait_for(self, phase: str) -> None:
        wait_until(lambda: self.seen and self.seen[-1].phase == phase and self.seen[-1].done >= (phase != "wait"))


@pytest.mark.parametrize("phase", ["wait", "prefill", "decode"])
@pytest.mark.parametrize("way", ["cancel", "close", "raise", "close the model", "timeout"])
def test_a_stream_ends_in_any_phase_in_any_way(path: Path, way: str, phase: str, stopwatch: Stopwatch) -> None:
    with Phi(path, max_concurrent=1, **SLOW) as phi:
        phases, raised = Phases(), LookupError("enough")
        timeout = max(TIMEOUT, 10 * first_token_seconds(phi))  # so that there is some text even on a busy machine
        holder = phi.stream(HAIKU, ignore_eos=True)
        if phase == "wait":
            Reading(holder)
            wait_until(lambda: holder.text)
        stream = phi.stream(
            HAIKU if phase == "decode" else LONG,
            ignore_eos=True,
            on_progress=phases,
            timeout=timeout if way == "timeout" else None,
        )
        begin = time.monotonic()
        reading = Reading(stream)
        if phase == "decode":
            wait_until(lambda: stream.text)
        elif way != "timeout":
            phases.wait_for(phase)
        since = begin + timeout if way == "timeout" else time.monotonic()
        if way == "raise":
            phases.error = raised
        elif way == "close the model":
            phi.close()
            phi.close()
        elif way != "timeout":
            getattr(stream, way)()
        if way != "timeout":
            stopwatch.check(time.monotonic() - since, 0.25)  # it does not wait for the reader
        stopwatch.check(reading.took(since), SOON)
        if way == "close the model":
            assert isinstance(reading.raised, ClosedError)
            assert stream.finish_reason == "error"
            return
        assert reading.raised is (raised if way == "raise" else None)
        assert stream.finish_reason == ("timeout" if way == "timeout" else "cancelled")
        assert bool(stream.text) == (phase == "decode")
        assert phi.detokenize(stream.token_ids).strip() == stream.text.strip()
        holder.cancel()
        works(phi)  # the slot is free


def test_timeouts_keep_the_text(slow: Phi, stopwatch: Stopwatch) -> None:
    whole = slow.generate(HAIKU, temperature=0, ignore_eos=True, max_tokens=300)
    begin = time.monotonic()
    cut = slow.generate(HAIKU, temperature=0, ignore_eos=True, timeout=TIMEOUT)
    took = time.monotonic() - begin
    assert took >= TIMEOUT
    stopwatch.check(took, TIMEOUT + SOON)
    assert cut.finish_reason == "timeout"
    assert whole.startswith(cut) or cut.startswith(whole)
    for prompt in (HAIKU, LONG):
        begin = time.monotonic()
        none = slow.generate(prompt, timeout=0)
        assert (none, none.finish_reason, none.usage.completion_tokens) == ("", "timeout", 0)
        stopwatch.check(time.monotonic() - begin, SOON)
    assert slow.generate(HAIKU, seed=1, timeout=1e30) == slow.generate(HAIKU, seed=1)


def test_a_timeout_begins_with_the_call(slow: Phi) -> None:
    stream = slow.stream(HAIKU, ignore_eos=True, timeout=0.2)
    deadline = time.monotonic() + 0.2  # the stream's is no later
    wait_until(lambda: time.monotonic() > deadline)  # a timeout that began with the first read would not be over
    assert list(stream) == []
    assert stream.finish_reason == "timeout"


def test_dropping_a_stream_ends_it(path: Path, stopwatch: Stopwatch) -> None:
    with Phi(path, max_concurrent=1, **SLOW) as phi:
        for prompt in (LONG, HAIKU):
            stream = phi.stream(prompt, ignore_eos=True, timeout=30)
            if prompt is HAIKU:
                next(stream)
            else:
                Reading(stream).stream.cancel()
            del stream
            begin = time.monotonic()
            works(phi)
            stopwatch.check(time.monotonic() - begin, SOON)


def test_closing_reaches_every_reader(path: Path, stopwatch: Stopwatch) -> None:
    phi = Phi(path, **SLOW)
    phases = [Phases() for _ in range(3)]
    shared = phi.stream(LONG, on_progress=phases[0])
    streams = [shared, phi.stream(LONG, on_progress=phases[1]), phi.stream(HAIKU, ignore_eos=True)]
    readers = [Reading(stream) for stream in [*streams, shared]]
    failed: list[BaseException] = []

    def logits() -> None:
        try:
            phi.logits(LONG, on_progress=phases[2])
        except BaseException as error:
            failed.append(error)

    computing = threading.Thread(target=logits)
    computing.start()
    for phase in phases:
        phase.wait_for("prefill")
    wait_until(lambda: streams[2].text)
    since = time.monotonic()
    closing = [threading.Thread(target=phi.close) for _ in range(3)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(HANG)
        assert not thread.is_alive(), "hangs"
    stopwatch.check(time.monotonic() - since, SOON)
    for reader in readers:
        stopwatch.check(reader.took(since), SOON)
        assert isinstance(reader.raised, ClosedError)
    computing.join(HANG)
    assert [type(error) for error in failed] == [ClosedError]
    stopwatch.check(time.monotonic() - since, 2 * SOON)


@pytest.mark.parametrize("call", ["stream", "generate", "logits"])
def test_the_callback(slow: Phi, call: str, stopwatch: Stopwatch) -> None:
    """In the reading thread, through the phases, at most 20 times a second and at least every 200 ms."""
    prompt = [len(call)] * 1500  # no prompt begins as another one
    calls: list[tuple[float, int, Progress]] = []

    def note(p: Progress) -> None:
        calls.append((time.monotonic(), threading.get_ident(), p))

    options: dict[str, Any] = {"on_progress": note}
    if call == "logits":
        slow.logits(prompt, **options)
    elif call == "generate":
        slow.generate(prompt, max_tokens=100, ignore_eos=True, **options)
    else:
        for _ in slow.stream(prompt, max_tokens=100, ignore_eos=True, **options):
            pass
    assert {thread for _, thread, _ in calls} == {threading.get_ident()}
    times = [when for when, _, _ in calls]
    if stopwatch.enforced:
        # 20, and one more for a call that was late after the one before
        assert max(sum(start <= t < start + 1 for t in times) for start in times) <= 21
    stopwatch.check(max(b - a for a, b in itertools.pairwise(times)), 0.2 + 0.5)
    seen = [p for _, _, p in calls]
    assert (seen[0].phase, seen[0].done, seen[0].total, seen[0].unit) == ("wait", 0, None, "tokens")
    prefill = [p for p in seen if p.phase == "prefill"]
    assert {p.total for p in prefill} == {1500}
    assert [p.done for p in prefill] == sorted(p.done for p in prefill)
    assert any(p.done % 512 for p in prefill[:-1])  # also within a pass of 512 tokens
    assert prefill[-1].done == 1500
    decode = [p for p in seen if p.phase == "decode"]
    if call == "logits":
        assert decode == []
    else:
        assert (decode[-1].done, decode[-1].total) == (100, 100)


def test_the_callback_of_short_work(phi: Phi) -> None:
    seen: list[Progress] = []
    answer = phi.generate(HAIKU, on_progress=seen.append)
    assert [p.phase for p in seen][:1] == ["wait"]
    assert {p.phase for p in seen} == {"wait", "prefill", "decode"}
    assert (seen[-1].done, seen[-1].total) in [(n, None) for n in (len(answer.token_ids), len(answer.token_ids) + 1)]


@pytest.mark.parametrize(("call", "prompt"), [("generate", HAIKU), ("generate", LONG), ("logits", LONG)])
def test_an_exception_of_the_callback_ends_any_call(slow: Phi, call: str, prompt: Any, stopwatch: Stopwatch) -> None:
    raised = LookupError("enough")
    when = 0.0

    def stop(p: Progress) -> None:
        nonlocal when
        if p.done and p.phase == ("prefill" if prompt is LONG else "decode"):
            when = time.monotonic()
            raise raised

    method: Callable[..., object] = getattr(slow, call)
    with pytest.raises(LookupError) as caught:
        method(prompt, on_progress=stop, **({} if call == "logits" else {"ignore_eos": True}))
    stopwatch.check(time.monotonic() - when, SOON)
    assert caught.value is raised
    works(slow)


@pytest.mark.parametrize("call", ["stream", "generate", "logits"])
def test_a_stop_iteration_of_the_callback_becomes_a_runtime_error(phi: Phi, call: str) -> None:
    """`list(stream)` would take it for the stream's end."""

    def stop(_: Progress) -> None:
        raise StopIteration("of something else")

    def read() -> object:
        if call == "stream":
            return list(phi.stream(HAIKU, on_progress=stop))
        return phi.generate(HAIKU, on_progress=stop) if call == "generate" else phi.logits([5] * 99, on_progress=stop)

    with pytest.raises(RuntimeError, match="on_progress raised StopIteration") as raised:
        read()
    assert str(raised.value.__cause__) == "of something else"


def test_ctrl_c(path: Path, stopwatch: Stopwatch) -> None:
    # in a process of its own: a late interrupt would end the test run
    script = f"""
import signal, threading, time
from candle_phi import Phi
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
phi = Phi({str(path)!r}, kernel="portable", n_threads=1, prefix_cache=0, max_concurrent=1)
LONG = [5] * 20_000
def decode():
    for _ in phi.stream({HAIKU!r}, ignore_eos=True): pass
def queued():
    next(phi.stream({HAIKU!r}))
calls = {{
    "prefill": lambda: next(phi.stream(LONG)),
    "decode": decode,
    "generate": lambda: phi.generate(LONG),
    "generated": lambda: phi.generate({HAIKU!r}, ignore_eos=True),
    "logits": lambda: phi.logits(LONG),
    "queued": queued,
}}
for name, call in calls.items():
    if name == "queued":
        holder = phi.stream(LONG)
        def read():
            for _ in holder: pass
        reader = threading.Thread(target=read)
        reader.start()
        while not holder.timings.queue_seconds: time.sleep(0.002)
    at = []
    def interrupt():
        at.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)
    threading.Timer(0.3, interrupt).start()
    try:
        call()
        print(name, "was not interrupted")
    except KeyboardInterrupt:
        print(name, time.monotonic() - at[0])
holder.cancel()
reader.join()
print(phi.generate("Hi", max_tokens=2, ignore_eos=True).usage.completion_tokens)
"""
    *calls, last = [line.split() for line in run_python(script).splitlines()]
    assert [name for name, *_ in calls] == ["prefill", "decode", "generate", "generated", "logits", "queued"]
    assert last == ["2"]
    for _, seconds in calls:
        stopwatch.check(float(seconds), SOON)


@pytest.fixture(scope="module")
def large(phi: Phi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, extended by a hole of 4 GB that takes seconds to read into memory."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    path.write_bytes(Path(phi.path).read_bytes())
    os.truncate(path, 4 << 30)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and /proc")
def test_an_exception_of_the_callback_ends_a_load(large: Path, stopwatch: Stopwatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, when, raised = resident(), 0.0, LookupError("enough")

    def stop(p: Progress) -> None:
        nonlocal when
        assert (p.phase, p.unit, p.total) == ("load", "bytes", 4 << 30)
        if p.done:
            when = time.monotonic()
            raise raised

    with pytest.raises(LookupError) as caught:
        Phi(large, mmap=False, on_progress=stop)
    stopwatch.check(time.monotonic() - when, SOON)
    assert caught.value is raised
    wait_until(lambda: resident() < before + (64 << 20))  # no thread goes on reading


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_ctrl_c_ends_a_load(large: Path, stopwatch: Stopwatch) -> None:
    script = (
        "import signal, threading, time\n"
        "from candle_phi import Phi\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "at = []\n"
        "def interrupt():\n"
        "    at.append(time.monotonic())\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "threading.Timer(0.1, interrupt).start()\n"
        f"try: Phi({str(large)!r}, mmap=False)\n"
        "except KeyboardInterrupt: print(time.monotonic() - at[0])\n"
    )
    stopwatch.check(float(run_python(script)), SOON)


LEAVING = {
    "a live stream": "next(stream)",
    "a thread inside next": "start(lambda: phi.generate([5] * 20_000, on_progress=note))",
    "a thread that reads": "start(read)",
    "many threads": "[start(read) for _ in range(8)]",
    "a thread inside logits": "start(lambda: phi.logits([5] * 20_000, on_progress=note))",
    "callbacks that sleep": "[start(lambda: phi.logits([5] * 20_000, on_progress=sleep)) for _ in range(4)]",
    "callbacks that do not return": "[start(call) for call in (prefill, logits, load)]",
    "a thread that loads": "start(lambda: [Phi(path, on_progress=note) for _ in range(1000)])",
}


@pytest.mark.parametrize("what", LEAVING)
def test_the_interpreter_exits_at_once(path: Path, what: str, stopwatch: Stopwatch) -> None:
    script = f"""
import queue, sys, threading, time
from candle_phi import Phi
path = {str(path)!r}
phi = Phi(path, kernel="portable", n_threads=1, prefix_cache=0)
stream = phi.stream("Hi", ignore_eos=True)
running, started, here = queue.Queue(), [], threading.local()
def note(p):
    if not hasattr(here, "noted"):
        here.noted = True
        running.put(p)
def sleep(p):
    note(p)
    time.sleep(0.02)
def spin(p):
    note(p)
    while True: pass
def read():
    for _ in phi.stream("Hi", ignore_eos=True, on_progress=note): pass
def prefill(): phi.generate([5] * 20_000, on_progress=spin)
def logits(): phi.logits([5] * 20_000, on_progress=spin)
def load():
    while True: Phi(path, on_progress=spin)
def start(work):
    started.append(work)
    threading.Thread(target=work, daemon=True).start()
{LEAVING[what]}
for _ in started:
    running.get(timeout={HANG})
print("leaving", flush=True)
sys.exit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"leaving\n"
    begin = time.monotonic()
    _, err = process.communicate(timeout=HANG)
    stopwatch.check(time.monotonic() - begin, 1 + SOON)
    assert (process.returncode, err) == (7, b"")


def pythons() -> list[str]:
    """This Python and every other CPython from 3.11 on that is installed here and can load the same module: a build for
    the stable ABI runs in all of them, one for a free-threaded Python in that one only."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return [sys.executable]
    names = [shutil.which(f"python3.{minor}") for minor in range(11, 20)]
    of_pyenv = sorted(str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python"))
    ask = (
        "import sys, sysconfig\n"
        "assert sys.version_info >= (3, 11) and not sysconfig.get_config_var('Py_GIL_DISABLED')\n"
        "print(sys.version)"
    )
    versions = {sys.version: sys.executable}
    for python in [*filter(None, names), *of_pyenv]:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0:
            versions.setdefault(done.stdout.rstrip("\n"), python)
    return list(versions.values())


@pytest.fixture(scope="module", params=pythons())
def any_python(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ends_by_itself(python: str, script: str) -> str:
    """What a script prints that exits with 7, without a word on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(Path(candle_phi.__file__).parents[1])}
    done = subprocess.run([python, "-c", script], env=environment, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (7, "")
    return done.stdout


def test_dozens_of_daemon_threads_at_exit(any_python: str) -> None:
    script = """
import os, sys, threading, time
from candle_phi import Phi
class Slow:  # dropped while the interpreter finalizes: the threads come back from the engine meanwhile
    def __del__(self, sleep=time.sleep, write=os.write):
        sleep(0.2)
        write(1, b"slow")
sys.slow = Slow()
phi = Phi.demo(n_threads=1)
begun = threading.Semaphore(0)
def generate(): phi.generate("Hi", max_tokens=3, ignore_eos=True)
def read():
    for _ in phi.stream("Hi", max_tokens=50, ignore_eos=True): pass
def tokenize(): phi.tokenize("Hi")
def load(): Phi.demo()
def close():
    with phi.stream("Hi", ignore_eos=True) as stream: next(stream)
def repeat(work):
    begun.release()
    while True: work()
for work in (generate, read, tokenize, load, close) * 8:
    threading.Thread(target=repeat, args=[work], daemon=True).start()
for _ in range(40): begun.acquire()
sys.exit(7)
"""
    for _ in range(3):
        assert ends_by_itself(any_python, script) == "slow"


def test_an_older_exit_handler_may_join_a_thread_that_generates(any_python: str) -> None:
    """Handlers run in reverse order: one from before the import runs after all of the package's own."""
    script = """
import atexit, queue, sys, threading
def stop():
    jobs.put(None)
    worker.join()
    print(len(texts))
atexit.register(stop)
from candle_phi import Phi
phi = Phi.demo(n_threads=1)
jobs, texts = queue.Queue(), []
def work():
    while (prompt := jobs.get()) is not None:
        texts.append(phi.generate(prompt, max_tokens=3, ignore_eos=True))
worker = threading.Thread(target=work, daemon=True)
worker.start()
for _ in range(20): jobs.put("Hi")
sys.exit(7)
"""
    assert ends_by_itself(any_python, script) == "20\n"


def test_an_older_exit_handler_may_join_an_event_loop(any_python: str) -> None:
    """The thread that wakes event loops has to outlive the exit handlers."""
    script = f"""
import asyncio, atexit, queue, sys, threading
def stop():
    for _ in range(20): jobs.put("Hi")
    jobs.put(None)
    worker.join({HANG / 2})
    print(len(texts))
atexit.register(stop)
from candle_phi import Phi
phi = Phi.demo(n_threads=1)
jobs, texts, begun = queue.Queue(), [], threading.Event()
async def serve():
    while (prompt := jobs.get()) is not None:
        texts.append(await phi.agenerate(prompt, max_tokens=3, ignore_eos=True))
        begun.set()
worker = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
worker.start()
jobs.put("Hi")
begun.wait()
sys.exit(7)
"""
    assert ends_by_itself(any_python, script) == "21\n"


def test_an_event_loop_may_start_after_the_main_thread_has_ended(any_python: str) -> None:
    """Python 3.12 starts no threads from then on."""
    script = """
import asyncio, sys, threading
from candle_phi import Phi
phi = Phi.demo(n_threads=1)
def work():
    threading.main_thread().join()
    print(len(asyncio.run(phi.agenerate("Hi", max_tokens=3, ignore_eos=True)).token_ids))
threading.Thread(target=work).start()
sys.exit(7)
"""
    assert ends_by_itself(any_python, script) == "3\n"


@posix
def test_a_signal_handler_of_the_application(path: Path, stopwatch: Stopwatch) -> None:
    """An exception of the handler leaves the call. When the handler returns, the call continues, even if the handler
    used the model."""
    script = f"""
import os, signal, threading, time
from candle_phi import Phi
phi = Phi({str(path)!r}, kernel="portable", n_threads=1, prefix_cache=0)
LONG = [5] * 20_000
class Enough(Exception): pass
def enough(*_):
    raise Enough
def ask(*_):
    print(phi.generate("Hi", max_tokens=2, ignore_eos=True).usage.completion_tokens)
def later():
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    return time.monotonic() + 0.3
signal.signal(signal.SIGALRM, enough)
for call in (phi.generate, phi.logits, lambda prompt: list(phi.stream(prompt))):
    since = later()
    try: call(LONG)
    except Enough: print(time.monotonic() - since)
signal.signal(signal.SIGALRM, ask)
later()
print(phi.generate({HAIKU!r}, ignore_eos=True, timeout=1).finish_reason)
"""
    *seconds, asked, finish_reason = run_python(script).split()
    assert (len(seconds), asked, finish_reason) == (3, "2", "timeout")
    for took in seconds:
        stopwatch.check(float(took), SOON)


@posix
def test_a_signal_ends_a_process_that_computes(path: Path) -> None:
    script = (
        "from candle_phi import Phi\n"
        f"phi = Phi({str(path)!r}, kernel='portable')\n"
        "phi.logits([5] * 20_000, on_progress=lambda p: print(p.phase, flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    while process.stdout.readline() != b"prefill\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == -signal.SIGTERM
    process.stdout.close()
