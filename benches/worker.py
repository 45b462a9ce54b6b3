"""What the engines' processes have in common: they answer questions about one figure at a time.

A process prints a line of JSON when it is ready, and one for each question: the figures that were measured, by name.
The others wait meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Takes the file, and what will be asked about it."""

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
