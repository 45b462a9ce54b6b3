"""Shared by the tests: the bundled model, a fake Hub, processes, and the rule for tests that measure time."""
# Decisions: docs/design/tests-and-benchmarks.md

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from candle_phi import Phi
from fake_hub import FakeHub

ROOT = Path(__file__).resolve().parents[1]
HAIKU = "Write a haiku about ice hockey"
HANG = 60.0
"""Seconds after which a wait counts as a hang. Not a measure of speed: nothing here takes a tenth of it."""

TIMING = "timing"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--timing", action="store_true", help="run the tests that measure time, with their limits")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A slow machine must not fail `make test`. A test whose subject is time has the mark `timing`: it runs with
    --timing only. A test that also checks something else takes the fixture `stopwatch`: it always runs, and its limits
    apply with --timing only."""
    timing = config.getoption("--timing")
    chosen = [item for item in items if (_measures_time(item) if timing else not item.get_closest_marker(TIMING))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _measures_time(item: pytest.Item) -> bool:
    return item.get_closest_marker(TIMING) is not None or "stopwatch" in getattr(item, "fixturenames", ())


class Stopwatch:
    def __init__(self, enforced: bool) -> None:
        self.enforced = enforced

    def check(self, seconds: float, limit: float) -> None:
        """Prints a measured duration. With --timing, fails if it exceeds the limit."""
        print(f"{1000 * seconds:.0f} ms, limit {1000 * limit:.0f} ms")
        if self.enforced:
            assert seconds < limit


@pytest.fixture(scope="session")
def stopwatch(pytestconfig: pytest.Config) -> Stopwatch:
    return Stopwatch(pytestconfig.getoption("--timing"))


def wait_until(condition: Callable[[], object]) -> None:
    """Polls a condition that has no hook. Fails if it hangs."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.002)


@pytest.fixture(scope="session")
def phi() -> Iterator[Phi]:
    with Phi.demo() as phi:
        yield phi


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside this checkout: vocabularies of the real models, too large for the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no reference data in ../shared")
    return path


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeHub], Path]:
    """`use(server)` makes the server the Hub of this test, without a token or a proxy. It returns the test's own
    HF_HOME, whose name is not ASCII."""

    def use(server: FakeHub) -> Path:
        home = tmp_path / "Jérôme 田中"
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("HF_", "SSL_CERT_", "REQUESTS_CA_")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "2")
        server.mend()
        server.forget()
        return home

    return use


def run_python(script: str, warnings: str = "error") -> str:
    """Runs a script in a process of its own and returns its stdout. It must exit with 0 and leave stderr empty."""
    command = [sys.executable, "-W", warnings, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * HANG)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
