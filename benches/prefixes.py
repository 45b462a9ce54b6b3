"""Times until the first token: with and without what was computed before.

Usage: python benches/prefixes.py MODEL.gguf [--kernel NAME] [--rounds N]

- A second turn of a chat, after about 1000 tokens and with 50 new ones, and the same prompt computed as a whole.
- A prompt that begins with 2000 tokens of a system message, in a new process: from `prefix_cache_dir`, and computed.
- The memory of 200 different prompts, beside the limit of `prefix_cache`.
- Processes that share the folder: the memory that each has for itself.

The two sides of a ratio take turns. The figures are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from candle_phi import Phi

WORDS = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8").split()


def text(phi: Phi, tokens: int, start: int = 0) -> str:
    """Words of about this many tokens."""
    words = [WORDS[(start + i) % len(WORDS)] for i in range(tokens)]
    while phi.count_tokens(" ".join(words)) > tokens:
        words = words[: len(words) * 9 // 10]
    return " ".join(words)


def first_token(phi: Phi, prompt: object) -> tuple[float, int]:
    """Seconds until the first token, and the cached tokens."""
    result = phi.generate(prompt, temperature=0, max_tokens=1, ignore_eos=True)  # type: ignore[arg-type]
    return result.timings.time_to_first_token or 0.0, result.usage.cached_tokens


def second_turn(model: str, kernel: str | None, rounds: int) -> dict[str, object]:
    """The second turn of a chat, and its prompt as a whole."""
    held, whole, counts = [], [], {}
    with Phi(model, kernel=kernel, prefix_cache=4 << 30) as phi, Phi(model, kernel=kernel, prefix_cache=0) as other:
        for i in range(rounds):
            with phi.chat(temperature=0, ignore_eos=True) as chat:
                chat.send(text(phi, 960, 100 * i), max_tokens=40)
                before = len(chat.token_ids)
                turn = chat.send(text(phi, 42, 7 * i), max_tokens=1)
                held.append(turn.timings.time_to_first_token or 0.0)
                prompt = chat.token_ids[: turn.usage.prompt_tokens]
                counts = {"held": before, "prompt": turn.usage.prompt_tokens, "cached": turn.usage.cached_tokens}
            whole.append(first_token(other, prompt)[0])
    a, b = statistics.median(held), statistics.median(whole)
    return {**counts, "seconds": a, "seconds_as_a_whole": b, "ratio": a / b}


def new_process(model: str, kernel: str | None, folder: str | None) -> dict[str, object]:
    """A system message of 2000 tokens and a question, in a process of its own. Prints JSON."""
    with Phi(model, kernel=kernel, prefix_cache_dir=folder) as phi:
        system = {"role": "system", "content": text(phi, 1990)}
        start = time.perf_counter()
        phi.warm([system])
        warmed = time.perf_counter() - start
        seconds, cached = first_token(phi, [system, {"role": "user", "content": "Why?"}])
        return {"warm": warmed, "first_token": seconds, "cached": cached, "private_mb": private_megabytes()}


def private_megabytes() -> float:
    """Memory of this process alone, without mapped files, on Linux."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def prefix_folder(model: str, kernel: str | None, rounds: int) -> dict[str, object]:
    """New processes, from the folder and without one."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(model))) as folder:
        run = [sys.executable, __file__, model, "--process"] + (["--kernel", kernel] if kernel else [])

        def process(*more: str) -> dict[str, float]:
            done = subprocess.run([*run, *more], check=True, capture_output=True, text=True)
            return dict(json.loads(done.stdout))

        first = process("--folder", folder)
        later = [process("--folder", folder) for _ in range(rounds)]
        bytes_ = sum(file.stat().st_size for file in Path(folder).iterdir())
    median = {key: statistics.median(run[key] for run in later) for key in later[0]}
    return {"computed": first, "from_the_folder": median, "folder_mb": bytes_ / 1e6}


def many_prompts(model: str, kernel: str | None, count: int) -> dict[str, object]:
    """Different prompts one after the other, within a budget of 512 MiB."""
    limit = 512 << 20
    with Phi(model, kernel=kernel, prefix_cache=limit) as phi:
        most = private = 0.0
        for i in range(count):
            first_token(phi, text(phi, 150, 37 * i))
            most, private = max(most, phi.cache_info().bytes), max(private, private_megabytes())
    return {"prompts": count, "limit_mb": limit / 1e6, "most_mb": most / 1e6, "private_mb": private}


def main() -> None:
    """Measures what was asked for and prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kernel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=0, help="also this many different prompts")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    typed = parser.parse_args()
    if typed.process:
        print(json.dumps(new_process(typed.model, typed.kernel, typed.folder)))
        return
    print("second turn:", json.dumps(second_turn(typed.model, typed.kernel, typed.rounds)), flush=True)
    print("system message:", json.dumps(prefix_folder(typed.model, typed.kernel, typed.rounds)), flush=True)
    if typed.prompts:
        print("prompts:", json.dumps(many_prompts(typed.model, typed.kernel, typed.prompts)), flush=True)


if __name__ == "__main__":
    main()
