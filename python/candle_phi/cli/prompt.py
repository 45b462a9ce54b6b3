"""The prompt: an argument, piped stdin, or both."""

import errno
import sys
import threading
from collections.abc import Sequence

from . import output
from .mistakes import UsageError

_LONG_DASHES = ("\N{EN DASH}", "\N{EM DASH}")
_CURVED_QUOTES = tuple("\u201c\u201d\u201e\u2018\u2019\u00ab")
"""Quotes that a text processor puts in place of the shell's."""

_PATIENCE = 3.0
"""Seconds to wait for the end of stdin before a line says that stdin is being read."""


_MOST = 64 << 20
"""The largest text that is read, in bytes."""


def read_prompt(words: Sequence[str], *, command: str, exact: bool) -> str:
    """The prompt of a command line.

    Piped stdin comes before a typed prompt, with a blank line between them; "-" or no prompt at all is stdin alone.
    Stdin that is not a terminal is read to its end, as `ollama run` and `llm` do.

    Args:
        words: the arguments in place of the prompt.
        command: the command's name, for messages.
        exact: True keeps the last line end of a piped text that is the whole prompt.
    """
    if len(words) > 1:
        raise UsageError(about_words(words))
    if words and words[0] != "-":
        check_typed(words[0], exact=exact)
        piped = "" if _is_terminal() else _read_stdin(beside=True).rstrip("\r\n")
        return f"{piped}\n\n{words[0]}" if piped else words[0]
    return _read_alone("prompt", bool(words), command=command, exact=exact)


def read_text(words: Sequence[str], *, command: str) -> str:
    """The text of a command that takes it unchanged: the argument, else stdin."""
    if len(words) > 1:
        raise UsageError(about_words(words, "text"))
    if words and words[0] != "-":
        check_typed(words[0], exact=True, noun="text")
        return words[0]
    return _read_alone("text", bool(words), command=command, exact=True)


def read_file(words: Sequence[str], *, command: str) -> str:
    """The text of a file, of stdin for "-", or of piped stdin without an argument."""
    if len(words) > 1:
        raise UsageError(f"unexpected argument {words[1]!r}: {command} takes one file")
    if not words or words[0] == "-":
        return _read_alone("text", bool(words), command=command, exact=True, example="FILE")
    try:
        with open(words[0], "rb") as file:
            data = file.read(_MOST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{words[0]!r} cannot be read: {reason}") from error
    return decode(words[0], data)


def check_typed(word: str, *, exact: bool, noun: str = "prompt") -> None:
    """Refuses an empty text, and one that is meant as an option."""
    if not (word if exact else word.strip()):
        raise UsageError(f"the {noun} is empty")
    if word.startswith(_LONG_DASHES) and " " not in word:
        raise UsageError(_about_dash(word))


def _read_alone(noun: str, dash: bool, *, command: str, exact: bool, example: str = '"Why is the sky blue?"') -> str:
    """A text from stdin: for "-", or without an argument if stdin is not a terminal."""
    if not dash and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(f"there is no {noun}: {command} {example} (see {command} --help)")
    text = _read_stdin(beside=False)
    if not exact:
        text = text.rstrip("\r\n")
    if not (text if exact else text.strip()):
        other = "" if dash else f": {command} {example}"
        raise UsageError(f"there is no {noun}, stdin is empty{other}")
    return text


def _about_dash(word: str) -> str:
    return f"{word!r} begins with a long dash; an option begins with - or --"


def about_words(words: Sequence[str], noun: str = "prompt") -> str:
    """The message for a prompt in several words."""
    if dash := next((word for word in words if word.startswith(_LONG_DASHES)), None):
        return _about_dash(dash)
    if words[0].startswith(_CURVED_QUOTES):
        return f'the quotes around the {noun} are typographic; the shell needs straight ones: "{words[0][1:]} ..."'
    if words[0].startswith("'"):
        return f"the {noun} is in single quotes, which this shell does not know; use double quotes"
    if words[0] == "-":
        return f"unexpected argument {words[1]!r}: with - the {noun} is stdin alone"
    text = " ".join(words)
    return f'put the {noun} in quotes: "{text if len(text) < 60 else text[:50] + "..."}"'


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _read_stdin(*, beside: bool) -> str:
    """All of stdin as text. `beside`: there is a prompt too, so stdin that cannot be read counts as empty."""
    if sys.stdin is None:
        if beside:
            return ""
        raise UsageError("stdin is closed")
    if sys.stdin.isatty():
        return sys.stdin.read()
    remark = threading.Timer(_PATIENCE, output.note, ("(reading stdin to its end; < /dev/null leaves it out)",))
    remark.daemon = True
    remark.start()
    try:
        data = sys.stdin.buffer.read(_MOST + 1)
    except OSError as error:
        if beside and error.errno == errno.EBADF:  # nohup's stdin
            return ""
        raise UsageError(f"stdin cannot be read: {error.strerror or error}") from error
    finally:
        remark.cancel()
    return decode("stdin", data)


def decode(source: str, data: bytes) -> str:
    """The text of bytes that `source` had, of which `_MOST + 1` were read at most."""
    if len(data) > _MOST:  # without this, the output of `yes` would take all memory
        raise UsageError(f"{source} has more than {_MOST >> 20} MiB of text, which is the limit")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text: byte 0x{data[error.start]:02x} at {error.start}") from None
