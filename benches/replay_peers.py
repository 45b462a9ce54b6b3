"""Speculation on known texts: candle-phi, and llama-cpp-python with prompt lookup, line by line in turns.

Usage: python benches/replay_peers.py FILE.jsonl --model MODEL.gguf [--lines N] [--rounds N]

FILE has lines as `candle-phi bench --replay` takes them; benches/replays.py makes some. Both engines get the same ids.
The speeds are those of decoding, from the first token to the last: prompts are read before.
"""

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from candle_phi import Phi, _engine, _replay
from engines import Runner, compare, model_path, say, warm
from llama_builds import add_llama_options, check_llama_options, llama_environments
from report import markdown

ROOT = Path(__file__).resolve().parents[1]
BENCHES = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--model", help='a GGUF file, or "demo" (default: the command line\'s model)')
    parser.add_argument("--lines", type=int, metavar="N", help="only the first N")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--n-threads", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--kernels", metavar="NAME,...", help="default: the best here")
    parser.add_argument("--out", type=Path, default=ROOT / "target" / "bench", help="default: target/bench")
    add_llama_options(parser)
    typed = parser.parse_args()
    check_llama_options(parser, typed)
    if min(typed.rounds, typed.n_threads, typed.lines or 1) < 1:
        parser.error("rounds, threads and lines are at least 1")
    return typed


def tokens(typed: argparse.Namespace, model: Path) -> list[_replay.Item]:
    """The lines of the file in the model's tokens. Exits if there is a mistake in them."""
    try:
        lines = _replay.read(typed.file.read_text(encoding="utf-8"), str(typed.file), typed.lines)
        with Phi(str(model)) as phi:
            return _replay.items(phi, lines, str(typed.file))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def runners(typed: argparse.Namespace, model: Path, items: Path, asked: list[str]) -> list[Runner]:
    common = [str(model), f"--n-threads={typed.n_threads}", f"--items={items}"]
    doctor: dict[str, Any] = _engine.doctor()
    kernels = typed.kernels.split(",") if typed.kernels else [doctor["kernel"]]
    ours = [
        Runner(
            f"candle-phi {kernel}",
            [sys.executable, str(BENCHES / "our_replay.py"), *common, f"--kernel={kernel}"],
            asked,
        )
        for kernel in kernels
    ]
    peers = [
        Runner(
            f"llama-cpp-python {build}",
            [python, str(BENCHES / "llama_replay.py"), *common, *options],
            asked,
            f"flash attention {setting}",
            is_peer=True,
        )
        for build, python in llama_environments(typed).items()
        for setting, options in {"off": [], "on": ["--flash-attention"]}.items()
    ]
    return ours + peers


def report(items: list[_replay.Item], lasted: list[Runner]) -> str:
    """Tokens per second by line and in all; of the peers also what ours is over them."""
    names = [f"line {item.number}" for item in items]
    counts = [len(item.answer) - 1 for item in items]
    times = [[median(runner.samples[f"seconds {item.number}"]) for item in items] for runner in lasted]
    rows = []
    for runner, seconds in zip(lasted, times, strict=True):
        passes = sum(runner.samples["passes"]) * len(items) / len(runner.samples["passes"])
        speeds = [f"{count / time:.1f}" for count, time in zip(counts, seconds, strict=True)]
        in_all = [f"{sum(counts) / sum(seconds):.1f}", f"{sum(counts) / passes:.2f}"]
        rows.append(
            [f"{runner.name} {runner.setting}".strip(), *speeds, *in_all, f"{sum(seconds) / sum(times[0]):.2f}"]
        )
    return markdown(["tok/s", *names, "in all", "tokens a pass", f"{lasted[0].name} over it"], rows)


def main() -> None:
    typed = arguments()
    model = model_path(typed.model)
    items = tokens(typed, model)
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.json"
        path.write_text(json.dumps(items), encoding="utf-8")
        asked = [f"line {item.number}" for item in items]
        warm(model)
        lasted = compare(typed.rounds, runners(typed, model, path, asked), left_out)
    about = lasted[0].ready
    date = datetime.now(UTC).isoformat(timespec="seconds")
    text = report(items, lasted)
    text += f"\n{about['machine']}, n_threads={typed.n_threads}, {date[:10]}, rounds: {typed.rounds}.\n"
    text += "".join(f"\nLeft out: {what}\n" for what in left_out)
    record = {
        "model": model.name,
        "file": typed.file.name,
        "date": date,
        "lines": [[item.number, len(item.prompt), len(item.answer)] for item in items],
        "runs": [
            {"name": runner.name, "setting": runner.setting, "samples": runner.samples, "about": runner.ready}
            for runner in lasted
        ],
        "left_out": left_out,
    }
    typed.out.mkdir(parents=True, exist_ok=True)
    stem = typed.out / "replay_peers"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)
    say(f"table and samples are in {stem.parent}")


if __name__ == "__main__":
    main()
