"""`candle-phi help`: an overview, or the help of a command."""

from collections.abc import Callable, Mapping

from . import bench, cache, chat, commands, doctor, output, perplexity, tokenize
from . import run as answer
from .mistakes import UsageError
from .parser import Parser, format_rows
from .prompt import about_words

_PARSERS: Mapping[str, Callable[[], Parser]] = {
    "chat": chat.make_parser,
    "run": lambda: answer.make_parser("run"),
    "pull": cache.make_pull_parser,
    "list": cache.make_list_parser,
    "verify": cache.make_verify_parser,
    "rm": cache.make_remove_parser,
    "perplexity": perplexity.make_parser,
    "bench": bench.make_parser,
    "tokenize": tokenize.make_parser,
    "doctor": doctor.make_parser,
}

_EXAMPLES = """\
examples:
  candle-phi chat -m phi-4-mini
  candle-phi "Write a haiku about ice hockey" --model demo
  candle-phi "Why is the sky blue?" -m phi-4-mini
  cat report.txt | candle-phi "Summarize this in three sentences:"
"""

_USUAL = ("--model", "--system", "--max-tokens", "--temperature", "--seed", "--stop", "--json", "--stats", "--n-ctx")
"""The options that the overview shows."""


def run(arguments: list[str]) -> None:
    """Prints the overview, or the help of a command."""
    names = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not names:
        output.write(overview())
    elif len(names) > 1:
        if names[0] not in _PARSERS:
            raise UsageError(about_words(["help", *names]))
        raise UsageError(f"unexpected argument {names[1]!r}: candle-phi help COMMAND")
    elif names[0] in _PARSERS:
        output.write(_PARSERS[names[0]]().format_help())
    elif names[0] == "help":
        output.write(overview())
    elif names[0] in commands.UNBUILT:
        raise UsageError(commands.not_in_this_version(names[0]))
    else:
        raise UsageError(_about_topic(names[0]))


def _about_topic(topic: str) -> str:
    known = ", ".join(_PARSERS)
    if topic.startswith("-"):
        return "candle-phi help run lists all options"
    if meant := commands.similar_command(topic):
        return f"there is no command {topic!r}; did you mean candle-phi help {meant}?"
    return f"there is no command {topic!r}; the commands: {known}"


def overview() -> str:
    """What `candle-phi --help` prints."""
    every = {name.split()[0].rstrip(","): (name, text) for name, text in answer.make_parser("").rows()}
    rows = [(name, text) for flag, (name, text) in every.items() if flag in _USUAL or name.startswith("-m")]
    return "\n".join(
        [
            'usage: candle-phi "PROMPT" [OPTION...]',
            "       candle-phi COMMAND [ARGUMENT...]",
            "       candle-phi",
            "",
            "Runs Microsoft's Phi models on this machine and streams the answer.",
            "",
            _EXAMPLES,
            format_rows("commands", list(commands.COMMANDS.items())),
            "",
            format_rows(
                "usual options (candle-phi help run lists all)",
                [*rows, ("-h, --help", "print this help"), ("--version", "print the version")],
            ),
            "",
        ]
    )
