"""Progress of work that takes long: the callback's `Progress`, and the bar of a download."""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO, TypeVar, cast

Callback = Callable[[str, int, int | None], object]
_Result = TypeVar("_Result")
_Result_co = TypeVar("_Result_co", covariant=True)


class Work(Protocol[_Result_co]):
    """Work of the engine that a caller waits for, such as `_engine.Task` and `_engine.Scores`."""

    def poll(self) -> tuple[bool, _Result_co | None]: ...
    def wait(self) -> None: ...
    def progress(self, end: bool) -> list[tuple[str, int, int | None]]: ...
    def cancel(self) -> None: ...


def wait_for(work: Work[_Result], callback: Callback | None) -> _Result:
    """Waits for the result.

    The engine waits for a moment at a time, and signals and callbacks are handled here, in Python. A thread inside a
    callback is unwound when the interpreter ends, and must not have frames of the engine then.
    """
    try:
        while True:
            ready, result = work.poll()
            if ready:
                notify(work, callback, end=True)
                return cast(_Result, result)
            work.wait()
            notify(work, callback, end=False)
    except BaseException:
        work.cancel()
        raise


def each_item(work: Work[_Result], callback: Callback | None) -> Iterator[_Result]:
    """Yields the items of work that has several, up to its end. Waits as `wait_for` does."""
    try:
        while True:
            ready, item = work.poll()
            if ready and item is None:
                notify(work, callback, end=True)
                return
            if ready:
                yield cast(_Result, item)
            else:
                work.wait()
            notify(work, callback, end=False)
    except BaseException:
        work.cancel()
        raise


def notify(work: Work[object], callback: Callback | None, *, end: bool) -> None:
    """Calls the callback for each progress report."""
    if callback is not None:
        for progress in work.progress(end):
            callback(*progress)


@dataclass(frozen=True)
class Progress:
    """What `on_progress` is called with.

    Attributes:
        phase: `"wait"` (for another process, the network, or a turn), `"download"`, `"verify"`, `"load"`, `"prefill"`
            or `"decode"`.
        done: how much is done.
        total: how much there is to do; None if that is unknown.
        unit: `"bytes"`, or `"tokens"` of a generation.
    """

    phase: str
    done: int
    total: int | None
    unit: str


OnProgress = Callable[[Progress], object]
"""A function that takes a `Progress`, at most 20 times a second. Its result is ignored. An exception ends the work."""


def token_callback(on_progress: OnProgress | None) -> Callback | None:
    """The callback for the engine while it generates."""
    if on_progress is None:
        return None

    def callback(phase: str, done: int, total: int | None) -> None:
        try:
            on_progress(Progress(phase, done, total, "tokens"))
        except (StopIteration, StopAsyncIteration) as error:  # a loop over chunks would take it for their end
            raise RuntimeError(f"on_progress raised {type(error).__name__}") from error

    return callback


@contextlib.contextmanager
def progress_callback(label: str, progress: bool | None, on_progress: OnProgress | None) -> Iterator[Callback | None]:
    """Yields the callback for the engine while it works. It draws the bar, if there is one, and calls `on_progress`.

    Args:
        label: the name beside the bar.
        progress: whether to draw a bar; None: on a terminal or in a notebook.
        on_progress: the caller's callback. Its exception ends the work.
    """
    bar = _Bar(label, sys.stderr) if progress or (progress is None and has_viewer()) else None
    if bar is None and on_progress is None:
        yield None
        return

    def callback(phase: str, done: int, total: int | None) -> None:
        p = Progress(phase, done, total, "bytes")
        if bar is not None:
            bar.draw(p)
        if on_progress is not None:
            on_progress(p)

    try:
        yield callback
    finally:
        if bar is not None:
            bar.close()


def has_viewer() -> bool:
    """Whether stderr is a terminal or a notebook, and HF_HUB_DISABLE_PROGRESS_BARS does not ask for silence."""
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if "ipykernel" in sys.modules:
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None, an object of the application's, or closed
        return False


