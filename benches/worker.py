"""Shared by the engines' processes: each answers questions about one figure at a time.

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


def parser(description: str | None) -> argparse.ArgumentParser:
    """Reads the arguments: the file, and the figures that will be asked for."""

    def counts(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    found = argparse.ArgumentParser(description=description)
    found.add_argument("model")
    found.add_argument("--prompts", type=counts, required=True)
    found.add_argument("--contexts", type=counts, required=True)
    found.add_argument("--n-threads", type=int)
    return found


def serve(ready: Mapping[str, Any], answers: Mapping[str, Callable[[int], Mapping[str, float | None]]]) -> None:
    """Answers questions like "prefill 512" or "load" until there are no more."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        question, _, n = line.strip().partition(" ")
        print(json.dumps(answers[question](int(n or 0))), flush=True)
