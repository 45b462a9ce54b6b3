"""The builds for aarch64 on CPUs that `qemu-aarch64` plays, beside this machine's own (`make test-aarch64`)."""

import json
import os
import subprocess

import pytest

from conftest import ROOT
from test_emulated import PROMPTS, SCRIPT, texts  # noqa: F401  # a fixture

HERE = ROOT / "target" / "aarch64"
PYTHON = str(HERE / "bin" / "python")
FROM_SOURCE = {"PYTHONPATH": str(HERE / "fp16")}  # as `pip install .` builds it, with +fp16
FEATURES = {
    "cortex-a53": "neon",  # ARMv8.0, as in a Raspberry Pi 3; that of a Pi 4 has the same
    "cortex-a76": "neon, fp16, dotprod",  # a Raspberry Pi 5
    "max": "neon, fp16, dotprod, i8mm, bf16",
}


def run(cpu: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-W", "error", *arguments]
    env = {**os.environ, "CPU": cpu, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("cpu", FEATURES)
def test_doctor_names_the_kernel_and_what_the_cpu_has(cpu: str) -> None:
    done = run(cpu, "-m", "candle_phi", "doctor")
    assert done.returncode == 0, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert shown["cpu"] == f"arch aarch64, os linux, {FEATURES[cpu]}"
    assert (shown["kernels"], shown["kernel"]) == ("portable neon", "neon")


@pytest.mark.parametrize("cpu", FEATURES)
def test_the_wheel_writes_what_this_machine_writes(texts: list[str], cpu: str) -> None:  # noqa: F811  # the fixture
    done = run(cpu, "-c", SCRIPT, json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["neon", "neon", *texts]


def test_a_build_from_source_does_too(texts: list[str]) -> None:  # noqa: F811  # the fixture
    done = run("max", "-c", SCRIPT, json.dumps(PROMPTS), **FROM_SOURCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["neon", "neon", *texts]


def test_a_build_from_source_says_that_a_cpu_lacks_fp16() -> None:
    done = run("cortex-a53", "-c", "import candle_phi", **FROM_SOURCE)
    assert done.returncode == 1, done.stderr  # an illegal instruction would be -4
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ")
    assert "fp16" in error


def test_candles_engine_is_refused_where_it_would_end_the_process() -> None:
    script = (
        "from candle_phi import Phi\n"
        "try: phi = Phi.demo(engine='candle')\n"
        "except ValueError as error: print(error)\n"
        "else: print(phi.generate('Hi', temperature=0, max_tokens=2, ignore_eos=True).usage.completion_tokens)\n"
    )
    refused, runs = run("cortex-a53", "-c", script), run("cortex-a76", "-c", script)
    assert (refused.returncode, runs.returncode) == (0, 0), refused.stderr + runs.stderr
    assert "dotprod" in refused.stdout
    assert runs.stdout == "2\n"
