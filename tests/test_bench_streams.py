"""`benches/streams_together.py`: what it reports. Speeds themselves are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPT = str(ROOT / "benches" / "streams_together.py")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--model=demo", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_comparison(tmp_path: Path) -> None:
    """With this checkout as the other one. llama.cpp, which does not run here, is left out with its last words."""
    options = ["--quick", "--kernels=portable", "--prompt=200", f"--base={ROOT}", f"--out={tmp_path}"]
    done = run(*options, f"--llama-python=native={sys.executable}")
    assert done.returncode == 0, done.stderr
    assert "Left out: llama.cpp native flash attention off ended with 1" in done.stdout
    assert "Left out: late 3000: needs 3001 positions, the context has 1024" in done.stdout
    for row in ("8 together / in turn", "one stream / other checkout", "longest wait / (longest pass + layer)"):
        assert f"| {row} | " in done.stdout
    found = json.loads((tmp_path / "streams_together.json").read_text(encoding="utf-8"))
    ours, other, alone = found["runs"]
    assert (ours["name"], other["name"]) == ("candle-phi portable", "other checkout portable")
    for name in ("decode in turn", "decode together", "answers in turn", "answers together", "gap over limit"):
        (figure,) = ours["samples"][name]
        assert figure > 0
    assert len(ours["samples"]["one"]) == len(other["samples"]["one"]) == 3
    assert alone["name"] == "candle-phi portable"
    (memory,) = alone["samples"]["estimated memory"]
    assert memory > 8 * 512 * 2048  # keys and values of 8 streams, in f16


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_memory_is_that_of_all_streams(tmp_path: Path) -> None:
    for context in (128, 896):
        assert (
            run("--measure=memory", "--kernels=portable", f"--context={context}", f"--out={tmp_path}").returncode == 0
        )
        (alone,) = json.loads((tmp_path / "streams_together.json").read_text(encoding="utf-8"))["runs"]
        (taken,) = alone["samples"]["memory"]
        (estimated,) = alone["samples"]["estimated memory"]
        assert taken > 0.5 * estimated


@pytest.mark.parametrize("option", ["--measure=speed", "--rounds=0", "--llama=sse", "--base=/nowhere", "--context=8"])
def test_wrong_options_are_refused(option: str) -> None:
    assert run(option).returncode == 2
