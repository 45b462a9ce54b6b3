"""What the tests share: the bundled model, opened once, and the reference data where it lies beside the checkout."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from candle_phi import Phi

ROOT = Path(__file__).resolve().parents[1]
HAIKU = "Write a haiku about ice hockey"


@pytest.fixture(scope="session")
def phi() -> Iterator[Phi]:
    with Phi.demo() as phi:
        yield phi


@pytest.fixture(scope="session")
def shared() -> Path:
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return path


def run_python(script: str, warnings: str = "error") -> str:
    """What a script prints in a process of its own, which ends well and says nothing on stderr."""
    command = [sys.executable, "-W", warnings, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
