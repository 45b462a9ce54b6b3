"""Streams that share a model, and llama.cpp's sequences on the same file, in turns: a table and every sample as JSON.

    python benches/streams_together.py --model path/to/Phi-3-mini-4k-instruct-q4.gguf

What is measured:

- together: 8 streams side by side, decoding alone and with their prompts, over the same streams in turn. llama.cpp
  decodes 8 sequences in one batch, through the low-level interface of llama-cpp-python.
- one: one stream alone, compared with another checkout of this repository whose module is built (--base PATH).
- gaps: the longest wait of 8 decoding streams while a 1000-token prompt is read, over the longest pass and a layer of
  that prompt.
- late: the time to the first token of short prompts that arrive while a 3000-token prompt is read.
- memory: the anonymous memory of 8 streams of 512 tokens over its estimate, in a process of its own.

Each engine has a process for the whole comparison. They take turns figure by figure. A ratio is of figures of one
round; the table has its median and its range. Other work on the machine spoils the figures.
"""
# Decisions: docs/design/tests-and-benchmarks.md

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from candle_phi import _engine
from engines import Runner, compare, model_path, say, warm
from llama_builds import add_llama_options, check_llama_options, llama_environments
from report import figure, markdown

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benches"
MEASURES = ("together", "one", "gaps", "late", "memory")
TURNS = 3
"""Turns in a round for one stream alone: its figure decides about hundredths."""
BASE = "other checkout"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a GGUF file, or demo (default: phi-3-mini-4k from the cache)")
    add("--n-threads", type=int, default=2, metavar="N", help="default: 2")
    add("--kernels", metavar="NAME,...", help="kernels of candle-phi (default: all but portable)")
    add("--base", type=Path, metavar="PATH", help="another checkout of this repository; its module must be built")
    add_llama_options(parser)
    add("--measure", metavar="NAME,...", help=f"some of {', '.join(MEASURES)} (default: all)")
    add("--rounds", type=int, default=3, metavar="N", help="default: 3")
    add("--quick", action="store_true", help="one round of everything")
    add("--streams", type=int, default=8, metavar="N", help="of together (default: 8)")
    add("--prompt", type=int, default=1000, metavar="TOKENS", help="of gaps (default: 1000)")
    add("--long", type=int, default=3000, metavar="TOKENS", help="of late (default: 3000)")
    add("--context", type=int, default=512, metavar="TOKENS", help="of memory (default: 512)")
    add("--out", type=Path, default=ROOT / "target" / "bench", help="default: target/bench")
    typed = parser.parse_args()
    check_llama_options(parser, typed)
    typed.measure = typed.measure.split(",") if typed.measure else list(MEASURES)
    if unknown := sorted(set(typed.measure) - set(MEASURES)):
        parser.error(f"unknown measurement {unknown[0]!r}; expected some of: {', '.join(MEASURES)}")
    if min(typed.rounds, typed.streams, typed.prompt, typed.long, typed.n_threads) < 1 or typed.context < 64:
        parser.error("rounds, streams, prompts and threads are at least 1, the context of memory at least 64")
    if typed.base and not any((typed.base / "python" / "candle_phi").glob("_engine*")):
        parser.error(f"{typed.base} has no built module in python/candle_phi")
    if typed.quick:
        typed.rounds = 1
    return typed


def questions(typed: argparse.Namespace) -> list[str]:
    """The questions of a round."""
    n = typed.streams
    asked = {
        "together": [f"together {n}", f"in_turn {n}", f"answers {n}"],
        "one": TURNS * ["one"],
        "gaps": [f"gaps {typed.prompt}"],
        "late": [f"late {typed.long}"],
    }
    return [question for measure in typed.measure for question in asked.get(measure, [])]


def our_runner(typed: argparse.Namespace, model: Path, kernel: str, asked: list[str], base: Path | None) -> Runner:
    command = [sys.executable, str(BENCHES / "our_streams.py"), str(model), f"--n-threads={typed.n_threads}"]
    command += [f"--kernel={kernel}", f"--questions={','.join(asked)}"]
    env = {"PYTHONPATH": str(base / "python")} if base else {}
    return Runner(f"{BASE} {kernel}" if base else f"candle-phi {kernel}", command, asked, is_peer=bool(base), env=env)


def llama_runners(typed: argparse.Namespace, model: Path) -> list[Runner]:
    """llama.cpp's builds, each without and with flash attention."""
    asked = [question for question in questions(typed) if question.split()[0] in ("together", "answers", "one")]
    if not asked:
        return []
    return [
        Runner(
            f"llama.cpp {build}",
            [python, str(BENCHES / "llama_speed.py"), str(model), f"--n-threads={typed.n_threads}", *options],
            asked,
            f"flash attention {setting}",
            is_peer=True,
        )
        for build, python in llama_environments(typed).items()
        for setting, options in {"off": [], "on": ["--flash-attention"]}.items()
    ]


class Found:
    """The samples of engines, by name and figure. Of an engine's settings, the one that decodes faster counts."""

    def __init__(self, runners: Iterable[Runner]) -> None:
        self.engines: dict[str, dict[str, list[float]]] = {}
        for runner in runners:
            best = self.engines.setdefault(runner.name, {})
            for name, values in runner.samples.items():
                if name not in best or median(values) > median(best[name]):
                    best[name] = values

    def median(self, engine: str, name: str, unit: float = 1) -> str:
        values = self.engines[engine].get(name)
        return figure(median(values) * unit) if values else ""

    def ratio(self, mine: tuple[str, str], other: tuple[str, str]) -> str:
        """Of two figures, each of an engine: the median of the rounds, and the range."""
        values, others = (self.engines.get(engine, {}).get(name) for engine, name in (mine, other))
        return spread([a / b for a, b in zip(values, others, strict=True)]) if values and others else ""


