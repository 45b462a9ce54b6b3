"""The command line: `candle-phi PROMPT`."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from . import __version__, _engine, hub, options
from ._engine import DEFAULT_FILE, DEFAULT_REPO
from .errors import DownloadError, NotInThisVersionError, PhiError
from .model import Phi
from .results import Result

_UNBUILT = ("chat", "serve", "batch")
_COMMANDS = ("run", "pull", "list", "verify", "rm", "bench", "doctor", "tokenize", *_UNBUILT)

_MODEL_OPTIONS: Mapping[str, tuple[type, str]] = {
    "n_ctx": (int, "how many tokens the context holds (default: the file's)"),
    "n_threads": (int, "default: what affinity and the cgroup's quota allow"),
    "device": (str, "auto, cpu, cuda or metal (default: auto)"),
    "engine": (str, "native, or candle: Candle's own loop (default: native)"),
    "kernel": (str, "a name that doctor prints (default: the best here)"),
    "kv_cache": (str, "f16, f32 or q8_0 (default: f16)"),
    "tokenizer": (str, "path of a tokenizer.json, or a Hub repository with one (default: the GGUF's own)"),
    "chat_template": (str, "a Jinja source (default: the file's)"),
}
_HUB_OPTIONS: Mapping[str, tuple[type, str]] = {
    "revision": (str, "a branch, a tag or a commit (default: main)"),
    "cache_dir": (str, "where downloads are kept (default: the cache of Hugging Face's tools)"),
    "token": (str, "for private and gated repositories (default: HF_TOKEN, or a login's)"),
}
_SAMPLING_OPTIONS: Mapping[str, tuple[type, str]] = {
    "max_tokens": (int, "default: until a stop or the end of the context"),
    "temperature": (float, "0: always the most likely token (default: 1.0)"),
    "top_k": (int, "keep this many of the most likely tokens (default: all)"),
    "top_p": (float, "keep the smallest set with this probability (default: all)"),
    "min_p": (float, "keep what is this probable relative to the likeliest (default: all)"),
    "repeat_penalty": (float, "above 1: less repetition (default: 1, off)"),
    "repeat_last_n": (int, "how far --repeat-penalty looks back, -1: all (default: 64)"),
    "presence_penalty": (float, "-2 to 2 (default: 0)"),
    "frequency_penalty": (float, "-2 to 2 (default: 0)"),
    "seed": (int, "the same seed gives the same text (default: drawn)"),
    "top_logprobs": (int, "with --logprobs: and of this many of the likeliest, at most 20"),
    "timeout": (float, "seconds; then the answer ends as it is (default: none)"),
}

_T = TypeVar("_T")


class _UsageError(Exception):
    """What was typed makes no sense: exit code 2."""


class _Log(logging.Handler):
    """The library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(_as_typed(record.getMessage()))


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line, and explains other libraries' option names."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        typed, extra = self.parse_known_args(arguments)
        for word in extra:
            if not word.startswith("-"):
                raise _UsageError("one prompt, please: put it in quotes" if "prompt" in typed else f"no {word!r} here")
            name = word.partition("=")[0].lstrip("-").replace("-", "_")
            known = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}
            if name in known:  # with underscores, or without its no-
                raise _UsageError(f"unknown option {word!r}; did you mean {known[name]}?")
            raise _UsageError(_as_typed(options.unknown_option(name, known.keys() - {"help", "version"})))
        return typed


