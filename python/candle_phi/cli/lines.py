"""What a person types into a chat, or a pipe sends: lines, and texts of several lines."""

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType

from . import output
from .mistakes import UsageError
from .prompt import decode

_PROMPT, _MORE = ">>> ", "... "
_FENCE = '"""'
_MOST = 64 << 20
"""The longest line that is read, in bytes."""

_VARIABLE = "CANDLE_PHI_HISTORY"
_MOST_LINES = 1000
"""Lines that the history file keeps."""


class Lines:
    """The texts of stdin, one at a time.

    On a terminal a prompt is shown, and lines can be edited and called back where Python has `readline`. A line that
    ends with a backslash goes on in the next; a text between two lines of three quotes may have any number of lines.
    """

    def __init__(self) -> None:
        if sys.stdin is None:
            raise UsageError("stdin is closed")
        self.typed = sys.stdin.isatty()
        self._history = _History() if self.typed and output.is_terminal(sys.stdout) else None
        self._number = 0

    def read(self) -> str:
        """The next text. Raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""
        line = self._line(_PROMPT)
        if line.lstrip().startswith(_FENCE):
            return self._fenced(line.lstrip().removeprefix(_FENCE))
        text = line
        while _goes_on(line):
            text = text[:-1]
            try:
                line = self._line(_MORE)
            except EOFError:
                break
            text += "\n" + line
        return text

    def close(self) -> None:
        """Keeps the history for the next chat."""
        if self._history is not None:
            self._history.save()

    def _fenced(self, line: str) -> str:
        """The text up to the next three quotes. `line`: what follows the first three."""
        lines = []
        while not line.rstrip().endswith(_FENCE):
            lines.append(line)
            try:
                line = self._line(_MORE)
            except EOFError:
                return "\n".join(lines).strip("\n")
        return "\n".join([*lines, line.rstrip().removesuffix(_FENCE)]).strip("\n")

    def _line(self, prompt: str) -> str:
        if not self.typed:
            return self._piped()
        if output.is_terminal(sys.stdout):
            return input(prompt)
        if output.is_terminal(sys.stderr):  # not on stdout, which is a file of answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _piped(self) -> str:
        """A line of a pipe or a file, which is UTF-8 whatever the locale."""
        self._number += 1
        data = sys.stdin.buffer.readline(_MOST + 1)
        if not data:
            raise EOFError
        text = decode(f"line {self._number} of stdin", data)
        return text.removesuffix("\n").removesuffix("\r")


def _goes_on(line: str) -> bool:
    """Whether a line ends with a backslash that is not itself behind one."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


class _History:
    """The lines of earlier chats, in a file that its owner alone can read."""

    def __init__(self) -> None:
        self._readline = _import_readline()
        self._path = history_path()
        self._known = 0
        if self._readline is None or self._path is None:
            return
        for line in self._kept():
            self._readline.add_history(line)
        self._known = self._readline.get_current_history_length()

    def _kept(self) -> list[str]:
        """The lines of the file, which another chat may have written since."""
        if self._path is None or not os.path.isfile(self._path):  # a device or a pipe could be read without end
            return []
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def save(self) -> None:
        """Adds the lines of this chat to the file. A file that cannot be written is left as it is.

        So is a device: a rename by root would replace /dev/null by a file.
        """
        if self._readline is None or self._path is None:
            return
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            return
        count = self._readline.get_current_history_length()
        items = [self._readline.get_history_item(i) for i in range(self._known + 1, count + 1)]
        added = [line for item in items if item for line in item.splitlines()]
        if not added:
            return
        text = "".join(f"{line}\n" for line in [*self._kept(), *added][-_MOST_LINES:])
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            beside.unlink(missing_ok=True)
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text.encode("utf-8", errors="replace"))
            os.replace(beside, self._path)


def history_path() -> Path | None:
    """The file of the history: that of CANDLE_PHI_HISTORY, which turns it off if it is empty, else the usual one."""
    try:
        if _VARIABLE in os.environ:  # a link stays one: the file that it names is replaced
            return Path(os.environ[_VARIABLE]).expanduser().resolve() if os.environ[_VARIABLE] else None
        if sys.platform == "win32":
            folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Application Support"
        else:
            folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except (RuntimeError, OSError, ValueError):  # there is no home, or the path has a loop of links
        return None
    return folder / "candle-phi" / "history"


def _import_readline() -> ModuleType | None:
    """Python's line editing; None on Windows and in builds without it."""
    try:
        import readline
    except ImportError:
        return None
    return readline
