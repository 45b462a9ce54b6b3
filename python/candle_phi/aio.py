"""Streams for event loops. Waiting takes no thread and blocks no loop."""
# Decisions: docs/design/python.md

import contextlib
import itertools
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from . import _engine
from .errors import PhiError
from .progress import notify
from .results import Chunk, Result
from .stream import Stream, StreamBase, raise_thrown

if TYPE_CHECKING:  # at run time where it is used: it takes long to import, and few programs need it
    from asyncio import AbstractEventLoop, Event, Task

_PROGRESS_INTERVAL = 0.075
"""Seconds between two progress reports. The contract: at most 20 a second, and at least one in 200 ms."""
POLL_INTERVAL = 0.02
"""Seconds between two polls of a stream if no thread can be started."""
HOUR = 3600.0


class TaskReader(ABC):
    """A reader that ends when the task that reads it is cancelled, wherever the task waits.

    The task's frames hold the reader, and a traceback may keep them alive until the next garbage collection.
    """

    _reader: "weakref.ref[Task[Any]] | None" = None
    """The task that read last."""

    @abstractmethod
    def cancel(self) -> None:
        """Ends the reader."""

    def _follow(self, task: "Task[Any] | None") -> None:
        """Makes cancelling the task end this reader."""
        if task is None or (self._reader is not None and self._reader() is task):
            return
        self._reader = weakref.ref(task)
        readers = _read_by.get(task)
        if readers is None:
            readers = _read_by[task] = weakref.WeakSet()
            task.add_done_callback(_end_readers)
        readers.add(self)


_read_by: weakref.WeakKeyDictionary[Any, weakref.WeakSet[TaskReader]] = weakref.WeakKeyDictionary()
"""The readers of each task. One done callback serves all: a task may read any number of streams."""


def _end_readers(task: "Task[Any]") -> None:
    """Ends the readers that a cancelled task was the last to read."""
    for reader in list(_read_by.pop(task, ())):
        if task.cancelled() and reader._reader is not None and reader._reader() is task:
            reader.cancel()


class AsyncStream(StreamBase, TaskReader, AsyncGenerator[Chunk, None]):
    """The text of one generation, read piece by piece in an event loop.

    >>> async def answer():
    ...     async with phi.astream("What is icing?", temperature=0, max_tokens=3) as stream:
    ...         return [chunk async for chunk in stream]
    >>> asyncio.run(answer())
    ['A', ' long', ' shot']

    An asynchronous iterator of `Chunk`s, whose join is `text`. Work starts at the first read and stays at most a small
    buffer ahead of the reader. Any thread may cancel it. Leaving an `async with` block, cancelling the task that reads
    it, or dropping it cancels it. It keeps its model alive. It belongs to no event loop.
    """

    def __init__(self, stream: Stream) -> None:
        """Takes over a stream that has not been read."""
        with_logprobs = stream._logprobs is not None
        super().__init__(stream._model, stream._stream, stream._watch, logprobs=with_logprobs, turn=stream._turn)

    async def __anext__(self) -> Chunk:
        import asyncio

        before = self._failure
        try:
            self._follow(asyncio.current_task())
            await asyncio.sleep(0)  # a reader that never waits must still let others run, and be cancelled
            ready, chunk = self._poll()
            if not ready:
                chunk = await self._wait(asyncio.get_running_loop(), asyncio.Event())
            if chunk is None:
                self._raise_since(before)
        except BaseException:
            self.cancel()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _poll(self) -> tuple[bool, Chunk | None]:
        """Whether the next chunk is ready, and the chunk, which is None at the end. Never waits."""
        self._stream.check_process()  # in a forked child, a thread that does not exist there may hold the lock below
        notify(self._stream, self._watch, end=False)
        with self._reading:
            try:
                ready, chunk = self._take()
            except PhiError as error:
                self._failure = error
                raise
        if ready and chunk is None:
            notify(self._stream, self._watch, end=True)
        return ready, chunk

    async def _wait(self, loop: "AbstractEventLoop", event: "Event") -> Chunk | None:
        """Waits for the next chunk, which is None at the end."""
        notifier = running_notifier()
        ticket: int | None = None
        try:
            while True:
                if notifier is not None:
                    ticket = notifier.call(self._stream, loop, event, ticket)
                # The timer keeps this task alive, and goes when the loop is closed. The notifier keeps nothing alive.
                timer = loop.call_later(POLL_INTERVAL if notifier is None else self._pause(), event.set)
                try:
                    await event.wait()
                finally:
                    timer.cancel()
                event.clear()
                ready, chunk = self._poll()
                if ready:
                    return chunk
        finally:
            if notifier is not None:
                notifier.forget(ticket)

    def _pause(self) -> float:
        """Seconds after which to call `_poll` again, also without a call of the notifier."""
        pauses = [self._stream.time_left, None if self._watch is None else _PROGRESS_INTERVAL, HOUR]
        return min(pause for pause in pauses if pause is not None)

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
        """Cancels the stream and raises the exception, like a generator that does not catch it."""
        self.cancel()
        raise_thrown(typ, val, tb)

    async def aclose(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


async def agenerate(stream: AsyncStream) -> Result:
    """Reads a stream to its end."""
    async with stream:
        async for _ in stream:
            pass
        return stream._result()


class Notifier:
    """The one thread of this process that waits for the streams of all event loops, and wakes the loops.

    It waits inside the engine. The engine's own threads never run Python code. It lives as long as the process: exit
    handlers of the application may still join a thread that reads in an event loop.
    """

    def __init__(self) -> None:
        self._queue = _engine.ReadyQueue()
        self._tickets = itertools.count()
        self._waiting: dict[int, tuple[weakref.ref[AbstractEventLoop], weakref.ref[Event]]] = {}
        self._thread = threading.Thread(target=self._run, name="candle-phi-async", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            for ticket in self._queue.take(None):
                self._wake(ticket)

    def _wake(self, ticket: int) -> None:
        if waiting := self._waiting.pop(ticket, None):
            loop, event = waiting[0](), waiting[1]()
            if loop is not None and event is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(event.set)

    def call(self, stream: _engine.Stream, loop: "AbstractEventLoop", event: "Event", last: int | None) -> int:
        """Makes the engine set the event once a stream has something to read.

        Does nothing while the stream's last call is pending. Takes that call's ticket and returns the new one.
        """
        if last is not None and last in self._waiting:
            return last
        ticket = next(self._tickets)
        self._waiting[ticket] = weakref.ref(loop), weakref.ref(event)
        stream.notify(self._queue, ticket)
        return ticket

    def forget(self, ticket: int | None) -> None:
        """Ends a call, if it is pending."""
        if ticket is not None:
            self._waiting.pop(ticket, None)


_current: Notifier | None = None
_starting = threading.Lock()


def running_notifier() -> Notifier | None:
    """This process's notifier. The first call starts it. None if no thread can be started: the system has no more, or
    the interpreter exits (Python 3.12)."""
    global _current
    with _starting:
        if _current is None:
            with contextlib.suppress(RuntimeError):
                _current = Notifier()
        return _current


def _forget() -> None:
    """Forgets the notifier in a forked child, which has none of its parent's threads."""
    global _current, _starting
    _current, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
