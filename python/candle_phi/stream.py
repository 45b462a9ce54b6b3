"""One generation, read piece by piece."""
# Decisions: docs/design/python.md

import copy
import threading
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, cast

from . import _engine
from .errors import ForkError, PhiError, missing_attribute
from .progress import Callback, notify
from .results import Chunk, FinishReason, Result, Timings, TokenLogprob, Usage


class Turn(Protocol):
    """The turn of a chat that a stream computes."""

    pieces: list[str]
    """The text so far, which the stream fills."""

    def settle(self) -> object:
        """Called when the end was read."""


class StreamBase:
    """The state of one generation: what a `Stream` and an `AsyncStream` have in common.

    Args:
        watch: called by a reader while it waits.
        logprobs: whether log probabilities were asked for.
        turn: the turn of a chat, which is told of the end.
    """

    def __init__(
        self,
        model: _engine.Model,
        stream: _engine.Stream,
        watch: Callback | None,
        *,
        logprobs: bool,
        turn: Turn | None = None,
    ) -> None:
        self._model = model
        self._stream = stream
        self._watch = watch
        self._turn = turn
        self._reading = threading.Lock()  # one reader at a time: pieces are recorded in the order of their tokens
        self._failure: PhiError | None = None
        self._pieces: list[str] = [] if turn is None else turn.pieces
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None

    def _raise_since(self, before: PhiError | None) -> None:
        """Raises the failure that another reader met meanwhile, so that the text does not end silently for this one."""
        if self._failure is not None and self._failure is not before:
            raise copy.copy(self._failure)

    def _take(self) -> tuple[bool, Chunk | None]:
        """Whether the next chunk is ready, and the chunk, which is None at the end. Records it. Never waits."""
        chunk = None
        ready, piece = self._stream.poll()
        while piece and not (chunk := self._record(piece)):
            ready, piece = self._stream.poll()
        if ready and chunk is None and self._turn is not None:
            self._turn.settle()
        return ready, chunk

    def _take_all(self) -> bool:
        """Records what there is to read. True at the end. Never waits."""
        while True:
            ready, chunk = self._take()
            if not ready or chunk is None:
                return ready

    def _record(self, piece: "_engine._Piece") -> Chunk | None:
        """Records a piece. The last one may have only ids without text: that is not a chunk."""
        text, ids, entries = piece
        logprobs = None if entries is None else [token_logprob(entry) for entry in entries]
        if self._logprobs is not None and logprobs:
            self._logprobs += logprobs
        self._pieces.append(text)
        return Chunk(text, ids, logprobs) if text else None

    def cancel(self) -> None:
        """Ends the generation. Returns at once, from any thread and in any phase. The text so far stays."""
        self._stream.cancel()

    @property
    def text(self) -> str:
        """The text read so far."""
        return "".join(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """The ids behind `text`, without the stop id. At the end also the last ids, if they had no text."""
        return self._stream.token_ids

    @property
    def seed(self) -> int:
        """The seed in use. Passing it back gives the same text."""
        return self._stream.seed

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until the end, then `"stop"`, `"length"`, `"cancelled"` or `"timeout"`; `"error"` after an exception."""
        return cast(FinishReason | None, self._stream.finish_reason)

    @property
    def usage(self) -> Usage:
        """The number of tokens so far. `prompt_tokens` is known from the start."""
        prompt, completion, cached, draft, accepted = self._stream.usage
        return Usage(prompt, completion, prompt + completion, cached, draft, accepted)

    @property
    def timings(self) -> Timings:
        """Seconds and speeds so far."""
        queue, prefill, decode, first, passes = self._stream.timings
        prompt, _, cached, _, accepted = self._stream.usage
        # a pass gives a token, and those of its drafts that were right
        return Timings(
            queue, prefill, decode, first, _speed(prompt - cached, prefill), _speed(passes + accepted, decode)
        )

    def _result(self, prompt_index: int | None = None) -> Result:
        """The whole answer. The stream must be at its end."""
        return Result(
            self.text,
            self.token_ids,
            self._logprobs,
            cast(FinishReason, self.finish_reason),
            self.usage,
            self.timings,
            self.seed,
            self._model.system_fingerprint,
            prompt_index,
        )

    def __repr__(self) -> str:
        kind = type(self).__name__
        try:
            return f"<{kind}: {self.usage.completion_tokens} tokens, {self.finish_reason or 'not finished'}>"
        except ForkError:
            return f"<{kind}: of another process>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled or copied; read it, and pickle its text")

    if not TYPE_CHECKING:  # a type checker would take every name

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute(self, name, later=("partial", "reasoning", "events"), foreign={})


class Stream(StreamBase, Generator[Chunk, None, None]):
    """The text of one generation, read piece by piece.

    >>> with phi.stream("What is icing?", temperature=0, max_tokens=3) as stream:
    ...     print([chunk for chunk in stream])
    ['A', ' long', ' shot']
    >>> stream.finish_reason, stream.usage.completion_tokens
    ('length', 3)

    An iterator of `Chunk`s, whose join is `text`. Work starts at the first read and stays at most a small buffer ahead
    of the reader. Any thread may read or cancel it. Leaving a `with` block or dropping the stream cancels it. It keeps
    its model alive.
    """

    # An object and not a Python generator, because one thread must be able to end it while another waits in `next`.

    _reader: int | None = None
    """The thread that is inside `next`."""

    def __next__(self) -> Chunk:
        if self._reader == threading.get_ident():  # from a signal handler: the lock below would deadlock
            raise ValueError("this thread is reading the stream already")
        self._stream.check_process()  # in a forked child, a thread that does not exist there may hold the lock below
        before = self._failure
        try:
            with self._reading:
                self._raise_since(before)
                self._reader = threading.get_ident()
                try:
                    chunk = self._next_chunk()
                except PhiError as error:
                    self._failure = error
                    raise
                finally:
                    self._reader = None
        except BaseException:  # Ctrl-C, at any line of this
            self._stream.cancel()
            raise
        if chunk is None:
            raise StopIteration
        return chunk

    def _next_chunk(self) -> Chunk | None:
        """Waits for the next chunk, which is None at the end. Callbacks and signal handlers run in this loop."""
        while True:
            notify(self._stream, self._watch, end=False)
            ready, chunk = self._take()
            if ready:
                if chunk is None:
                    notify(self._stream, self._watch, end=True)
                return chunk
            self._stream.wait()

    def send(self, value: None, /) -> Chunk:
        """`send(None)` is `next()`."""
        if value is not None:
            raise TypeError(f"a Stream takes no values, and was sent {type(value).__name__}")
        return next(self)

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
        /,
    ) -> NoReturn:
        """Cancels the stream and raises the exception, like a generator that does not catch it."""
        self.cancel()
        raise_thrown(typ, val, tb)

    def close(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def raise_thrown(
    typ: type[BaseException] | BaseException, val: BaseException | object, tb: TracebackType | None
) -> NoReturn:
    """Raises the exception that the arguments of a generator's `throw` stand for."""
    if isinstance(typ, BaseException):
        error = typ
    elif isinstance(val, BaseException):
        error = val
    else:
        error = typ() if val is None else typ(val)
    raise error if tb is None else error.with_traceback(tb)


def _speed(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None


def token_logprob(entry: "_engine._Logprob") -> TokenLogprob:
    """An entry of the engine as users see it."""
    token_id, text, raw, logprob, top = entry
    return TokenLogprob(token_id, text, raw, logprob, tuple(TokenLogprob(*other, ()) for other in top))
