"""The measurements of `candle-phi bench`: a model's speeds on this machine, and the bandwidth that limits them."""

import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, median_low
from typing import NamedTuple

from . import __version__, _engine
from ._private_memory import private_bytes
from .errors import PhiError
from .model import Phi
from .stream import Stream

PROMPTS = (32, 128, 512)
CONTEXTS = (0, 1500)

_AHEAD = 8
"""Tokens read before the clock starts: more than the engine computes ahead of its reader."""
_DECODED = 16
"""Tokens over which decoding is timed."""
_TURN = 2 * _AHEAD + _DECODED
"""Positions that a turn of decoding may take, with those computed while the bandwidth is measured."""
PASS_TOKENS = (2, 3, 4, 5, 6, 7, 8, 12, 16)
"""Sizes of the decode passes that are compared with a pass over one token."""
COMPUTING: dict[str, object] = {"prefix_cache": 0, "speculate": False}
"""Options of a model that is measured: every token is computed, in a pass of its own.

A model with random weights repeats itself, so drafts would be accepted that no real text has.
"""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt's speed."""

    tokens: int
    tokens_per_second: float
    """The prompt's tokens over the time to the first token."""
    samples: list[float]


@dataclass(frozen=True, slots=True)
class Decode:
    """The speed of decoding after a prompt."""

    context: int
    """Tokens before, on average; at 0 there is one, since a prompt has at least one."""
    tokens_per_second: float
    """Measured over 16 tokens, read one after the other, with sampling and detokenizing."""
    bytes_per_token: int
    """Bytes that a token reads: the weights, and the keys and values before it."""
    bandwidth_fraction: float
    """Bytes read per second over the bandwidth before and after; above 1 if the processor's cache holds them."""
    samples: list[float]


@dataclass(frozen=True, slots=True)
class PassCost:
    """The time of a decode pass over several tokens at once, over that of a pass over one."""

    tokens: int
    over_one: float
    samples: list[float]


class Turn(NamedTuple):
    """One sample of decoding."""

    tokens_per_second: float
    bytes_per_token: int
    bandwidth: float
    """Bytes per second, the mean of before and after: it changes within seconds while other processes use memory."""

    @property
    def bandwidth_fraction(self) -> float:
        return self.tokens_per_second * self.bytes_per_token / self.bandwidth


@dataclass(frozen=True, slots=True)
class Report:
    """All measurements. Speeds and times are medians; their samples are in the order of the rounds."""

    model: str
    version: str
    date: str
    machine: str
    cpu: object
    """The report of `doctor`."""
    engine: str
    kernel: str
    n_threads: int
    repeat: int
    bandwidth_bytes_per_second: float
    """The speed at which `n_threads` threads read the weights and do nothing else."""
    bandwidth_samples: list[float]
    """Each is the mean of before and after a sample of decoding."""
    weight_bytes_per_token: int
    prefill: list[Prefill]
    decode: list[Decode]
    load_seconds: float
    """From the call that opens the model to the start of its first pass."""
    private_bytes_loaded: int | None
    """Memory of the process that no file backs, before the first pass; None where the system does not report it."""
    private_bytes_decoding: int | None
    """The largest while decoding: with the KV cache."""
    pass_costs: list[PassCost]
    """What it costs that streams share a pass. Empty for the engine "candle", whose passes are over one token."""
    left_out: list[str]
    """Measurements that do not fit the model's context."""


