"""The results of many prompts, whose streams share the passes of a model."""
# Decisions: docs/design/python.md

import contextlib
import threading
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

from . import _engine
from .aio import HOUR, POLL_INTERVAL, Notifier, TaskReader, running_notifier
from .errors import ClosedError, ForkError
from .messages import are_ids
from .results import Result
from .stream import Stream

if TYPE_CHECKING:  # at run time where it is used: it takes long to import, and few programs need it
    from asyncio import AbstractEventLoop, Event, Task

_Outcome = TypeVar("_Outcome", bound=Result | Exception)
_Value = TypeVar("_Value")
_END = object()

_SIGNAL_INTERVAL = 0.075
"""The longest wait in one piece, in seconds: Ctrl-C is handled between two."""


def several(prompts: object, call: str) -> None:
    """Checks the prompts of a call, as far as that is possible without drawing one.

    Raises:
        TypeError: they are not an iterable of prompts. A single prompt is the usual mistake.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{call}() takes several prompts, not a str: {call}([prompt])")
    if isinstance(prompts, (bytes, bytearray, memoryview)):
        raise TypeError(f"{call}() takes several prompts, not {type(prompts).__name__}")
    if not isinstance(prompts, (Iterable, AsyncIterable) if call == "amap" else Iterable):
        hint = ": use amap()" if isinstance(prompts, AsyncIterable) else ""
        raise TypeError(f"{call}() takes an iterable of prompts, not {type(prompts).__name__}{hint}")
    first = prompts[0] if isinstance(prompts, (list, tuple)) and prompts else prompts
    if isinstance(first, Mapping):
        raise TypeError(f"{call}() takes several prompts, not the messages of one: {call}([messages])")
    if first is not prompts and are_ids([first]):
        raise TypeError(f"{call}() takes several prompts, not the token ids of one: {call}([ids])")


class Batch:
    """The prompts of one call: those whose streams run, and those whose results are not yielded yet.

    Args:
        start: makes the stream of a prompt. The engine computes it to its end without further reads.
        ordered: yield results in the order of their prompts, not in the order of their ends.
        return_exceptions: yield the exception of a prompt in place of its result.
        max_pending: the number of prompts that may be started and not yielded.
    """

    def __init__(
        self, start: Callable[[Any], Stream], *, ordered: bool, return_exceptions: bool, max_pending: int
    ) -> None:
        self.running: dict[int, Stream] = {}  # by the prompt's index
        self.ended = False  # no more prompts are drawn
        self.closed = False
        self.watch: Callable[[int, Stream], None] = lambda index, stream: None
        """Arranges that `collect` is called again once the stream of an index has something to read."""
        self._start = start
        self._ordered = ordered
        self._return_exceptions = return_exceptions
        self._max_pending = max_pending
        self._done: dict[int, Result | Exception] = {}  # by the prompt's index, in the order of the ends
        self._started = 0
        self._yielded = 0
        self._fault: BaseException | None = None  # of the iterator of prompts

    def has_room(self) -> bool:
        """Whether another prompt may be started."""
        return not self.ended and len(self.running) + len(self._done) < self._max_pending

    def is_finished(self) -> bool:
        """Whether every result was taken, and no prompt is left."""
        return self.closed or (self.ended and not self.running and not self._done)

    def begin(self, prompt: object) -> None:
        """Starts the next prompt."""
        index, self._started = self._started, self._started + 1
        stream = _attempt(self._start, prompt)
        if isinstance(stream, Exception):
            self._put(index, stream)
            return
        self.running[index] = stream
        self.collect(index)
        if self.closed:  # by another thread since the prompt was drawn
            stream.cancel()

    def end(self, fault: BaseException | None = None) -> None:
        """There are no more prompts. `fault`: why, if their iterator failed. It is raised after the results."""
        self.ended = True
        if not self.closed:
            self._fault = self._fault or fault

    def collect(self, index: int) -> None:
        """Takes the result of a stream that is at its end."""
        stream = self.running.get(index)
        if stream is None:
            return
        outcome = _attempt(_read, stream, index)
        if outcome is None:
            self.watch(index, stream)
        elif self.running.pop(index, None) is not None:
            self._put(index, outcome)

    def collect_late(self) -> None:
        """Takes the results of streams whose timeout is over. The engine wakes no reader for it while they queue."""
        for index, stream in list(self.running.items()):
            if stream._stream.time_left == 0:
                self.collect(index)

    def pause(self, longest: float) -> float:
        """Seconds to the next timeout, at most `longest`."""
        left = [stream._stream.time_left for stream in list(self.running.values())]
        return min([longest, *(seconds for seconds in left if seconds is not None)])

    def is_ready(self) -> bool:
        """Whether the next result is there."""
        return self._yielded in self._done if self._ordered else bool(self._done)

    def take(self) -> Result | Exception | None:
        """The next result; None if there is none yet. Raises the exception of its prompt or of the iterator."""
        index = self._yielded if self._ordered else next(iter(self._done), -1)
        outcome = self._done.pop(index, None)
        if self.closed:  # perhaps by another thread: the outcome may be that of a cancelled stream
            return None
        if outcome is None:
            fault = self._fault if self.is_finished() else None
            if fault is not None:
                self._fault = None
                raise fault
            return None
        self._yielded += 1
        if isinstance(outcome, Exception) and self._raises(outcome):
            raise outcome
        return outcome

    def close(self) -> None:
        """Cancels what runs, from any thread."""
        self.closed = self.ended = True
        self._fault = None
        for stream in list(self.running.values()):
            stream.cancel()
        self.running.clear()
        self._done.clear()

    def _put(self, index: int, outcome: Result | Exception) -> None:
        if isinstance(outcome, Exception):
            with contextlib.suppress(AttributeError):  # a class with __slots__
                outcome.prompt_index = index  # type: ignore[attr-defined]  # documented in Phi.map
            outcome.add_note(f"raised by prompts[{index}]")
            if self._raises(outcome):
                self.ended = True
        self._done[index] = outcome

    def _raises(self, error: Exception) -> bool:
        """Whether an exception ends the call. One of the whole model always does: no other prompt would succeed."""
        return not self._return_exceptions or isinstance(error, (ClosedError, ForkError))


def _attempt(function: Callable[..., _Value], *args: object) -> _Value | Exception:
    """Calls a function and returns what it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _read(stream: Stream, index: int) -> Result | None:
    """The result of a stream that is at its end."""
    return stream._result(index) if stream._take_all() else None


