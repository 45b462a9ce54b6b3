"""The measurement of `candle-phi bench --replay`: known texts, generated with and without speculation.

The ids of a known answer take the place of those that are sampled. Passes, drafts, sampling and detokenizing are real,
so the speeds are those of a model that writes this text. Speeds on the text of a model with random weights would say
nothing: it repeats itself.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import NamedTuple

from . import __version__, _engine, messages
from ._bench import machine
from .errors import PhiError
from .messages import Turn
from .model import Phi
from .stream import Stream

HELD = 1 << 40
"""The `prefix_cache` of a model that replays, in bytes: whatever its prompts take, they are read once."""

SLICE = 32
"""Tokens of a turn."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file."""

    number: int
    prompt: list[Turn]
    answer: str
    prediction: str | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What one or several lines took. Seconds of decoding are medians of the rounds, without those of prompts."""

    lines: list[int]
    """Their numbers in the file."""
    prompt_tokens: int
    answer_tokens: int
    passes: int
    """Decode passes with speculation. A pass that several streams share counts for each."""
    tokens_per_pass: float
    """Of each stream, without the first token, which the prompt's pass gives."""
    draft_tokens: int
    accepted_tokens: int
    seconds: float
    seconds_without: float
    """Without speculation."""
    tokens_per_second: float
    tokens_per_second_without: float
    ratio: float
    """The speed with speculation over that without."""


@dataclass(frozen=True, slots=True)
class Report:
    """All measurements."""

    model: str
    version: str
    date: str
    machine: str
    cpu: object
    """The report of `doctor`."""
    kernel: str
    n_threads: int
    repeat: int
    streams: int
    """Lines that were generated at the same time."""
    lines: list[Figures]
    """Of each line or, with several streams, of those that were generated together."""
    total: Figures


class Item(NamedTuple):
    """A line in tokens."""

    number: int
    prompt: list[int]
    answer: list[int]
    prediction: list[int] | None


class Run(NamedTuple):
    """Some lines, generated once."""

    tokens: int
    """Without those that were there when the clock started."""
    seconds: float
    passes: int
    drafted: int
    accepted: int
    texts: list[str]


def read(text: str, name: str, limit: int | None = None) -> list[Line]:
    """The first `limit` lines of a file.

    Args:
        text: JSON lines: `{"prompt": str or messages, "answer": str, "prediction": str}`, the last one optional. Other
            keys are ignored, and so are empty lines.
        name: the file's name, for messages.

    Raises:
        ValueError: a line that is not such an object, with its number.
    """
    numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{name} has no lines")
    return [_line(line, number, f"{name}, line {number}") for number, line in numbered[:limit]]


