"""What a model does on this machine, beside what the machine's memory allows: the measuring of `candle-phi bench`."""

import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from . import __version__, _engine
from .errors import PhiError
from .model import Phi
from .stream import Stream

PROMPTS = (32, 128, 512)
CONTEXTS = (0, 1500)

_DECODED = 17
"""Tokens of which decoding is timed; the first of them comes from the prompt's pass."""
_SPARE = 8
"""Tokens that a stream may still make while its memory is looked at."""
_TOGETHER = 4


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt's speed."""

    tokens: int
    tokens_per_second: float
    """The prompt's tokens over the time to the first token."""
    samples: list[float]


@dataclass(frozen=True, slots=True)
class Decode:
    """The speed of what follows a prompt."""

    context: int
    """Tokens before; at 0 there is one, since a prompt has at least one."""
    tokens_per_second: float
    """Tokens after the first over the time since it came, sampling and detokenizing included."""
    bytes_per_token: int
    """What the model has to read for each: the weights, and the keys and values before it."""
    bandwidth_fraction: float
    """What it reads in a second over the bandwidth of the same round; above 1 when the processor's cache holds it."""
    samples: list[float]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured. Speeds and times are medians; their samples are in the order of the rounds."""

    model: str
    version: str
    date: str
    machine: str
    cpu: object
    """As `doctor` has it."""
    engine: str
    kernel: str
    n_threads: int
    repeat: int
    bandwidth_bytes_per_second: float
    """How fast `n_threads` threads read the weights and do nothing else: in each round the best of some passes."""
    bandwidth_samples: list[float]
    weight_bytes_per_token: int
    prefill: list[Prefill]
    decode: list[Decode]
    load_seconds: float
    """From the call that opens the model to the start of its first pass."""
    private_bytes_loaded: int | None
    """Memory of the process that no file backs, before the first pass; None where the system, not Linux, is silent."""
    private_bytes_decoding: int | None
    """The same while it decodes, the largest found: with the KV cache."""
    four_tokens_over_one: float | None
    """Time of a decode pass over 4 tokens at once, over that of a pass over 1; None: not for this engine."""
    left_out: list[str]
    """What does not fit the model's context."""


