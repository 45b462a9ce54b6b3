"""What a shell and a terminal see of the Hub: the commands, the bar, the warning of too little memory."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import terminal
from candle_phi import Phi, _engine, hub, memory
from candle_phi.cli.model import DOWNLOAD_GB
from conftest import HAIKU, run_python
from fake_hub import FakeHub

COMMAND = [sys.executable, "-m", "candle_phi"]
posix = pytest.mark.skipif(os.name != "posix", reason="terminals as POSIX has them")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with Phi.demo() as phi:
        server = FakeHub({"demo-q4.gguf": Path(phi.path).read_bytes(), "other.gguf": b"another"})
    yield server
    server.close()


@pytest.fixture
def home(server: FakeHub, use: Callable[[FakeHub], Path]) -> Path:
    return use(server)


def run(*arguments: str, code: int = 0) -> str:
    """What a command prints; on failure what it says."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    said, silent = (done.stderr, done.stdout) if code else (done.stdout, done.stderr)
    assert silent == b""
    return said.decode()


def on_terminal(*arguments: str, columns: int = 100, **env: str) -> tuple[int, str, str]:
    """Runs with a terminal as stderr: exit code, stdout, and what the terminal received."""
    code, received, out = terminal.on_terminal([*COMMAND, *arguments], "stderr", columns=columns, **env)
    return code, out.decode(), received.decode()


def test_pull_list_verify_rm(home: Path, server: FakeHub) -> None:
    path = run("pull", "org/model", "*q4*").strip()
    assert Path(path).read_bytes() == server.files["demo-q4.gguf"]
    assert run("pull", "org/model", "demo-q4.gguf", "--revision", "v1").strip() == path
    listed = [line.split() for line in run("list").splitlines()]
    size = f"{len(server.files['demo-q4.gguf']) / 1e6:.1f}"
    assert listed[0] == ["MODEL", "SIZE", "FILE"]
    assert listed[1][:4] == ["demo", size, "MB", "bundled"]
    assert listed[-1] == ["org/model", size, "MB", "downloaded", "demo-q4.gguf"]
    for short, (_, file) in hub.SHORT_NAMES.items():
        assert [short, f"{DOWNLOAD_GB[short]}", "GB", "not", "downloaded", file] in listed
    (found,) = json.loads(run("list", "--json"))["cached"]
    assert (found["repo_id"], found["path"], found["revisions"]) == ("org/model", path, ["main", "v1"])
    assert run("verify") == run("verify", "org/model", "demo*") == f"ok  {size} MB  org/model  demo-q4.gguf\n"
    Path(path).resolve().write_bytes(b"damaged")
    assert "demo-q4.gguf has the checksum" in run("verify", code=1)
    assert run("rm", "org/model") == "removed, 7 B are free again\n"
    assert "not in the cache" in run("rm", "org/model", code=1)
    assert "org/model" not in run("list")
    assert run("verify") == f"there are no models in the cache {home / 'hub'}\n"


def test_the_list_fits_80_columns(home: Path, server: FakeHub) -> None:
    run("pull", "org/model", "demo-q4.gguf")
    named = {
        "bartowski/Phi-4-mini-reasoning-instruct-GGUF": "Phi-4-mini-reasoning-Q4_K_M.gguf",
        hub.SHORT_NAMES["phi-4"][0]: hub.SHORT_NAMES["phi-4"][1],
    }
    for repo, file in named.items():
        folder = home / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40, encoding="ascii")
        (snapshot / file).write_bytes(b"GGUF")
    lines = run("list").splitlines()
    assert max(map(len, lines)) < 80
    assert ["phi-4", "4", "B", "downloaded", named[hub.SHORT_NAMES["phi-4"][0]]] in [line.split() for line in lines]
    at = lines.index("bartowski/Phi-4-mini-reasoning-instruct-GGUF")  # too long for its column
    assert lines[at + 1].split() == ["4", "B", "downloaded", "Phi-4-mini-reasoning-Q4_K_M.gguf"]


def test_mistakes_are_usage_errors(home: Path, server: FakeHub) -> None:
    for arguments in (["pull"], ["rm"], ["pull", "a/b/c"], ["pull", "org/model", "../x"], ["list", "--tokn"]):
        assert len(run(*arguments, code=2).splitlines()) == 1
    said = run(HAIKU, "--model", "org/model", "--revision", "a b", code=2)
    assert said.endswith('revision must be a branch, a tag or a commit, not "a b"\n')
    assert "did you mean candle-phi pull" in run("pul", code=2)


def test_a_prompt_to_a_model_of_the_hub(home: Path, server: FakeHub, phi: Phi) -> None:
    arguments = [HAIKU, "--seed", "1", "--model", "org/model", "--filename", "*q4*"]
    answer = phi.generate(HAIKU, seed=1) + "\n"
    assert run(*arguments) == answer
    server.forget()
    assert run(*arguments, "--local-files-only") == answer
    assert server.requests == []


