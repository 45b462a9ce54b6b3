"""Ours, Candle's own loop and llama.cpp on the same file, in turns: a table, a chart, and every sample as JSON.

    make bench MODEL=path/to/Phi-3-mini-4k-instruct-q4.gguf

Each engine has a process for the whole comparison. They take turns figure by figure, so a slow phase of the machine
affects all of them. All are in memory at once (14 GB with Phi-3-mini and two builds of llama.cpp). Candle's loop takes
most and runs alone at the end. The file is read before, so the page cache is warm. llama.cpp is PyPI's
llama-cpp-python, compiled into environments of its own, once for each set of instructions. Other work on the machine
spoils the figures.
"""
# Decisions: docs/design/tests-and-benchmarks.md

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from candle_phi import Phi, _engine, hub
from report import chart, heading, speeds, tables

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benches"
OURS = [sys.executable, str(BENCHES / "our_speed.py")]
ALONE = "one thread"
TURNS = 3
"""Turns in a round for short measurements: the speed of memory changes within seconds."""
SHORT = 64
"""Tokens of a prompt whose measurement is short."""
LLAMA = "llama-cpp-python==0.3.36"
AVX2 = ["AVX", "AVX2", "FMA", "F16C", "BMI2"]
AVX512 = ["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"]
AMX = ["AMX_TILE", "AMX_INT8", "AMX_BF16"]


def cmake(on: list[str]) -> str:
    """Arguments for llama.cpp's build that allow these instructions and no others."""
    switches = [f"-DGGML_{name}={'ON' if name in on else 'OFF'}" for name in [*AVX2, *AVX512, *AMX]]
    return " ".join(["-DGGML_NATIVE=OFF", *switches])


BUILDS = {"native": "-DGGML_NATIVE=ON", "avx512": cmake([*AVX2, *AVX512]), "avx2": cmake(AVX2)}
"""The instructions that llama.cpp is compiled for: those of this processor, or a named set."""


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


def medians(runners: Iterable[Runner]) -> dict[str, dict[str, float]]:
    """The medians of each engine, of the best setting if there are several."""
    engines: dict[str, dict[str, float]] = {}
    for runner in runners:
        best = engines.setdefault(runner.name, {})
        for name, values in runner.samples.items():
            better = min if name.startswith(("load", "private", "four")) else max
            found = median(values)
            best[name] = better(found, best.get(name, found))
    return engines


