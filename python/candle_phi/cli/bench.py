"""`candle-phi bench`: a model's speed and memory on this machine."""

import argparse
import dataclasses
import re
from collections.abc import Callable

from .. import _bench, _replay
from . import output
from .mistakes import UsageError, spelled, usage_errors
from .model import Choice, add_model_options, choose_model, open_model
from .parser import Parser
from .prompt import read_file


def run(arguments: list[str]) -> None:
    """Measures a model and prints a table or JSON."""
    parser = make_parser()
    typed, extra, unknown = parser.split(arguments)
    if unknown:
        raise UsageError(parser.unknown_option(unknown[0]))
    names = [*typed.names, *extra]
    if len(names) > 1 or (names and "model" in typed):
        raise UsageError(f"unexpected argument {names[-1]!r}: bench measures one model")
    if names:
        typed.model = names[0]
    choice = choose_model(typed)
    if "replay" in typed:
        _replay_file(typed, choice, parser.command)
    else:
        _measure(typed, choice)


def _measure(typed: argparse.Namespace, choice: Choice) -> None:
    for option in ("streams", "lines"):
        if option in typed:
            raise UsageError(f"{spelled(option)} is for {spelled('replay')} FILE")
    repeat = getattr(typed, "repeat", 5)
    report = _bench.measure(
        lambda: open_model(_with(choice, _bench.COMPUTING)),
        repeat=repeat,
        prompts=getattr(typed, "prompts", _bench.PROMPTS),
        contexts=getattr(typed, "contexts", _bench.CONTEXTS),
        on_round=lambda number: output.status.draw(f"round {number} of {repeat}"),
    )
    output.status.clear()
    _write(typed, report, _bench.table(report))


def _replay_file(typed: argparse.Namespace, choice: Choice, command: str) -> None:
    for option in ("prompts", "contexts"):
        if option in typed:
            raise UsageError(f"{spelled(option)} is not for {spelled('replay')}, whose file has the prompts")
    name = "stdin" if typed.replay == "-" else typed.replay
    with usage_errors():
        lines = _replay.read(read_file([typed.replay], command=command), name, getattr(typed, "lines", None))
    with open_model(_with(choice, {"prefix_cache": _replay.HELD, "speculate": True})) as phi, usage_errors():
        report = _replay.measure(
            phi,
            _replay.items(phi, lines, name),
            repeat=getattr(typed, "repeat", 1),
            streams=getattr(typed, "streams", 1),
            on_turn=output.status.draw,
        )
    output.status.clear()
    _write(typed, report, _replay.table(report))


def _with(choice: Choice, settings: dict[str, object]) -> Choice:
    """The choice with these options of the model. They are the measurement's, not the user's."""
    for name in settings:
        if name in choice.model:
            raise UsageError(f"bench sets {spelled(name)} itself")
    return choice._replace(model={**choice.model, **settings})


def _write(typed: argparse.Namespace, report: _bench.Report | _replay.Report, table: str) -> None:
    if typed.json:
        output.write_json(dataclasses.asdict(report))
    else:
        output.write(table)


def make_parser() -> Parser:
    """The parser of `candle-phi bench`."""
    parser = Parser(
        "bench",
        "Measures a model on this machine: speeds, load time, memory, and the memory's bandwidth. Speculation is "
        "measured on known texts alone: --replay.",
        "[MODEL] [OPTION...]",
    )
    parser.words("names", "MODEL")
    section = parser.section("options")
    section.add("--json", default=False, help="print one JSON object, with all samples")
    section.add(
        "--repeat",
        type=_at_least_1,
        metavar="N",
        help="rounds; the figures are medians (default: 5, with --replay 1)",
    )
    section.add("--prompts", type=_counts(1), metavar="N,...", help="prompt lengths in tokens (default: 32,128,512)")
    section.add(
        "--contexts",
        type=_counts(0),
        metavar="N,...",
        help="context lengths at which decoding is timed (default: 0,1500)",
    )
    section.add(
        "--replay",
        metavar="FILE",
        help='generate the answers of a file with and without speculation: JSON lines of "prompt" (text or messages), '
        '"answer" and, if wanted, "prediction"',
    )
    section.add("--lines", type=_at_least_1, metavar="N", help="of --replay: only the first N (default: all)")
    section.add("--streams", type=_at_least_1, metavar="N", help="of --replay: lines at the same time (default: 1)")
    parser.end_section()
    add_model_options(parser)
    return parser


def _counts(least: int) -> Callable[[str], list[int]]:
    """A type of arguments: whole numbers with commas between them."""
    return lambda text: [_count(n, least) for n in text.split(",")]


def _at_least_1(text: str) -> int:
    return _count(text, 1)


def _count(text: str, least: int) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"needs whole numbers from {least} to 999999999, not {text!r}")
    return int(text)
