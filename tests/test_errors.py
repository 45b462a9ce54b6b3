"""Every exception: raised where it belongs, naming what was wrong; picklable; caught by its built-in base."""

import copy
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

import candle_phi
from candle_phi import (
    InvalidModelError,
    ModelNotFoundError,
    Phi,
    PhiError,
    UnsupportedModelError,
    hub,
)
from conftest import run_python


def made(error: type[PhiError]) -> PhiError:
    if error is candle_phi.ContextLengthError:
        return candle_phi.ContextLengthError("too long", 50, 40)
    if issubclass(error, candle_phi.DownloadError):
        return error("no answer", "https://host/file", 503, "host")
    return error("what was wrong")


CLASSES = [value for value in vars(candle_phi).values() if isinstance(value, type) and issubclass(value, PhiError)]


@pytest.mark.parametrize("error", CLASSES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_errors_keep_their_attributes(error: type[PhiError], protocol: int) -> None:
    before = made(error)
    after = pickle.loads(pickle.dumps(before, protocol))
    assert type(after) is error
    assert str(after) == str(before)
    for name in ("prompt_tokens", "n_ctx", "url", "status", "host"):
        assert getattr(after, name, None) == getattr(before, name, None)


def gguf(*pairs: tuple[str, str]) -> bytes:
    """A GGUF v3 file of string keys and no tensors."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    keys = b"".join(string(key) + struct.pack("<I", 8) + string(value) for key, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + keys


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    for given in (path, str(path)):
        with pytest.raises(FileNotFoundError, match=r"none\.gguf") as raised:
            Phi(given)
        assert type(raised.value) is ModelNotFoundError


def test_a_folder_names_the_call_that_works(tmp_path: Path, phi: Phi) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Phi\.from_pretrained\("):
        Phi(tmp_path)
    shutil.copy(phi.path, tmp_path / "some.gguf")
    with pytest.raises(ModelNotFoundError, match=r"1 \.gguf files?: Phi\(.*some\.gguf"):
        Phi(tmp_path)
    with Phi.from_pretrained(tmp_path, "some.gguf") as opened:
        assert opened.n_vocab == phi.n_vocab


def test_a_repository_names_the_call_that_works() -> None:
    with pytest.raises(ModelNotFoundError, match=r"Phi\.from_pretrained\('microsoft/Phi-3-mini-4k-instruct-gguf'\)"):
        Phi("microsoft/Phi-3-mini-4k-instruct-gguf")


@pytest.mark.parametrize("path", [b"model.gguf", 5, None, ["model.gguf"]])
def test_a_path_is_text(path: Any) -> None:
    with pytest.raises(TypeError, match="model_path must be"):
        Phi(path)
    with pytest.raises(ValueError, match="NUL"):
        Phi("a\0b.gguf")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty|0 bytes|short|ends"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
        (b"PK\x03\x04" + b"\0" * 100, "GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "4611686018427387904|key"),
        (gguf(("general.architecture", "phi3")), "phi3|token|tensor"),
    ],
)
def test_a_damaged_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModelError, match=says) as raised:
        Phi(path)
    assert isinstance(raised.value, ValueError)
    assert "bad.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(gguf(("general.architecture", "llama")))
    with pytest.raises(UnsupportedModelError, match="llama"):
        Phi(path)


def test_a_truncated_file(tmp_path: Path, phi: Phi) -> None:
    whole = Path(phi.path).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (3, 20, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidModelError, match=r"cut\.gguf"):
            Phi(path)


def test_a_path_that_is_not_ascii(tmp_path: Path, phi: Phi) -> None:
    path = tmp_path / "модель 氷 🏒.gguf"
    shutil.copy(phi.path, path)
    with Phi(path) as opened:
        assert opened.path == str(path)
        assert opened.render("Hi") == phi.render("Hi")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a file's name be bytes that are no text")
def test_a_path_that_is_not_text(tmp_path: Path, phi: Phi) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")
    shutil.copy(phi.path, path)
    with Phi(path) as opened:
        assert opened.n_vocab == phi.n_vocab


@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_a_device_that_is_not_built_in(phi: Phi, device: Any) -> None:
    if phi.device == device:
        pytest.skip(f"this build has {device}")
    with pytest.raises(UnsupportedModelError, match=f"{device}.*feature|feature.*{device}"):
        Phi.demo(device=device)


def test_a_bad_chat_template() -> None:
    with pytest.raises(ValueError, match="template"):
        Phi.demo(chat_template="{% for %}")


def test_a_bad_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Phi.demo(tokenizer=tmp_path / "none.json")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InvalidModelError, match=r"tokenizer\.json"):
        Phi.demo(tokenizer=path)


def test_from_pretrained_opens_a_path(phi: Phi) -> None:
    with Phi.from_pretrained(phi.path, n_ctx=50) as opened:
        assert (opened.path, opened.n_ctx) == (phi.path, 50)
    with pytest.raises(ValueError, match="revision"):
        Phi.from_pretrained(phi.path, revision="main")


@pytest.mark.parametrize("options", [{"kernel": "portable"}, {"n_threads": 1}, {"kv_cache": "f32"}, {"device": "cuda"}])
def test_candles_engine_refuses_what_it_would_ignore(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Phi.demo(engine="candle", **options)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_panic_of_the_compute_thread() -> None:
    """Candle panics where its threads cannot be started: there is no room for their stacks, which are large here."""
    script = """
import os, resource
os.environ.update(CANDLE_NUM_THREADS="2", RUST_MIN_STACK=str(1 << 30))
from candle_phi import InternalError, Phi, UnsupportedModelError
phi = Phi.demo(engine="candle")
try: phi.logits([1, 2], every_position=True)
except UnsupportedModelError: pass  # the compute thread has said so: it is there
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (taken + (512 << 20), limits[1]))
for _ in range(2):
    stream = phi.stream("Hi", max_tokens=2)
    try: next(stream)
    except InternalError as error: print(str(error).partition(" candle ")[0])
    print(stream.finish_reason, list(stream))