def terminal_columns() -> int:
    """The terminal's width."""
    from shutil import get_terminal_size  # not at import: it brings five modules for compression

    return get_terminal_size().columns


def bar_line(columns: int, label: str, done: int, total: int, details: Sequence[str]) -> str:
    """A label, a bar, a percentage and details within a number of columns.

    The bar stays at every width from 20 columns on. For it, the label is shortened in its middle, and details are left
    out from the end.
    """
    percent = f"{100 * done // total if total else 100:3}%"
    numbers = [percent, *details]
    while len(numbers) > 1 and columns - len("  ".join(numbers)) < _LEAST_BAR + _LEAST_LABEL:
        numbers.pop()
    text = "  ".join(numbers)
    room = columns - len(text) - _LEAST_BAR
    label = _shorten(label, room - 2) + "  " if room >= _LEAST_LABEL else ""
    cells = min(columns - len(text) - len(label) - len("[]  "), 30)
    if cells < 1:
        return text[: max(columns, 0)]
    full = cells * done // total if total else cells
    return f"{label}[{'#' * full}{' ' * (cells - full)}]  {text}"


_LEAST_BAR = len("[##########]  ")
_LEAST_LABEL = 8


def _shorten(text: str, width: int) -> str:
    """The text, or its beginning and its end: a file's end says how it is quantized."""
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return text[: width - 3 - end] + "..." + text[len(text) - end :]


class _Bar:
    """One line on the terminal that is drawn again and again: how much is done, the speed, the time left."""

    def __init__(self, label: str, stream: TextIO | None) -> None:
        self._label = label
        self._stream = stream
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=100)  # about 6 seconds
        self._phase = ""
        self._began = 0.0
        self._drawn = 0

    def draw(self, p: Progress) -> None:
        now = time.monotonic()
        if p.phase != self._phase:  # the speed of hashing says nothing about the network's
            self._phase, self._began = p.phase, now
            self._recent.clear()
        self._recent.append((now, p.done))
        columns = terminal_columns() - 1
        if p.total is None:
            line = self._count(p, now - self._began)[: max(columns, 0)]
        else:
            line = bar_line(columns, self._label, p.done, p.total, self._details(p, p.total))
        self._write("\r" + line.ljust(self._drawn))
        self._drawn = len(line)

    def _count(self, p: Progress, seconds: float) -> str:
        """The line while the total is unknown."""
        numbers = [f"{p.done / 1e6:.1f} MB"] if p.done else []
        return "  ".join([self._label, _VERBS.get(p.phase, p.phase), *numbers, f"{seconds:.0f} s"])

    def _details(self, p: Progress, total: int) -> list[str]:
        """What is beside the bar, the most important first."""
        if total >= 1e9:
            sizes = f"{p.done / 1e9:.2f} of {total / 1e9:.2f} GB"
        else:
            digits = 0 if total >= 1e7 else 1
            sizes = f"{p.done / 1e6:.{digits}f} of {total / 1e6:.{digits}f} MB"
        if p.phase == "wait":
            return [_VERBS["wait"], sizes]
        verb = [_VERBS["verify"]] if p.phase == "verify" else []
        (first, before), (last, done) = self._recent[0], self._recent[-1]
        remaining, speed = "", ""
        if last > first and done > before:
            bytes_per_second = (done - before) / (last - first)
            seconds = round((total - p.done) / bytes_per_second)
            remaining, speed = f"{seconds // 60}:{seconds % 60:02} left", f"{bytes_per_second / 1e6:.1f} MB/s"
        return [*verb, sizes, remaining.rjust(10), speed.rjust(10)]  # as wide from the start, so that the bar stays

    def close(self) -> None:
        """Leaves the line as it is. What comes next begins on a line of its own."""
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


_VERBS = {"wait": "waiting", "verify": "checking", "download": "downloading", "load": "loading"}
