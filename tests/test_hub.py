"""Models of the Hub: the choice of the file, the download, and the cache."""

import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sandbox
from candle_phi import (
    BusyError,
    DownloadError,
    InvalidModelError,
    ModelNotFoundError,
    OfflineError,
    Phi,
    Progress,
    hub,
)
from conftest import HAIKU
from fake_hub import COMMIT, FakeHub, Reply, Request, wrong_contents

posix = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
CONTENT = random.Random(2).randbytes(1_500_000)
PARTS = {f"big/model-0000{i}-of-00003.gguf": random.Random(i).randbytes(1000 + i) for i in (1, 2, 3)}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    server = FakeHub({})
    yield server
    server.close()


@pytest.fixture
def home(server: FakeHub, use: Callable[[FakeHub], Path]) -> Path:
    server.files = {"model-q4.gguf": CONTENT, "README.md": b"# A model"}
    return use(server)


def slow(server: FakeHub, seconds: float = 0.01) -> None:
    server.break_with(lambda reply, _: setattr(reply, "slow", seconds), times=None)


def until_arrived(home: Path, size: int) -> None:
    """Waits until another process has written this many bytes, of which no event tells."""
    deadline = time.monotonic() + 20
    while sum(path.stat().st_size for path in home.rglob("*.incomplete")) < size:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def python(script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def ended(process: subprocess.Popen[str]) -> str:
    """The output of a process without errors."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out


# which file


def test_the_only_model_of_a_repository(server: FakeHub, home: Path) -> None:
    path = hub.download("org/model")
    assert path.read_bytes() == CONTENT
    assert path == home / "hub" / "models--org--model" / "snapshots" / COMMIT / "model-q4.gguf"
    assert hub.cached("org/model") == hub.cached("org/model", "*q4.gguf") == path
    server.forget()
    assert hub.download("org/model") == hub.download("org/model", "*q4*") == path
    assert server.requests == []


def test_several_models_are_listed_with_their_sizes(server: FakeHub, home: Path) -> None:
    server.files |= {"model-q8.gguf": bytes(3_210_000_0), **PARTS}
    for filename, says in ((None, "there are 3 GGUF models"), ("*.gguf", "3 models match"), ("q5*", "0 models match")):
        with pytest.raises(
            ModelNotFoundError, match=rf"org/model: {says}.*model-q4\.gguf \(2 MB\), model-q8\.gguf \(32 MB\)"
        ):
            hub.download("org/model", filename)
    assert hub.download("org/model", "*q4.gguf").read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"no such file.*model-q4\.gguf \(2 MB\)") as raised:
        hub.download("org/model", "model-q6.gguf")
    assert raised.value.status == 404


def test_a_repository_without_models(server: FakeHub, home: Path) -> None:
    server.files = {"README.md": b"nothing"}
    with pytest.raises(ModelNotFoundError, match="there are 0 GGUF models; its GGUF files: none"):
        hub.download("org/model")


@pytest.mark.parametrize("filename", ["big/model-00001-of-00003.gguf", "big/model-00003-of-00003.gguf", "big/*", None])
def test_all_parts_of_a_split_file(server: FakeHub, home: Path, filename: str | None) -> None:
    server.files = dict(PARTS)
    seen: list[Progress] = []
    path = hub.download("org/model", filename, on_progress=seen.append)
    assert path.name == "model-00001-of-00003.gguf"
    assert {part.name: part.read_bytes() for part in path.parent.iterdir()} == {
        Path(name).name: content for name, content in PARTS.items()
    }
    total = sum(map(len, PARTS.values()))
    assert (seen[-1].done, seen[-1].total) == (total, total)
    server.forget()
    assert hub.download("org/model", filename) == path
    assert server.requests == []
    path.unlink()
    assert hub.cached("org/model", "big/model-00002-of-00003.gguf") is None


def test_a_split_file_without_one_of_its_parts(server: FakeHub, home: Path) -> None:
    server.files = {name: content for name, content in PARTS.items() if "00002" not in name}
    with pytest.raises(ModelNotFoundError, match=r"model-00002-of-00003\.gguf.*missing"):
        hub.download("org/model")


def test_short_names(server: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for short, (repo, file) in hub.SHORT_NAMES.items():
        monkeypatch.setattr(server, "repo", repo)
        server.files = {file: CONTENT, "another.gguf": b"x"}
        path = hub.download(short)
        assert (path.name, path.read_bytes()) == (file, CONTENT)
        assert hub.cached(repo) == hub.cached(short, "*4*") == path
    assert set(hub.SHORT_NAMES) >= {"phi-3-mini-4k", "phi-3-mini-128k", "phi-3-medium-4k", "phi-3.5-mini", "phi-4"}
    assert {file.repo_id for file in hub.list_cached()} == {repo for repo, _ in hub.SHORT_NAMES.values()}


@pytest.mark.parametrize("filename", ["../x.gguf", "/etc/passwd", "a\\b.gguf", "C:x.gguf", "", "a/../../b", "a\0b"])
def test_a_file_name_stays_in_the_cache(home: Path, server: FakeHub, filename: str) -> None:
    for call in (hub.download, hub.cached):
        with pytest.raises(ValueError, match="filename"):
            call("org/model", filename)
    assert server.requests == []


@pytest.mark.parametrize("name", ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "..\\x.gguf", "C:\\x.gguf", "a\0.gguf"])
def test_a_file_name_of_the_servers_stays_in_the_cache(home: Path, server: FakeHub, name: str) -> None:
    server.files = {name: CONTENT}
    with pytest.raises(DownloadError, match="leads out of the cache"):
        hub.download("org/model")
    with pytest.raises(DownloadError, match="leads out of the cache"):
        hub.info("org/model")


@pytest.mark.parametrize("repo", ["", "a/b/c", "../b", "a b/c", "a/", "a--b/c", "a/..", "https://host/x"])
def test_an_invalid_repository(home: Path, repo: str) -> None:
    with pytest.raises(ValueError, match="repo_id"):
        hub.download(repo)


def test_types_are_checked(home: Path) -> None:
    for name, value in {"filename": 5, "revision": b"x", "token": 5, "local_files_only": 1, "on_progress": "x"}.items():
        with pytest.raises(TypeError, match=name):
            hub.download("org/model", **{name: value})  # type: ignore[arg-type]
        if name != "filename":
            with pytest.raises(TypeError, match=name):
                Phi.from_pretrained("org/model", **{name: value})  # type: ignore[arg-type]


def test_revisions(server: FakeHub, home: Path) -> None:
    path = hub.download("org/model", revision="v1")
    assert hub.cached("org/model") is None
    assert hub.cached("org/model", revision="v1") == hub.cached("org/model", revision=COMMIT) == path
    assert hub.download("org/model", revision=COMMIT) == path
    hub.download("org/model")
    (file,) = hub.list_cached()
    assert file.revisions == ("main", "v1")
    assert server.count() == 1
    for revision in ("../../x", "a b", ""):
        with pytest.raises(ValueError, match="revision"):
            hub.download("org/model", revision=revision)


@pytest.mark.parametrize(
    "listing", [b"<html>", b"[]", b'{"sha": "../..", "siblings": []}', b'{"sha": 5}', b"[" * 10**5]
)
def test_an_invalid_listing(server: FakeHub, home: Path, listing: bytes) -> None:
    server.break_with(lambda reply, _: setattr(reply, "body", listing), where="hub", times=None)
    with pytest.raises(DownloadError, match="the list of files"):
        hub.info("org/model")


def test_info(server: FakeHub, home: Path) -> None:
    info = hub.info("org/model")
    assert (info.repo_id, info.commit) == ("org/model", COMMIT)
    assert {file.filename: file.size for file in info.files} == {"README.md": 9, "model-q4.gguf": len(CONTENT)}
    assert info.files[-1].sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_a_listing_that_is_too_large(server: FakeHub, home: Path) -> None:
    server.break_with(lambda reply, _: setattr(reply, "body", b" " * ((16 << 20) + 1)), where="hub", times=None)
    with pytest.raises(DownloadError, match="the list of files is not valid: it has more than 16777216 bytes"):
        hub.info("org/model")
    assert server.count("hub") == 1


def test_a_small_file_is_checked_as_git_does(server: FakeHub, home: Path) -> None:
    assert hub.download("org/model", "README.md").read_bytes() == b"# A model"
    server.break_with(lambda reply, _: setattr(reply, "body", b"# A modem"), where="hub", times=None)
    hub.remove("org/model")
    with pytest.raises(DownloadError, match="checksum"):
        hub.download("org/model", "README.md")


# the token


def authorized(server: FakeHub) -> set[tuple[str, str | None]]:
    return {(request.where, request.headers.get("authorization")) for request in server.requests}


def test_the_token_goes_to_the_hub_alone(server: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.download("org/model")
    assert authorized(server) == {("hub", "Bearer hf_secret"), ("cdn", None)}
    server.forget()
    hub.remove("org/model")
    hub.download("org/model", token="another")
    assert authorized(server) == {("hub", "Bearer another"), ("cdn", None)}
    for variable in ("", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        server.forget()
        hub.remove("org/model")
        if variable:
            monkeypatch.setenv(variable, "1")
        hub.download("org/model", token=None if variable else False)
        assert authorized(server) == {("hub", None), ("cdn", None)}


def test_the_token_of_a_login(server: FakeHub, home: Path) -> None:
    with pytest.raises(ValueError, match="HF_TOKEN"):
        hub.download("org/model", token=True)
    home.mkdir(exist_ok=True)
    (home / "token").write_text("hf_of_login\n")
    hub.download("org/model", token=True)
    assert ("hub", "Bearer hf_of_login") in authorized(server)


@pytest.mark.parametrize("token", ["", "a b", "a\r\nhost: x", "é"])
def test_an_invalid_token(home: Path, server: FakeHub, token: str) -> None:
    with pytest.raises(ValueError, match="token"):
        hub.download("org/model", token=token)
    assert server.requests == []


# without the network


def test_offline_and_cold(home: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OfflineError, match=r"model-q4\.gguf of org/model is not in the cache.*local_files_only"):
        hub.download("org/model", "model-q4.gguf", local_files_only=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (
        lambda: hub.download("org/model"),
        lambda: Phi.from_pretrained("phi-4"),
        lambda: hub.info("org/model"),
    ):
        with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
            call()
    assert server.requests == []


NO_NETWORK = pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("http://127.0.0.1:9", r"127\.0\.0\.1 cannot be reached"),
        ("http://nowhere.invalid", r"cannot resolve nowhere\.invalid: no network, or no such host"),
    ],
)


@NO_NETWORK
def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, problem: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match=f"{problem}.*browser") as raised:
        hub.download("org/model", "model-q4.gguf")
    assert raised.value.host is not None
    assert raised.value.host in endpoint
    assert raised.value.status is None


@sandbox.needed
def test_offline_and_warm_opens_no_socket(home: Path, server: FakeHub, phi: Phi) -> None:
    server.files = {"demo.gguf": Path(phi.path).read_bytes()}
    hub.download("org/model")
    script = (
        "import sandbox, sys\n"
        "from candle_phi import Phi, hub\n"
        "sandbox.without('socket', error=None)\n"
        "with Phi.from_pretrained('org/model') as phi: print(phi.n_vocab)\n"
        "assert hub.cached('org/model') and hub.download('org/model', '*.gguf')\n"
        "assert hub.verify('org/model') and hub.list_cached()\n"
        "if len(sys.argv) > 1: hub.info('org/model')\n"
    )
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert ended(python(script, **env)) == f"{phi.n_vocab}\n"
    process = python(script, "ask")  # the test would notice
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGSYS


def test_invalid_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HF_ENDPOINT": "huggingface",
        "HF_HUB_DOWNLOAD_TIMEOUT": "soon",
        "HF_HUB_ETAG_TIMEOUT": "-1",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=f"{name}.*{value}"):
                hub.download("org/model")


# several at once, killed, interrupted

FETCH = "from candle_phi import hub; print(hub.download('org/model').stat().st_size)"


@posix
def test_killed_at_twenty_points(home: Path, server: FakeHub) -> None:
    slow(server, 0.002)
    for i in range(1, 21):
        process = python(FETCH)
        server.until_sent(i * len(CONTENT) // 21)
        process.kill()
        process.communicate()
        assert wrong_contents(home) == []
        assert hub.cached("org/model") is None
    server.mend()
    assert hub.download("org/model").read_bytes() == CONTENT
    # each killed process loses the bytes that were in flight, and no more
    assert server.sent < len(CONTENT) + 20 * 100_000


def test_eight_processes_make_one_download(home: Path, server: FakeHub) -> None:
    slow(server, 0.005)
    processes = [python(FETCH) for _ in range(8)]
    assert [ended(process) for process in processes] == [f"{len(CONTENT)}\n"] * 8
    assert (server.count(), server.sent) == (1, len(CONTENT))


def test_eight_threads_make_one_download(home: Path, server: FakeHub) -> None:
    slow(server, 0.002)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(hub.download("org/model").read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8
    assert server.sent == len(CONTENT)


def test_waiting_for_another_process_is_reported(home: Path, server: FakeHub) -> None:
    slow(server, 0.01)
    other = python(FETCH)
    server.until_sent(1)
    seen: list[Progress] = []
    hub.download("org/model", on_progress=seen.append)
    waits = [p for p in seen if p.phase == "wait" and p.total == len(CONTENT)]
    assert waits[0].done < waits[-1].done <= len(CONTENT)
    ended(other)


@pytest.mark.parametrize("phase", ["wait", "download", "stalled", "verify"])
def test_raising_in_the_callback_stops_it(home: Path, server: FakeHub, phase: str) -> None:
    class Stop(Exception):
        pass

    raised = Stop()

    def stop(p: Progress) -> None:
        if p.phase == phase or (phase == "stalled" and p.done == 500_000):
            raise raised

    if phase == "wait":
        server.break_with(lambda reply, _: setattr(reply, "stall", -1), where="hub", method="HEAD", times=None)
    elif phase == "stalled":
        server.break_with(lambda reply, _: setattr(reply, "stall", 500_000), times=None)
    elif phase == "verify":
        hub.download("org/model")
        with pytest.raises(Stop):
            hub.verify("org/model", on_progress=stop)
        return
    else:
        slow(server)
    with pytest.raises(Stop) as caught:
        hub.download("org/model", "model-q4.gguf", on_progress=stop)
    assert caught.value is raised
    server.mend()
    before = server.sent
    assert hub.download("org/model", "model-q4.gguf").read_bytes() == CONTENT  # the lock is free again
    if phase == "stalled":
        assert server.sent - before == len(CONTENT) - 500_000


def test_the_callback(home: Path, server: FakeHub) -> None:
    slow(server, 0.005)
    calls: list[tuple[int, Progress]] = []
    hub.download("org/model", on_progress=lambda p: calls.append((threading.get_ident(), p)))
    assert {thread for thread, _ in calls} == {threading.get_ident()}
    done = [p.done for _, p in calls if p.phase == "download"]
    assert done == sorted(done)
    last = calls[-1][1]
    assert (last.done, last.total, last.unit) == (len(CONTENT), len(CONTENT), "bytes")
    with pytest.raises(AttributeError):
        last.done = 0  # type: ignore[misc]


@posix
def test_ctrl_c_on_the_command_line(home: Path, server: FakeHub) -> None:
    server.break_with(lambda reply, _: setattr(reply, "stall", 500_000), times=None)
    for i, arguments in enumerate((["pull", "org/model"], [HAIKU, "--model", "org/model"]), 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "candle_phi", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "10"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        until_arrived(home, i * 500_000)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (130, b"", b"")
    server.mend()
    server.forget()
    assert hub.download("org/model").read_bytes() == CONTENT
    assert server.sent == len(CONTENT) - 2 * 500_000  # both commands left what they had


@posix
def test_a_process_ends_while_a_thread_downloads(home: Path, server: FakeHub) -> None:
    server.break_with(lambda reply, _: setattr(reply, "stall", 1000), times=None)
    script = (
        "import sys, threading, time\n"
        "from candle_phi import hub\n"
        "begun = threading.Event()\n"
        "note = lambda p: begun.set()\n"
        "threading.Thread(target=lambda: hub.download('org/model', on_progress=note), daemon=True).start()\n"
        "begun.wait()\n"
        "sys.exit(7)\n"
    )
    process = python(script, HF_HUB_DOWNLOAD_TIMEOUT="10")
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 7


# speed, with wide bounds: not for a busy machine


@pytest.mark.timing
@NO_NETWORK
def test_no_network_is_noticed_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, problem: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=problem):
        hub.download("org/model", "model-q4.gguf")
    assert time.monotonic() - begin < 2


@pytest.mark.timing
@pytest.mark.parametrize("phase", ["wait", "stalled"])
def test_an_exception_of_the_callback_arrives_at_once(home: Path, server: FakeHub, phase: str) -> None:
    if phase == "wait":
        server.break_with(lambda reply, _: setattr(reply, "stall", -1), where="hub", method="HEAD", times=None)
    else:
        server.break_with(lambda reply, _: setattr(reply, "stall", 500_000), times=None)
    raised_at = 0.0

    def stop(p: Progress) -> None:
        nonlocal raised_at
        if phase == "wait" or p.done > 0:
            raised_at = time.monotonic()
            raise KeyError(phase)

    with pytest.raises(KeyError, match=phase):
        hub.download("org/model", "model-q4.gguf", on_progress=stop)
    assert time.monotonic() - raised_at < 1


@pytest.mark.timing
def test_how_often_the_callback_is_called(home: Path, server: FakeHub) -> None:
    """At most 20 times a second, at least every 200 ms, also when nothing moves."""
    server.break_with(lambda reply, _: setattr(reply, "stall", 500_000))
    times: list[float] = []
    hub.download("org/model", on_progress=lambda _: times.append(time.monotonic()))
    assert all(len([t for t in times if start <= t < start + 1]) <= 20 for start in times)
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.5


@posix
@pytest.mark.timing
def test_how_fast_ctrl_c_ends_a_download(home: Path, server: FakeHub) -> None:
    server.break_with(lambda reply, _: setattr(reply, "stall", 500_000), times=None)
    process = subprocess.Popen(
        [sys.executable, "-m", "candle_phi", "pull", "org/model"],
        env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "10"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until_arrived(home, 500_000)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - begin < 1


# the cache

THEIRS = {
    "PYTHONUTF8": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "10",  # theirs are whole numbers
    "HF_HUB_ETAG_TIMEOUT": "10",
}


def test_huggingface_hub_finds_ours(home: Path, server: FakeHub) -> None:
    path = hub.download("org/model")
    script = (
        "from huggingface_hub import hf_hub_download, try_to_load_from_cache\n"
        "print(try_to_load_from_cache('org/model', 'model-q4.gguf'))\n"
        "print(hf_hub_download('org/model', 'model-q4.gguf', local_files_only=True))\n"
        "print(hf_hub_download('org/model', 'model-q4.gguf'))\n"
    )
    assert ended(python(script, **THEIRS, HF_HUB_OFFLINE="1")).splitlines() == [str(path)] * 3


def test_we_find_theirs(home: Path, server: FakeHub) -> None:
    script = (
        "from huggingface_hub import hf_hub_download\n"
        "print(hf_hub_download('org/model', 'model-q4.gguf', revision='v1'))"
    )
    process = python(script, **THEIRS)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    server.forget()
    path = hub.cached("org/model", revision="v1")
    assert str(path) == out.strip()
    assert hub.download("org/model", "model-q4.gguf", revision="v1", local_files_only=True) == path
    assert [file.path for file in hub.verify("org/model")] == [path]
    assert server.requests == []


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"HF_HOME": "~/x"},
        {"HF_HOME": "/a/$USER_OF_TEST/b"},
        {"HF_HUB_CACHE": "${USER_OF_TEST}/c"},
        {"HF_HUB_CACHE": "$NOT_SET/c"},
        {"XDG_CACHE_HOME": "/xdg"},
        {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"HF_HOME": "/h", "HF_HUB_CACHE": "/c"},
    ],
    ids=str,
)
def test_the_cache_folder_is_theirs(env: dict[str, str]) -> None:
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    script = (
        "from candle_phi import _engine\nfrom huggingface_hub import constants\n"
        "print(_engine.doctor()['cache_dir'])\nprint(constants.HF_HUB_CACHE)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, "USER_OF_TEST": "someone", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = done.stdout.splitlines()
    assert ours == theirs


@sandbox.needed
@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ("'symlink', 'symlinkat'", 1),
        ("'flock'", 38),
        ("'flock'", 37),
        ("'flock'", 0),
    ],
    ids=["no links", "no locks", "no locks left", "locks that keep nobody out"],
)
def test_strange_file_systems(home: Path, server: FakeHub, calls: str, error: int) -> None:
    slow(server, 0.002)
    server.break_with(lambda reply, _: setattr(reply, "cut", 300_000))
    script = f"import sandbox; sandbox.without({calls}, error={error})\n{FETCH}; assert hub.verify('org/model')"
    processes = [python(script) for _ in range(2)]
    assert [ended(process) for process in processes] == [f"{len(CONTENT)}\n"] * 2
    assert wrong_contents(home) == []
    assert not list(home.rglob("*.incomplete"))
    path = hub.cached("org/model")
    assert path is not None
    assert path.read_bytes() == CONTENT
    assert path.is_symlink() == ("link" not in calls)
    assert hub.remove("org/model") == len(CONTENT)  # so it took its room once
    assert not list(home.rglob("*.gguf"))


@posix
def test_a_cache_that_is_read_only(home: Path, server: FakeHub) -> None:
    path = hub.download("org/model")
    os.chmod(home.parent, 0o755)
    script = (
        "import os, urllib.request\n"  # while it may be read
        "from candle_phi import DownloadError, hub\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "print(hub.download('org/model'))\n"
        "try: hub.download('org/model', 'README.md')\n"
        "except DownloadError as error: print(error)\n"
    )
    folders = [folder for folder in (home, *home.rglob("*")) if folder.is_dir() and not folder.is_symlink()]
    for folder in folders:
        folder.chmod(0o555)
    for folder in home.parents:  # of pytest's own, for its user alone
        if folder.stat().st_uid == os.getuid() and "pytest" in folder.name:
            folder.chmod(folder.stat().st_mode | 0o055)
    try:
        found, error = ended(python(script, PYTHONUTF8="1")).splitlines()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert found == str(path)
    assert re.search(r"Jérôme 田中.*ermission denied.*HF_HUB_CACHE", error)


@posix
def test_a_disk_that_is_full_half_way(home: Path, server: FakeHub) -> None:
    script = (
        "import resource\n"
        "from candle_phi import DownloadError, hub\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
        "try: hub.download('org/model')\n"
        "except DownloadError as error: print(error)\n"
    )
    assert "incomplete: " in ended(python(script, PYTHONUTF8="1"))
    server.forget()
    assert hub.download("org/model").read_bytes() == CONTENT
    assert server.sent <= len(CONTENT) - 600_000


def test_a_cache_folder_that_is_a_file(home: Path, server: FakeHub) -> None:
    home.write_text("not a folder")
    with pytest.raises(DownloadError, match=r"Jérôme 田中.*HF_HUB_CACHE"):
        hub.download("org/model")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens and cannot be read")
def test_verify_names_a_file_that_cannot_be_read(home: Path, server: FakeHub) -> None:
    path = hub.download("org/model", "model-q4.gguf")
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(DownloadError, match=r"model-q4\.gguf: cannot be read: "):
        hub.verify("org/model")


def test_verify_names_what_is_damaged(home: Path, server: FakeHub) -> None:
    server.files |= {"other.gguf": b"another content"}
    path = hub.download("org/model", "model-q4.gguf")
    hub.download("org/model", "other.gguf")
    assert {file.filename for file in hub.verify()} == {"model-q4.gguf", "other.gguf"}
    seen: list[Progress] = []
    hub.verify("org/model", on_progress=seen.append)
    assert (seen[-1].phase, seen[-1].done) == ("verify", len(CONTENT) + 15)
    flipped = bytearray(CONTENT)
    flipped[700_000] ^= 1
    path.resolve().write_bytes(flipped)
    with pytest.raises(
        InvalidModelError, match=r"model-q4\.gguf has the checksum [0-9a-f]{64}, expected [0-9a-f]{64}"
    ) as raised:
        hub.verify()
    assert "other" not in str(raised.value)
    assert [file.filename for file in hub.verify("org/model", "other.gguf")] == ["other.gguf"]
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        hub.verify("org/none")


def test_remove(home: Path, server: FakeHub) -> None:
    server.files |= {"same.gguf": CONTENT, "other.gguf": b"another content"}
    for name in server.files:
        hub.download("org/model", name)
    assert server.count() == 2
    assert hub.remove("org/model", "same.gguf") == 0  # another name has the same content
    path = hub.cached("org/model", "model-q4.gguf")
    assert path is not None
    assert path.read_bytes() == CONTENT
    assert hub.remove("org/model", "model*") == len(CONTENT)
    assert [file.filename for file in hub.list_cached()] == ["other.gguf"]
    with pytest.raises(ModelNotFoundError, match="model"):
        hub.remove("org/model", "model*")
    assert hub.remove("org/model") == 15 + 9
    assert not (home / "hub" / "models--org--model").exists()
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        hub.remove("org/model")


def test_remove_while_it_is_downloaded(home: Path, server: FakeHub) -> None:
    slow(server, 0.01)
    other = python(FETCH)
    server.until_sent(1)
    with pytest.raises(BusyError, match="org/model is in use"):
        hub.remove("org/model")
    assert ended(other) == f"{len(CONTENT)}\n"


@posix
def test_a_download_waits_for_a_removal(home: Path, server: FakeHub) -> None:
    import fcntl

    path = home / "hub" / ".locks" / "models--org--model" / "repository.lock"
    path.parent.mkdir(parents=True)
    waited = False
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a process that removes has it

        def release(p: Progress) -> None:
            nonlocal waited
            if (p.phase, p.total) == ("wait", len(CONTENT)):
                waited = True
                assert server.count() == 0
                fcntl.flock(lock, fcntl.LOCK_UN)

        assert hub.download("org/model", on_progress=release).read_bytes() == CONTENT
        assert waited
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a process that downloads has it
        for filename in (None, "model-q4.gguf"):
            with pytest.raises(BusyError, match="org/model is in use"):
                hub.remove("org/model", filename)
    assert hub.remove("org/model") == len(CONTENT)


def test_space_is_checked_for_all_parts_before_the_first(home: Path, server: FakeHub) -> None:
    """Each part fits on the disk, all of them do not."""
    server.files = dict(PARTS)
    size = int(shutil.disk_usage(home.parent).free * 0.6)
    server.break_with(lambda reply, _: reply.headers.__setitem__("x-linked-size", str(size)), "hub", "HEAD", times=None)
    with pytest.raises(DownloadError, match=rf"not enough disk space: {3 * size / 1e9:.2f} GB to download.*free"):
        hub.download("org/model")
    assert (server.count(), server.sent) == (0, 0)


def test_sizes_that_no_disk_has(home: Path, server: FakeHub) -> None:
    server.files = dict(PARTS)
    size = str(2**64 - 1)
    server.break_with(lambda reply, _: reply.headers.__setitem__("x-linked-size", size), "hub", "HEAD", times=None)
    with pytest.raises(DownloadError, match=r"not enough disk space: 18\.45 EB to download"):
        hub.download("org/model")


def test_space_is_not_needed_for_parts_that_are_there(home: Path, server: FakeHub) -> None:
    server.files = dict(PARTS)
    hub.download("org/model")
    hub.remove("org/model", "*-00003-of-*")
    size = shutil.disk_usage(home.parent).free * 2

    def enlarge(reply: Reply, request: Request) -> None:
        if "00003-of" in request.path:
            reply.headers["x-linked-size"] = str(size)

    server.break_with(enlarge, "hub", "HEAD", times=None)
    with pytest.raises(DownloadError, match=rf"not enough disk space: {size / 1e9:.2f} GB to download"):
        hub.download("org/model")


def test_a_listing_whose_names_claim_too_many_parts(home: Path, server: FakeHub) -> None:
    server.files = {f"a{i:03}-00001-of-99999.gguf": b"x" for i in range(500)}
    with pytest.raises(ModelNotFoundError, match=r"500 GGUF models.*and 480 more") as raised:
        hub.download("org/model")
    assert len(str(raised.value)) < 2000
    with pytest.raises(ModelNotFoundError, match=r"a007-00002-of-99999\.gguf.*missing"):
        hub.download("org/model", "a007*")
    with pytest.raises(DownloadError, match=r"no such file"):
        hub.download("org/model", "a007-00001-of-99999.gguf")
    assert server.count("hub", "HEAD") == 2  # the first missing part ends it


def test_another_cache_folder(home: Path, server: FakeHub, tmp_path: Path) -> None:
    path = hub.download("org/model", cache_dir=tmp_path / "elsewhere")
    assert path.is_relative_to(tmp_path / "elsewhere")
    assert hub.cached("org/model") is None
    assert hub.cached("org/model", cache_dir=tmp_path / "elsewhere") == path
    assert not home.exists()


# opening what was downloaded


def test_from_pretrained(home: Path, server: FakeHub, phi: Phi) -> None:
    server.files = {"demo-q4.gguf": Path(phi.path).read_bytes()}
    seen: list[Progress] = []
    with Phi.from_pretrained("org/model", on_progress=seen.append, n_ctx=100) as opened:
        assert opened.n_ctx == 100
        assert opened.path.endswith("demo-q4.gguf")
        assert opened.generate(HAIKU, seed=1) == phi.generate(HAIKU, seed=1, max_tokens=100)
    assert [p.phase for p in seen][-1] == "load"
    assert "download" in {p.phase for p in seen}
    server.forget()
    Phi.from_pretrained("org/model", "*q4*", local_files_only=True).close()
    assert server.requests == []


def test_a_tokenizer_of_the_hub(home: Path, server: FakeHub, phi: Phi) -> None:
    server.files = {"demo.gguf": Path(phi.path).read_bytes(), "tokenizer.json": b'{"version": "none of ours"}'}
    error = r"org--model.*tokenizer\.json"  # of the reader, and so it was downloaded
    with pytest.raises(InvalidModelError, match=error):
        Phi.demo(tokenizer="org/model")
    with pytest.raises(InvalidModelError, match=error):
        Phi.from_pretrained("org/model", tokenizer="org/model")
    assert hub.cached("org/model", "tokenizer.json") is not None


def test_phi_names_the_call_for_a_short_name() -> None:
    with pytest.raises(ModelNotFoundError, match=r"Phi\.from_pretrained\('phi-4'\)"):
        Phi("phi-4")