def llama_python(build: str, folder: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python compiled for `build`. It is made if missing."""
    home = folder / f"llama-{build}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = home / "made"
    if not made.exists():
        say(f"compiling {LLAMA} for {build} into {home}: some minutes")
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        env = os.environ | compilers() | {"CMAKE_ARGS": BUILDS[build]}
        # no cache: wheels of different builds have the same name
        options = ["--quiet", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        subprocess.run([python, "-m", "pip", "install", *options, LLAMA], env=env, check=True)
        made.touch()
    return python


def compilers() -> dict[str, str]:
    """Clang, if it is installed: llama.cpp's AMX code crashes when GCC 12 compiles it."""
    for suffix in ["", *(f"-{version}" for version in range(25, 13, -1))]:
        c, cxx = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if c and cxx:
            return {"CC": c, "CXX": cxx}
    return {}


def usual_builds() -> list[str]:
    """One for this processor, and one for each smaller set of instructions that has a kernel here."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    except OSError:
        return ["native"]
    lesser = {"amx_tile": "avx512", "avx512f": "avx2"}
    return ["native", *(build for flag, build in lesser.items() if flag in flags)]


def arguments() -> argparse.Namespace:
    def counts(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    builds = ", ".join(BUILDS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a GGUF file, or demo (default: phi-3-mini-4k from the cache)")
    add("--n-threads", type=int, metavar="N", help="default: those of candle-phi")
    add("--kernels", metavar="NAME,...", help="kernels of candle-phi, best first (default: all but portable)")
    add("--llama", action="append", metavar="BUILD", help=f"{builds}, or none; may be repeated (default: by the CPU)")
    add(
        "--llama-python",
        action="append",
        default=[],
        metavar="BUILD=PATH",
        help="the Python of an environment that has it",
    )
    add("--rounds", type=int, default=5, metavar="N", help="default: 5")
    add("--candle-rounds", type=int, default=2, metavar="N", help="of Candle, which is slow (default: 2; 0: without)")
    add("--quick", action="store_true", help="one round of everything")
    add("--prompts", type=counts, default=[32, 128, 512], metavar="N,...", help="default: 32,128,512")
    add("--contexts", type=counts, default=[0, 1500], metavar="N,...", help="default: 0,1500")
    add("--out", type=Path, default=ROOT / "target" / "bench", help="default: target/bench")
    typed = parser.parse_args()
    for build in [*(typed.llama or []), *(entry.partition("=")[0] for entry in typed.llama_python)]:
        if build not in (*BUILDS, "none"):
            parser.error(f"unknown build of llama.cpp {build!r}; expected one of: {builds}")
    if min(typed.rounds, typed.candle_rounds + 1, *typed.prompts, *(n + 1 for n in typed.contexts)) < 1:
        parser.error("rounds and prompts are at least 1, contexts at least 0")
    if typed.quick:
        typed.rounds = 1
    return typed


@dataclass
class Work:
    """The file and the measurements."""

    model: Path
    prompts: list[int]
    contexts: list[int]
    rounds: int

    def command(self, *program: str) -> list[str]:
        """The command of a process for these measurements."""
        given = {"--prompts": self.prompts, "--contexts": self.contexts}
        lengths = [f"{name}={','.join(map(str, lengths))}" for name, lengths in given.items()]
        return [*program, str(self.model), *lengths]

    def questions(self) -> list[str]:
        """The questions of a round, in order. "passes" is for candle-phi only."""
        prefill = [f"prefill {n}" for n in self.prompts for _ in range(TURNS if n <= SHORT else 1)]
        return ["load", *prefill, *TURNS * self.decoding(), *TURNS * ["passes"]]

    def decoding(self) -> list[str]:
        return [f"decode {n}" for n in self.contexts]

    def warm(self) -> None:
        """Reads the file into the page cache."""
        with self.model.open("rb", buffering=0) as file:
            block = bytearray(1 << 24)
            while file.readinto(block):
                pass


def our_runner(work: Work, name: str, kernel: str, n_threads: int) -> Runner:
    return Runner(name, [*work.command(*OURS), f"--n-threads={n_threads}", f"--kernel={kernel}"], work.questions())


def llama_runners(work: Work, typed: argparse.Namespace, n_threads: int) -> list[Runner]:
    """llama.cpp's builds, each without and with flash attention."""
    found = []
    given = dict(entry.split("=", 1) for entry in typed.llama_python)
    asked = [question for question in work.questions() if question != "passes"]
    for build in typed.llama or list(given) or usual_builds():
        if build != "none":
            python = given.get(build) or str(llama_python(build, typed.out))
            command = [*work.command(python, str(BENCHES / "llama_speed.py")), f"--n-threads={n_threads}"]
            for setting, options in {"off": [], "on": ["--flash-attention"]}.items():
                found.append(
                    Runner(
                        f"llama.cpp {build}", [*command, *options], asked, f"flash attention {setting}", is_peer=True
                    )
                )
    return found


def candle_runner(work: Work, n_threads: int) -> Runner:
    env = {"CANDLE_NUM_THREADS": str(n_threads), "RAYON_NUM_THREADS": str(n_threads)}
    asked = ["load", *(f"prefill {n}" for n in work.prompts), *work.decoding()]
    return Runner("Candle", [*work.command(*OURS), "--engine=candle"], asked, is_peer=True, env=env)


def compare(work: Work, runners: list[Runner], left_out: list[str]) -> list[Runner]:
    """Starts the engines and asks each question of all of them in turn. Returns those that did not fail."""

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
        for number in range(1, work.rounds + 1):
            say(f"{time.strftime('%H:%M:%S')}  round {number} of {work.rounds}")
            for i, question in enumerate(runners[0].asked if runners else []):
                turn = i % len(runners)  # so that no engine always follows the same one
                for runner in runners[turn:] + runners[:turn]:
                    if question in runner.asked and not attempt(runner, Runner.ask, question):
                        runners.remove(runner)
        return [runner for runner in runners if attempt(runner, Runner.ask, "memory")]


def main() -> None:
    typed = arguments()
    path = typed.model or hub.cached(_engine.DEFAULT_REPO, _engine.DEFAULT_FILE)
    if path is None:
        sys.exit(
            f"there is no model to measure: {_engine.DEFAULT_FILE} is not in the cache. "
            "candle-phi pull phi-3-mini-4k downloads it (2.4 GB); "
            "make bench MODEL=path/to/file.gguf measures another file, MODEL=demo the bundled model"
        )
    with Phi.demo() if path == "demo" else Phi(path) as phi:
        model, best, n_threads = Path(phi.path).resolve(), phi.kernel, typed.n_threads or phi.n_threads
    doctor: dict[str, Any] = _engine.doctor()
    lesser = [kernel for kernel in doctor["kernels"][::-1] if kernel not in (best, "portable")]
    kernels = typed.kernels.split(",") if typed.kernels else [best, *lesser]
    work, left_out = Work(model, typed.prompts, typed.contexts, typed.rounds), list[str]()
    ours = [our_runner(work, f"candle-phi {kernel}", kernel, n_threads) for kernel in kernels]
    alone = our_runner(work, ALONE, kernels[0], 1)
    alone.asked = [*(f"prefill {n}" for n in work.prompts[-1:]), *TURNS * work.decoding()[:1], "passes"]
    others = [alone] if n_threads > 1 else []
    work.warm()
    lasted = compare(work, [*ours, *others, *llama_runners(work, typed, n_threads)], left_out)
    if typed.candle_rounds:
        less = replace(work, rounds=min(typed.rounds, typed.candle_rounds))
        lasted += compare(less, [candle_runner(less, n_threads)], left_out)
    typed.out.mkdir(parents=True, exist_ok=True)
    write(typed.out / "tokens_per_second", work, lasted, left_out)


def write(stem: Path, work: Work, runners: list[Runner], left_out: list[str]) -> None:
    """The table, on stdout too, the chart, and every sample."""
    engines = medians(runners)
    alone = engines.pop(ALONE, None)
    names = [name for name in engines if name.startswith("candle-phi ")]
    mine, about = engines[names[0]], runners[0].ready
    reads = {int(context): read for context, read in about["bytes_per_token"].items()}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    threads = about["n_threads"]
    caption = f"{about['machine']}, n_threads={threads}, {date[:10]}, medians of {work.rounds} rounds"
    flags = " ".join(name for name, has in about["cpu"].items() if has is True)
    bandwidths = [value / 1e9 for value in runners[0].samples["bandwidth"]]
    notes = [
        f"{caption}; {flags}.",
        f"Memory, when only read: {median(bandwidths):.1f} GB/s ({min(bandwidths):.1f} to {max(bandwidths):.1f}).",
    ]
    if alone:
        gains = [f"{heading(name)} {mine[name] / alone[name]:.2f}x" for name in speeds(alone)]
        gains.append(f"reading memory {mine['bandwidth'] / alone['bandwidth']:.2f}x")
        notes.append(f"{threads} threads over one: {', '.join(gains)}.")
    notes += [
        f"{name}: a decode pass over 4 tokens takes {engines[name]['four over one']:.2f} times as long as over one."
        for name in names
    ]
    notes += [f"Left out: {what}" for what in left_out]
    text = tables(engines, names, reads) + "".join(f"\n{note}\n" for note in notes)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".svg").write_text(chart(engines, names, reads, caption), encoding="utf-8")
    record = {
        "model": work.model.name,
        "model_bytes": work.model.stat().st_size,
        "date": date,
        "machine": about["machine"],
        "cores": os.cpu_count(),
        "cpu": about["cpu"],
        "n_threads": threads,
        "medians": engines,
        "runs": [
            {"name": runner.name, "setting": runner.setting, "samples": runner.samples, "about": runner.ready}
            for runner in runners
        ],
        "left_out": left_out,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)
    say(f"table, chart and samples are in {stem.parent}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
