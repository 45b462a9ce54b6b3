"""Hours of use in minutes: `make soak` (SOAK_SECONDS, 60).

Threads share one bundled model and generate with random options, so that streams join and leave the passes of others
at any moment. Their prompts are of mixed lengths, and many begin alike. A fifth of the streams is cancelled at a random
moment: by the reader, by another thread, by its timeout. Some threads read many prompts with `phi.map`, and close some
of these iterators early. Now and then a thread opens a model of its own and closes it under a live stream.

Anonymous memory (which has the KV cache), file descriptors and threads must not grow. Every text must be that of a
serial run with the same seed, with its ids and log probabilities. A cancelled text must be the beginning of it.
"""

import argparse
import ctypes
import gc
import hashlib
import os
import random
import re
import sys
import threading
import time
from array import array
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from candle_phi import ClosedError, Phi, Result, TokenLogprob

CANCELLED = 0.2
OWN_MODEL = 0.02
MAPPED = 0.1
SPELLS = 6
"""The run is cut into these. Resources are compared between them, when nothing runs."""
ALLOCATED = 0.2
"""MiB by which allocations may grow. 128 positions of the bundled model take 0.25 MiB of the KV cache."""
ANONYMOUS = 64
"""MiB by which anonymous memory may grow: glibc kept up to 40 MiB in fragments."""
PROMPTS = (
    "Write a haiku about ice hockey",
    "Hi",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A haiku, 氷上の, about ❄️?"}],
    [{"role": "user", "content": "Write a haiku"}, {"role": "assistant", "content": "The puck"}],
    "<|end|> is text, and so is this: " + "ice " * 60,
)
LONG = [random.Random(0).randrange(2048) for _ in range(900)]
"""The ids that many prompts begin with."""
PAGE = 128
"""Positions that share a part of the KV cache: prompts part at its borders and beside them."""


def prompt(number: int, index: int) -> Any:
    """The prompt of one of the texts of a job: one of a few, or ids that begin as many others do."""
    draw = random.Random(f"{number}, {index}")
    if draw.random() < 0.5:
        return draw.choice(PROMPTS)
    border = PAGE * draw.randint(1, 6)
    shared = draw.choice([draw.randint(0, 800), border - 1, border, border + 1])
    return LONG[:shared] + [draw.randrange(2048) for _ in range(draw.choice([1, 2, 100]))]


def job(number: int) -> tuple[dict[str, Any], random.Random]:
    """The options of a job, and what else is drawn for it."""
    draw = random.Random(number)
    options: dict[str, Any] = {
        "seed": number,
        "max_tokens": draw.randint(1, 40),
        "temperature": draw.choice([0.0, 0.5, 1.0, 1.7]),
        "top_k": draw.choice([None, 1, 5, 40]),
        "top_p": draw.choice([None, 0.3, 0.9]),
        "min_p": draw.choice([None, 0.05]),
        "repeat_penalty": draw.choice([None, 1.0, 1.3]),
        "repeat_last_n": draw.choice([-1, 0, 8, 64]),
        "presence_penalty": draw.choice([0.0, 0.7]),
        "frequency_penalty": draw.choice([0.0, -0.4]),
        "logit_bias": draw.choice([None, {7: -100.0, 30: 1.5}]),
        "stop": draw.choice([None, "\n", [" the", "puck", "ice."]]),
        "ignore_eos": draw.random() < 0.2,
        "logprobs": draw.random() < 0.2,
    }
    return options, draw


class Heap(ctypes.Structure):
    """The result of glibc's `mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )
    uordblks: int
    hblkhd: int


def allocated() -> int:
    """Bytes that this process has allocated and not freed, Python's objects left out. 0 without glibc 2.33."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Heap
    heap: Heap = mallinfo()
    return heap.uordblks + heap.hblkhd


class Resources(NamedTuple):
    """What this process holds."""

    anonymous: float
    """MiB of memory that no file backs. The allocator keeps some that is freed."""
    allocated: float
    """MiB that are allocated and not freed."""
    files: int
    threads: int

    @classmethod
    def now(cls) -> Self:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None, "this Linux does not say how much memory is anonymous"
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        return cls(int(found[1]) / 2**10, allocated() / 2**20, files, threads)

    @classmethod
    def settled(cls) -> Self:
        """Those once the threads of closed models have ended."""
        seen: list[int] = []
        until = time.monotonic() + 10
        while len(set(seen[-5:])) > 1 or len(seen) < 5:
            assert time.monotonic() < until, f"threads come and go while nothing is read: {seen[-5:]}"
            time.sleep(0.1)
            seen.append(cls.now().threads)
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps freed memory for later
            trim(0)
        return cls.now()


