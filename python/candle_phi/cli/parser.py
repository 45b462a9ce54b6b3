"""The parser of a command: options with their help, and one line for each mistake."""

import argparse
import itertools
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from .. import __version__, options
from ..option_names import RENAMED, UNBUILT
from .commands import closest
from .mistakes import UsageError

_WIDTH = 80
_COLUMN = 25
"""The column at which explanations begin."""

_RENAMED: Mapping[str, str] = {
    "n": "--max-tokens",
    "predict": "--max-tokens",
    "max_completion_tokens": "--max-tokens",
    "c": "--n-ctx",
    "ctx_size": "--n-ctx",
    "context_size": "--n-ctx",
    "t": "--n-threads",
    "threads": "--n-threads",
    "num_thread": "--n-threads",
    "num_threads": "--n-threads",
    "s": "--seed",
    "random_seed": "--seed",
    "ngl": "--device",
    "gpu_layers": "--device",
    "gpu": "--device",
    "cpu": "--device cpu",
    "ctk": "--kv-cache",
    "ctv": "--kv-cache",
    "cache_type_k": "--kv-cache",
    "cache_type_v": "--kv-cache",
    "hf": "--model",
    "hfr": "--model",
    "hf_repo": "--model",
    "repo": "--model",
    "repo_id": "--model",
    "model_path": "--model",
    "model_name": "--model",
    "hff": "--filename",
    "hf_file": "--filename",
    "hft": "--token",
    "hf_token": "--token",
    "sys": "--system",
    "system_prompt": "--system",
    "r": "--stop",
    "reverse_prompt": "--stop",
    "greedy": "--temperature 0",
    "do_sample": "--temperature 0 to take the most likely token",
    "v": "--version, or --stats for speeds",
    "V": "--version",
    "verbose": "--stats for speeds",
    "offline": "--local-files-only",
    "o": "> FILE",
    "output": "> FILE",
    "out": "> FILE",
}
"""Options of other programs, each with the option that does the same here."""

_ANSWERS: Mapping[str, str] = {
    **dict.fromkeys(("p", "prompt", "message", "query"), 'the prompt needs no option: candle-phi "PROMPT"'),
    **dict.fromkeys(("f", "file", "input"), "a prompt from a file: candle-phi - < FILE"),
    **dict.fromkeys(("q", "quiet", "silent"), "stdout has only the answer; 2>/dev/null hides the rest"),
    **dict.fromkeys(("stream", "no_stream"), "the answer always streams; --json prints it whole"),
    **dict.fromkeys(("i", "interactive", "cnv", "conversation"), "candle-phi chat is a conversation"),
    **dict.fromkeys(("host", "port", "api_key"), "serve (a server) is not in this version"),
    **dict.fromkeys(
        ("fa", "flash_attn", "mlock", "b", "ub", "batch_size", "n_batch", "numa"), "the engine chooses this itself"
    ),
    **dict.fromkeys(("torch_dtype", "dtype", "load_in_4bit"), "weights keep the type that the file has"),
    **dict.fromkeys(("n_best", "num_return_sequences"), "one call gives one answer; another --seed gives another"),
    "keepalive": "no model stays loaded after an answer",
    "max_concurrent": "the command line answers one prompt at a time",
    "cache_scope": "the command line has one user; it keeps tenants apart in the API",
}
"""Options of other programs that have no counterpart here, each with a hint."""

_UNBUILT: Mapping[str, str] = {**UNBUILT, "schema": "structured output"}
"""Options of a later version, each with the feature that it belongs to."""


def whole_number(text: str) -> int:
    """Reads an integer of an option."""
    if not re.fullmatch("[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def number(text: str) -> float:
    """Reads a number of an option. The API refuses "nan" and "inf"."""
    if re.fullmatch("[+-]?[0-9]*,[0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}; did you mean {text.replace(',', '.')}?")
    try:
        if "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")