def test_the_main_command(home: Path, server: FakeHub, phi: Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, file = hub.SHORT_NAMES["phi-3-mini-4k"]
    monkeypatch.setattr(server, "repo", repo)
    monkeypatch.setitem(server.files, file, server.files["demo-q4.gguf"])
    done = subprocess.run([*COMMAND, HAIKU, "--seed=1"], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.decode()) == (0, phi.generate(HAIKU, seed=1) + "\n")
    said = f"downloading {file} (2.4 GB), once; --model demo needs no download"
    assert done.stderr.decode() == f"candle-phi: {said}\n"
    server.forget()
    assert run(HAIKU, "--seed=1", "--model", "phi-3-mini-4k") == phi.generate(HAIKU, seed=1) + "\n"
    assert server.requests == []


def test_a_failure_is_one_line(home: Path, server: FakeHub) -> None:
    server.break_with(lambda reply, _: setattr(reply, "status", 403), times=None)
    (line,) = run("pull", "org/model", "other.gguf", code=1).splitlines()
    assert "localhost answers 403" in line
    assert "Signature" not in line


@posix
def test_the_bar(home: Path, server: FakeHub) -> None:
    server.break_with(lambda reply, _: setattr(reply, "slow", 0.005), times=None)
    code, out, drawn = on_terminal("pull", "org/model", "demo-q4.gguf")
    assert (code, Path(out.strip()).name) == (0, "demo-q4.gguf")
    lines = [line.rstrip() for line in drawn.replace("\n", "\r").split("\r") if line.strip()]
    assert len(lines) > 5
    assert max(map(len, lines)) < 100
    size = f"{len(server.files['demo-q4.gguf']) / 1e6:.1f}"
    assert any("MB/s" in line and "left" in line and "#" in line and "%" in line for line in lines)
    assert "100%" in lines[-1]
    assert f"of {size} MB" in lines[-1]
    assert drawn.endswith("\r\n")
    assert drawn.count("\n") == 1


@posix
def test_no_bar_where_none_is_wanted(home: Path, server: FakeHub) -> None:
    assert on_terminal("pull", "org/model", "other.gguf", HF_HUB_DISABLE_PROGRESS_BARS="1")[2] == ""
    assert on_terminal("pull", "org/model", "other.gguf")[2] == ""  # it is there


STREAMS = """
import io, sys
from candle_phi import hub
class Odd:
    def write(self, text): raise OSError("full")
for progress in (None, True, False):
    for stream in (None, Odd(), io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")):
        sys.stdout = sys.stderr = stream
        hub.download("org/model", "other.gguf", progress=progress)
        hub.remove("org/model")
        drawn = stream.getvalue() if isinstance(stream, io.StringIO) else None
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        if drawn is not None: print(progress, "100%" in drawn)
"""


def test_streams_that_are_none(home: Path, server: FakeHub) -> None:
    assert run_python(STREAMS).split() == ["None", "False", "True", "True", "False", "False"]


def test_nothing_is_drawn_and_nothing_logged_by_the_library(home: Path, server: FakeHub) -> None:
    assert run_python("from candle_phi import hub; hub.download('org/model', 'other.gguf')") == ""


def test_a_model_that_is_larger_than_memory(
    phi: Phi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = os.path.getsize(phi.path)
    for free, warns in ((size // 2, True), (100 * size, False), (None, False)):
        caplog.clear()
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        with caplog.at_level(logging.WARNING, "candle_phi"):
            Phi(phi.path).close()
        assert bool(caplog.records) == warns
    assert _engine.memory_needed(phi.path, 100, "f32")[1] == 2 * _engine.memory_needed(phi.path, 100, "f16")[1]


def test_the_warning_counts_the_context(
    phi: Phi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights, context, activations = _engine.memory_needed(phi.path, phi.n_ctx, "f16")
    assert weights == os.path.getsize(phi.path)
    keys = [
        "block_count",
        "attention.head_count_kv",
        "attention.sliding_window",
        "embedding_length",
        "attention.head_count",
    ]
    layers, kv_heads, window, hidden, heads = (cast(int, phi.metadata[f"phi3.{key}"]) for key in keys)
    per_position = 2 * 2 * layers * kv_heads * hidden // heads  # keys and values, 2 bytes each
    assert context % per_position == 0
    assert window < context // per_position < phi.n_ctx
    monkeypatch.setattr(memory, "available", lambda: weights + context + activations - 1)
    Phi(phi.path, n_ctx=phi.n_ctx).close()
    (record,) = caplog.records
    assert phi.path in record.getMessage()
    assert "are free" in record.getMessage()


@pytest.mark.skipif(sys.platform not in ("linux", "darwin", "win32"), reason="the platforms that are known")
def test_free_memory() -> None:
    free = memory.available()
    assert free is not None
    assert 2**26 < free < 2**45


def test_loading_reports_and_can_be_left(phi: Phi) -> None:
    seen: list[str] = []
    Phi(phi.path, on_progress=lambda p: seen.append(p.phase)).close()
    assert seen[-1] == "load"

    def leave(_: object) -> None:
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        Phi(phi.path, on_progress=leave)
