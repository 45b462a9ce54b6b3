"""`candle-phi chat`: on a pseudo-terminal, and with piped stdin."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_phi import Phi
from conftest import HANG

COMMAND = [sys.executable, "-m", "candle_phi"]
GREEDY = ["chat", "-m", "demo", "--temperature", "0"]
PROMPT = ">>> "
QUESTIONS = ["Who are you?", "What is icing?", "What is a power play?"]

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX has pseudo-terminals")


def piped(text: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*COMMAND, *GREEDY, *arguments], input=text, capture_output=True, text=True, encoding="utf-8", timeout=HANG
    )
    return done.returncode, done.stdout, done.stderr


def answers(*questions: str, **options: Any) -> list[str]:
    with Phi.demo() as phi, phi.chat(temperature=0, **options) as chat:
        return [str(chat.send(question)) for question in questions]


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        import pty  # POSIX has it

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **environment},
            start_new_session=True,
        )
        os.close(slave)
        self.received = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def read(self, until: str, seconds: float = HANG) -> str:
        """What it shows up to and including this text, without control sequences."""
        deadline = time.monotonic() + seconds
        while until not in (shown := self.shown()):
            left = deadline - time.monotonic()
            assert left > 0, f"{until!r} did not come: {self.received!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the end, on Linux
                    data = b""
                assert data, f"the chat ended before {until!r}: {self.received!r}"
                self.received += data.decode("utf-8", errors="replace")
        head, _, rest = shown.partition(until)
        self.received = rest
        return head + until

    def shown(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.received)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ask(self, text: str) -> str:
        """The lines after this one, up to the next prompt."""
        self.type(text + "\n")
        shown = self.read(PROMPT).removesuffix(PROMPT)
        return shown.replace("\r", "").partition("\n")[2].strip("\n")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_typing(self, until: str) -> str:
        """Ctrl-C at the prompt, and what is shown then. Python's readline (`readline_until_enter_or_signal`) notices a
        signal that arrives while it handles a key only at the next key or signal."""
        self.interrupt()
        try:
            return self.read(until, HANG / 10)
        except AssertionError:
            self.interrupt()
            return self.read(until)

    def end(self) -> int:
        """The exit code after Ctrl-D."""
        self.type("\x04")
        deadline = time.monotonic() + HANG
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.master, 65536)
        return self.process.wait(1)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"CANDLE_PHI_HISTORY": str(tmp_path / "state" / "history")}


@pytest.fixture
def chat(home: dict[str, str]) -> Iterator[Terminal]:
    with Terminal(*GREEDY, **home) as terminal:
        terminal.read(PROMPT)
        yield terminal


@posix
def test_a_conversation(chat: Terminal, home: dict[str, str]) -> None:
    assert [chat.ask(question) for question in QUESTIONS] == answers(*QUESTIONS)
    assert chat.end() == 0
    history = Path(home["CANDLE_PHI_HISTORY"])
    assert history.read_text().splitlines() == QUESTIONS
    assert history.stat().st_mode & 0o777 == 0o600


@posix
def test_a_line_can_be_edited_and_called_back(chat: Terminal) -> None:
    pytest.importorskip("readline")
    expected = answers(*QUESTIONS[:1], QUESTIONS[0])
    chat.type("Who are yox?\x1b[D\x1b[D\x1b[D\x1b[D")  # left
    chat.type("\x1b[C\x1b[C\x1b[C\x7fu")  # right, backspace
    assert chat.ask("") == expected[0]
    chat.type("\x1b[A")  # up
    assert chat.ask("") == expected[1]


@posix
def test_ctrl_c_ends_the_answer_and_keeps_the_chat(home: dict[str, str]) -> None:
    with Terminal(*GREEDY, "--ignore-eos", "--max-tokens", "700", **home) as chat:
        chat.read(PROMPT)
        chat.type("Who are you?\n")
        chat.read("I am the demonstration model")
        chat.interrupt()
        assert "(cancelled: this turn is not part of the chat)" in chat.read(PROMPT)
        assert chat.ask("/rewind") == "candle-phi: the chat has 0 turns, not 1"
        chat.type("Who are you?\n")
        chat.read("I am the demonstration model")
        chat.interrupt()
        chat.read(PROMPT)
        assert chat.end() == 0


@posix
def test_ctrl_c_at_the_prompt_says_how_to_leave(chat: Terminal) -> None:
    chat.type("half a line")
    chat.read("half a line")
    assert "Ctrl-D or /quit leaves the chat" in chat.interrupt_typing(PROMPT)
    assert chat.ask(QUESTIONS[0]) == answers(QUESTIONS[0])[0]
    chat.type("/quit\n")
    assert chat.end() == 0


@posix
def test_commands(chat: Terminal, tmp_path: Path) -> None:
    first, second, _ = answers(*QUESTIONS)
    help_ = chat.ask("/help")
    assert all(f"/{name}" in help_ for name in ("help", "system", "save", "load", "rewind", "stats", "quit"))
    assert chat.ask(QUESTIONS[0]) == first
    assert chat.ask(f"/save {tmp_path}/chat").startswith(f"(saved: {tmp_path}/chat, 1 turn, ")
    assert chat.ask(QUESTIONS[1]) == second
    assert "1 turn now" in chat.ask("/rewind")
    assert chat.ask(QUESTIONS[1]) == second
    assert "not 5" in chat.ask("/rewind 5")
    assert "1 turn, " in chat.ask(f"/load {tmp_path}/chat")
    assert chat.ask(QUESTIONS[1]) == second
    assert "no such file" in chat.ask(f"/load {tmp_path}/nowhere").lower()
    assert "did you mean /rewind?" in chat.ask("/rewnd")
    assert "stats are on" in chat.ask("/stats")
    assert re.search(
        r"\(prompt: \d+ tokens, \d+ cached, .* tok/s; answer: \d+ tokens, .* tok/s; first token: ", chat.ask("Hi")
    )
    chat.ask("/stats")
    chat.ask("/rewind 3")
    assert "system message is set" in chat.ask("/system Be brief.")
    with Phi.demo() as phi, phi.chat("Be brief.", temperature=0) as other:
        assert chat.ask(QUESTIONS[0]) == other.send(QUESTIONS[0])


@posix
def test_text_of_several_lines(chat: Terminal) -> None:
    text = "What is icing?\nAnswer in one sentence."
    expected = answers(text)[0]
    chat.type("What is icing?\\\n")
    chat.read("... ")
    assert chat.ask("Answer in one sentence.") == expected
    chat.ask("/rewind")
    chat.type('"""\n')
    chat.read("... ")
    chat.type("What is icing?\n")
    chat.read("... ")
    chat.type("Answer in one sentence.\n")
    chat.read("... ")
    assert chat.ask('"""') == expected


