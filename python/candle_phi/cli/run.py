"""`candle-phi PROMPT`: the answer of a model, streamed."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .. import options
from ..model import Phi
from ..results import Result, Timings, Usage
from ..stream import Stream
from . import output
from .commands import mistaken_word
from .mistakes import UsageError, usage_errors
from .model import add_model_options, choose_model, open_model
from .parser import Parser, Section, add_version, number, whole_number
from .prompt import read_prompt

_SAMPLING: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "max_tokens": (whole_number, "N", "end after N tokens (default: when it is complete)"),
    "temperature": (number, "X", "0: always the most likely token (default: 1.0)"),
    "top_k": (whole_number, "N", "sample from the N most likely tokens (default: all)"),
    "top_p": (number, "X", "sample from the smallest set this probable (default: 1)"),
    "min_p": (number, "X", "drop tokens below X times the best's probability"),
    "repeat_penalty": (number, "X", "above 1: lower recent tokens (default: off)"),
    "repeat_last_n": (whole_number, "N", "how many tokens are recent; -1: all (default: 64)"),
    "presence_penalty": (number, "X", "-2 to 2: lower tokens that occurred (default: 0)"),
    "frequency_penalty": (number, "X", "-2 to 2: the same, for each occurrence (default: 0)"),
    "seed": (whole_number, "N", "the same seed gives the same text (default: random)"),
    "timeout": (number, "X", "end the answer after X seconds (default: none)"),
}


def run(arguments: list[str], *, command: str) -> None:
    """Answers a prompt. `command` is "run", or "" for a prompt alone."""
    parser = make_parser(command)
    typed, extra, unknown = parser.split(arguments)
    words = [*typed.prompt, *extra]
    if "--" not in arguments and (answer := mistaken_word(words, commands=not command)):
        raise UsageError(answer)
    if unknown:
        raise UsageError(parser.unknown_option(unknown[0]))
    given = {name: getattr(typed, name) for name in options.GENERATION if name in typed}
    _check_options(typed, given)
    choice = choose_model(typed)
    text = read_prompt(words, command=parser.command, exact="raw" in given)
    prompt: Any = text
    if "system" in typed:
        prompt = [{"role": "system", "content": typed.system}, {"role": "user", "content": text}]
    with open_model(choice) as phi:
        if typed.json:
            _answer_as_json(phi, prompt, given, stats=typed.stats)
        else:
            _answer(phi, prompt, given, stats=typed.stats)


def _check_options(typed: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Finds mistakes in the options of a generation, without a model."""
    if "system" in typed and "raw" in given:
        raise UsageError("--system needs the chat template, and --raw leaves it out")
    if "logprobs" in given and not typed.json:
        raise UsageError("--logprobs needs --json")
    with usage_errors():
        options.checked(options.GENERATION, given)


def _answer(phi: Phi, prompt: Any, given: Mapping[str, Any], *, stats: bool) -> None:
    with usage_errors():
        stream = phi.stream(prompt, **given, on_progress=output.status.on_progress)
    with stream:
        write_answer(stream, "\n")
        remark(phi, given, stream.finish_reason, stream.usage)
        if stats:
            output.note(stats_line(stream.usage, stream.timings))


def write_answer(stream: Stream, last: str) -> None:
    """Writes the text as it comes, and ends its line. `last`: the end of what is written already."""
    try:
        for last in stream:
            output.status.clear()
            output.write(last)
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            last = "\n"  # the end of the line that shows ^C comes later
        raise
    finally:
        if not last.endswith("\n"):
            output.status.clear()
            output.write("\n")