resource.setrlimit(resource.RLIMIT_AS, limits)
print(phi.generate("Hi", max_tokens=2, ignore_eos=True).finish_reason)
"""
    assert run_python(script) == "internal error: failed to spawn\nerror []\n" * 2 + "length\n"


def test_a_warning_goes_to_the_log_and_to_no_stream() -> None:
    script = "from candle_phi import Phi; Phi.demo().generate('<|user|> Hi', seed=1, max_tokens=1)"
    assert run_python(script) == ""


@pytest.mark.parametrize("name", ["", "zebra", "demo", "folder/zebra"])
def test_an_unknown_name_is_answered_with_the_calls_that_work(name: str) -> None:
    for opens in (Phi, Phi.from_pretrained):
        with pytest.raises(ModelNotFoundError, match=r"Phi\.demo\(\) opens.*from_pretrained") as raised:
            opens(name if "/" not in name else f"./{name}")
        assert all(short in str(raised.value) for short in hub.SHORT_NAMES)
        assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("phi-4-mni", "phi-4-mini"), ("Phi-4-mini", "phi-4-mini"), ("phi-3-mini", "phi-3-mini-4k"), ("ph4", "phi4")],
)
def test_a_misspelt_name_is_answered_with_the_closest(name: str, meant: str) -> None:
    for opens in (Phi, Phi.from_pretrained):
        with pytest.raises(ModelNotFoundError, match=rf"did you mean Phi\.from_pretrained\('{meant}'\)\?"):
            opens(name)


@pytest.mark.parametrize("name", [*hub.SHORT_NAMES, *hub.ALIASES, "phi4:latest"])
def test_a_models_name_is_answered_with_the_call_that_works(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=rf"Phi\.from_pretrained\('{name}'\)") as raised:
        Phi(name)
    assert hub.resolve(name) in str(raised.value)


def test_aliases_are_short_names_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(hub.ALIASES.values()) <= set(hub.SHORT_NAMES)
    assert not set(hub.ALIASES) & set(hub.SHORT_NAMES)
    assert hub.resolve("phi3.5") == hub.resolve("phi-3.5-mini") == hub.SHORT_NAMES["phi-3.5-mini"][0]
    assert hub.resolve("microsoft/phi") == "microsoft/phi"
    with pytest.raises(candle_phi.OfflineError, match="Phi-4-mini-instruct-Q4_K_M"):
        Phi.from_pretrained("phi4-mini", cache_dir=tmp_path, local_files_only=True)
    assert hub.cached("phi4-mini", cache_dir=tmp_path) is None
    with pytest.raises(ModelNotFoundError, match="unsloth/Phi-4-mini"):
        hub.remove("phi4-mini", cache_dir=tmp_path)


def test_a_tokenizer_that_is_not_there_names_the_option() -> None:
    with pytest.raises(ModelNotFoundError, match="'nowhere\\.json'"):
        Phi.demo(tokenizer="nowhere.json")


@pytest.mark.parametrize("name", ["Event", "OutputError", "ToolCall", "integrations", "server"])
def test_names_of_later_versions_are_named_by_the_module(name: str) -> None:
    with pytest.raises(candle_phi.NotInThisVersionError, match=rf"^candle_phi\.{name} is not in this version$"):
        getattr(candle_phi, name)
    assert not hasattr(candle_phi, name)


def test_a_subclass_that_does_not_open_its_model_is_told_so() -> None:
    class Closed(Phi):
        def __init__(self) -> None:
            pass

    closed = Closed()
    for use in (repr, Phi.generate, Phi.close, copy.copy, lambda closed: closed.n_ctx):
        with pytest.raises(AttributeError, match=r"^this Closed is not open: its __init__ did not call Phi\.__init__$"):
            use(closed, *(["Hi"] if use is Phi.generate else []))
