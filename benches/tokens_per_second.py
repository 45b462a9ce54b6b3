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
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from candle_phi import Phi, _engine
from engines import Runner, compare, model_path, say, warm
from llama_builds import add_llama_options, check_llama_options, llama_environments
from report import chart, heading, speeds, tables

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benches"
OURS = [sys.executable, str(BENCHES / "our_speed.py")]
ALONE = "one thread"
TURNS = 3
"""Turns in a round for short measurements: the speed of memory changes within seconds."""
SHORT = 64
"""Tokens of a prompt whose measurement is short."""


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


def arguments() -> argparse.Namespace:
    def counts(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a GGUF file, or demo (default: phi-3-mini-4k from the cache)")
    add("--n-threads", type=int, metavar="N", help="default: those of candle-phi")
    add("--kernels", metavar="NAME,...", help="kernels of candle-phi, best first (default: all but portable)")
    add_llama_options(parser)
    add("--rounds", type=int, default=5, metavar="N", help="default: 5")
    add("--candle-rounds", type=int, default=2, metavar="N", help="of Candle, which is slow (default: 2; 0: without)")
    add("--quick", action="store_true", help="one round of everything")
    add("--prompts", type=counts, default=[32, 128, 512], metavar="N,...", help="default: 32,128,512")
    add("--contexts", type=counts, default=[0, 1500], metavar="N,...", help="default: 0,1500")
    add("--out", type=Path, default=ROOT / "target" / "bench", help="default: target/bench")
    typed = parser.parse_args()
    check_llama_options(parser, typed)
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


def our_runner(work: Work, name: str, kernel: str, n_threads: int) -> Runner:
    return Runner(name, [*work.command(*OURS), f"--n-threads={n_threads}", f"--kernel={kernel}"], work.questions())


def llama_runners(work: Work, typed: argparse.Namespace, n_threads: int) -> list[Runner]:
    """llama.cpp's builds, each without and with flash attention."""
    found = []
    asked = [question for question in work.questions() if question != "passes"]
    for build, python in llama_environments(typed).items():
        command = [*work.command(python, str(BENCHES / "llama_speed.py")), f"--n-threads={n_threads}"]
        for setting, options in {"off": [], "on": ["--flash-attention"]}.items():
            found.append(
                Runner(f"llama.cpp {build}", [*command, *options], asked, f"flash attention {setting}", is_peer=True)
            )
    return found


def candle_runner(work: Work, n_threads: int) -> Runner:
    env = {"CANDLE_NUM_THREADS": str(n_threads), "RAYON_NUM_THREADS": str(n_threads)}
    asked = ["load", *(f"prefill {n}" for n in work.prompts), *work.decoding()]
    return Runner("Candle", [*work.command(*OURS), "--engine=candle"], asked, is_peer=True, env=env)


def main() -> None:
    typed = arguments()
    model = model_path(typed.model)
    with Phi(model) as phi:
        best, n_threads = phi.kernel, typed.n_threads or phi.n_threads
    doctor: dict[str, Any] = _engine.doctor()
    lesser = [kernel for kernel in doctor["kernels"][::-1] if kernel not in (best, "portable")]
    kernels = typed.kernels.split(",") if typed.kernels else [best, *lesser]
    work, left_out = Work(model, typed.prompts, typed.contexts, typed.rounds), list[str]()
    ours = [our_runner(work, f"candle-phi {kernel}", kernel, n_threads) for kernel in kernels]
    alone = our_runner(work, ALONE, kernels[0], 1)
    alone.asked = [*(f"prefill {n}" for n in work.prompts[-1:]), *TURNS * work.decoding()[:1], "passes"]
    others = [alone] if n_threads > 1 else []
    warm(model)
    lasted = compare(work.rounds, [*ours, *others, *llama_runners(work, typed, n_threads)], left_out, "memory")
    if typed.candle_rounds:
        less = replace(work, rounds=min(typed.rounds, typed.candle_rounds))
        lasted += compare(less.rounds, [candle_runner(less, n_threads)], left_out, "memory")
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


if __name__ == "__main__":
    main()