@posix
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"CANDLE_PHI_HISTORY": ""}])
def test_a_plain_terminal(environment: dict[str, str], home: dict[str, str]) -> None:
    with Terminal(*GREEDY, **{**home, **environment}) as terminal:
        terminal.read(PROMPT)
        assert terminal.ask(QUESTIONS[0]) == answers(QUESTIONS[0])[0]
        assert terminal.end() == 0


@posix
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "no home"])
def test_a_history_that_is_no_plain_file(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    path, target = tmp_path / "history", tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(path)  # not a regular file, as /dev/null is not; a test needs no root to make one
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(target)
    before = None if kind == "no home" else path.lstat().st_mode
    value = "~nobody-has-this-name/h" if kind == "no home" else str(path)
    with Terminal(*GREEDY, CANDLE_PHI_HISTORY=value) as terminal:
        terminal.read(PROMPT)
        terminal.ask("/stats")
        assert terminal.end() == 0
    assert (None if kind == "no home" else path.lstat().st_mode) == before
    assert (target.read_text() if kind == "link" else "") == ("/stats\n" if kind == "link" else "")
    expected = {"pipe": {path}, "folder": {path}, "link": {path, target}, "no home": set()}[kind]
    assert set(tmp_path.iterdir()) == expected, "nothing is left beside it"


@posix
def test_no_command_on_a_terminal_is_a_chat(home: dict[str, str]) -> None:
    with Terminal(CANDLE_PHI_MODEL="demo", **home) as terminal:
        assert "/help prints the commands" in terminal.read(PROMPT)
        assert terminal.ask("/stats") == "(stats are on)"


def test_each_line_of_a_pipe_is_a_message(tmp_path: Path) -> None:
    code, out, err = piped("\n".join(QUESTIONS))
    assert (code, out.splitlines(), err) == (0, answers(*QUESTIONS), "")
    file = tmp_path / "chat"
    code, out, err = piped(f"{QUESTIONS[0]}\n/save {file}\n")
    assert (code, out.splitlines()) == (0, answers(QUESTIONS[0]))
    code, out, err = piped(QUESTIONS[1], "--load", str(file))
    assert (code, out.splitlines(), err) == (0, [answers(*QUESTIONS[:2])[1]], "")
    code, out, err = piped("//who are you?\n/nonsense\n")
    assert out.strip()
    assert "there is no command /nonsense" in err


def test_a_full_context_is_one_clear_line() -> None:
    code, out, err = piped("\n".join([QUESTIONS[0], "word " * 900, QUESTIONS[1]]), "--n-ctx", "200")
    assert code == 1
    assert out.splitlines() == answers(QUESTIONS[0], QUESTIONS[1])
    assert re.fullmatch(r"candle-phi: the chat has \d+ tokens with this message, and the context holds 200: .*\n", err)
