"""The protocol of an engine's process: it measures one figure at a time.

A process prints a line of JSON when it is ready, and one for each question: the measured figures by name. The other
processes wait meanwhile.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1] / "python" / "candle_phi"

private_bytes: Callable[[], int | None] = runpy.run_path(str(_PACKAGE / "_private_memory.py"))["private_bytes"]
"""As `candle-phi bench` counts it. The file is read here: llama.cpp's environment does not have the package."""

SHORT_PROMPT = 16
"""Tokens of the prompts of streams that share a model."""
ANSWER = 24
"""Tokens of their answers."""
AHEAD = 10
"""Tokens that are read before the clock of decoding starts: the engine computes up to 8 ahead of its reader."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments: the file, and the prompts and contexts of the questions to come."""

    def counts(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("model")
    arguments.add_argument("--prompts", type=counts, default=[])
    arguments.add_argument("--contexts", type=counts, default=[])
    arguments.add_argument("--n-threads", type=int)
    return arguments


def serve(ready: Mapping[str, Any], answers: Mapping[str, Callable[[int], Mapping[str, float | None]]]) -> None:
    """Answers questions like "prefill 512" or "load" until the end of stdin."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        question, _, n = line.strip().partition(" ")
        print(json.dumps(answers[question](int(n or 0))), flush=True)
