"""`candle-phi bench`: a model's speed and memory on this machine."""

import argparse
import dataclasses
import re
from collections.abc import Callable

from .. import _bench
from . import output
from .mistakes import UsageError
from .model import add_model_options, choose_model, open_model
from .parser import Parser


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
    report = _bench.measure(
        lambda: open_model(choice),
        repeat=typed.repeat,
        prompts=typed.prompts,
        contexts=typed.contexts,
        on_round=lambda number: output.status.draw(f"round {number} of {typed.repeat}"),
    )
    output.status.clear()
    if typed.json:
        output.write_json(dataclasses.asdict(report))
    else:
        output.write(_bench.table(report))


def make_parser() -> Parser:
    """The parser of `candle-phi bench`."""
    parser = Parser(
        "bench",
        "Measures a model on this machine: speeds, load time, memory, and the memory's bandwidth.",
        "[MODEL] [OPTION...]",
    )
    parser.words("names", "MODEL")
    section = parser.section("options")
    section.add("--json", default=False, help="print one JSON object, with all samples")
    section.add(
        "--repeat", type=_at_least_1, default=5, metavar="N", help="rounds; the figures are medians (default: 5)"
    )
    section.add(
        "--prompts",
        type=_counts(1),
        default=_bench.PROMPTS,
        metavar="N,...",
        help="prompt lengths in tokens (default: 32,128,512)",
    )
    section.add(
        "--contexts",
        type=_counts(0),
        default=_bench.CONTEXTS,
        metavar="N,...",
        help="context lengths at which decoding is timed (default: 0,1500)",
    )
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
