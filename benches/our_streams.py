"""Streams of one model side by side, for streams_together.py: one figure at a time.

An old version of candle-phi answers the questions too, if PYTHONPATH names it.
"""

import contextlib
import inspect
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any, Self

import candle_phi
from candle_phi import OnProgress, Phi, Progress, Stream, _engine
from candle_phi._bench import machine
from worker import AHEAD, ANSWER, SHORT_PROMPT, parser, serve

ONE = 32
"""Tokens over which one stream alone is timed."""
ONE_PROMPT = 128
"""Tokens of a prompt whose time is measured alone."""
LATE_PROMPT = 20
"""Tokens of a prompt that arrives while another one is read."""
PAUSE = 2.0
"""Seconds from the first token of one late prompt to the arrival of the next."""
LAYERS = 8
"""Layers of a prompt over which one is timed."""
DECODERS = 8
"""Streams that decode while a prompt is read."""


class Reader(threading.Thread):
    """Reads a stream to its end, and records when each token came."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.arrivals: list[float] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            for chunk in self.stream:
                self._arrived(len(chunk.token_ids), time.perf_counter())
        except BaseException as error:
            self._error = error

    def _arrived(self, tokens: int, now: float) -> None:
        """Tokens without text of their own ride on the next chunk: each of them took a pass."""
        before = self.arrivals[-1] if self.arrivals else now
        self.arrivals += [before + (now - before) * i / tokens for i in range(1, tokens + 1)]

    def end(self) -> None:
        """Waits for the end of the stream, and raises the error that ended it."""
        self.join()
        if self._error is not None:
            raise self._error


class Streams:
    """The measurements of one model."""

    def __init__(self, phi: Phi) -> None:
        self.phi = phi
        self._ids = random.Random(0)

    def _stream(self, prompt: int, tokens: int, on_progress: OnProgress | None = None) -> Stream:
        """A stream of `tokens` tokens after a prompt of `prompt` random ids. It starts at its first read."""
        ids = [self._ids.randrange(self.phi.n_vocab) for _ in range(prompt)]
        return self.phi.stream(ids, max_tokens=tokens, temperature=0, ignore_eos=True, on_progress=on_progress)

    def _first_token(self, prompt: int) -> float:
        """Seconds from the first read to the first token."""
        with self._stream(prompt, 1) as stream:
            start = time.perf_counter()
            for _ in stream:
                pass
            return time.perf_counter() - start

    def one(self, _: int) -> dict[str, float]:
        """One stream alone: tokens per second of its answer, and of a longer prompt."""
        reader = Reader(self._stream(SHORT_PROMPT, 1 + ONE))
        reader.start()
        reader.end()
        return {"one": speed(reader.arrivals), "one prompt": ONE_PROMPT / self._first_token(ONE_PROMPT)}

    def in_turn(self, n: int) -> dict[str, float]:
        """`n` answers one after the other: tokens per second of decoding, and of all with the prompts."""
        decoding, start = [], time.perf_counter()
        for _ in range(n):
            reader = Reader(self._stream(SHORT_PROMPT, ANSWER))
            reader.start()
            reader.end()
            decoding.append(speed(reader.arrivals))
        whole = time.perf_counter() - start
        return {"decode in turn": harmonic_mean(decoding), "answers in turn": n * ANSWER / whole}

    def answers(self, n: int) -> dict[str, float]:
        """`n` calls at the same moment, each a short prompt and an answer: tokens per second in all."""
        readers = [Reader(self._stream(SHORT_PROMPT, ANSWER)) for _ in range(n)]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.end()
        return {"answers together": n * ANSWER / (time.perf_counter() - start)}

    def together(self, n: int) -> dict[str, float]:
        """`n` streams that decode side by side, their prompts read before: tokens per second in all."""
        with self._decoders(n, AHEAD + ANSWER) as readers:
            for reader in readers:
                reader.end()
        start = max(reader.arrivals[AHEAD] for reader in readers)
        end = max(reader.arrivals[-1] for reader in readers)
        counted = sum(arrival > start for reader in readers for arrival in reader.arrivals)
        return {"decode together": counted / (end - start)}

    @contextlib.contextmanager
    def _decoders(self, n: int, tokens: int) -> Iterator[list[Reader]]:
        """`n` streams whose prompts are read. A thread reads each from now on. They are cancelled at the end."""
        streams = [self._stream(SHORT_PROMPT, 1 + tokens) for _ in range(n)]
        for stream in streams:
            next(stream)
        rest()
        readers = [Reader(stream) for stream in streams]
        for reader in readers:
            reader.start()
        try:
            yield readers
        finally:
            for reader in readers:
                reader.stream.cancel()
            for reader in readers:
                reader.end()

    def gaps(self, prompt: int) -> dict[str, float]:
        """The longest wait of a decoding stream while a prompt is read, and its limit.

        The limit is the longest pass before the prompt arrived, and the longest layer of a prompt of that length alone.
        """
        layer = self._longest_layer(prompt)
        with self._decoders(DECODERS, self.phi.n_ctx - SHORT_PROMPT - 1) as readers:
            while any(len(reader.arrivals) < AHEAD + ANSWER for reader in readers):
                assert all(reader.is_alive() for reader in readers), "a stream ended before the prompt arrived"
                time.sleep(0.01)
            arrived = time.perf_counter()
            took = self._first_token(prompt)
            assert all(reader.is_alive() for reader in readers), "a stream ended while the prompt was read"
        waits = [wait for reader in readers for wait in pairwise(reader.arrivals[AHEAD:])]
        alone = [after - before for before, after in waits if after <= arrived]
        beside = [after - before for before, after in waits if after > arrived and before < arrived + took]
        return {
            "layer": layer,
            "gap alone": median(alone),
            "longest gap alone": max(alone),
            "gap": median(beside),
            "longest gap": max(beside),
            "gap over limit": max(beside) / (max(alone) + layer),
            "prompt beside decoders": took,
        }

    def _longest_layer(self, prompt: int) -> float:
        """Seconds of a layer of a prompt alone, in the slowest part of it.

        Progress is reported after each layer, but at most every 75 ms: the mean of several layers is exact enough. Of a
        model with shorter layers, this is an upper bound.
        """
        ends, done = [time.perf_counter()], 0

        def watch(progress: Progress) -> None:
            nonlocal done
            if progress.phase == "prefill" and done < progress.done < prompt:
                done = progress.done
                ends.append(time.perf_counter())

        with self._stream(prompt, 1, watch) as stream:
            for _ in stream:
                pass
        ends.append(time.perf_counter())
        n = min(LAYERS, len(ends) - 1)
        return max(after - before for before, after in zip(ends, ends[n:], strict=False)) / n

    def late(self, prompt: int) -> dict[str, float]:
        """Seconds to the first token of short prompts that arrive one by one while a long prompt is read."""
        begun = threading.Event()

        def watch(progress: Progress) -> None:
            if progress.phase == "prefill":
                begun.set()

        alone = self._first_token(LATE_PROMPT)
        long = Reader(self._stream(prompt, 1, watch))
        long.start()
        while not begun.wait(0.1) and long.is_alive():
            pass
        took: list[float] = []
        while not took or long.is_alive():
            took.append(self._first_token(LATE_PROMPT))
            long.join(PAUSE)
        long.end()
        return {"first token alone": alone, "first token": median(took), "longest first token": max(took)}

    def memory(self, tokens: int) -> dict[str, float]:
        """Bytes of anonymous memory that streams of `tokens` tokens take at most, over the bytes that were estimated.

        Nothing may have been computed before: later streams reuse memory.
        """
        before = anonymous()
        streams = [self._stream(tokens - 2 * AHEAD, 2 * AHEAD) for _ in range(DECODERS)]
        with Peak() as peak, ThreadPoolExecutor(DECODERS) as threads:
            # the engine computes ahead of them, and none of them ends
            list(threads.map(lambda stream: [next(stream) for _ in range(AHEAD // 2)], streams))
            rest()
        for stream in streams:
            stream.close()
        _, context, activations = _engine.memory_needed(self.phi.path, tokens, "f16")
        taken, estimated = peak.bytes - before, DECODERS * context + activations
        return {
            "memory before": before,
            "memory": taken,
            "estimated memory": estimated,
            "memory over estimate": taken / estimated,
        }


def speed(arrivals: list[float]) -> float:
    """Tokens per second after the first token."""
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def rest() -> None:
    """Waits until this process computes nothing: every stream is as far ahead of its reader as it may be."""
    while True:
        before = time.process_time()
        time.sleep(0.2)
        if time.process_time() - before < 0.02:
            return


class Peak(threading.Thread):
    """The most anonymous memory of this process within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, anonymous())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def anonymous() -> int:
    """Bytes of this process's memory that no file backs. 0 where the system, not Linux, does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kernel", required=True)
    options.add_argument("--questions", type=lambda text: text.split(","), required=True, help="those that will come")
    given = options.parse_args()
    # nothing is held or drafted; an old version has no such options
    known = inspect.signature(Phi).parameters
    computing: Any = {name: value for name, value in {"prefix_cache": 0, "speculate": False}.items() if name in known}
    with Phi(given.model, n_threads=given.n_threads, kernel=given.kernel, **computing) as phi:
        streams = Streams(phi)
        left_out = {}
        for question in given.questions:
            name, _, n = question.partition(" ")
            if name in ("gaps", "late", "memory") and int(n) >= phi.n_ctx:
                left_out[question] = f"{question}: needs {int(n) + 1} positions, the context has {phi.n_ctx}"
        ready = {
            "left_out": left_out,
            "package": str(Path(candle_phi.__file__).parent),
            "version": candle_phi.__version__,
            "n_threads": phi.n_threads,
            "machine": machine(),
            "cpu": _engine.doctor()["cpu"],
        }
        if not any(question.startswith("memory") for question in given.questions):
            streams.one(0)  # the first passes touch all weights once
        serve(
            ready,
            {
                "one": streams.one,
                "in_turn": streams.in_turn,
                "answers": streams.answers,
                "together": streams.together,
                "gaps": streams.gaps,
                "late": streams.late,
                "memory": streams.memory,
            },
        )


if __name__ == "__main__":
    main()
