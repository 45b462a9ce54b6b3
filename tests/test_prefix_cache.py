"""The prefix cache: what it holds, for whom, in what memory, and in which folder."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from candle_phi import ClosedError, Phi
from conftest import ROOT, run_python

SYSTEM = {"role": "system", "content": "You answer in one sentence, about hockey and winter. " * 12}
QUESTIONS = ["What is icing?", "What is a power play?", "Who are you?"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def asked(question: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with Phi.demo(prefix_cache=0) as phi:
        results = [phi.generate(asked(question), **GREEDY) for question in QUESTIONS]
        assert {result.usage.cached_tokens for result in results} == {0}
        return [str(result) for result in results]


def test_calls_share_what_they_begin_with(texts: list[str]) -> None:
    with Phi.demo() as phi:
        first, *others = (phi.generate(asked(question), **GREEDY) for question in QUESTIONS)
        assert [first, *others] == texts
        common = phi.count_tokens([SYSTEM]) - 1  # without the start of an answer
        assert first.usage.cached_tokens == 0
        assert all(other.usage.cached_tokens >= common > 128 for other in others)
        again = phi.generate(asked(QUESTIONS[0]), **GREEDY)
        assert (again, again.usage.cached_tokens) == (texts[0], again.usage.prompt_tokens - 1)
        info = phi.cache_info()
        assert (info.hits, info.misses) == (3, 1)
        assert 0 < info.bytes <= info.limit
        assert info.positions >= first.usage.prompt_tokens


def test_prompts_at_once_share_what_they_begin_with(texts: list[str]) -> None:
    with Phi.demo() as phi:
        results = list(phi.map([asked(question) for question in QUESTIONS], **GREEDY))
        assert [str(result) for result in results] == texts
        cached = [result.usage.cached_tokens for result in results]
        assert cached[0] == 0
        assert min(cached[1:]) >= 128, "the others waited for the first one"


def test_scores_and_logits_use_it_and_keep_their_bits() -> None:
    text = "The puck drops and the rink goes quiet. " * 30
    with Phi.demo(prefix_cache=0) as phi:
        ids = phi.tokenize(text)
        expected = (phi.score(ids, start=200), phi.logits(ids))
    with Phi.demo() as phi:
        for _ in range(2):
            assert (phi.score(ids, start=200), phi.logits(ids)) == expected
        assert phi.cache_info().hits >= 3


def test_a_scope_sees_its_own_prefixes_alone(texts: list[str], tmp_path: Path) -> None:
    prompt = asked(QUESTIONS[0])
    with Phi.demo(prefix_cache_dir=tmp_path) as phi:
        phi.generate(prompt, cache_scope="a", **GREEDY)
        cached = [phi.generate(prompt, cache_scope=scope, **GREEDY).usage.cached_tokens for scope in ("b", None, "a")]
        assert cached[:2] == [0, 0]
        assert cached[2] > 128
        phi.warm([SYSTEM])  # waits for the folder
    with Phi.demo(prefix_cache_dir=tmp_path) as phi:
        cached = [phi.generate(prompt, cache_scope=scope, **GREEDY).usage.cached_tokens for scope in ("c", "b")]
        assert cached[0] == 0
        assert cached[1] > 128


def test_warming_computes_what_the_next_call_begins_with() -> None:
    with Phi.demo() as phi:
        phi.warm([SYSTEM], pin=True)
        result = phi.generate(asked(QUESTIONS[0]), **GREEDY)
        assert result.usage.cached_tokens >= phi.count_tokens([SYSTEM]) - 1
    with pytest.raises(ClosedError):
        phi.warm([SYSTEM])


@pytest.mark.parametrize("limit", [0, 1, 300_000, 600_000, 3_000_000])
def test_many_prompts_stay_within_the_limit(limit: int) -> None:
    most = 0
    with Phi.demo(prefix_cache=limit) as phi:

        def ask(first: int) -> None:
            nonlocal most
            for i in range(first, 40, 2):
                phi.generate([i] * 150, max_tokens=2, ignore_eos=True)
                most = max(most, phi.cache_info().bytes)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most <= limit
        assert (phi.cache_info().positions > 0) == (limit >= 300_000)
        assert phi.cache_info().limit == limit


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_200_long_prompts() -> None:
    script = """
