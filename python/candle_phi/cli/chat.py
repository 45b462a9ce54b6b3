"""`candle-phi chat`: a conversation on the terminal."""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from .. import options
from ..errors import ClosedError, ContextLengthError, PhiError
from ..model import Phi
from . import output
from .commands import closest, names_model
from .lines import Lines
from .mistakes import AlreadySaid, UsageError, usage_errors
from .model import add_model_options, choose_model, open_model
from .parser import Parser, format_rows
from .run import add_generation_options, remark, stats_line, write_answer

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "/help": ("", "print these lines"),
    "/system": ("TEXT", 'set the system message ("" removes it); alone, print it'),
    "/save": ("FILE", "keep the chat in a file"),
    "/load": ("FILE", "go on with the chat of a file"),
    "/rewind": ("N", "remove the last N turns (default: 1)"),
    "/stats": ("", "print tokens and speeds after each answer, or stop that"),
    "/quit": ("", "leave the chat, as Ctrl-D does"),
}
"""Commands of a chat, each with its argument and what it does."""

_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("/bye", "/exit", "/q", "/x"), "/quit"),
    **dict.fromkeys(("/?", "/h", "/commands"), "/help"),
    **dict.fromkeys(("/undo", "/back", "/pop", "/regenerate", "/retry"), "/rewind"),
    **dict.fromkeys(("/clear", "/reset", "/new"), "/rewind N, with the number of all turns"),
    **dict.fromkeys(("/verbose", "/timings", "/info"), "/stats"),
    **dict.fromkeys(("/set", "/sys"), "/system TEXT"),
    **dict.fromkeys(("/write", "/export"), "/save FILE"),
    **dict.fromkeys(("/open", "/read", "/import"), "/load FILE"),
}
"""Commands of other programs, each with what does the same here."""

_MORE = (
    'A line that ends with \\ goes on in the next line. A line of """ begins a text of several lines, the next one '
    "ends it. A line that begins with // sends the text with one slash. Ctrl-C ends an answer, Ctrl-D the chat."
)


def run(arguments: list[str]) -> None:
    """Talks until the end of stdin."""
    parser = make_parser()
    typed, words, unknown = parser.split(arguments)
    if unknown:
        raise UsageError(parser.unknown_option(unknown[0]))
    if words:
        raise UsageError(_about_word(words[0]))
    given = {name: getattr(typed, name) for name in options.GENERATION if name in typed}
    _check_options(typed, given)
    choice = choose_model(typed)
    lines = Lines()
    with open_model(choice) as phi:
        output.status.clear()
        conversation = Conversation(phi, given, typed.stats)
        with usage_errors():
            conversation.begin(getattr(typed, "system", None), getattr(typed, "load", None))
        if lines.typed:
            output.aside(f"{_model_name(phi)}, {phi.n_ctx} tokens of context; /help prints the commands, Ctrl-D leaves")
        try:
            _talk(conversation, lines)
        finally:
            lines.close()
    if conversation.failed and not lines.typed:
        raise AlreadySaid


def _talk(conversation: "Conversation", lines: Lines) -> None:
    """Reads and answers to the end of stdin, or to /quit."""
    while not conversation.ended:
        try:
            text = lines.read()
        except EOFError:
            if lines.typed:
                output.write("\n")
            return
        except UnicodeDecodeError:
            output.note("(that line is not text in this terminal's encoding)")
            continue
        except KeyboardInterrupt:
            if not lines.typed:
                raise
            output.status.end_interrupted()
            output.aside("(Ctrl-D or /quit leaves the chat)")
            continue
        try:
            conversation.take(text)
        except KeyboardInterrupt:
            if not lines.typed:
                raise
            output.status.end_interrupted()
            output.aside("(cancelled: this turn is not part of the chat)")