class Results(Iterator[_Outcome], Generic[_Outcome]):
    """The results of `Phi.map`. An iterator. Closing or dropping it cancels what runs."""

    def __init__(self, batch: Batch, prompts: Iterable[object]) -> None:
        self._batch = batch
        self._prompts = iter(prompts)
        self._reading = threading.Lock()
        self._queue = queue = _engine.ReadyQueue()
        batch.watch = lambda index, stream: stream._stream.notify(queue, index)

    def __next__(self) -> _Outcome:
        if not self._reading.acquire(blocking=False):
            raise ValueError("the results are being read already")  # as of a generator
        try:
            return self._next()
        except BaseException:  # Ctrl-C, at any line of this
            self.close()
            raise
        finally:
            self._reading.release()

    def _next(self) -> _Outcome:
        while True:
            while self._batch.has_room():
                self._draw()
                self._collect(0)
                if self._batch.is_ready():  # a slow iterator of prompts delays a result by one prompt, not by all
                    break
            outcome = self._batch.take()
            if outcome is not None:
                return cast(_Outcome, outcome)  # the overloads of Phi.map say which type it has
            if self._batch.is_finished():
                raise StopIteration
            self._collect(self._batch.pause(_SIGNAL_INTERVAL))

    def _collect(self, seconds: float) -> None:
        """Waits at most this long for a stream that is at its end, and collects what there is."""
        for index in self._queue.take(seconds):
            self._batch.collect(index)
        self._batch.collect_late()

    def _draw(self) -> None:
        """Starts the next prompt, if there is one."""
        try:
            prompt = next(self._prompts, _END)
        except Exception as error:
            self._batch.end(error)
            return
        if prompt is _END:
            self._batch.end()
        else:
            self._batch.begin(prompt)

    def close(self) -> None:
        """Cancels what runs, from any thread. Reading ends."""
        self._batch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncResults(TaskReader, AsyncIterator[_Outcome], Generic[_Outcome]):
    """The results of `Phi.amap`. An asynchronous iterator of one event loop.

    Closing it, cancelling the task that reads it, or dropping it cancels what runs.
    """

    def __init__(self, batch: Batch, prompts: Iterable[object] | AsyncIterable[object]) -> None:
        self._batch = batch
        self._drawing: _Drawing | None = None  # from the first read on
        self._is_read = False
        self._prompts = aiter(prompts) if isinstance(prompts, AsyncIterable) else iter(prompts)

    async def __anext__(self) -> _Outcome:
        if self._is_read:
            raise RuntimeError("the results are being read already")  # as of an asynchronous generator
        self._is_read = True
        try:
            return await self._next()
        except BaseException:
            self.cancel()
            raise
        finally:
            self._is_read = False

    async def _next(self) -> _Outcome:
        import asyncio

        self._follow(asyncio.current_task())
        await asyncio.sleep(0)  # a reader that never waits must still let others run, and be cancelled
        if self._drawing is None:
            self._drawing = _Drawing(self._batch, self._prompts)
        while True:
            outcome = self._batch.take()
            if outcome is not None:
                self._drawing.room.set()
                return cast(_Outcome, outcome)  # the overloads of Phi.amap say which type it has
            if self._batch.is_finished():
                raise StopAsyncIteration
            await self._drawing.change()

    def cancel(self) -> None:
        """Cancels what runs, from any thread. Returns at once. Reading ends."""
        self._batch.close()
        if self._drawing is not None:
            self._drawing.cancel()

    async def aclose(self) -> None:
        """Cancels what runs, and waits for the end of the iterator of prompts if it is being read."""
        self.cancel()
        if self._drawing is not None:
            await self._drawing.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self.cancel()  # the task that draws prompts keeps the streams alive