def _answer_as_json(phi: Phi, prompt: Any, given: Mapping[str, Any], *, stats: bool) -> None:
    with usage_errors():
        result = phi.generate(prompt, **given, on_progress=output.status.on_progress)
    output.status.clear()
    output.write_json(
        {
            "text": result.text,
            "finish_reason": result.finish_reason,
            "usage": dataclasses.asdict(result.usage),
            "timings": dataclasses.asdict(result.timings),
            "seed": result.seed,
            "token_ids": result.token_ids,
            "logprobs": _logprobs(result),
            "model": phi.path,
            "system_fingerprint": result.system_fingerprint,
        }
    )
    if stats:
        output.note(stats_line(result.usage, result.timings))


def _logprobs(result: Result) -> list[dict[str, Any]] | None:
    return None if result.logprobs is None else [dataclasses.asdict(entry) for entry in result.logprobs]


def remark(phi: Phi, given: Mapping[str, Any], reason: str | None, usage: Usage) -> None:
    """Prints why an answer ended early."""
    if reason == "timeout":
        output.note(f"(stopped: the timeout of {given['timeout']:g} s is over)")
    elif reason == "length" and usage.completion_tokens == given.get("max_tokens"):
        output.note(f"(stopped: --max-tokens {given['max_tokens']} is reached)")
    elif reason == "length":
        output.note(f"(stopped: the context of {phi.n_ctx} tokens is full)")


def stats_line(usage: Usage, timings: Timings) -> str:
    """Tokens and speeds of an answer."""
    cached = f", {usage.cached_tokens} cached" if usage.cached_tokens else ""
    parts = [
        f"prompt: {_counted(usage.prompt_tokens)}{cached}{_speed(timings.prefill_tokens_per_second)}",
        f"answer: {_counted(usage.completion_tokens)}{_speed(timings.decode_tokens_per_second)}",
    ]
    if timings.time_to_first_token is not None:
        parts.append(f"first token: {timings.time_to_first_token:.2f} s")
    return f"({'; '.join(parts)})"


def _counted(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def _speed(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return ""
    return f", {tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f} tok/s"


def make_parser(command: str) -> Parser:
    """The parser of `candle-phi run`."""
    parser = Parser(
        command,
        "Answers a prompt, and streams the answer. Piped stdin comes before the prompt, or is the prompt.",
        '"PROMPT" [OPTION...]',
    )
    parser.words("prompt", "PROMPT")
    section = parser.section("options")
    section.add("--system", metavar="TEXT", help="a system message before the prompt")
    section.add("--raw", help="send the prompt unchanged, without a template")
    section.add("--add-bos", help="with --raw: put the beginning-of-text token first")
    section.add(
        "--parse-special",
        shown="--[no-]parse-special",
        action=argparse.BooleanOptionalAction,
        help="with --raw: read special tokens as tokens (default)",
    )
    section.add("--prediction", metavar="TEXT", help="what the answer will mostly repeat: sooner done, same text")
    section.add("--json", default=False, help="print one JSON object at the end")
    section.add("--stats", default=False, help="print tokens and speeds on stderr at the end")
    add_version(section)
    parser.end_section()
    section = add_generation_options(parser)
    section.add("--logprobs", help="with --json: the log probability of every token")
    section.add(
        "--top-logprobs",
        type=whole_number,
        metavar="N",
        help="with --logprobs: also the N most likely tokens, 0 to 20",
    )
    add_model_options(parser)
    return parser


def add_generation_options(parser: Parser) -> Section:
    """Adds the options of a generation that answers in plain text have too."""
    section = parser.section("generation")
    section.add_table(_SAMPLING)
    section.add("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    section.add("--logit-bias", action=_Bias, metavar="ID=X", help="add X to a token's logit; repeatable")
    section.add("--ignore-eos", help="generate through the model's own stop tokens")
    return section


class _Bias(argparse.Action):
    """Collects ID=X into a mapping."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        token, _, bias = values.partition("=")
        try:
            entry = {whole_number(token): number(bias)}
        except argparse.ArgumentTypeError:
            problem = f"needs a token id and a number, as in {self.option_strings[0]} 13=-5, not {values!r}"
            raise argparse.ArgumentError(self, problem) from None
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | entry)
