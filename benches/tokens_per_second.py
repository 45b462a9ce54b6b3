"""Ours, Candle's own loop and llama.cpp on the same file, in turns: a table, a chart, and every sample as JSON.

    make bench MODEL=path/to/Phi-3-mini-4k-instruct-q4.gguf

Each engine has a process of its own in each round, and a round goes through all engines, so that what slows the machine
for a while slows them alike. The file is read before each process: the page cache is warm. llama.cpp is PyPI's
llama-cpp-python, compiled into environments of its own, once for each set of instructions that it is compared on.
Other work on the machine spoils the figures.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from candle_phi import Phi, _engine
from report import chart, heading, speeds, tables

ROOT = Path(__file__).resolve().parents[1]
BENCH = [sys.executable, "-m", "candle_phi", "bench", "--json", "--repeat=1"]
LLAMA = "llama-cpp-python==0.3.36"
AVX2 = ["AVX", "AVX2", "FMA", "F16C", "BMI2"]
AVX512 = ["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"]
AMX = ["AMX_TILE", "AMX_INT8", "AMX_BF16"]


def cmake(on: list[str]) -> str:
    """Arguments for llama.cpp's build that allow these instructions and no others."""
    switches = [f"-DGGML_{name}={'ON' if name in on else 'OFF'}" for name in [*AVX2, *AVX512, *AMX]]
    return " ".join(["-DGGML_NATIVE=OFF", *switches])


BUILDS = {"native": "-DGGML_NATIVE=ON", "avx512": cmake([*AVX2, *AVX512]), "avx2": cmake(AVX2)}
"""What llama.cpp is compiled for: this processor, or a named set of instructions."""


@dataclass
class Work:
    """The file, and what is measured on it."""

    model: Path
    prompts: list[int]
    contexts: list[int]

    def warm(self) -> None:
        """Reads the file into the page cache."""
        with self.model.open("rb", buffering=0) as file:
            block = bytearray(1 << 24)
            while file.readinto(block):
                pass

    def options(self) -> list[str]:
        given = {"--prompts": self.prompts, "--contexts": self.contexts}
        return [f"{name}={','.join(map(str, lengths))}" for name, lengths in given.items()]