class _Drawing:
    """The task that draws prompts and starts them, so that a prompt that is late does not delay a result.

    All prompts are drawn by one task: an asynchronous generator may use `asyncio.timeout` and its like.
    """

    def __init__(self, batch: Batch, prompts: Iterator[object] | AsyncIterator[object]) -> None:
        import asyncio

        self.room = asyncio.Event()  # a result was taken
        self._changed = asyncio.Event()  # there may be a result
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._notifier = running_notifier()
        if self._notifier is not None:
            batch.watch = _watching(self._notifier, self._loop, self._changed)
        self._task: Task[None] = self._loop.create_task(_draw(batch, prompts, self.room, self._changed))

    async def change(self) -> None:
        """Waits until there may be a result, and collects what there is."""
        pause = POLL_INTERVAL if self._notifier is None else self._batch.pause(HOUR)
        # The timer keeps this task alive, and goes when the loop is closed. The notifier keeps nothing alive.
        timer = self._loop.call_later(pause, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()
        self._changed.clear()
        for index in list(self._batch.running):
            self._batch.collect(index)

    def cancel(self) -> None:
        """Ends the task, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._loop.call_soon_threadsafe(self._changed.set)

    async def end(self) -> None:
        """Waits for the end of the task."""
        import asyncio

        if self._task is not asyncio.current_task():
            await asyncio.wait([self._task])


def _watching(notifier: Notifier, loop: "AbstractEventLoop", event: "Event") -> Callable[[int, Stream], None]:
    """The `watch` of a batch that an event loop reads."""
    tickets: weakref.WeakKeyDictionary[Stream, int] = weakref.WeakKeyDictionary()

    def watch(index: int, stream: Stream) -> None:
        tickets[stream] = notifier.call(stream._stream, loop, event, tickets.get(stream))

    return watch


async def _draw(
    batch: Batch, prompts: Iterator[object] | AsyncIterator[object], room: "Event", changed: "Event"
) -> None:
    """Draws prompts and starts them, while there is room."""
    import asyncio

    try:
        while not batch.ended:
            prompt = await anext(prompts, _END) if isinstance(prompts, AsyncIterator) else next(prompts, _END)
            if prompt is _END:
                break
            batch.begin(prompt)
            changed.set()
            await asyncio.sleep(0)  # tokenizing takes the loop's time
            while not batch.ended and not batch.has_room():
                room.clear()
                await room.wait()
    except BaseException as error:
        batch.end(error)  # also if the iterator cancelled itself: a reader must not wait for more
        if not isinstance(error, Exception):
            raise
    finally:
        batch.end()
        changed.set()
