"""What the command line prints: results on stdout, messages on stderr, one line each."""

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterable

from ..progress import Progress, has_viewer, terminal_columns


def start() -> None:
    """Begins the output of a command line.

    Redirected output is UTF-8 whatever the locale. A terminal shows a replacement for a character it lacks.
    """
    global status
    status = Status()
    if sys.stdout is None:  # Windows without a console
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the process ends
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure and sys.stdout.isatty():
        reconfigure(errors="replace")
    elif reconfigure:
        reconfigure(encoding="utf-8", errors="surrogateescape")  # a path may hold bytes that are not UTF-8


def finish() -> None:
    """Ends the output. What cannot be written goes to the null device, because the interpreter flushes once more."""
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None:
                file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def write(text: str) -> None:
    """Prints text on stdout at once."""
    try:
        sys.stdout.write(_escape(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        if os.name == "nt" and error.errno == errno.EINVAL:  # Windows reports a closed pipe this way
            raise BrokenPipeError(errno.EPIPE, "the reader closed the pipe") from error
        raise


def write_json(value: object) -> None:
    """Prints a value as JSON on one line."""
    # the bytes of a token become a list of numbers, as in OpenAI's JSON
    write(json.dumps(value, ensure_ascii=sys.stdout.isatty(), default=list) + "\n")


def say(message: str) -> None:
    """Prints a message on stderr, on one line and with the program's name."""
    note(f"candle-phi: {message}")


def note(message: str, *, dim: bool = False) -> None:
    """Prints a remark on stderr, on one line."""
    status.clear()
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):  # a full disk, or a reader that has gone: the exit code says it
        line = _escape(re.sub(r"\s*\n\s*", " ", message.strip()))
        sys.stderr.write(f"\x1b[2m{line}\x1b[0m\n" if dim else line + "\n")
        sys.stderr.flush()


def aside(message: str) -> None:
    """Prints a remark on stderr, dim on a terminal that can."""
    dim = is_terminal(sys.stderr) and os.name == "posix" and not os.environ.get("NO_COLOR") and not is_dumb()
    note(message, dim=dim)


def is_terminal(file: object) -> bool:
    """Whether a standard stream is a terminal. None, without a console, is not."""
    return file is not None and bool(getattr(file, "isatty", lambda: False)())


def is_dumb() -> bool:
    """Whether the terminal takes text and line ends alone."""
    return os.environ.get("TERM") == "dumb"


def _escape(text: str) -> str:
    """Escapes control characters except line ends and tabs, so that a model's text cannot control a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def size(n_bytes: float) -> str:
    """A size in a few characters: `"2.4 GB"`, `"16 MB"`, `"7 B"`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * factor:
            return f"{n_bytes / factor:.{0 if n_bytes >= 9.95 * factor else 1}f} {unit}"
    return f"{n_bytes:.0f} B"


def table(rows: Iterable[Iterable[str]]) -> str:
    """Rows as lines with aligned columns."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )


class Status:
    """A line on the terminal about work in progress. The next text replaces it."""

    def __init__(self) -> None:
        self._drawn = 0
        self._bar = False

    def draw(self, text: str) -> None:
        """Shows a text in place of the one before. Without a terminal on stderr nothing is shown."""
        if not has_viewer():
            return
        text = text[: terminal_columns() - 1]
        sys.stderr.write("\r" + text.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(text)

    def clear(self) -> None:
        """Removes the line."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0

    def on_progress(self, p: Progress) -> None:
        """Shows how much of the model is loaded, or of the prompt is read. The library draws a bar for downloads."""
        self._bar = p.phase in ("download", "verify") or (p.phase == "wait" and p.unit == "bytes")
        if p.phase == "prefill" and p.done < (p.total or 0):
            self.draw(f"reading the prompt: {p.done} of {p.total} tokens")
        elif p.phase == "load" and p.done < (p.total or 0):
            self.draw(f"loading the model: {100 * p.done // (p.total or 1)}%")
        elif p.phase != "wait":
            self.clear()

    def end_interrupted(self) -> None:
        """Ends the line that shows ^C. The library's bar ends its line itself."""
        terminal = next((file for file in (sys.stderr, sys.stdout) if file is not None and file.isatty()), None)
        if terminal is not None and not (self._bar and terminal is sys.stderr and has_viewer()):
            terminal.write("\n")
            terminal.flush()
        self._drawn = 0


status = Status()
