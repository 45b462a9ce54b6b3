"""Engines that take turns: each is a process that lives for the whole comparison and measures one figure at a time."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from candle_phi import Phi, _engine, hub


@dataclass
class Runner:
    """One engine in one setting: a process that is asked for one figure at a time."""

    name: str
    command: list[str]
    asked: list[str]
    """The questions of each round."""
    setting: str = ""
    """Runners of one name are settings of one engine: the best of them counts, figure by figure."""
    is_peer: bool = False
    env: dict[str, str] = field(default_factory=dict)
    ready: dict[str, Any] = field(default_factory=dict)
    """The line that the process printed at its start."""
    samples: dict[str, list[float]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Starts the process, and waits until it is ready."""
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def answer(self) -> dict[str, Any]:
        """The process's next line."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        status = self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} {self.setting} ended with {status}: {self.errors.read().strip()[-500:]}")

    def ask(self, question: str) -> None:
        """Requests a measurement and keeps the samples."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
        except OSError:  # the process has ended: `answer` raises with its last output
            pass
        for name, value in self.answer().items():
            if value is not None:
                self.samples.setdefault(name, []).append(value)


def compare(rounds: int, runners: list[Runner], left_out: list[str], last: str | None = None) -> list[Runner]:
    """Starts the engines and asks each question of the first of all of them in turn; `last` once, after all rounds.

    Returns those that did not fail. `left_out` gets the reasons of the others.
    """

    def attempt(runner: Runner, step: Callable[..., object], *given: str) -> bool:
        try:
            step(runner, *given)
        except RuntimeError as error:
            if not runner.is_peer:
                sys.exit(str(error))
            left_out.append(str(error))
            return False
        return True

    def start(runner: Runner) -> None:
        say(f"{time.strftime('%H:%M:%S')}  starting {runner.name} {runner.setting}")
        processes.enter_context(runner)
        runner.ready = runner.answer()
        runner.asked = [question for question in runner.asked if question not in runner.ready["left_out"]]
        for reason in runner.ready["left_out"].values():
            if reason not in left_out:
                left_out.append(f"{runner.name}: {reason}" if runner.is_peer else reason)

    with ExitStack() as processes:
        runners = [runner for runner in runners if attempt(runner, start)]
        for number in range(1, rounds + 1):
            say(f"{time.strftime('%H:%M:%S')}  round {number} of {rounds}")
            for i, question in enumerate(runners[0].asked if runners else []):
                turn = i % len(runners)  # so that no engine always follows the same one
                for runner in runners[turn:] + runners[:turn]:
                    if question in runner.asked and not attempt(runner, Runner.ask, question):
                        runners.remove(runner)
        return [runner for runner in runners if last is None or attempt(runner, Runner.ask, last)]


def model_path(given: str | None) -> Path:
    """The file to measure: a path, "demo", or by default the command line's model. Exits if it is not in the cache."""
    path = given or hub.cached(_engine.DEFAULT_REPO, _engine.DEFAULT_FILE)
    if path is None:
        sys.exit(
            f"there is no model to measure: {_engine.DEFAULT_FILE} is not in the cache. "
            "candle-phi pull phi-3-mini-4k downloads it (2.4 GB); "
            "make bench MODEL=path/to/file.gguf measures another file, MODEL=demo the bundled model"
        )
    if path != "demo":
        return Path(path).resolve()
    with Phi.demo() as phi:
        return Path(phi.path).resolve()


def warm(file: Path) -> None:
    """Reads the file into the page cache."""
    with file.open("rb", buffering=0) as opened:
        block = bytearray(1 << 24)
        while opened.readinto(block):
            pass


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