def _as_typed(message: str) -> str:
    """A message about options of the API, with the names that they have on the command line."""

    def typed(found: re.Match[str]) -> str:
        name = next(filter(None, found.groups()))
        known = name in options.GENERATION or name in options.MODEL or name in options.HUB
        return "--" + name.replace("_", "-") if known else found[0]

    message = re.sub(r"Phi\((.+?)\)", r"--model \1", message.replace(", an option of Phi()", ""))
    # a name at the start, in quotes, after "use", with an underscore in it, or switched on
    return re.sub(r"^(\w+)(?= must| is|\[)|'(\w+)'|(?<=use )(\w+)|\b(\w+_\w+)\b(?:=True)?|\b(\w+)=True", typed, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 0, 1 (failure), 2 (usage) or 130 (Ctrl-C).
    """
    _use_utf8()
    logging.getLogger("candle_phi").addHandler(_Log())
    try:
        with contextlib.suppress(SystemExit):  # argparse's end of --help and --version
            _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe is expected
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, say head, has what it wanted. The interpreter flushes once more as it ends: give it a place to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (_UsageError, NotInThisVersionError) as error:
        return _fail(error, 2)
    except (PhiError, OSError) as error:
        return _fail(error, 1)
    return 0


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else ""
    if command in _UNBUILT:
        raise _UsageError(f"{command} is not in this version; to send the word as a prompt: candle-phi run {command}")
    if command == "doctor":
        _doctor(arguments[1:])
    elif command == "tokenize":
        _tokenize(arguments[1:])
    elif command in _HUB_COMMANDS:
        _HUB_COMMANDS[command](arguments[1:])
    elif command == "bench":
        _bench(arguments[1:])
    elif command == "run":
        _run("candle-phi run", arguments[1:], any_word=True)
    else:
        _run("candle-phi", arguments, any_word="--" in arguments)


def _run(prog: str, arguments: list[str], *, any_word: bool) -> None:
    typed = _run_parser(prog).parse(arguments)
    given = {name: getattr(typed, name) for name in options.GENERATION if name in typed}
    prompt: Any = _prompt(typed.prompt, any_word=any_word, exact="raw" in given)
    if "system" in typed:
        if "raw" in given:
            raise _UsageError("--system needs a chat template, and --raw goes without")
        prompt = [{"role": "system", "content": typed.system}, {"role": "user", "content": prompt}]
    if "logprobs" in given and not typed.json:
        raise _UsageError("--logprobs needs --json")
    _asked(lambda: options.checked(options.GENERATION, given))  # before a model is loaded
    with _open(typed) as phi:
        if typed.json:
            result = _asked(lambda: phi.generate(prompt, **given))
            _write_json(
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
            return
        last = "\n"
        with _asked(lambda: phi.stream(prompt, **given)) as stream:
            try:
                for last in stream:
                    _write(last)
            finally:  # also after Ctrl-C: what comes next begins a line of its own
                if not last.endswith("\n"):
                    _write("\n")


def _logprobs(result: Result) -> list[dict[str, Any]] | None:
    return None if result.logprobs is None else [dataclasses.asdict(entry) for entry in result.logprobs]


def _run_parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description="Streams the answer of a Phi-3-family model.",
        epilog="Other commands: pull, list, verify, rm, bench, doctor, tokenize. "
        "A command's name as prompt: candle-phi run list.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", nargs="*", default=[], help="one user turn, in quotes; -: from stdin")
    parser.add_argument("--version", action="version", version=f"candle-phi {__version__}")
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object at the end")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="the prompt as it stands, without a chat template")
    parser.add_argument("--add-bos", action="store_true", help="with --raw: the beginning-of-text token first")
    parser.add_argument(
        "--parse-special",
        action=argparse.BooleanOptionalAction,
        help="with --raw: whether special tokens count as such",
    )
    group = parser.add_argument_group("generation")
    _add(group, _SAMPLING_OPTIONS)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be given several times")
    group.add_argument("--logit-bias", action=_Bias, metavar="ID=BIAS", help="added to a token's logit; several times")
    group.add_argument("--ignore-eos", action="store_true", help="generate through the model's own stop tokens")
    group.add_argument("--logprobs", action="store_true", help="with --json: every token's log probability")
    _add_model(parser)
    return parser


class _Bias(argparse.Action):
    """Collects ID=BIAS into a mapping."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        token, _, bias = values.partition("=")
        try:
            entry = {int(token): float(bias)}
        except ValueError:
            raise argparse.ArgumentError(self, f"needs ID=BIAS, a token id and a number, not {values!r}") from None
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | entry)


def _add(group: Any, table: Mapping[str, tuple[type, str]]) -> None:
    for name, (kind, text) in table.items():
        metavar = {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)


def _add_model(parser: _Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help=f"a GGUF file, a Hub repository, a short name that list prints, or demo: the bundled one "
        f"(default: {DEFAULT_FILE}, downloaded once)",
    )
    _add(group, _MODEL_OPTIONS)
    group.add_argument("--filename", metavar="TEXT", help="which file of the repository: a name, or a pattern")
    _add(group, _HUB_OPTIONS)
    group.add_argument("--local-files-only", action="store_true", help="never download")
    group.add_argument("--no-mmap", action="store_false", dest="mmap", help="read the file into private memory")


def _open(typed: argparse.Namespace) -> Phi:
    given: dict[str, Any] = {name: getattr(typed, name) for name in options.MODEL if name in typed}
    path = getattr(typed, "model", DEFAULT_REPO)
    if path == "demo":
        return _asked(lambda: Phi.demo(**given))
    given |= {name: getattr(typed, name) for name in options.HUB if name in typed}
    try:
        return _asked(lambda: Phi.from_pretrained(path, **given))
    except DownloadError as error:
        if "model" not in typed:
            error.args = (f"{error}; --model demo works without a download",)
        raise


