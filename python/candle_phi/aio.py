"""The same streams for event loops: they wait without a thread, and no loop waits for them."""

import atexit
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from . import _engine
from .results import Chunk, FinishReason, Result, Timings, Usage
from .stream import Stream

if TYPE_CHECKING:  # at run time where it is used: it takes long to import, and not everybody needs it
    from asyncio import AbstractEventLoop, Event, Task


class AsyncStream(AsyncGenerator[Chunk, None]):
    """The text of one generation, as it is made, for event loops: `Stream` in every respect but how it waits.

    An asynchronous iterator of `Chunk`s, whose join is `text`. Work starts at the first read and goes no further ahead
    than a small buffer. Any thread may cancel it; leaving an `async with` block, cancelling the task that reads it, or
    dropping it, cancels what is left. It keeps its model alive and belongs to no loop: whichever reads it is woken.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reader: weakref.ref[Task[Any]] | None = None  # the task that read last

    async def __anext__(self) -> Chunk:
        import asyncio

        before = self._stream._failure
        try:
            self._follow(asyncio.current_task())
            await asyncio.sleep(0)  # a reader that finds text every time must let others run, and be cancelled
            ready, chunk = self._stream._poll()
            if not ready:
                chunk = await self._wait(asyncio.get_running_loop(), asyncio.Event())
            if chunk is None:
                self._stream._raise_since(before)
        except BaseException:
            self._stream.cancel()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _follow(self, task: "Task[Any] | None") -> None:
        """Cancelling the task ends the stream, whatever the task waits for: its frames, and with them the stream, may
        live on in a traceback until the garbage collector comes by."""
        if task is None or (self._reader is not None and self._reader() is task):
            return
        self._reader = weakref.ref(task)
        myself = weakref.ref(self)

        def left(task: "Task[Any]") -> None:
            stream = myself()
            if stream is not None and task.cancelled() and stream._reader is not None and stream._reader() is task:
                stream.cancel()

        task.add_done_callback(left)

    async def _wait(self, loop: "AbstractEventLoop", event: "Event") -> Chunk | None:
        """The next chunk, which is not there yet; None at the end."""
        stream = self._stream
        with _notifier().calling(loop, event) as call:
            while True:
                call(stream._stream)
                # The timer keeps this task alive, and goes when the loop is closed: the notifier keeps nothing.
                timer = loop.call_later(stream._pause(), event.set)
                try:
                    await event.wait()
                finally:
                    timer.cancel()
                event.clear()
                ready, chunk = stream._poll()
                if ready:
                    return chunk

    async def asend(self, value: None, /) -> Chunk:
        """`asend(None)` is `anext()`."""
        if value is not None:
            raise TypeError(f"an AsyncStream takes no values, and was sent {type(value).__name__}")
        return await self.__anext__()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
        /,
    ) -> NoReturn:
        """Cancels the stream and raises the exception, as a generator does that catches none."""
        self._stream.throw(typ, val, tb)

    def cancel(self) -> None:
        """Ends the generation, in any phase, from any thread; returns at once. The text so far stays."""
        self._stream.cancel()

    async def aclose(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    @property
    def text(self) -> str:
        """What was yielded so far."""
        return self._stream.text

    @property
    def token_ids(self) -> list[int]:
        """The ids behind `text`, and at the end also those that made no text; never the stop id."""
        return self._stream.token_ids

    @property
    def seed(self) -> int:
        """The seed in use: passing it back gives the same text."""
        return self._stream.seed

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until the end; then `"stop"`, `"length"`, `"cancelled"`, `"timeout"`; after an exception `"error"`."""
        return self._stream.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens so far; `prompt_tokens` is known from the start."""
        return self._stream.usage

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        return self._stream.timings

    def __repr__(self) -> str:
        return repr(self._stream).replace("Stream", "AsyncStream", 1)

    def __reduce__(self) -> NoReturn:
        self._stream.__reduce__()


async def generate(stream: AsyncStream) -> Result:
    """The whole text of a stream."""
    async with stream:
        async for _ in stream:
            pass
        return stream._stream._result()


class _Notifier:
    """The one thread of this process that waits for the streams of all event loops, inside the engine, and wakes the
    loops. The engine's own threads never come to Python."""

    def __init__(self) -> None:
        self._queue = _engine.ReadyQueue()
        self._tickets = itertools.count()
        self._waiting: dict[int, tuple[weakref.ref[AbstractEventLoop], weakref.ref[Event]]] = {}
        self._thread = threading.Thread(target=self._run, name="candle-phi-async", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (tickets := self._queue.take()) is not None:
            for ticket in tickets:
                self._wake(ticket)

    def _wake(self, ticket: int) -> None:
        if waiting := self._waiting.pop(ticket, None):
            loop, event = waiting[0](), waiting[1]()
            if loop is not None and event is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(event.set)

    @contextlib.contextmanager
    def calling(self, loop: "AbstractEventLoop", event: "Event") -> Iterator[Callable[[_engine.Stream], None]]:
        """Gives what makes the engine set the event once a stream has something to read."""
        ticket: int | None = None

        def call(stream: _engine.Stream) -> None:
            nonlocal ticket
            if ticket in self._waiting:
                return  # it is still to come
            ticket = next(self._tickets)
            self._waiting[ticket] = weakref.ref(loop), weakref.ref(event)
            stream.notify(self._queue, ticket)

        try:
            yield call
        finally:
            if ticket is not None:
                self._waiting.pop(ticket, None)

    def stop(self) -> None:
        self._queue.close()
        self._thread.join(1)


_current: _Notifier | None = None
_starting = threading.Lock()


def _notifier() -> _Notifier:
    """This process's notifier, which the first that waits starts."""
    global _current
    with _starting:
        if _current is None:
            _current = _Notifier()
            atexit.register(_stop)
        return _current


def _stop() -> None:
    """At the interpreter's exit, while threads can still end by themselves."""
    global _current
    with _starting:
        notifier, _current = _current, None
    if notifier is not None:
        notifier.stop()


def _forget() -> None:
    """In a forked child, which has none of its parent's threads."""
    global _current, _starting
    _current, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
