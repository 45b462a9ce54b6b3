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
from collections.abc import Callable, Iterable, Sequence
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

    def spread(self, engine: str, name: str) -> str:
        values = self.engines[engine].get(name)
        return spread(values) if values else ""


def spread(values: Sequence[float]) -> str:
    """The median, and the range."""
    middle, least, most = median(values), min(values), max(values)
    return f"{middle:.2f}" if len(values) == 1 else f"{middle:.2f} ({least:.2f} to {most:.2f})"


def report(found: Found, typed: argparse.Namespace) -> str:
    """Markdown: the speeds of all engines, then all other figures, with a column for each of our kernels."""
    shown = {
        "one": "one stream",
        "decode in turn": f"{typed.streams} in turn",
        "decode together": f"{typed.streams} together",
        "answers in turn": "in turn, with prompts",
        "answers together": "together, with prompts",
    }
    rows = [[engine, *(found.median(engine, name) for name in shown)] for engine in found.engines]
    rows = [row for row in rows if any(row[1:])]
    text = markdown(["tok/s in all", *shown.values()], rows) + "\n" if rows else ""
    ours = [engine for engine in found.engines if engine.startswith("candle-phi ")]
    facts = [[label, *(cell(engine) for engine in ours)] for label, cell in cells(found, typed).items()]
    return text + markdown(["", *ours], [row for row in facts if any(row[1:])])


def cells(found: Found, typed: argparse.Namespace) -> dict[str, Callable[[str], str]]:
    """The rows of the second table: from a label to the text for one of our engines."""

    def over(name: str, other: str, engine: str | None = None) -> Callable[[str], str]:
        """The ratio of a figure to another, of the same engine by default."""
        return lambda mine: found.ratio((mine, name), (engine or mine, other))

    def over_base(name: str) -> Callable[[str], str]:
        return lambda mine: found.ratio((mine, name), (f"{BASE} {mine.split()[-1]}", name))

    def figures(name: str, unit: float = 1000) -> Callable[[str], str]:
        return lambda mine: found.median(mine, name, unit)

    n = typed.streams
    rows = {f"{n} together / in turn": over("decode together", "decode in turn")}
    rows["the same, with prompts"] = over("answers together", "answers in turn")
    for peer in (name for name in found.engines if name.startswith("llama.cpp")):
        rows[f"{n} together / {peer}"] = over("decode together", "decode together", peer)
        rows[f"the same, with prompts, {peer}"] = over("answers together", "answers together", peer)
    rows[f"one stream / {BASE}"] = over_base("one")
    rows[f"prompt of 128 tokens / {BASE}"] = over_base("one prompt")
    rows["pass of 8 streams, ms"] = figures("gap alone")
    rows["longest pass, ms"] = figures("longest gap alone")
    rows[f"layer of a prompt of {typed.prompt} tokens, ms"] = figures("layer")
    rows["longest wait of the 8 beside that prompt, ms"] = figures("longest gap")
    rows["longest wait / (longest pass + layer)"] = lambda mine: found.spread(mine, "gap over limit")
    rows["first token of a prompt of 20 tokens, ms"] = figures("first token alone")
    rows[f"beside a prompt of {typed.long} tokens, ms"] = figures("first token")
    rows["the longest, ms"] = figures("longest first token")
    rows[f"memory of 8 streams of {typed.context} tokens, MB"] = figures("memory", 1e-6)
    rows["memory / estimate"] = figures("memory over estimate", 1)
    return rows


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
    rounds = f"medians of {typed.rounds} rounds" if typed.rounds > 1 else "one round"
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
