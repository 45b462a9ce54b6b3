"""Hours of use in minutes: `make soak` (SOAK_SECONDS, 60).

Threads share one bundled model and generate with random options. A fifth of the streams is cancelled at a random
moment: by whoever reads, by another thread, by its timeout. Now and then a thread opens a model of its own and closes
it under a live stream, or maps prompts of which some are bad, and leaves the rest. Memory, file descriptors and threads
must not grow, and every text must be the one that a serial run with the same seed gives, a cancelled one the beginning
of it.
"""

import argparse
import hashlib
import itertools
import os
import random
import statistics
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from candle_phi import ClosedError, Phi, Result

WORKERS = 4
CANCELLED = 0.2
OWN_MODEL = 0.02
MAPPED = 0.05
PROMPTS = (
    "Write a haiku about ice hockey",
    "Hi",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A haiku, 氷上の, about ❄️?"}],
    [{"role": "user", "content": "Write a haiku"}, {"role": "assistant", "content": "The puck"}],
    "<|end|> is text, and so is this: " + "ice " * 60,
)


def job(number: int) -> tuple[Any, dict[str, Any], random.Random]:
    """Prompt, options and what else is drawn of this number."""
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
    return draw.choice(PROMPTS), options, draw


class Soak:
    def __init__(self, seconds: float, first: int) -> None:
        self.phi = Phi.demo(n_threads=2)
        self.until = time.monotonic() + seconds
        self.numbers = iter(range(first, sys.maxsize))
        self.lock = threading.Lock()
        # Number, length and hash of the text, whether it is whole, of one generation after the other: little memory.
        self.done = array("q")
        self.tokens = 0
        self.errors: list[str] = []

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
        prompt, options, draw = job(number)
        if draw.random() < OWN_MODEL:
            self.close_under_a_stream(prompt, options)
        if draw.random() < MAPPED:
            self.map_some(number, prompt, options, draw)
            return
        reads, delay = draw.randint(0, 6), draw.random() * 0.02
        ends = ["cancel", "another thread", "close", "drop", "with", "timeout"]
        how = draw.choice(ends) if draw.random() < CANCELLED else None
        stream = self.phi.stream(prompt, timeout=delay if how == "timeout" else None, **options)
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
        self.record(number, stream.text, len(stream.token_ids), stream.finish_reason in ("stop", "length"))

    def map_some(self, number: int, prompt: Any, options: dict[str, Any], draw: random.Random) -> None:
        """Reads some results of prompts without end, then closes or drops them."""
        prompts = itertools.cycle([prompt, 5, prompt])
        ordered, most = draw.random() < 0.5, draw.randint(1, 20)
        results = self.phi.map(prompts, ordered=ordered, max_pending=most, return_exceptions=True, **options)
        outcomes = list(itertools.islice(results, draw.randint(3, 12)))
        if draw.random() < 0.5:
            results.close()
        texts = {outcome.text: len(outcome.token_ids) for outcome in outcomes if isinstance(outcome, Result)}
        for text, tokens in texts.items():  # one, if all is well
            self.record(number, text, tokens, whole=True)

    def record(self, number: int, text: str, tokens: int, whole: bool) -> None:
        with self.lock:
            self.tokens += tokens
            self.done.extend((number, len(text), digest(text), whole))

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

    def check(self, number: int, length: int, found: int, whole: bool, phi: Phi) -> None:
        prompt, options, _ = job(number)
        text = phi.generate(prompt, **options).text
        if digest(text[:length]) != found or (whole and len(text) != length):
            self.errors.append(f"job {number}: not the text of the serial run, {text!r}")


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def resources() -> tuple[float, int, int]:
    """Resident MiB, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first generation; others draw others")
    given = parser.parse_args()
    if sys.platform != "linux":
        parser.error("it reads /proc")

    soak = Soak(given.seconds, given.first)
    began = time.monotonic()
    threads = [threading.Thread(target=soak.work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    samples = []  # once everything has been used for a while
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if time.monotonic() - began > 0.2 * given.seconds:
            samples.append(resources())
    for thread in threads:
        thread.join()
    took = time.monotonic() - began

    third = max(1, len(samples) // 3)
    memory, files, _ = zip(*samples, strict=True)
    before, after = statistics.median(memory[:third]), statistics.median(memory[-third:])
    done = list(zip(*[iter(soak.done)] * 4, strict=True))
    cancelled = sum(not whole for *_, whole in done)
    with Phi.demo(n_threads=1) as serial:
        for number, length, found, whole in done:
            soak.check(number, length, found, bool(whole), serial)
    soak.phi.close()
    until = time.monotonic() + 10
    while resources()[2] > 1 and time.monotonic() < until:
        time.sleep(0.05)
    _, files_left, threads_left = resources()

    print(
        f"{len(done)} generations ({cancelled} cancelled), {soak.tokens} tokens, {took:.0f} s, {WORKERS} threads\n"
        f"resident memory: {before:.1f} MiB in the first third, {after:.1f} MiB in the last\n"
        f"open files: {min(files)} to {max(files)} during, {files_left} after; threads after: {threads_left}\n"
        f"serial re-run: {len(done) - len(soak.errors)} of {len(done)} texts equal"
    )
    if after - before > 4 + 0.02 * before:
        soak.errors.append(f"resident memory grew by {after - before:.1f} MiB")
    if threads_left != 1 or files_left > min(files):
        soak.errors.append(f"left behind: {threads_left - 1} threads, {files_left - min(files)} files")
    for error in soak.errors[:10]:
        print(error, file=sys.stderr)
    return int(bool(soak.errors))


if __name__ == "__main__":
    sys.exit(main())
