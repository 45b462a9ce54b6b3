"""What a person sees on a terminal: progress, the bar, Ctrl-C."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from candle_phi import Phi, Progress, cli, hub, progress
from candle_phi.cli import output
from candle_phi.stream import Stream
from candle_phi.testing import FakePhi
from conftest import HAIKU
from terminal import on_terminal

LABEL = "Phi-3-mini-4k-instruct-q4.gguf"


class Terminal(io.StringIO):
    """Stdin, stdout and stderr on one terminal."""

    def isatty(self) -> bool:
        return True

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within the test, since pytest's capture replaces the streams between a fixture and its test."""
        stdin = sys.stdin
        sys.stdin = self
        try:
            with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
                yield
        finally:
            sys.stdin = stdin

    def main(self, *arguments: str) -> int:
        with self.used():
            return cli.main(arguments)

    def screen(self) -> list[str]:
        """The lines that it shows."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes --model demo a model with these replies, whose prompt takes some time to read."""

    class Slow(FakePhi):
        def stream(self, prompt: Any, **options: Any) -> Stream:
            for done in (0, 512, 1024, 2000):
                options["on_progress"](Progress("prefill", done, 2000, "tokens"))
            return super().stream(prompt, **options)

    def use(*given: Any) -> None:
        monkeypatch.setattr(Phi, "demo", lambda **_: Slow(list(given)))

    return use


def test_the_prompts_progress_is_shown_and_goes(terminal: Terminal, replies: Callable[..., None]) -> None:
    replies("The puck drops.")
    assert terminal.main("Hi", "--model", "demo") == 0
    assert "\rreading the prompt: 512 of 2000 tokens" in terminal.getvalue()
    assert terminal.screen() == ["The puck drops.", ""]


def test_json_has_progress_too(terminal: Terminal, replies: Callable[..., None]) -> None:
    replies("The puck drops.")
    assert terminal.main("Hi", "--model", "demo", "--json") == 0
    assert "reading the prompt: 1024 of 2000 tokens" in terminal.getvalue()
    first, last = terminal.screen()
    assert (first[0], first[-1], last) == ("{", "}", "")


def test_the_answer_ends_with_a_line_end(terminal: Terminal, replies: Callable[..., None]) -> None:
    for reply in ("one", "one\n"):
        terminal.seek(0)
        terminal.truncate()
        replies([reply])
        assert terminal.main("Hi", "--model", "demo") == 0
        assert terminal.screen() == ["one", ""]


def test_a_remark_comes_on_a_line_of_its_own(terminal: Terminal, replies: Callable[..., None]) -> None:
    replies(["The puck ", "drops."])
    assert terminal.main("Hi", "--model", "demo", "--max-tokens", "1") == 0
    assert terminal.screen() == ["The puck", "(stopped: --max-tokens 1 is reached)", ""]


def test_progress_stays_within_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with terminal.used():
        output.status.on_progress(Progress("prefill", 512, 2000, "tokens"))
        assert terminal.screen() == ["reading the prompt:"]
        output.status.on_progress(Progress("load", 512, 2000, "bytes"))
        assert terminal.screen() == ["loading the model:"]
        output.say("a warning")
    assert terminal.screen() == ["candle-phi: a warning", ""]