class Bench:
    """A model that is measured figure by figure, so that other engines can take turns.

    A stream at a long context is kept from turn to turn, from a tenth below the context to a tenth above: reading its
    prompt takes far longer than a measurement.
    """

    def __init__(self, phi: Phi, *, prompts: Sequence[int], contexts: Sequence[int]) -> None:
        """Makes the first pass, which touches all weights once.

        Args:
            phi: a model that was just opened, with the options `COMPUTING`.
            prompts: lengths in tokens of the prompts to time.
            contexts: positions around which decoding is timed.
        """
        self.phi = phi
        self.private_loaded = private_bytes()
        self.private_decoding: int | None = None
        self.left_out: dict[str, str] = {}
        """Figures that do not fit the model's context ("prefill 512", "decode 1500"), and why."""
        self._ids = random.Random(0)
        self._kept: dict[int, Stream] = {}
        self.prompts = [n for n in prompts if self._fits(f"prefill {n}", n, 1)]
        self.contexts = [n for n in contexts if self._fits(f"decode {n}", *self._span(n))]
        self.bandwidth()  # brings the file into memory
        self.prefill(self.prompts[0] if self.prompts else 1)  # Candle repacks the weights on first use

    def prefill(self, tokens: int) -> float:
        """Tokens per second."""
        with self._stream(tokens, 1) as stream:
            for _ in stream:
                pass
            return tokens / _first_token_seconds(stream)

    def decode(self, context: int) -> Turn:
        """Times some tokens, and measures the bandwidth before and after."""
        before = self.bandwidth()
        prompt, more = self._span(context)
        stream = self._kept.pop(context, None) or self._stream(prompt, more)
        _read(stream, len(stream.token_ids) + _AHEAD)
        first, start = len(stream.token_ids), time.perf_counter()
        _read(stream, first + _DECODED)
        decoded = len(stream.token_ids) - first
        speed = decoded / (time.perf_counter() - start)
        private = private_bytes()
        self.private_decoding = max(private or 0, self.private_decoding or 0) or None
        if len(stream.token_ids) + _TURN <= more:
            self._kept[context] = stream
            time.sleep(
                _AHEAD / speed
            )  # until it has computed ahead as far as it may: then it disturbs no other measurement
        else:
            stream.close()
        read = sum(self.phi._model.bytes_per_token(prompt + first + decoded // 2))
        return Turn(speed, read, (before + self.bandwidth()) / 2)

    def bandwidth(self) -> float:
        """Bytes per second at which the weights are only read."""
        return self.phi._model.bandwidth()

    def pass_cost(self, tokens: int) -> float:
        """Time of a decode pass over `tokens` tokens at once, over the mean of a pass over 1 before and after."""
        before = self.phi._model.decode_pass(1)
        several = self.phi._model.decode_pass(tokens)
        return 2 * several / (before + self.phi._model.decode_pass(1))

    def _span(self, context: int) -> tuple[int, int]:
        """Lengths of the prompt and of the completion of a stream for this context."""
        turns = context // 5 // _TURN if self.phi.engine == "native" else 1  # Candle's loop holds one stream at a time
        more = _TURN * max(turns, 1)
        return max(context - more // 2, 1), more

    def _stream(self, prompt: int, max_tokens: int) -> Stream:
        ids = [self._ids.randrange(self.phi.n_vocab) for _ in range(prompt)]
        return self.phi.stream(ids, max_tokens=max_tokens, temperature=0, ignore_eos=True)

    def _fits(self, figure: str, prompt: int, more: int) -> bool:
        """Whether prompt and completion fit. If not, `left_out` gets the reason."""
        positions = prompt + more
        if positions > self.phi.n_ctx:
            self.left_out[figure] = f"{figure}: needs {positions} positions, the context has {self.phi.n_ctx}"
            return False
        try:
            self._stream(prompt, more).close()  # nothing is computed before the first read
        except PhiError as error:  # engine="candle" has no sliding window
            self.left_out[figure] = f"{figure}: {error}"
            return False
        return True


def measure(
    open_model: Callable[[], Phi],
    *,
    repeat: int = 5,
    prompts: Sequence[int] = PROMPTS,
    contexts: Sequence[int] = CONTEXTS,
    on_round: Callable[[int], object] = lambda number: None,
) -> Report:
    """Measures in rounds, so that a slow moment of the machine affects all figures alike.

    Args:
        open_model: opens the model with the options `COMPUTING`, anew for each measurement of the load time.
        repeat: number of rounds.
        prompts: lengths in tokens of the prompts to time.
        contexts: positions around which decoding is timed.
        on_round: called with the number of each round, from 1.
    """
    with open_model() as phi:
        bench = Bench(phi, prompts=prompts, contexts=contexts)
        prefills: dict[int, list[float]] = {n: [] for n in bench.prompts}
        decodes: dict[int, list[Turn]] = {n: [] for n in bench.contexts}
        costs: dict[int, list[float]] = {n: [] for n in PASS_TOKENS if phi.engine == "native"}
        for number in range(1, repeat + 1):
            on_round(number)
            for n, speeds in prefills.items():
                speeds.append(bench.prefill(n))
            for n, turns in decodes.items():
                turns.append(bench.decode(n))
            for n, ratios in costs.items():
                ratios.append(bench.pass_cost(n))
        weights, _ = phi._model.bytes_per_token(1)
        bandwidths = [turn.bandwidth for turns in decodes.values() for turn in turns] or [bench.bandwidth()]
    loads = [load_seconds(open_model) for _ in range(repeat)]
    return Report(
        model=phi.path,
        version=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        cpu=_engine.doctor()["cpu"],
        engine=phi.engine,
        kernel=phi.kernel,
        n_threads=phi.n_threads,
        repeat=repeat,
        bandwidth_bytes_per_second=median(bandwidths),
        bandwidth_samples=bandwidths,
        weight_bytes_per_token=weights,
        prefill=[Prefill(n, median(speeds), speeds) for n, speeds in prefills.items()],
        decode=[
            Decode(
                context=n,
                tokens_per_second=median(turn.tokens_per_second for turn in turns),
                bytes_per_token=median_low(turn.bytes_per_token for turn in turns),
                bandwidth_fraction=median(turn.bandwidth_fraction for turn in turns),
                samples=[turn.tokens_per_second for turn in turns],
            )
            for n, turns in decodes.items()
        ],
        load_seconds=median(loads),
        private_bytes_loaded=bench.private_loaded,
        private_bytes_decoding=bench.private_decoding,
        pass_costs=[PassCost(n, median(ratios), ratios) for n, ratios in costs.items()],
        left_out=list(bench.left_out.values()),
    )


def table(report: Report) -> str:
    """A report as lines of text."""
    most = report.bandwidth_bytes_per_second / report.weight_bytes_per_token
    lines = [
        f"model    {report.model}",
        f"engine   {report.engine}, kernel {report.kernel}, {_count(report.n_threads, 'thread')}",
        f"machine  {report.machine}",
        f"memory   {report.bandwidth_bytes_per_second / 1e9:.1f} GB/s; a decoded token reads "
        f"{report.weight_bytes_per_token / 1e9:.3g} GB of weights: at most {most:,.1f} tok/s",
        "",
        f"{'tok/s':>33}   of the bandwidth",
    ]
    lines += [f"prefill  {prefill.tokens:5} tokens {prefill.tokens_per_second:11,.2f}" for prefill in report.prefill]
    lines += [
        f"decode at {decode.context:4} tokens {decode.tokens_per_second:11,.2f}   {decode.bandwidth_fraction:6.1%}"
        for decode in report.decode
    ]
    lines += ["", f"load {report.load_seconds:.3f} s"]
    if report.private_bytes_loaded is not None:
        private = f"private memory {_megabytes(report.private_bytes_loaded)} when loaded"
        if report.private_bytes_decoding is not None:
            private += f", {_megabytes(report.private_bytes_decoding)} when decoding"
        lines.append(private)
    if report.pass_costs:
        lines += [
            "tokens in a decode pass" + "".join(f"{n:6}" for n in [1, *(cost.tokens for cost in report.pass_costs)]),
            "time over that of one  "
            + "".join(f"{x:6.2f}" for x in [1, *(cost.over_one for cost in report.pass_costs)]),
        ]
    lines += [f"left out: {what}" for what in report.left_out]
    return "\n".join([*lines, f"medians of {_count(report.repeat, 'round')}"]) + "\n"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.0f} MB"


def _first_token_seconds(stream: Stream) -> float:
    seconds = stream.timings.time_to_first_token
    assert seconds is not None, "a stream that was read has its first token"
    return seconds


def load_seconds(open_model: Callable[[], Phi]) -> float:
    """From the call that opens the model to the start of its first pass."""
    start = time.perf_counter()
    with open_model() as phi, phi.stream([0], max_tokens=1, temperature=0, ignore_eos=True) as stream:
        for _ in stream:
            pass
        return time.perf_counter() - start - stream.timings.prefill_seconds


def _read(stream: Stream, tokens: int) -> None:
    """Reads until the stream has made this many tokens."""
    while len(stream.token_ids) < tokens:
        next(stream)


def machine() -> str:
    """The processor's name, as far as the system reports it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