def spread(values: Sequence[float]) -> str:
    middle, least, most = median(values), min(values), max(values)
    return f"{middle:.2f}" if len(values) == 1 else f"{middle:.2f} ({least:.2f} to {most:.2f})"


def report(found: Found, typed: argparse.Namespace) -> str:
    """Markdown tables: streams together, then the waits, then memory."""
    ours = [engine for engine in found.engines if engine.startswith("candle-phi ")]
    n, text = typed.streams, ""
    if "together" in typed.measure or "one" in typed.measure:
        shown = ["one", "decode in turn", "decode together", "answers in turn", "answers together"]
        heads = [
            "one stream",
            f"{n} in turn",
            f"{n} together",
            f"{n} in turn, with prompts",
            f"{n} together, with prompts",
        ]
        rows = [[engine, *(found.median(engine, name) for name in shown)] for engine in found.engines]
        text += markdown(["tok/s in all", *heads], [row for row in rows if any(row[1:])])
        rows = []
        for engine in ours:
            base = f"{BASE} {engine.split()[-1]}"
            compared = [
                (f"{engine}: {n} together / in turn", "decode together", engine, "decode in turn"),
                (f"{engine}: the same, with prompts", "answers together", engine, "answers in turn"),
                (f"{engine} / {BASE}: one stream", "one", base, "one"),
                (f"{engine} / {BASE}: a prompt of 128 tokens", "one prompt", base, "one prompt"),
            ]
            for peer in (name for name in found.engines if name.startswith("llama.cpp")):
                compared.append((f"{engine} / {peer}: {n} together", "decode together", peer, "decode together"))
                compared.append((f"{engine} / {peer}: with prompts", "answers together", peer, "answers together"))
            rows += [[label, found.ratio((engine, mine), (peer, other))] for label, mine, peer, other in compared]
        text += "\n" + markdown(["ratio", "median (range)"], [row for row in rows if row[1]])
    if "gaps" in typed.measure or "late" in typed.measure:
        shown = ["gap alone", "longest gap alone", "layer", "gap", "longest gap", "first token alone", "first token"]
        shown.append("longest first token")
        heads = [
            "pass",
            "longest pass",
            "layer",
            "wait",
            "longest wait",
            "first token alone",
            "behind a prompt",
            "longest",
        ]
        rows = [[engine, *(found.median(engine, name, 1000) for name in shown)] for engine in ours]
        text += "\n" + markdown(["ms", *heads], rows)
        for engine in ours:
            if limit := found.engines[engine].get("gap over limit"):
                text += f"\n{engine}: the longest wait is {spread(limit)} of the longest pass and a layer.\n"
    for engine in ours:
        if taken := found.engines[engine].get("memory over estimate"):
            sizes = [found.median(engine, name, 1e-6) for name in ("memory", "estimated memory")]
            text += (
                f"\n{engine}: streams of {typed.context} tokens take {sizes[0]} MB, {spread(taken)} of the estimated "
            )
            text += f"{sizes[1]} MB.\n"
    return text


def main() -> None:
    typed = arguments()
    model = model_path(typed.model)
    doctor: dict[str, Any] = _engine.doctor()
    best_first = [kernel for kernel in doctor["kernels"][::-1] if kernel != "portable"]
    kernels = typed.kernels.split(",") if typed.kernels else best_first
    left_out: list[str] = []
    asked = questions(typed)
    runners = [our_runner(typed, model, kernel, asked, None) for kernel in kernels]
    if typed.base and "one" in typed.measure:
        runners += [our_runner(typed, model, kernel, TURNS * ["one"], typed.base.resolve()) for kernel in kernels]
    warm(model)
    lasted = compare(typed.rounds, [*runners, *llama_runners(typed, model)], left_out) if asked else []
    for runner in lasted:
        if runner.name.startswith(BASE) and not Path(runner.ready["package"]).is_relative_to(typed.base.resolve()):
            sys.exit(f"{runner.name} is the package in {runner.ready['package']}, not that of {typed.base}")
    if "memory" in typed.measure:
        for kernel in kernels:
            [alone] = compare(1, [our_runner(typed, model, kernel, [f"memory {typed.context}"], None)], left_out)
            lasted.append(alone)
    typed.out.mkdir(parents=True, exist_ok=True)
    write(typed, model, lasted, left_out)


def write(typed: argparse.Namespace, model: Path, runners: list[Runner], left_out: list[str]) -> None:
    """The tables, on stdout too, and every sample."""
    about = runners[0].ready
    date = datetime.now(UTC).isoformat(timespec="seconds")
    flags = " ".join(name for name, has in about["cpu"].items() if has is True)
    found = Found(runners)
    text = report(found, typed)
    rounds = f"medians of {typed.rounds} rounds (memory: once)"
    text += f"\n{about['machine']}, n_threads={typed.n_threads}, {date[:10]}, {rounds}; {flags}.\n"
    text += "".join(f"\nLeft out: {what}\n" for what in left_out)
    record = {
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "date": date,
        "machine": about["machine"],
        "cores": os.cpu_count(),
        "cpu": about["cpu"],
        "n_threads": typed.n_threads,
        "medians": {
            engine: {name: median(values) for name, values in figures.items()}
            for engine, figures in found.engines.items()
        },
        "runs": [
            {"name": runner.name, "setting": runner.setting, "samples": runner.samples, "about": runner.ready}
            for runner in runners
        ],
        "left_out": left_out,
    }
    stem = typed.out / "streams_together"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)
    say(f"table and samples are in {stem.parent}")


if __name__ == "__main__":
    main()