def _line(text: str, number: int, place: str) -> Line:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} is not a JSON object")
    for key in ("prompt", "answer"):
        if key not in found:
            raise ValueError(f'{place} lacks "{key}"')
    for key in ("answer", "prediction"):
        if not isinstance(found.get(key, ""), str) and (key, found[key]) != ("prediction", None):
            raise ValueError(f'{place}: "{key}" must be a string')
    if not isinstance(found["prompt"], str | list):
        raise ValueError(f'{place}: "prompt" must be a string or a list of messages')
    try:
        turns = messages.turns(found["prompt"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    return Line(number, turns, found["answer"], found.get("prediction"))


def items(phi: Phi, lines: Sequence[Line], name: str) -> list[Item]:
    """The lines in the model's tokens.

    Raises:
        ValueError: an answer of fewer than two tokens, or a line that the model's context does not hold.
    """
    return [_item(phi, line, f"{name}, line {line.number}") for line in lines]


def _item(phi: Phi, line: Line, place: str) -> Item:
    prompt, answer = phi._model.tokenize_messages(line.prompt), phi.tokenize(line.answer)
    if len(answer) < 2:
        raise ValueError(f"{place}: an answer needs at least 2 tokens, and this one has {len(answer)}")
    if len(prompt) + len(answer) > phi.n_ctx:
        tokens = f"{len(prompt)} tokens of the prompt and {len(answer)} of the answer"
        raise ValueError(f"{place}: {tokens} do not fit the context of {phi.n_ctx}")
    prediction = None if line.prediction is None else phi.tokenize(line.prediction)
    return Item(line.number, prompt, answer, prediction)


def measure(
    phi: Phi,
    given: Sequence[Item],
    *,
    repeat: int = 1,
    streams: int = 1,
    on_turn: Callable[[str], object] = lambda text: None,
) -> Report:
    """Generates the lines with and without speculation, in turns.

    Args:
        phi: a model that holds prefixes, so that a prompt is read once.
        repeat: number of rounds.
        streams: lines that are generated at the same time.
        on_turn: called with a text before each turn.

    Raises:
        ValueError: the engine does not speculate.
        PhiError: a text that speculation changed.
    """
    if phi.engine != "native":
        raise ValueError(f'the engine "{phi.engine}" does not speculate')
    groups = [given[i : i + streams] for i in range(0, len(given), streams)]
    runs: dict[bool, list[list[Run]]] = {kind: [[] for _ in groups] for kind in (False, True)}
    for turn in range(repeat):
        for i, group in enumerate(groups):
            on_turn(f"round {turn + 1} of {repeat}: {_numbers(group)}, the prompt")
            for item in group:
                phi.warm(item.prompt)
            on_turn(f"round {turn + 1} of {repeat}: {_numbers(group)}")
            order = ((False, True), (True, False))[(turn + i) % 2]
            found = (
                _in_slices(phi, group[0], order) if streams == 1 else {kind: run(phi, group, kind) for kind in order}
            )
            for kind, done in found.items():
                runs[kind][i].append(done)
            if runs[True][i][-1].texts != runs[False][i][-1].texts:
                raise PhiError(f"{_numbers(group)}: speculation changed the text, which is a bug")
    rows = [_Row.of(group, runs[True][i], runs[False][i]) for i, group in enumerate(groups)]
    return Report(
        model=phi.path,
        version=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        cpu=_engine.doctor()["cpu"],
        kernel=phi.kernel,
        n_threads=phi.n_threads,
        repeat=repeat,
        streams=streams,
        lines=[_figures([row]) for row in rows],
        total=_figures(rows),
    )


def _in_slices(phi: Phi, item: Item, order: Sequence[bool]) -> dict[bool, Run]:
    """Generates a line with and without speculation, some tokens of each in turn.

    The speed of memory changes within seconds, so turns of a whole line would compare different moments. The time is
    that of the engine's passes, which wait for no reader. No pass has both streams.
    """
    with ExitStack() as stack:
        streams = {kind: stack.enter_context(replay(phi, item, speculate=kind)) for kind in order}
        for end in range(SLICE, len(item.answer) + SLICE, SLICE):
            for stream in streams.values():
                while len(stream.token_ids) < min(end, len(item.answer)) and next(stream, None):
                    pass
                _rest()
        return {kind: _done([item], [stream]) for kind, stream in streams.items()}


def _rest() -> None:
    """Waits until this process computes nothing: the stream is as far ahead of its reader as it may be."""
    while True:
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.005:
            return


def run(phi: Phi, group: Sequence[Item], speculate: bool) -> Run:
    """Generates lines at the same time. The clock starts at the first token and stops at the last."""
    with ExitStack() as stack:
        readers = [_Reader(stack.enter_context(replay(phi, item, speculate=speculate))) for item in group]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.end()
    return _done(group, [reader.stream for reader in readers])._replace(
        tokens=sum(len(item.answer) - reader.tokens_at_start for item, reader in zip(group, readers, strict=True)),
        seconds=max(reader.ended for reader in readers) - min(reader.started for reader in readers),
    )


def _done(group: Sequence[Item], streams: Sequence[Stream]) -> Run:
    """What the engine says of streams that were read to their ends. The seconds are those of the only one."""
    for item, stream in zip(group, streams, strict=True):
        if stream.token_ids != item.answer:
            raise PhiError(f"line {item.number}: the text has other ids than the answer, which is a bug")
    counts = [(stream._stream.usage, stream._stream.timings) for stream in streams]
    return Run(
        tokens=sum(len(item.answer) - 1 for item in group),
        seconds=counts[0][1][2],
        passes=sum(timings[4] for _, timings in counts),
        drafted=sum(usage[3] for usage, _ in counts),
        accepted=sum(usage[4] for usage, _ in counts),
        texts=[stream.text for stream in streams],
    )


def replay(phi: Phi, item: Item, *, speculate: bool) -> Stream:
    """The stream of a known answer."""
    call = phi._generation({"max_tokens": len(item.answer), "temperature": 0, "ignore_eos": True})
    settings = call.sampling | {"speculate": speculate, "prediction": item.prediction}
    stream = phi._model.stream(item.prompt, **settings, runs=None, chat=None, whole=False, replay=item.answer)
    return Stream(phi._model, stream, None, logprobs=False)


class _Reader(threading.Thread):
    """Reads a stream to its end, and records when its tokens came."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.tokens_at_start = 0
        self.started = self.ended = 0.0
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            for chunk in self.stream:
                if not self.started:
                    self.started, self.tokens_at_start = time.perf_counter(), len(chunk.token_ids)
            self.ended = time.perf_counter()
            self.started = self.started or self.ended  # an answer without text
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        """Waits for the end of the stream, and raises the error that ended it."""
        try:
            self.join()
        except BaseException:  # Ctrl-C
            self.stream.cancel()
            raise
        if self._error is not None:
            raise self._error


class _Row(NamedTuple):
    """Lines that were generated together: of seconds the medians of the rounds."""

    group: Sequence[Item]
    run: Run
    seconds: float
    seconds_without: float

    @classmethod
    def of(cls, group: Sequence[Item], runs: Sequence[Run], without: Sequence[Run]) -> "_Row":
        middle = [median(run.seconds for run in kind) for kind in (runs, without)]
        return cls(group, runs[-1], *middle)


def _figures(rows: Sequence[_Row]) -> Figures:
    given = [item for row in rows for item in row.group]
    tokens, passes = sum(row.run.tokens for row in rows), sum(row.run.passes for row in rows)
    seconds, without = sum(row.seconds for row in rows), sum(row.seconds_without for row in rows)
    answers = sum(len(item.answer) for item in given)
    return Figures(
        lines=[item.number for item in given],
        prompt_tokens=sum(len(item.prompt) for item in given),
        answer_tokens=answers,
        passes=passes,
        tokens_per_pass=(answers - len(given)) / passes,
        draft_tokens=sum(row.run.drafted for row in rows),
        accepted_tokens=sum(row.run.accepted for row in rows),
        seconds=seconds,
        seconds_without=without,
        tokens_per_second=_over(tokens, seconds),
        tokens_per_second_without=_over(tokens, without),
        ratio=_over(without, seconds),
    )


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


def table(report: Report) -> str:
    """A report as lines of text."""
    threads = "1 thread" if report.n_threads == 1 else f"{report.n_threads} threads"
    together = f", {report.streams} streams together" if report.streams > 1 else ""
    titles = ["", "prompt", "answer", "tok/pass", "drafted", "accepted", "tok/s", "without", "ratio"]
    rows = [titles, *(_cells(_name(figures.lines), figures) for figures in report.lines)]
    if len(report.lines) > 1:
        rows.append(_cells("in all", report.total))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"model    {report.model}",
        f"kernel   {report.kernel}, {threads}{together}",
        f"machine  {report.machine}",
        "",
        *("  ".join(_aligned(row, widths)).rstrip() for row in rows),
        "",
        "The file's answers took the place of the sampled tokens. The texts with and without speculation are equal.",
    ]
    if report.repeat > 1:
        lines.append(f"medians of {report.repeat} rounds")
    return "\n".join(lines) + "\n"


def _cells(name: str, figures: Figures) -> list[str]:
    return [
        name,
        f"{figures.prompt_tokens}",
        f"{figures.answer_tokens}",
        f"{figures.tokens_per_pass:.2f}",
        f"{figures.draft_tokens}",
        f"{figures.accepted_tokens}",
        f"{figures.tokens_per_second:,.2f}",
        f"{figures.tokens_per_second_without:,.2f}",
        f"{figures.ratio:.2f}",
    ]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i == 0 else cell.rjust(width)


def _numbers(group: Sequence[Item]) -> str:
    return _name([item.number for item in group])


def _name(numbers: Sequence[int]) -> str:
    return f"line {numbers[0]}" if len(numbers) == 1 else f"lines {numbers[0]} to {numbers[-1]}"
