"""The protocol of an engine's process: it measures one figure at a time.

A process prints a line of JSON when it is ready, and one for each question: the measured figures by name. The other
processes wait meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments: the file, and the prompts and contexts of the questions to come."""

    def counts(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("model")
    arguments.add_argument("--prompts", type=counts, required=True)
    arguments.add_argument("--contexts", type=counts, required=True)
    arguments.add_argument("--n-threads", type=int)
    return arguments


def serve(ready: Mapping[str, Any], answers: Mapping[str, Callable[[int], Mapping[str, float | None]]]) -> None:
    """Answers questions like "prefill 512" or "load" until the end of stdin."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        question, _, n = line.strip().partition(" ")
        print(json.dumps(answers[question](int(n or 0))), flush=True)