class Conversation:
    """A chat, and the commands that change it.

    Args:
        given: the options of each answer.
        stats: whether tokens and speeds are printed after each answer.
    """

    def __init__(self, phi: Phi, given: dict[str, Any], stats: bool) -> None:
        self.ended = False
        self.failed = False
        """Whether a message was not answered."""
        self._phi = phi
        self._given = given
        self._stats = stats
        self._chat = phi.chat()
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/rewind": self._rewind,
            "/stats": self._switch_stats,
            "/quit": self._quit,
        }

    def begin(self, system: str | None, file: str | None) -> None:
        """Opens the chat, that of a file or an empty one."""
        self._chat = self._phi.chat(system) if file is None else self._phi.load_chat(file)

    def take(self, text: str) -> None:
        """Answers a message, or does what a command says. A failure is one line on stderr."""
        if not text.strip():
            return
        try:
            if text.startswith("//"):
                self._answer(text[1:])
            elif text.startswith("/") and "\n" not in text:
                self._obey(text)
            else:
                self._answer(text)
        except ContextLengthError as error:
            self._fail(
                f"the chat has {error.prompt_tokens} tokens with this message, and the context holds {error.n_ctx}: "
                f"{self._about_rewind()} begins anew"
            )
        except ClosedError:
            raise
        except (PhiError, OSError, ValueError, TypeError, MemoryError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, FileNotFoundError) and error.filename:
                return self._fail(f"{error.filename}: no such file")
            self._fail(str(error) or type(error).__name__)

    def _fail(self, message: str) -> None:
        self.failed = True
        output.say(message)

    def _about_rewind(self) -> str:
        turns = self._chat.turns
        return f"/rewind removes the last turn, /rewind {turns}" if turns > 1 else "/rewind, or candle-phi chat,"

    def _answer(self, text: str) -> None:
        watch = None if output.is_dumb() else output.status.on_progress
        stream = self._chat.stream(text, **self._given, on_progress=watch)
        with stream:
            write_answer(stream, "")
        remark(self._phi, self._given, stream.finish_reason, stream.usage)
        if stream.finish_reason == "timeout":
            output.aside("(this turn is not part of the chat)")
        if self._stats:
            output.aside(stats_line(stream.usage, stream.timings))

    def _obey(self, text: str) -> None:
        word, _, argument = text.strip().partition(" ")
        command = self._commands.get(word.lower())
        if command is None:
            output.say(_about_command(word))
            return
        if argument and not _COMMANDS[word.lower()][0]:
            output.say(f"{word} takes no argument; // at the beginning sends a slash")
            return
        command(argument.strip())

    def _help(self, _: str) -> None:
        rows = [(" ".join(filter(None, [name, argument])), text) for name, (argument, text) in _COMMANDS.items()]
        output.write(f"{format_rows('commands', rows)}\n{_MORE}\n")

    def _system(self, text: str) -> None:
        messages = self._chat.messages
        current = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        if not text:
            output.aside("(there is no system message)" if current is None else f"(system message: {current})")
            return
        system = None if text in ('""', "''") else text
        rest = messages if current is None else messages[1:]
        before, self._chat = self._chat, self._phi.chat(system, messages=rest)
        before.close()
        again = "; the chat is read anew at the next message" if rest else ""
        output.aside(f"(the system message is {'set' if system else 'removed'}{again})")

    def _save(self, file: str) -> None:
        if not file:
            output.say("/save needs a file: /save FILE")
            return
        path = os.path.expanduser(file)
        self._chat.save(path)
        output.aside(f"(saved: {file}, {_turns(self._chat.turns)}, {output.size(os.path.getsize(path))})")

    def _load(self, file: str) -> None:
        if not file:
            output.say("/load needs a file: /load FILE")
            return
        before, self._chat = self._chat, self._phi.load_chat(os.path.expanduser(file))
        before.close()
        output.aside(f"(loaded: {file}, {_turns(self._chat.turns)}, {self._chat.context_left} tokens left)")

    def _rewind(self, number: str) -> None:
        if number and not number.isdecimal():
            output.say(f"/rewind needs a number of turns, not {number!r}")
            return
        turns = int(number[:9] or 1)
        if turns > self._chat.turns:
            output.say(f"the chat has {_turns(self._chat.turns)}, not {turns}")
            return
        if turns:
            self._chat.rewind(turns)
        output.aside(f"(the chat has {_turns(self._chat.turns)} now, and {self._chat.context_left} tokens left)")

    def _switch_stats(self, _: str) -> None:
        self._stats = not self._stats
        output.aside(f"(stats are {'on' if self._stats else 'off'})")

    def _quit(self, _: str) -> None:
        self.ended = True


def _turns(count: int) -> str:
    return f"{count} turn{'' if count == 1 else 's'}"


def _model_name(phi: Phi) -> str:
    return str(phi.metadata.get("general.name") or os.path.basename(phi.path))


def _about_command(word: str) -> str:
    """The message for a word that begins with a slash and is not a command."""
    meant = _ELSEWHERE.get(word.lower()) or closest(word.lower(), list(_COMMANDS))
    hint = f"; did you mean {meant}?" if meant else "; /help prints the commands, and // at the beginning sends a slash"
    return f"there is no command {word}{hint}"


def _about_word(word: str) -> str:
    """The message for an argument."""
    if names_model(word):
        return f"{word} is a model: candle-phi chat --model {word}"
    return f'candle-phi chat takes its messages from stdin; candle-phi "{word}" answers one prompt'


def _check_options(typed: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Finds mistakes in the options of a chat, without a model."""
    file = getattr(typed, "load", None)
    if file is not None and "system" in typed:
        raise UsageError("--system is for a new chat, and --load opens one; /system sets it there")
    if file is not None and not os.path.isfile(file):
        raise UsageError(f"--load {file}: no such file")
    with usage_errors():
        options.checked(options.CHAT, given)


def make_parser() -> Parser:
    """The parser of `candle-phi chat`."""
    parser = Parser(
        "chat",
        "Talks with a model. On a terminal, lines can be edited and are kept in a history file, that of "
        "CANDLE_PHI_HISTORY (empty: none). Of piped stdin, each line is a message. /help prints the commands.",
        "[OPTION...]",
    )
    section = parser.section("options")
    section.add("--system", metavar="TEXT", help="a system message before all others")
    section.add("--load", metavar="FILE", help="go on with a chat that /save kept")
    section.add("--stats", default=False, help="print tokens and speeds after each answer, on stderr")
    parser.end_section()
    add_generation_options(parser)
    add_model_options(parser)
    return parser
