"""Chats in files: whatever happens to a file, the next turn has the right text or one clear error."""

import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candle_phi import ClosedError, InvalidModelError, Phi, PhiError
from candle_phi import saved as saved_texts
from conftest import ROOT, run_python, wait_until

GOLDEN = ROOT / "tests" / "golden"
SYSTEM = "You answer in one sentence. " * 12
TURNS = ["What is icing?", "What is a power play?", "Who are you?"]
NEXT = "What is a Zamboni?"


def talk(phi: Phi) -> Any:
    chat = phi.chat(SYSTEM, temperature=0, max_tokens=40)
    for turn in TURNS:
        chat.send(turn)
    return chat


@pytest.fixture(scope="module")
def phi() -> Any:
    with Phi.demo(kernel="portable") as phi:
        yield phi


@pytest.fixture(scope="module")
def expected(phi: Phi) -> str:
    return str(talk(phi).send(NEXT))


@pytest.fixture(scope="module")
def saved(phi: Phi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    talk(phi).save(path)
    return path


def test_a_loaded_chat_goes_on_without_computing_it_again(phi: Phi, saved: Path, expected: str) -> None:
    with Phi.demo(kernel="portable") as other:
        chat = other.load_chat(saved)
        assert [message["content"] for message in chat.messages if message["role"] == "user"] == TURNS
        before = len(chat.token_ids)
        answer = chat.send(NEXT)
        assert answer == expected
        assert answer.usage.cached_tokens >= before - 1 > 128
        chat.rewind(2)
        assert chat.send(TURNS[2]) == talk(phi).messages[-1]["content"]


def test_a_file_without_keys_and_values_has_kilobytes(phi: Phi, tmp_path: Path, expected: str) -> None:
    path = tmp_path / "small"
    talk(phi).save(path, kv=False)
    assert path.stat().st_size < 16_000
    with Phi.demo(kernel="portable") as other:
        answer = other.load_chat(path).send(NEXT)
        assert (answer, answer.usage.cached_tokens) == (expected, 0)


def goes_on(path: Path, expected: str) -> str:
    """The next turn of a damaged file: its text is right, or there is one clear error and the model works on."""
    with Phi.demo(kernel="portable") as phi:
        failure = None
        try:
            assert phi.load_chat(path).send(NEXT) == expected
        except PhiError as error:
            failure = str(error)
        assert failure is None or str(path) in failure
        assert phi.generate("Who are you?", temperature=0, max_tokens=3) == "I am the"
        return "text" if failure is None else "error"


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file(saved: Path, tmp_path: Path, expected: str, damage: str) -> None:
    whole = saved.read_bytes()
    chance = random.Random(1)
    header = int.from_bytes(whole[:8], "little") + 8
    places = [0, 7, 8, 9, header - 1, header, len(whole) - 1]
    places += [chance.randrange(header) for _ in range(10)] + [chance.randrange(len(whole)) for _ in range(20)]
    path = tmp_path / "damaged"
    outcomes = []
    for place in places:
        flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
        path.write_bytes(whole[:place] if damage == "cut" else whole[:place] + flipped + whole[place + 1 :])
        outcomes.append(goes_on(path, expected))
        path.unlink()
    assert outcomes.count("error") == len(places)


def test_a_damaged_column_spoils_one_turn_and_not_the_chat(saved: Path, tmp_path: Path, expected: str) -> None:
    whole = bytearray(saved.read_bytes())
    header = int.from_bytes(whole[:8], "little") + 8
    whole[header + 100_000] ^= 1
    path = tmp_path / "damaged"
    path.write_bytes(whole)
    with Phi.demo(kernel="portable") as phi:
        chat = phi.load_chat(path)
        before = chat.messages
        with pytest.raises(InvalidModelError, match=r"damaged: the checksum of column 0, positions 0 to 127"):
            chat.send(NEXT)
        assert chat.messages == before
        assert chat.send(NEXT) == expected


@pytest.mark.parametrize("other", [{"kv_cache": "f32"}, {"kernel": None}])
def test_keys_and_values_of_another_kind_are_computed_anew(
    saved: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Phi.demo(**{"kernel": "portable", **other}) as phi:
        if phi.kernel == "portable" and "kernel" in other:
            pytest.skip("this CPU has the portable kernel alone")
        chat = phi.load_chat(saved)
        assert len(caplog.messages) == 1
        assert str(saved) in caplog.messages[0]
        answer = chat.send(NEXT)
        assert answer.usage.cached_tokens == 0
        assert len(chat.messages) == 2 * len(TURNS) + 3
        with pytest.raises(InvalidModelError, match="another model"):
            phi.load_chat(saved, strict=True)


def test_a_file_of_another_model(saved: Path) -> None:
    with Phi(GOLDEN / "plain.gguf") as other:
        chat = other.load_chat(saved)
        assert chat.messages[1]["content"] == TURNS[0]
        assert chat.fork().token_ids != Phi.demo().load_chat(saved).token_ids


@pytest.mark.parametrize("name", ["nowhere", "folder", "model", "text"])
def test_what_is_no_chat(phi: Phi, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "model":
        shutil.copy(phi.path, path)
    elif name == "text":
        path.write_text("no chat")
    error = FileNotFoundError if name == "nowhere" else InvalidModelError
    with pytest.raises(error, match=str(path)):
        phi.load_chat(path)


def test_saving_over_the_file_that_a_chat_uses(saved: Path, tmp_path: Path, expected: str) -> None:
    path = tmp_path / "chat"
    shutil.copy(saved, path)
    with Phi.demo(kernel="portable") as phi:
        chat, other = phi.load_chat(path), phi.load_chat(path)
        assert chat.send(NEXT) == expected
        chat.save(path)
        assert other.send(NEXT) == expected
        path.unlink()
        assert other.send("Who are you?") == chat.send("Who are you?")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and signals")
@pytest.mark.parametrize("where", ["folder", "missing/chat", "full"])
def test_a_chat_that_cannot_be_saved(phi: Phi, tmp_path: Path, where: str) -> None:
    if where == "full":
        script = f"""
import resource, signal
from candle_phi import Phi
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
phi = Phi.demo()
chat = phi.chat({SYSTEM!r}, temperature=0)
chat.send("Who are you?", max_tokens=3)
chat.save({str(tmp_path / "chat")!r}, kv=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: chat.save({str(tmp_path / "chat")!r})
except OSError as error: print({str(tmp_path)!r} in str(error), len(phi.load_chat({str(tmp_path / "chat")!r}).messages))
print(bool(chat.send("Who are you?", max_tokens=3)))
"""
        assert run_python(script) == "True 3\nTrue\n"
        assert os.listdir(tmp_path) == ["chat"]
        return
    (tmp_path / "folder").mkdir()
    chat = talk(phi)
    before = chat.messages
    with pytest.raises(OSError, match=where.split("/")[0]):
        chat.save(tmp_path / where)
    assert chat.messages == before
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a process is killed")
def test_a_process_that_is_killed_while_it_saves(tmp_path: Path, saved: Path, expected: str) -> None:
    path = tmp_path / "chat"
    shutil.copy(saved, path)
    script = f"""
import sys
from candle_phi import Phi
chat = Phi.demo(kernel="portable").load_chat({str(saved)!r})
print("ready", flush=True)
while True: chat.save({str(path)!r})
"""
    chance = random.Random(2)
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            inode = path.stat().st_ino
            wait_until(functools.partial(_is_replaced, path, inode))
            for _ in range(chance.randrange(2000)):
                pass
            process.kill()
        assert goes_on(path, expected) == "text"
    with Phi.demo(kernel="portable") as phi:
        phi.load_chat(saved).save(path)
    assert os.listdir(tmp_path) == ["chat"], "what killed writers left is removed"


def _is_replaced(path: Path, inode: int) -> bool:
    return path.stat().st_ino != inode


def test_two_writers(tmp_path: Path, saved: Path, expected: str) -> None:
    path = tmp_path / "chat"
    script = f"""
from candle_phi import Phi
chat = Phi.demo(kernel="portable").load_chat({str(saved)!r})
for _ in range(20): chat.save({str(path)!r})
"""
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert goes_on(path, expected) == "text"
    assert os.listdir(tmp_path) == ["chat"]


def _other_text(content: str) -> str:
    return content.replace('"user"', '"usher"', 1)


def _large_id(content: str) -> str:
    texts = json.loads(content)
    texts["states"][1]["ids"] = [2**40]
    return json.dumps(texts)


def _negative_count(content: str) -> str:
    texts = json.loads(content)
    texts["states"][1]["messages"] = -1
    return json.dumps(texts)


@pytest.mark.parametrize(
    "change", [_other_text, _large_id, _negative_count, lambda text: text[:-2], lambda text: "{}", lambda text: "[1]"]
)
def test_a_file_whose_texts_make_no_sense(
    phi: Phi, saved: Path, tmp_path: Path, change: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any) -> dict[str, str]:
        return {"chat": change(saved_texts.to_metadata(*args)["chat"])}

    monkeypatch.setattr(importlib.import_module("candle_phi.chat"), "to_metadata", changed)
    path = tmp_path / "chat"
    phi.load_chat(saved).save(path)
    with pytest.raises(InvalidModelError, match=str(path)):
        phi.load_chat(path)


def test_a_closed_model(saved: Path, tmp_path: Path) -> None:
    phi = Phi.demo()
    chat = phi.chat()
    phi.close()
    with pytest.raises(ClosedError):
        chat.save(tmp_path / "chat")
    with pytest.raises(ClosedError):
        phi.load_chat(saved)


def test_a_saved_chat_stays_in_its_scope(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with Phi.demo() as phi:
        chat = phi.chat(SYSTEM, cache_scope="a", temperature=0, max_tokens=5)
        chat.send(TURNS[0])
        misses = phi.cache_info().misses
        chat.save(path)
        assert phi.cache_info().misses == misses, "it was held, and is not computed in another scope"
        ids = chat.token_ids
        assert phi.generate(ids, max_tokens=1).usage.cached_tokens == 0
    with Phi.demo() as phi:
        loaded = phi.load_chat(path)
        assert loaded.fork().send(TURNS[1], cache_scope="b").usage.cached_tokens == 0
        assert loaded.send(TURNS[1]).usage.cached_tokens >= len(ids) - 1