def measure(
    open_model: Callable[[], Phi],
    *,
    repeat: int = 5,
    prompts: Sequence[int] = PROMPTS,
    contexts: Sequence[int] = CONTEXTS,
    on_round: Callable[[int], object] = lambda number: None,
) -> Report:
    """Measures in rounds, so that what slows the machine for a while slows everything alike.

    Args:
        open_model: opens the model, each time anew.
        repeat: how many rounds.
        prompts: lengths in tokens of the prompts that are timed.
        contexts: lengths of the prompts after which decoding is timed.
        on_round: called with the number of each round, from 1.
    """
    ids = random.Random(0)
    with open_model() as phi:
        loaded = _private_bytes()
        left_out: list[str] = []
        prompts = [n for n in prompts if _fits(phi, f"prefill of {n} tokens", n, 1, left_out)]
        contexts = [n for n in contexts if _fits(phi, f"decode at {n} tokens", n, _DECODED + _SPARE, left_out)]
        phi._model.bandwidth()  # brings the file into memory
        _prefill(phi, _prompt(phi, ids, prompts[0] if prompts else 1))  # Candle repacks the weights on first use
        prefills: list[list[float]] = [[] for _ in prompts]
        decodes: list[list[float]] = [[] for _ in contexts]
        bandwidths, fours, ones, private = [], [], [], []
        for number in range(1, repeat + 1):
            on_round(number)
            for n, samples in zip(prompts, prefills, strict=True):
                samples.append(_prefill(phi, _prompt(phi, ids, n)))
            bandwidths.append(phi._model.bandwidth())
            for n, samples in zip(contexts, decodes, strict=True):
                speed, memory = _decode(phi, _prompt(phi, ids, n))
                samples.append(speed)
                private.append(memory)
            if phi.engine == "native":
                fours.append(phi._model.decode_pass(_TOGETHER))
                ones.append(phi._model.decode_pass(1))
        traffic = [sum(phi._model.bytes_per_token(max(n, 1) + _DECODED // 2)) for n in contexts]
        weights, _ = phi._model.bytes_per_token(1)
    loads = [_load(open_model) for _ in range(repeat)]
    return Report(
        model=phi.path,
        version=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        cpu=_engine.doctor()["cpu"],
        engine=phi.engine,
        kernel=phi.kernel,
        n_threads=phi.n_threads,
        repeat=repeat,
        bandwidth_bytes_per_second=median(bandwidths),
        bandwidth_samples=bandwidths,
        weight_bytes_per_token=weights,
        prefill=[Prefill(n, median(speeds), speeds) for n, speeds in zip(prompts, prefills, strict=True)],
        decode=[
            Decode(
                context=n,
                tokens_per_second=median(speeds),
                bytes_per_token=read,
                bandwidth_fraction=median(s * read / b for s, b in zip(speeds, bandwidths, strict=True)),
                samples=speeds,
            )
            for n, speeds, read in zip(contexts, decodes, traffic, strict=True)
        ],
        load_seconds=median(loads),
        private_bytes_loaded=loaded,
        private_bytes_decoding=max((memory for memory in private if memory is not None), default=None),
        four_tokens_over_one=median(fours) / median(ones) if fours else None,
        left_out=left_out,
    )


def table(report: Report) -> str:
    """A report as lines for people."""
    most = report.bandwidth_bytes_per_second / report.weight_bytes_per_token
    lines = [
        f"model    {report.model}",
        f"engine   {report.engine}, kernel {report.kernel}, {_counted(report.n_threads, 'thread')}",
        f"machine  {report.machine}",
        f"memory   {report.bandwidth_bytes_per_second / 1e9:.1f} GB/s when only read; a decoded token reads "
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
    if report.four_tokens_over_one is not None:
        lines.append(f"a decode pass over 4 tokens takes {report.four_tokens_over_one:.2f} times as long as over one")
    lines += [f"left out: {what}" for what in report.left_out]
    return "\n".join([*lines, f"medians of {_counted(report.repeat, 'round')}"]) + "\n"


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.0f} MB"


def _fits(phi: Phi, name: str, prompt: int, more: int, left_out: list[str]) -> bool:
    """Whether prompt and completion fit; if not, `left_out` gets a word about it."""
    prompt = max(prompt, 1)
    if prompt + more > phi.n_ctx:
        left_out.append(f"{name}: takes {prompt + more} positions, and the context has {phi.n_ctx}")
        return False
    try:
        _stream(phi, [0] * prompt, more).close()  # nothing is computed before the first read
    except PhiError as error:  # engine="candle" knows no sliding window
        left_out.append(f"{name}: {error}")
        return False
    return True


def _prompt(phi: Phi, ids: random.Random, tokens: int) -> list[int]:
    return [ids.randrange(phi.n_vocab) for _ in range(max(tokens, 1))]


def _stream(phi: Phi, prompt: list[int], max_tokens: int) -> Stream:
    return phi.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)


def _first_token_seconds(stream: Stream) -> float:
    seconds = stream.timings.time_to_first_token
    assert seconds is not None, "a stream that was read has its first token"
    return seconds


def _prefill(phi: Phi, prompt: list[int]) -> float:
    """Tokens per second."""
    with _stream(phi, prompt, 1) as stream:
        for _ in stream:
            pass
        return len(prompt) / _first_token_seconds(stream)


def _decode(phi: Phi, prompt: list[int]) -> tuple[float, int | None]:
    """Tokens per second, and the private memory at the end, while the stream still has its cache."""
    with _stream(phi, prompt, _DECODED + _SPARE) as stream:
        start = time.perf_counter()
        for _ in stream:
            if len(stream.token_ids) >= _DECODED:
                break
        seconds = time.perf_counter() - start - _first_token_seconds(stream)
        return (len(stream.token_ids) - 1) / seconds, _private_bytes()


def _load(open_model: Callable[[], Phi]) -> float:
    """Seconds until the model computes."""
    start = time.perf_counter()
    with open_model() as phi, _stream(phi, [0], 1) as stream:
        for _ in stream:
            pass
        return time.perf_counter() - start - stream.timings.prefill_seconds


def _private_bytes() -> int | None:
    """Memory that this process shares with no other and that no file backs."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE))
    # the two overlap: anonymous pages are dirty as soon as they were written to
    return 1024 * max(int(kilobytes["Private_Dirty"]), int(kilobytes["Anonymous"]))


def _machine() -> str:
    """The processor's name, where the system tells."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