@dataclass
class Runner:
    """One engine in one setting."""

    name: str
    command: list[str]
    rounds: int
    setting: str = ""
    """Runners of one name are settings of one engine: the best of them counts, figure by figure."""
    env: dict[str, str] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def run(self, work: Work) -> None:
        work.warm()
        command = [*self.command, *work.options()]
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise RuntimeError(f"{self.name} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        self.reports.append(json.loads(done.stdout))

    def samples(self) -> dict[str, list[float]]:
        """Each figure in every round."""
        found: dict[str, list[float]] = {}
        for report in self.reports:
            for name, value in figures(report).items():
                found.setdefault(name, []).append(value)
        return found


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """One round's JSON as names and numbers."""
    found = {f"prefill {entry['tokens']}": entry["tokens_per_second"] for entry in report["prefill"]}
    for entry in report["decode"]:
        found[f"decode {entry['context']}"] = entry["tokens_per_second"]
        if "bandwidth_fraction" in entry:
            found[f"fraction {entry['context']}"] = entry["bandwidth_fraction"]
    names = {
        "load_seconds": "load",
        "private_bytes_loaded": "private loaded",
        "private_bytes_decoding": "private decoding",
        "four_tokens_over_one": "four over one",
        "bandwidth_bytes_per_second": "bandwidth",
    }
    return found | {short: report[key] for key, short in names.items() if report.get(key) is not None}


def medians(runners: Iterable[Runner]) -> dict[str, dict[str, float]]:
    """Each engine's medians; where it ran in several settings, of the best of them."""
    engines: dict[str, dict[str, float]] = {}
    for runner in runners:
        best = engines.setdefault(runner.name, {})
        for name, values in runner.samples().items():
            better = min if name.startswith(("load", "private", "four")) else max
            found = median(values)
            best[name] = better(found, best.get(name, found))
    return engines


def llama_python(build: str, folder: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python compiled as `build` says; made when it is not there."""
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
    """Clang, where there is one: what GCC 12 makes of llama.cpp's AMX code crashes."""
    for suffix in ["", *(f"-{version}" for version in range(25, 13, -1))]:
        c, cxx = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if c and cxx:
            return {"CC": c, "CXX": cxx}
    return {}


def usual_builds() -> list[str]:
    """One for the whole processor, and one for each lesser set of instructions that ours has a kernel for."""
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
    add("--model", help="a GGUF file, or demo (default: the one that candle-phi runs)")
    add("--n-threads", type=int, metavar="N", help="default: what candle-phi takes")
    add("--kernels", metavar="NAME,...", help="ours to compare, best first (default: all but portable)")
    add("--llama", action="append", metavar="BUILD", help=f"{builds}, or none; several times (default: as the CPU is)")
    add("--llama-python", action="append", default=[], metavar="BUILD=PATH", help="an environment that has it already")
    add("--rounds", type=int, default=5, metavar="N", help="default: 5")
    add("--candle-rounds", type=int, default=2, metavar="N", help="of Candle, which is slow (default: 2; 0: without)")
    add("--quick", action="store_true", help="one round of everything")
    add("--prompts", type=counts, default=[32, 128, 512], metavar="N,...", help="default: 32,128,512")
    add("--contexts", type=counts, default=[0, 1500], metavar="N,...", help="default: 0,1500")
    add("--out", type=Path, default=ROOT / "target" / "bench", help="default: target/bench")
    typed = parser.parse_args()
    for build in [*(typed.llama or []), *(entry.partition("=")[0] for entry in typed.llama_python)]:
        if build not in (*BUILDS, "none"):
            parser.error(f"no build {build!r} of llama.cpp is known here: {builds}")
    if min(typed.rounds, typed.candle_rounds + 1, *typed.prompts, *(n + 1 for n in typed.contexts)) < 1:
        parser.error("rounds and prompts are at least 1, contexts at least 0")
    if typed.quick:
        typed.rounds = 1
    return typed


def our_runner(name: str, kernel: str, n_threads: int, model: Path, rounds: int) -> Runner:
    return Runner(name, [*BENCH, f"--model={model}", f"--n-threads={n_threads}", f"--kernel={kernel}"], rounds)


def peer_runners(typed: argparse.Namespace, model: Path, n_threads: int) -> list[Runner]:
    """llama.cpp's builds, each without and with flash attention, and Candle's own loop."""
    found = []
    given = dict(entry.split("=", 1) for entry in typed.llama_python)
    for build in typed.llama or list(given) or usual_builds():
        if build != "none":
            python = given.get(build) or str(llama_python(build, typed.out))
            command = [python, str(ROOT / "benches" / "llama_speed.py"), str(model), f"--n-threads={n_threads}"]
            found.append(Runner(f"llama.cpp {build}", command, typed.rounds, "flash attention off"))
            found.append(
                Runner(f"llama.cpp {build}", [*command, "--flash-attention"], typed.rounds, "flash attention on")
            )
    if typed.candle_rounds:
        command = [*BENCH, f"--model={model}", "--engine=candle"]
        env = {"CANDLE_NUM_THREADS": str(n_threads), "RAYON_NUM_THREADS": str(n_threads)}
        found.append(Runner("Candle", command, min(typed.rounds, typed.candle_rounds), env=env))
    return found


def go_round(number: int, ours: list[Runner], peers: list[Runner], work: Work, left_out: list[str]) -> None:
    """One round through all. A peer that fails is left out from here on; one of ours that fails ends the run."""
    for runner in [runner for runner in [*ours, *peers] if number <= runner.rounds]:
        say(f"{time.strftime('%H:%M:%S')}  round {number}: {runner.name} {runner.setting}")
        try:
            runner.run(work)
        except RuntimeError as error:
            if runner not in peers:
                sys.exit(str(error))
            left_out.append(str(error))
            peers.remove(runner)
            continue
        if runner is ours[0] and number == 1:  # what does not fit the file is left out for everyone
            report = runner.reports[0]
            left_out += report["left_out"]
            work.prompts = [entry["tokens"] for entry in report["prefill"]]
            work.contexts = [entry["context"] for entry in report["decode"]]


def main() -> None:
    typed = arguments()
    path = typed.model or _engine.default_model()
    if path is None:
        sys.exit(
            "there is no model to measure: make bench MODEL=path/to/file.gguf, where "
            f"`hf download {_engine.DEFAULT_REPO} {_engine.DEFAULT_FILE}` gets the usual one (2.4 GB)"
        )
    with Phi.demo() if path == "demo" else Phi(path) as phi:
        model, best, n_threads = Path(phi.path).resolve(), phi.kernel, typed.n_threads or phi.n_threads
    doctor: dict[str, Any] = _engine.doctor()
    lesser = [kernel for kernel in doctor["kernels"][::-1] if kernel not in (best, "portable")]
    kernels = typed.kernels.split(",") if typed.kernels else [best, *lesser]
    ours = [our_runner(f"candle-phi {kernel}", kernel, n_threads, model, typed.rounds) for kernel in kernels]
    one_thread = our_runner("one thread", kernels[0], 1, model, typed.rounds)
    peers = peer_runners(typed, model, n_threads)
    work, left_out = Work(model, typed.prompts, typed.contexts), list[str]()
    for number in range(1, typed.rounds + 1):
        go_round(number, ours, peers, work, left_out)
        if n_threads > 1:
            go_round(number, [one_thread], [], Work(model, work.prompts[-1:], work.contexts[:1]), [])
    typed.out.mkdir(parents=True, exist_ok=True)
    write(typed.out / "tokens_per_second", model, ours, peers, one_thread, left_out)


def write(
    stem: Path, model: Path, ours: list[Runner], peers: list[Runner], one_thread: Runner, left_out: list[str]
) -> None:
    """The table, on stdout too, the chart, and every sample."""
    engines, names = medians([*ours, *peers]), [runner.name for runner in ours]
    mine, first = engines[names[0]], ours[0].reports[0]
    reads = {entry["context"]: entry["bytes_per_token"] for entry in first["decode"]}
    threads = first["n_threads"]
    caption = f"{first['machine']}, n_threads={threads}, {first['date'][:10]}, medians of {ours[0].rounds}"
    flags = " ".join(name for name, has in first["cpu"].items() if has is True)
    notes = [f"{caption}; {flags}.", f"Memory, when only read: {mine['bandwidth'] / 1e9:.1f} GB/s."]
    if one_thread.reports:
        alone = medians([one_thread])[one_thread.name]
        gains = [f"{heading(name)} {mine[name] / alone[name]:.2f}x" for name in speeds(alone)]
        gains.append(f"reading memory {mine['bandwidth'] / alone['bandwidth']:.2f}x")
        notes.append(f"{threads} threads over one: {', '.join(gains)}.")
    if "four over one" in mine:
        notes.append(f"A decode pass over 4 tokens takes {mine['four over one']:.2f} times as long as over one.")
    notes += [f"Left out: {what}" for what in left_out]
    text = tables(engines, names, reads) + "".join(f"\n{note}\n" for note in notes)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".svg").write_text(chart(engines, names, reads, caption), encoding="utf-8")
    record = {
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "date": first["date"],
        "machine": first["machine"],
        "cores": os.cpu_count(),
        "cpu": first["cpu"],
        "n_threads": threads,
        "medians": engines,
        "runs": [
            {"name": runner.name, "setting": runner.setting, "samples": runner.samples(), "reports": runner.reports}
            for runner in [*ours, *peers, one_thread]
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