from pathlib import Path
from candle_phi import Phi
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
with Phi.demo(prefix_cache=8_000_000) as phi:
    for i in range(20): phi.generate([i + 3] * 600, max_tokens=1, ignore_eos=True)
    before = resident()
    for i in range(200): phi.generate([i + 100] * 600, max_tokens=1, ignore_eos=True)
    print(resident() - before < 12_000_000, phi.cache_info().bytes <= 8_000_000)
"""
    assert run_python(script) == "True True\n"


def process(folder: Path, **options: Any) -> dict[str, Any]:
    """Asks a question in a process of its own."""
    script = f"""
import json, sys
from pathlib import Path
from candle_phi import Phi
with Phi.demo(prefix_cache_dir={str(folder)!r}, **{options!r}) as phi:
    phi.warm({asked(QUESTIONS[0])!r})
    result = phi.generate({asked(QUESTIONS[0])!r}, **{GREEDY!r})
    print(json.dumps([result, result.usage.cached_tokens, phi.cache_info().hits]))
"""
    text, cached, hits = json.loads(run_python(script))
    return {"text": text, "cached": cached, "hits": hits}


def test_a_folder_is_shared_by_processes_and_kept(tmp_path: Path, texts: list[str]) -> None:
    folder = tmp_path / "new" / "folder"
    first, second = process(folder), process(folder)
    assert [first["text"], second["text"]] == [texts[0]] * 2
    assert (first["hits"], second["hits"]) == (1, 2), "the second process has computed nothing"
    assert process(folder, kv_cache="f32")["hits"] == 1, "keys and values of another type are others"
    if os.name != "nt":
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "gone"])
def test_a_damaged_folder(tmp_path: Path, texts: list[str], damage: str) -> None:
    process(tmp_path)
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        middle = len(whole) // 2
        changed = {
            "cut": whole[:middle],
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"no safetensors",
        }
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(changed[damage])
    again = process(tmp_path)
    assert (again["text"], again["hits"]) == (texts[0], 1)
    assert process(tmp_path)["hits"] == 2, "the damaged files were replaced"


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_what_is_no_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        Phi.demo(prefix_cache_dir=tmp_path / where)


def test_a_folder_that_is_removed_while_it_is_open(tmp_path: Path, texts: list[str]) -> None:
    folder = tmp_path / "folder"
    with Phi.demo(prefix_cache_dir=folder) as phi:
        phi.warm([SYSTEM])
        shutil.rmtree(folder)
        assert [str(phi.generate(asked(question), **GREEDY)) for question in QUESTIONS] == texts


def test_two_processes_fill_a_folder_at_once(tmp_path: Path, texts: list[str]) -> None:
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(process(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one["text"] for one in found] == [texts[0]] * 3
    assert process(tmp_path)["hits"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_processes_share_the_pages_of_a_folder(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from candle_phi import Phi
phi = Phi({str(ROOT / "tests" / "golden" / "plain.gguf")!r}, kernel="portable", prefix_cache_dir={str(tmp_path)!r})
ids = [i % 50 + 3 for i in range(phi.n_ctx - 8)]
phi.warm(ids)
result = phi.generate(ids, max_tokens=1, ignore_eos=True)
print(result.usage.cached_tokens, len(ids), flush=True)
sys.stdin.read()
pages = Path("/proc/self/smaps").read_text().split("VmFlags")
mine = [page for page in pages if {str(tmp_path)!r} in page]
print(sum(int(line.split()[1]) for page in mine for line in page.splitlines() if line.startswith("Private_Dirty")))
print(len(mine) > 0)
"""
    command = [sys.executable, "-c", script]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    subprocess.run(command, check=True, input="", text=True, stdout=subprocess.DEVNULL)
    processes = [subprocess.Popen(command, **pipes) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        cached, length = map(int, process.stdout.readline().split())
        assert cached == length - 1 > 100
    for process in processes:
        assert process.communicate()[0] == "0\nTrue\n", "no page of the files is a process's own"
