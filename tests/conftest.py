"""What the tests share: the bundled model, opened once, and the reference data where it lies beside the checkout."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from candle_phi import Phi
from fake_hub import FakeHub

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


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeHub], Path]:
    """Makes a server the Hub of this test, which has no token and no proxy; returns its own HF_HOME, whose name is not
    ASCII."""

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
    """What a script prints in a process of its own, which ends well and says nothing on stderr."""
    command = [sys.executable, "-W", warnings, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