class Section:
    """Options that the help shows under one heading."""

    def __init__(self, parser: "Parser", title: str) -> None:
        self.title = title
        self.rows: list[tuple[str, str]] = []
        self._parser = parser

    def add(
        self, *flags: str, help: str, metavar: str | None = None, shown: str | None = None, **settings: Any
    ) -> None:
        """Adds an option, which takes a value if it has a metavar. `shown`: its name in the help."""
        if metavar is not None:
            settings["metavar"] = metavar
        elif "action" not in settings:
            settings["action"] = "store_true"
        self._parser.add_argument(*flags, **settings)
        self.rows.append((" ".join(filter(None, [shown or ", ".join(flags), metavar])), help))

    def add_word(self, name: str, metavar: str, help: str) -> None:
        """Adds an argument that may be left out."""
        self._parser.add_argument(name, metavar=metavar, nargs="?", default=None)
        self.rows.append((metavar, help))

    def add_table(self, table: Mapping[str, tuple[Callable[[str], Any], str, str]]) -> None:
        """Adds options of the API: name, type, metavar and help."""
        for name, (kind, metavar, text) in table.items():
            self.add("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)


class Parser(argparse.ArgumentParser):
    """Reads the arguments of one command.

    Args:
        command: its name; "" for the prompt alone.
        description: one sentence for the help.
        usage: what follows the command's name.
    """

    def __init__(self, command: str, description: str, usage: str) -> None:
        self.command = " ".join(filter(None, ["candle-phi", command]))
        super().__init__(
            prog=self.command,
            description=description,
            usage=f"{self.command} {usage}",
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
            exit_on_error=False,
        )
        self._sections: list[Section] = []

    def section(self, title: str) -> Section:
        """A new heading in the help."""
        self._sections.append(Section(self, title))
        return self._sections[-1]

    def end_section(self) -> None:
        """Adds --help, after the other options of the command."""
        section = self._sections[-1] if self._sections else self.section("options")
        section.add("-h", "--help", action="help", help="print this help")

    def words(self, name: str, metavar: str) -> None:
        """Adds an argument of any number of words, which the command checks itself."""
        self.add_argument(name, metavar=metavar, nargs="*", default=[])

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
        """Returns the options, the words that are left, and the unknown options."""
        before = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        for previous, word in itertools.pairwise(["", *before]):
            action = self._option_string_actions.get(previous)
            is_value = action is not None and action.nargs is None
            if re.fullmatch(r"-[^\W\d]\S+", word) and not word.startswith("-m=") and not is_value:
                raise UsageError(self._short(word))
        try:
            typed, extra = self.parse_known_args(list(arguments))
        except argparse.ArgumentError as error:
            raise UsageError(self._explain(error, before)) from error
        unknown = [word for word in extra if word.startswith("-") and word != "-"]
        return typed, [word for word in extra if word not in unknown], unknown

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the options of a command without words. Raises UsageError if anything is left."""
        typed, words, unknown = self.split(arguments)
        if unknown:
            raise UsageError(self.unknown_option(unknown[0]))
        if words:
            raise UsageError(f"unexpected argument {words[0]!r} (see {self.command} --help)")
        return typed

    def _known(self) -> dict[str, str]:
        """The flags of this command, by the API's names of the options."""
        return {
            flag.lstrip("-").replace("-", "_"): flag
            for action in self._actions
            for flag in action.option_strings
            if flag.startswith("--")
        }

    def _short(self, word: str) -> str:
        """The message for several letters after one dash."""
        flag, _, value = word.partition("=")
        if "-" + flag in self._option_string_actions:
            return f"unknown option {flag}; did you mean -{flag}?"
        if flag.startswith("-m") and "-m" in self._option_string_actions and not value:
            return f"unknown option {flag}; did you mean -m {flag[2:]}?"
        return self.unknown_option(word)

    def _explain(self, error: argparse.ArgumentError, arguments: list[str]) -> str:
        name = (error.argument_name or "").rpartition("/")[2]
        if error.message == "expected one argument":
            action = self._option_string_actions.get(name)
            flags = action.option_strings if action else [name]
            following = [b for a, b in itertools.pairwise(arguments) if a in flags]
            if following and following[0] not in self._option_string_actions:
                return f"{name} needs a value; one that begins with a dash: {name}={following[0]}"
            return f"{name} needs a value"
        if error.message.startswith("ignored explicit argument"):
            return f"{name} takes no value"
        return f"{name} {error.message}"

    def unknown_option(self, word: str) -> str:
        """The message for a word that begins with a dash and is not an option of this command."""
        flag = word.partition("=")[0]
        name, known = flag.lstrip("-").replace("-", "_"), self._known()
        if name.lower() in known and len(name) > 1:  # with underscores or capitals, or without its no-
            return f"unknown option {flag}; did you mean {known[name.lower()]}?"
        if "no_" + name in known:
            return f"unknown option {flag}; did you mean --no-{flag.lstrip('-')}?"
        if name in ("m", "model") and "repo_id" in {action.dest for action in self._actions}:
            return f"unknown option {flag}: the model needs no option: {self.command} REPO"
        if name in _ANSWERS:
            return f"unknown option {flag}: {_ANSWERS[name]}"
        right = RENAMED.get(name, name)
        if right in _UNBUILT:
            return f"{flag} ({_UNBUILT[right]}) is not in this version"
        renamed = _RENAMED.get(name) or "--" + right.replace("_", "-")
        meant = renamed.split()[0].rstrip(",")
        if meant in self._option_string_actions or not meant.startswith("--"):
            return f"unknown option {flag}; did you mean {renamed}?"
        if name in options.GENERATION or name in options.MODEL or name in options.HUB:
            return f"{self.command} has no option {flag} (see {self.command} --help)"
        close = closest(name, list(known)) if len(name) > 1 else None
        if close:
            return f"unknown option {flag}; did you mean {known[close]}?"
        if re.fullmatch(r"-\w\S*", flag) and "prompt" in {action.dest for action in self._actions}:
            return f"unknown option {flag}; a prompt that begins with a dash: {self.command} -- {word}"
        return f"unknown option {flag} (see {self.command} --help)"

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with argparse's message, for mistakes that `split` does not handle."""
        raise UsageError(f"{message} (see {self.command} --help)")

    def format_help(self) -> str:
        """The whole help, within 80 columns."""
        return "\n\n".join([f"usage: {self.usage}", *self.help_parts()]) + "\n"

    def rows(self) -> list[tuple[str, str]]:
        """All options with their explanations."""
        return [row for section in self._sections for row in section.rows]

    def help_parts(self) -> list[str]:
        """The description and the sections."""
        return [
            textwrap.fill(self.description or "", _WIDTH - 1),
            *(format_rows(section.title, section.rows) for section in self._sections),
        ]

    def print_help(self, file: Any = None) -> None:
        """Prints the help on stdout."""
        from .output import write

        write(self.format_help())


def format_rows(title: str, rows: Collection[tuple[str, str]]) -> str:
    """Names and explanations in two columns under a title."""
    lines = [f"{title}:"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, _WIDTH - 1 - _COLUMN)
        if len(name) + 4 > _COLUMN:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name}".ljust(_COLUMN) + wrapped.pop(0))
        lines += [" " * _COLUMN + line for line in wrapped]
    return "\n".join(lines)


class _Version(argparse.Action):
    """Prints the version and ends. argparse's own action hides that stdout cannot be written."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .output import write

        write(f"candle-phi {__version__}\n")
        parser.exit()
        raise AssertionError  # `exit` does not return


def add_version(section: Section) -> None:
    """Adds --version."""
    section.add("--version", action=_Version, nargs=0, help="print the version")