class Soak:
    def __init__(self, first: int) -> None:
        self.phi = Phi.demo(n_threads=2)
        self.until = 0.0
        self.numbers = iter(range(first, sys.maxsize))
        self.lock = threading.Lock()
        # Of each text: number of the job, index in it, length and hash of the text, whether it is whole. Little memory.
        self.done = array("q")
        self.tokens = 0
        self.errors: list[str] = []

    def spell(self, seconds: float, streams: int) -> Resources:
        """Generates for some seconds. Returns the resources after it, when nothing runs."""
        self.until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.work) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = Resources.settled()
        return found._replace(allocated=found.allocated - self.done.itemsize * len(self.done) / 2**20)

    def work(self) -> None:
        while time.monotonic() < self.until and not self.errors:
            with self.lock:
                number = next(self.numbers)
            try:
                self.generate(number)
            except BaseException as error:
                self.errors.append(f"job {number}: {error!r}")
                raise

    def generate(self, number: int) -> None:
        options, draw = job(number)
        if draw.random() < MAPPED:
            self.map(number, options, draw)
            return
        if draw.random() < OWN_MODEL:
            self.close_under_a_stream(prompt(number, 0), options)
        reads, delay = draw.randint(0, 6), draw.random() * 0.02
        ends = ["cancel", "another thread", "close", "drop", "with", "timeout"]
        how = draw.choice(ends) if draw.random() < CANCELLED else None
        stream = self.phi.stream(prompt(number, 0), timeout=delay if how == "timeout" else None, **options)
        match how:
            case None | "timeout":
                for _ in stream:
                    pass
            case "another thread":
                other = threading.Timer(delay, stream.cancel)
                other.start()
                for _ in stream:
                    pass
                other.join()
            case "with":
                with stream:
                    self.read(stream, reads)
            case "drop":
                self.read(stream, reads)
            case _:
                self.read(stream, reads)
                getattr(stream, how)()
        if stream.finish_reason in ("stop", "length"):
            self.record(number, 0, stream._result())
        else:
            self.record(number, 0, stream.text, tokens=len(stream.token_ids))

    def map(self, number: int, options: dict[str, Any], draw: random.Random) -> None:
        """Reads several prompts together, all of them or the first few results."""
        prompts = [prompt(number, index) for index in range(draw.randint(1, 20))]
        wanted = draw.randint(0, len(prompts) - 1) if draw.random() < CANCELLED else len(prompts)
        results = self.phi.map(prompts, ordered=draw.random() < 0.5, **options)
        for result in islice(results, wanted):
            self.record(number, result.prompt_index, result)
        if wanted == len(prompts):
            assert next(results, None) is None
        else:
            results.close()

    def record(self, number: int, index: int, text: str, tokens: int = 0) -> None:
        """Keeps what the check needs of a whole result, or of a text that was cancelled."""
        whole = isinstance(text, Result)
        with self.lock:
            self.tokens += len(text.token_ids) if isinstance(text, Result) else tokens
            self.done.extend((number, index, len(text), digest(text), whole))

    @staticmethod
    def read(stream: Any, pieces: int) -> None:
        for _ in range(pieces):
            if next(stream, None) is None:
                return

    @staticmethod
    def close_under_a_stream(prompt: Any, options: dict[str, Any]) -> None:
        phi = Phi.demo(n_threads=2, mmap=options["seed"] % 2 == 0)
        stream = phi.stream(prompt, **options)
        next(stream, None)
        phi.close()
        try:
            for _ in stream:
                pass
        except ClosedError:
            pass

    def check(self, number: int, index: int, length: int, found: int, whole: bool, phi: Phi) -> None:
        options, _ = job(number)
        result = phi.generate(prompt(number, index), **options)
        if digest(result if whole else result.text[:length]) != found:
            self.errors.append(f"job {number}, text {index}: not the result of the serial run, {result.text!r}")


def digest(text: str) -> int:
    """A hash of a text; of a whole result with its ids and log probabilities."""
    kept = f"{text!s} {text.token_ids} {numbers(text.logprobs)}" if isinstance(text, Result) else text
    return int.from_bytes(hashlib.blake2b(kept.encode(), digest_size=8).digest(), signed=True)


def numbers(logprobs: list[TokenLogprob] | None) -> list[str] | None:
    """Every bit of log probabilities."""
    return None if logprobs is None else [entry.logprob.hex() for entry in logprobs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="threads that read (default: 8)")
    parser.add_argument("--first", type=int, default=0, help="number of the first generation; others draw others")
    given = parser.parse_args()
    if sys.platform != "linux":
        parser.error("it reads /proc")

    soak = Soak(given.first)
    began = time.monotonic()
    idle = [soak.spell(given.seconds / SPELLS, given.streams) for _ in range(SPELLS) if not soak.errors]
    took = time.monotonic() - began
    done = list(zip(*[iter(soak.done)] * 5, strict=True))
    cancelled = sum(not whole for *_, whole in done)
    with Phi.demo(n_threads=1) as serial:
        for number, index, length, found, whole in done:
            soak.check(number, index, length, found, bool(whole), serial)
    soak.phi.close()
    end = Resources.settled()

    print(
        f"{len(done)} texts ({cancelled} cancelled), {soak.tokens} tokens, {took:.0f} s, {given.streams} streams\n"
        f"after each spell, and after the end of the model:\n"
        f"  anonymous MiB {', '.join(f'{each.anonymous:.1f}' for each in [*idle, end])}\n"
        f"  allocated MiB {', '.join(f'{each.allocated:.2f}' for each in [*idle, end])}\n"
        f"  open files {', '.join(str(each.files) for each in [*idle, end])}\n"
        f"  threads {', '.join(str(each.threads) for each in [*idle, end])}\n"
        f"serial re-run: {len(done) - len(soak.errors)} of {len(done)} texts equal"
    )
    first, last = idle[min(1, len(idle) - 1)], idle[-1]  # the first spell touches everything once
    if last.allocated - first.allocated > ALLOCATED or last.anonymous - first.anonymous > ANONYMOUS:
        soak.errors.append(
            f"memory grew: by {last.allocated - first.allocated:.2f} MiB that are allocated, "
            f"by {last.anonymous - first.anonymous:.1f} MiB that are anonymous"
        )
    if max(each.files for each in idle) > idle[0].files or max(each.threads for each in idle) > idle[0].threads:
        soak.errors.append("a spell left files or threads behind")
    if end.threads != 1 or end.files > idle[0].files:
        soak.errors.append(f"left behind: {end.threads - 1} threads, {end.files - idle[0].files} files")
    for error in soak.errors[:10]:
        print(error, file=sys.stderr)
    return int(bool(soak.errors))


if __name__ == "__main__":
    sys.exit(main())