def _asked(call: Callable[[], _T]) -> _T:
    """What the call returns; the mistakes it finds in its arguments were typed."""
    try:
        return call()
    except PhiError:
        raise
    except (TypeError, ValueError) as error:
        raise _UsageError(_as_typed(str(error))) from error


def _prompt(words: list[str], *, any_word: bool, exact: bool) -> str:
    """The prompt that was typed or piped in; `exact` keeps the line end that a shell's echo adds."""
    if not words:
        raise _UsageError("a prompt, please, in quotes, or - to read it from stdin (see candle-phi --help)")
    if not any_word and words[0].isalpha():
        close = difflib.get_close_matches(words[0].lower(), _COMMANDS, n=1, cutoff=0.7)
        if close:
            raise _UsageError(
                f"did you mean candle-phi {close[0]}? To send the word as a prompt: candle-phi run {words[0]}"
            )
    if len(words) > 1:
        raise _UsageError("one prompt, please: put it in quotes")
    if words[0] != "-":
        return words[0]
    text = _stdin()
    if not exact:
        text = text.rstrip("\r\n")
    if not text:
        raise _UsageError("there is no prompt on stdin")
    return text


def _stdin() -> str:
    if sys.stdin is None:
        raise _UsageError("there is no stdin to read a prompt from")
    if sys.stdin.isatty():
        return sys.stdin.read()
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _UsageError(f"stdin is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def _tokenize(arguments: list[str]) -> None:
    parser = _Parser(
        prog="candle-phi tokenize",
        description="Prints the token ids of a text as it stands.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", metavar="text", nargs="*", default=[], help="in quotes; -: from stdin")
    parser.add_argument("--pieces", action="store_true", default=False, help="one token a line: its id and its text")
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object: ids, pieces, model")
    parser.add_argument("--parse-special", action="store_true", help="special tokens in the text count as such")
    parser.add_argument("--add-bos", action="store_true", help="the beginning-of-text token first")
    _add_model(parser)
    typed = parser.parse(arguments)
    text = _prompt(typed.prompt, any_word=True, exact=True)
    given = {name: True for name in ("parse_special", "add_bos") if name in typed}
    with _open(typed) as phi:
        ids = _asked(lambda: phi.tokenize(text, **given))
        if typed.json:
            _write_json({"ids": ids, "pieces": _pieces(phi, ids), "model": phi.path})
        elif typed.pieces:
            for token, piece in zip(ids, _pieces(phi, ids), strict=True):
                _write(f"{token}\t{json.dumps(piece, ensure_ascii=False)}\n")
        else:
            _write(" ".join(map(str, ids)) + "\n")


def _pieces(phi: Phi, ids: list[int]) -> list[str]:
    """Each token's own text. It is read behind a letter, because decoding strips the space that begins a text."""
    letter = phi.tokenize("a")
    before = len(phi.detokenize(letter, skip_special=False))
    return [phi.detokenize([*letter, token], skip_special=False)[before:] for token in ids]


def _pull(arguments: list[str]) -> None:
    typed = _hub_parser("pull", "Downloads a model into the cache, and prints its path.", model=True).parse(arguments)
    given = {name: getattr(typed, name) for name in _HUB_OPTIONS if name in typed}
    _write(f"{_asked(lambda: hub.download(typed.repo_id, typed.filename, **given))}\n")


def _list(arguments: list[str]) -> None:
    parser = _hub_parser("list", "Prints the short names, and the models in the cache.", "cache_dir")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    typed = parser.parse(arguments)
    found = _asked(lambda: hub.list_cached(cache_dir=getattr(typed, "cache_dir", None)))
    if "json" in typed:
        cached = [{**dataclasses.asdict(file), "path": str(file.path)} for file in found]
        _write_json({"short_names": dict(hub.SHORT_NAMES), "cached": cached})
        return
    sizes = {(file.repo_id, file.filename): f"{file.size / 1e9:.2f} GB" for file in found}
    rows = [(short, *meant, sizes.pop(meant, "not here")) for short, meant in hub.SHORT_NAMES.items()]
    rows += [("", *meant, size) for meant, size in sizes.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        _write(line.rstrip() + "\n")


def _verify(arguments: list[str]) -> None:
    parser = _hub_parser("verify", "Hashes what is in the cache anew.", "cache_dir", model=True, optional=True)
    typed = parser.parse(arguments)
    place = getattr(typed, "cache_dir", None)
    for file in _asked(lambda: hub.verify(typed.repo_id, typed.filename, cache_dir=place)):
        _write(f"ok  {file.repo_id}  {file.filename}  {file.size} bytes\n")


def _rm(arguments: list[str]) -> None:
    parser = _hub_parser("rm", "Removes a repository, or files of it, from the cache.", "cache_dir", model=True)
    typed = parser.parse(arguments)
    place = getattr(typed, "cache_dir", None)
    freed = _asked(lambda: hub.remove(typed.repo_id, typed.filename, cache_dir=place))
    _write(f"{freed} bytes are free again\n")


_HUB_COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "pull": _pull,
    "list": _list,
    "verify": _verify,
    "rm": _rm,
}


def _hub_parser(command: str, text: str, *names: str, model: bool = False, optional: bool = False) -> _Parser:
    prog = f"candle-phi {command}"
    parser = _Parser(prog=prog, description=text, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if model:
        count = "?" if optional else None
        parser.add_argument("repo_id", metavar="REPO", nargs=count, default=None, help="a repository or a short name")
        parser.add_argument("filename", metavar="FILE", nargs="?", default=None, help="a file's name, or a pattern")
    _add(parser, {name: _HUB_OPTIONS[name] for name in names or _HUB_OPTIONS})
    return parser


def _bench(arguments: list[str]) -> None:
    from . import bench  # not at import: no other command needs what it needs

    parser = _Parser(
        prog="candle-phi bench",
        description="Measures a model on this machine: speeds, load time, memory, and how fast the memory is.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object, with all samples")
    parser.add_argument(
        "--repeat", type=_count, default=5, metavar="N", help="how many rounds the medians are of (default: 5)"
    )
    parser.add_argument(
        "--prompts",
        type=lambda text: [_count(n) for n in text.split(",")],
        default=bench.PROMPTS,
        metavar="N,...",
        help="prompt lengths to time, in tokens (default: 32,128,512)",
    )
    parser.add_argument(
        "--contexts",
        type=lambda text: [_count(n, least=0) for n in text.split(",")],
        default=bench.CONTEXTS,
        metavar="N,...",
        help="prompt lengths after which to time decoding (default: 0,1500)",
    )
    _add_model(parser)
    typed = parser.parse(arguments)
    shown = sys.stderr is not None and sys.stderr.isatty()

    def on_round(number: int) -> None:
        if shown:
            sys.stderr.write(f"\rround {number} of {typed.repeat}")
            sys.stderr.flush()

    try:
        report = bench.measure(
            lambda: _open(typed),
            repeat=typed.repeat,
            prompts=typed.prompts,
            contexts=typed.contexts,
            on_round=on_round,
        )
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
    if typed.json:
        _write_json(dataclasses.asdict(report))
    else:
        _write(bench.table(report))


def _count(text: str, *, least: int = 1) -> int:
    """A whole number that was typed."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be whole numbers from {least} to 999999999, not {text!r}")
    return int(text)


def _doctor(arguments: list[str]) -> None:
    parser = _Parser(prog="candle-phi doctor", description="Prints what this build finds here.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    typed = parser.parse(arguments)
    report = _asked(_engine.doctor)
    if typed.json:
        _write_json(report)
        return
    width = max(map(len, report))
    for name, value in report.items():
        _write(f"{name:{width}}  {_plain(value)}\n")


def _plain(value: object) -> str:
    """A value of the report as one line of words."""
    if isinstance(value, Mapping):
        # features are named where they are there; anything else is a name and a value
        return ", ".join(
            str(name) if found is True else f"{name} {_plain(found)}"
            for name, found in value.items()
            if found is not False and found is not None
        )
    if isinstance(value, (list, tuple)):
        return " ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _use_utf8() -> None:
    """Redirected output is UTF-8 whatever the locale; a terminal that cannot show a character gets a replacement."""
    if sys.stdout is None:  # Windows without a console
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the process ends
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure and sys.stdout.isatty():
        reconfigure(errors="replace")
    elif reconfigure:
        reconfigure(encoding="utf-8", errors="surrogateescape")  # a path may hold what is no UTF-8


def _shown(text: str) -> str:
    """Text with its control characters escaped, line ends and tabs excepted: a model must not steer a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _write(text: str) -> None:
    try:
        sys.stdout.write(_shown(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        if os.name == "nt" and error.errno == errno.EINVAL:  # what Windows says of a closed pipe
            raise BrokenPipeError(errno.EPIPE, "the reader closed the pipe") from error
        raise


def _write_json(value: object) -> None:
    # bytes, of a logprob, as OpenAI's JSON has them: a list of numbers
    _write(json.dumps(value, ensure_ascii=sys.stdout.isatty(), default=list) + "\n")


def _fail(error: Exception, code: int) -> int:
    _say(_as_typed(str(error)) or type(error).__name__)
    return code


def _say(message: str) -> None:
    """One line on stderr, where there is one."""
    if sys.stderr is not None:
        sys.stderr.write(f"candle-phi: {_shown(' '.join(message.split()))}\n")
