"""One generation, read piece by piece."""

import copy
import threading
from collections.abc import Generator
from types import TracebackType
from typing import NoReturn, Self, cast

from . import _engine
from .errors import ForkError, PhiError
from .progress import Watch, report
from .results import Chunk, FinishReason, Result, Timings, TokenLogprob, Usage

_LOOK = 0.075
"""Seconds between two reports of progress: a callback is promised 20 a second at most, and one in 200 ms at least."""
_HOUR = 3600.0


class Stream(Generator[Chunk, None, None]):
    """The text of one generation, as it is made.

    An iterator of `Chunk`s, whose join is `text`. Work starts at the first read and goes no further ahead than a small
    buffer. Any thread may read or cancel it; leaving a `with` block, or dropping it, cancels what is left. It keeps its
    model alive.

    It is an object rather than a Python generator so that another thread can end it while one waits inside `next`.
    """

    def __init__(self, model: _engine.Model, stream: _engine.Stream, watch: Watch | None, *, logprobs: bool) -> None:
        self._model = model
        self._stream = stream
        self._watch = watch  # called by a reader that waits
        self._reading = threading.Lock()  # one reader at a time: what is noted here keeps the order of the tokens
        self._reader: int | None = None  # the thread that is inside `next`
        self._failure: PhiError | None = None
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None

    def __next__(self) -> Chunk:
        if self._reader == threading.get_ident():  # from a signal handler: the lock below would never come
            raise ValueError("this thread is reading the stream already")
        _ = self._stream.finish_reason  # ForkError, where a thread that was not forked may hold the lock below
        before = self._failure
        try:
            with self._reading:
                self._raise_since(before)
                self._reader = threading.get_ident()
                try:
                    chunk = self._read()
                except PhiError as error:
                    self._failure = error
                    raise
                finally:
                    self._reader = None
        except BaseException:  # Ctrl-C, wherever in here it came
            self._stream.cancel()
            raise
        if chunk is None:
            raise StopIteration
        return chunk

    def _raise_since(self, before: PhiError | None) -> None:
        """The failure that another reader has met meanwhile: no silent end for this one."""
        if self._failure is not None and self._failure is not before:
            raise copy.copy(self._failure)

    def _read(self) -> Chunk | None:
        """The next chunk; None at the end. Callbacks and signal handlers run here, as `progress.finished` has it."""
        while True:
            report(self._stream, self._watch, end=False)
            ready, chunk = self._take()
            if ready:
                if chunk is None:
                    report(self._stream, self._watch, end=True)
                return chunk
            self._stream.wait()

    def _poll(self) -> tuple[bool, Chunk | None]:
        """Whether there is something to read, and if so, the next chunk, None at the end. Never waits."""
        _ = self._stream.finish_reason  # ForkError, as above
        report(self._stream, self._watch, end=False)
        with self._reading:
            try:
                ready, chunk = self._take()
            except PhiError as error:
                self._failure = error
                raise
        if ready and chunk is None:
            report(self._stream, self._watch, end=True)
        return ready, chunk

    def _take(self) -> tuple[bool, Chunk | None]:
        """What there is, and a note of it."""
        chunk = None
        ready, piece = self._stream.poll()
        while piece and not (chunk := self._chunk(piece)):
            ready, piece = self._stream.poll()
        return ready, chunk

    def _chunk(self, piece: "_engine._Read") -> Chunk | None:
        """Notes what was read. The last piece may have only ids that made no text: they are no chunk."""
        text, ids, entries = piece
        logprobs = None if entries is None else [_logprob(entry) for entry in entries]
        if self._logprobs is not None and logprobs:
            self._logprobs += logprobs
        self._pieces.append(text)
        return Chunk(text, ids, logprobs) if text else None

    def _pause(self) -> float:
        """Seconds after which who waits for `_poll` must look again, though nobody has called."""
        pauses = [self._stream.time_left, None if self._watch is None else _LOOK, _HOUR]
        return min(pause for pause in pauses if pause is not None)

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
        """Cancels the stream and raises the exception, as a generator does that catches none."""
        self.cancel()
        if isinstance(typ, BaseException):
            error = typ
        elif isinstance(val, BaseException):
            error = val
        else:
            error = typ() if val is None else typ(val)
        raise error if tb is None else error.with_traceback(tb)

    def cancel(self) -> None:
        """Ends the generation, in any phase, from any thread; returns at once. The text so far stays."""
        self._stream.cancel()

    def close(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def text(self) -> str:
        """What was yielded so far."""
        return "".join(self._pieces)

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
        return cast(FinishReason | None, self._stream.finish_reason)

    @property
    def usage(self) -> Usage:
        """Tokens so far; `prompt_tokens` is known from the start."""
        prompt, completion = self._stream.usage
        return Usage(prompt, completion, prompt + completion, 0)

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        queue, prefill, decode, first, passes = self._stream.timings
        prompt, _ = self._stream.usage
        return Timings(queue, prefill, decode, first, _speed(prompt, prefill), _speed(passes, decode))

    def _result(self) -> Result:
        """The whole answer of a stream that was read to its end."""
        return Result(
            self.text,
            self.token_ids,
            self._logprobs,
            cast(FinishReason, self.finish_reason),
            self.usage,
            self.timings,
            self.seed,
            self._model.system_fingerprint,
        )

    def __repr__(self) -> str:
        try:
            return f"<Stream: {self.usage.completion_tokens} tokens, {self.finish_reason or 'not finished'}>"
        except ForkError:
            return "<Stream: of another process>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Stream cannot be pickled or copied: it is work under way; read it, and pickle the text")


def _speed(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None


def _logprob(entry: "_engine._Logprob") -> TokenLogprob:
    token_id, text, raw, logprob, top = entry
    return TokenLogprob(token_id, text, raw, logprob, tuple(TokenLogprob(*other, ()) for other in top))