def test_no_progress_where_none_is_wanted(
    terminal: Terminal, replies: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    replies("The puck drops.")
    assert terminal.main("Hi", "--model", "demo") == 0
    assert terminal.getvalue() == "The puck drops.\n"


@pytest.mark.parametrize(
    ("reply", "screen"),
    [
        (KeyboardInterrupt(), ["reading the prompt: 0 of 6 tokens", ""]),
        (["The puck ", KeyboardInterrupt()], ["The puck", ""]),
        (["The puck\n", KeyboardInterrupt()], ["The puck", "", ""]),  # ^C has the second line
    ],
)
def test_ctrl_c_ends_its_line(terminal: Terminal, replies: Callable[..., None], reply: Any, screen: list[str]) -> None:
    """The terminal shows ^C where the cursor is: what comes next must not stand behind it."""
    replies(reply)
    assert terminal.main("Hi", "--model", "demo") == 130
    assert terminal.screen() == screen


def test_ctrl_c_while_the_prompt_is_read(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(FakePhi):
        def stream(self, prompt: Any, **options: Any) -> Stream:
            options["on_progress"](Progress("prefill", 512, 2000, "tokens"))
            raise KeyboardInterrupt

    monkeypatch.setattr(Phi, "demo", lambda **_: Interrupted([]))
    assert terminal.main("Hi", "--model", "demo") == 130
    assert terminal.screen() == ["reading the prompt: 512 of 2000 tokens", ""]


def test_ctrl_c_while_stdin_is_read(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "read", interrupt)
    assert terminal.main("-", "--model", "demo") == 130
    assert terminal.getvalue() == "\n"


def test_ctrl_c_while_a_file_comes_in(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's bar ends its own line."""

    def download(*_: object, on_progress: Callable[[Progress], object]) -> None:
        with progress.progress_callback("model.gguf", None, on_progress) as watch:
            assert watch is not None
            watch("download", 5_000_000, 10_000_000)
            raise KeyboardInterrupt

    monkeypatch.setattr(hub, "download", download)
    assert terminal.main("pull", "org/model") == 130
    first, last = terminal.screen()
    assert first.startswith("model.gguf  [")
    assert last == ""


def draw(columns: int, monkeypatch: pytest.MonkeyPatch, *events: tuple[float, Progress]) -> list[str]:
    """The lines of a bar, drawn at these times."""
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    bar = progress._Bar(LABEL, stream)
    for now, event in events:
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        bar.draw(event)
    monkeypatch.undo()
    return stream.getvalue().split("\r")[1:]


SIZE = 2_393_231_072


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (100, f"{LABEL}  [#####             ]   28%  0.67 of 2.39 GB   0:33 left   52.6 MB/s"),
        (80, "Phi-3-mi...q4.gguf  [##        ]   28%  0.67 of 2.39 GB   0:33 left   52.6 MB/s"),
        (60, "Phi-...guf  [##        ]   28%  0.67 of 2.39 GB   0:33 left"),
        (40, "Phi-3-mi...-q4.gguf  [##        ]   28%"),
        (20, "[###        ]   28%"),
    ],
)
def test_the_bar_of_the_default_model(columns: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = int(0.28 * SIZE)
    first, last = draw(
        columns,
        monkeypatch,
        (0.0, Progress("download", done - 4 * 52_600_000, SIZE, "bytes")),
        (4.0, Progress("download", done + 1, SIZE, "bytes")),
    )
    assert last.rstrip() == expected
    assert len(last) < columns
    assert first.index("[") == last.index("[")  # it does not jump once the speed is known
    assert first.index("]") == last.index("]")


def test_every_width_has_a_line_that_fits() -> None:
    details = ["checking", "0.68 of 2.39 GB", "1:05 left", "26.3 MB/s"]
    for columns in range(200):
        for label in (LABEL, "a.gguf", ""):
            for shown in (details, details[:2], []):
                line = progress.bar_line(columns, label, 680, 2390, shown)
                assert len(line) <= columns
                assert columns < 20 or "[#" in line
                assert columns < 4 or "28%" in line


def test_an_unknown_total_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = draw(
        80,
        monkeypatch,
        (10.0, Progress("wait", 0, None, "bytes")),
        (12.0, Progress("wait", 0, None, "bytes")),
        (13.0, Progress("download", 4_200_000, None, "bytes")),
        (15.0, Progress("download", 9_900_000, None, "bytes")),
    )
    assert [line.rstrip() for line in lines] == [
        f"{LABEL}  waiting  0 s",
        f"{LABEL}  waiting  2 s",
        f"{LABEL}  downloading  4.2 MB  0 s",
        f"{LABEL}  downloading  9.9 MB  2 s",
    ]


@pytest.mark.skipif(os.name != "posix", reason="terminals as POSIX has them")
def test_a_real_terminal() -> None:
    command = [sys.executable, "-m", "candle_phi", HAIKU, "--seed=1", "--model", "demo"]
    with Phi.demo() as phi:
        answer = phi.generate(HAIKU, seed=1)
    code, received, out = on_terminal(command, "stderr")
    assert (code, out.decode()) == (0, answer + "\n")
    terminal = Terminal()
    terminal.write(received.decode())
    assert terminal.screen() == [""]  # nothing is left of the progress
