"""How far the work is: the callback's `Progress`, and the bar of a download."""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TextIO, TypeVar, cast

Watch = Callable[[str, int, int | None], object]
_Result = TypeVar("_Result")
_Result_co = TypeVar("_Result_co", covariant=True)


class Work(Protocol[_Result_co]):
    """What the engine does while somebody waits for it: `_engine.Task`, `_engine.Logits`, `_engine.Stream`."""

    def poll(self) -> tuple[bool, _Result_co | None]: ...
    def wait(self) -> None: ...
    def progress(self, end: bool) -> list[tuple[str, int, int | None]]: ...
    def cancel(self) -> None: ...


def finished(work: Work[_Result], watch: Watch | None) -> _Result:
    """What the work brings.

    The engine waits for a moment at a time. So signals are handled and callbacks called here, in Python: a thread that
    is in one when the interpreter ends is unwound, and must have none of the engine's frames.
    """
    try:
        while True:
            ready, result = work.poll()
            if ready:
                report(work, watch, end=True)
                return cast(_Result, result)
            work.wait()
            report(work, watch, end=False)
    except BaseException:
        work.cancel()
        raise


def report(work: Work[object], watch: Watch | None, *, end: bool) -> None:
    """Tells of progress what is due."""
    if watch is not None:
        for progress in work.progress(end):
            watch(*progress)


@dataclass(frozen=True)
class Progress:
    """What `on_progress` is called with.

    Attributes:
        phase: `"wait"` (for another process, the network, or one's turn), `"download"`, `"verify"`, `"load"`,
            `"prefill"` or `"decode"`.
        done: how much is done.
        total: of how much; None where nobody knows.
        unit: what is counted: `"bytes"`, or `"tokens"` of a generation.
    """

    phase: str
    done: int
    total: int | None
    unit: str


OnProgress = Callable[[Progress], object]


def watching_tokens(on_progress: OnProgress | None) -> Watch | None:
    """What the engine calls while it generates."""
    if on_progress is None:
        return None

    def watch(phase: str, done: int, total: int | None) -> None:
        try:
            on_progress(Progress(phase, done, total, "tokens"))
        except (StopIteration, StopAsyncIteration) as error:  # in a loop over chunks it would pass for their end
            raise RuntimeError(f"on_progress raised {type(error).__name__}") from error

    return watch


@contextlib.contextmanager
def watching(label: str, progress: bool | None, on_progress: OnProgress | None) -> Iterator[Watch | None]:
    """Gives what the engine calls while it works: it draws the bar, if there is to be one, and calls the callback.

    Args:
        label: what the bar is about.
        progress: whether to draw a bar; None: on a terminal or in a notebook.
        on_progress: the caller's callback; its exception ends the work.
    """
    bar = _Bar(label, sys.stderr) if progress or (progress is None and _has_viewer()) else None
    if bar is None and on_progress is None:
        yield None
        return

    def watch(phase: str, done: int, total: int | None) -> None:
        p = Progress(phase, done, total, "bytes")
        if bar is not None:
            bar.draw(p)
        if on_progress is not None:
            on_progress(p)

    try:
        yield watch
    finally:
        if bar is not None:
            bar.close()


def _has_viewer() -> bool:
    """Whether someone sees what is written to stderr as it is written, and has not asked for silence."""
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if "ipykernel" in sys.modules:
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None, an object of the application's, or closed
        return False


class _Bar:
    """One line that is written over and over: how far, how fast, how long to go."""

    def __init__(self, label: str, stream: TextIO | None) -> None:
        self._label = label
        self._stream = stream
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=100)  # some 6 seconds
        self._phase = ""
        self._drawn = 0

    def draw(self, p: Progress) -> None:
        if p.phase != self._phase:  # what was hashed says nothing about the network's speed
            self._phase = p.phase
            self._recent.clear()
        self._recent.append((time.monotonic(), p.done))
        if p.total is None:
            return
        parts = [
            {"wait": "waiting", "verify": "checking"}.get(p.phase, ""),
            f"{100 * p.done // p.total if p.total else 100:3} %",
            f"{p.done / 1e9:.2f} of {p.total / 1e9:.2f} GB"
            if p.total >= 1e9
            else f"{p.done / 1e6:.0f} of {p.total / 1e6:.0f} MB",
        ]
        (first, before), (last, done) = self._recent[0], self._recent[-1]
        if p.phase != "wait" and last > first and done > before:
            speed = (done - before) / (last - first)
            left = round((p.total - p.done) / speed)
            parts += [f"{speed / 1e6:.1f} MB/s", f"{left // 60}:{left % 60:02} left"]
        numbers = "  ".join(filter(None, parts))
        from shutil import get_terminal_size  # not at import: it brings five modules for compression

        columns = get_terminal_size().columns - 1
        room = columns - len(numbers) - len(self._label) - 6
        bar = ""
        if room >= 10:
            width = min(room, 30)
            full = width * p.done // p.total if p.total else width
            bar = f"[{'#' * full}{' ' * (width - full)}]  "
        line = f"{self._label}  {bar}{numbers}"[: max(columns, 0)]
        self._write("\r" + line.ljust(self._drawn))
        self._drawn = len(line)

    def close(self) -> None:
        """Leaves the line as it is: what comes next begins one of its own."""
        if self._drawn:
            self._write("\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (AttributeError, OSError, ValueError):  # no stream, gone, closed, or it cannot show the file's name
            self._stream = None
