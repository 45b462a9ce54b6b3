"""`candle-phi doctor`: what this build finds on this machine."""

from collections.abc import Mapping

from .. import _engine
from . import output
from .mistakes import usage_errors
from .parser import Parser


def run(arguments: list[str]) -> None:
    """Prints the engine's report."""
    typed = make_parser().parse(arguments)
    with usage_errors():
        report = _engine.doctor()
    if typed.json:
        output.write_json(report)
    else:
        output.write(output.table((name, _words(value)) for name, value in report.items()))


def make_parser() -> Parser:
    """The parser of `candle-phi doctor`."""
    parser = Parser(
        "doctor", "Prints what this build finds on this machine: CPU, kernels, threads, cache.", "[OPTION...]"
    )
    section = parser.section("options")
    section.add("--json", default=False, help="print one JSON object")
    parser.end_section()
    return parser


def _words(value: object) -> str:
    """A value of the report on one line."""
    if isinstance(value, Mapping):
        # a feature that is there has its name alone; anything else has its name and its value
        return ", ".join(
            str(name) if entry is True else f"{name} {_words(entry)}"
            for name, entry in value.items()
            if entry is not False and entry is not None
        )
    if isinstance(value, (list, tuple)):
        return " ".join(map(_words, value))
    return "none" if value is None else str(value)
