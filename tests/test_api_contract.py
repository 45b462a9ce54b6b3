"""The names and defaults that users rely on, as docs/api.md has them."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import candle_phi
from candle_phi import CacheInfo, Chat, Phi
from candle_phi.option_names import UNBUILT
from conftest import ROOT

MODEL = {
    "n_ctx": None,
    "n_threads": None,
    "device": "auto",
    "engine": "native",
    "kernel": None,
    "kv_cache": "f16",
    "mmap": True,
    "tokenizer": None,
    "chat_template": None,
    "max_concurrent": None,
    "max_batch": 8,
    "prefix_cache": None,
    "prefix_cache_dir": None,
    "speculate": True,
    "on_progress": None,
}
HUB = {
    "revision": None,
    "cache_dir": None,
    "token": None,
    "local_files_only": False,
    "progress": None,
}
GENERATION = {
    "max_tokens": None,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repeat_penalty": None,
    "repeat_last_n": 64,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": None,
    "seed": None,
    "stop": None,
    "ignore_eos": False,
    "logprobs": False,
    "top_logprobs": 0,
    "timeout": None,
    "cache_scope": None,
    "speculate": None,
    "prediction": None,
    "on_progress": None,
    "raw": False,
    "parse_special": None,
    "add_bos": False,
}
CHAT = {name: default for name, default in GENERATION.items() if name not in ("raw", "parse_special", "add_bos")}
MAP = {"ordered": True, "return_exceptions": False, "max_pending": None}
CACHE_INFO = ["bytes", "limit", "positions", "hits", "misses", "chats"]
ERRORS = {
    "PhiError": (Exception,),
    "ModelNotFoundError": (FileNotFoundError,),
    "InvalidModelError": (ValueError,),
    "UnsupportedModelError": (),
    "NotInThisVersionError": (NotImplementedError,),
    "ContextLengthError": (ValueError,),
    "DownloadError": (OSError,),
    "OfflineError": (candle_phi.DownloadError,),
    "BusyError": (),
    "ClosedError": (),
    "ForkError": (RuntimeError,),
    "InternalError": (RuntimeError,),
}
READ_ONLY = [
    *("path", "n_ctx", "n_vocab", "metadata", "chat_template", "bos_token_id", "eos_token_ids"),
    *("device", "engine", "kernel", "n_threads", "closed"),
]


def options(function: Callable[..., object]) -> dict[str, object]:
    """The keyword-only parameters of a function and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_constructor() -> None:
    assert options(Phi) == MODEL
    assert next(iter(inspect.signature(Phi).parameters)) == "model_path"


@pytest.mark.parametrize("method", ["stream", "generate", "astream", "agenerate"])
def test_generation_options(method: str) -> None:
    assert options(getattr(Phi, method)) == GENERATION
    assert list(inspect.signature(getattr(Phi, method)).parameters)[:2] == ["self", "prompt"]


@pytest.mark.parametrize("method", ["map", "amap"])
def test_options_for_many_prompts(method: str) -> None:
    generation = {name: default for name, default in GENERATION.items() if name != "on_progress"}
    assert options(getattr(Phi, method)) == MAP | generation
    assert list(inspect.signature(getattr(Phi, method)).parameters)[:2] == ["self", "prompts"]


def test_other_methods() -> None:
    assert list(inspect.signature(Phi.render).parameters) == ["self", "messages"]
    assert options(Phi.tokenize) == {"parse_special": False, "add_bos": False}
    assert options(Phi.detokenize) == {"skip_special": True}
    assert options(Phi.logits) == {"every_position": False, "on_progress": None}
    assert options(Phi.score) == {"start": 1, "top_logprobs": 0, "on_progress": None}
    assert options(Phi.perplexity) == {"stride": None}
    assert options(Phi.warm) == {"pin": False}
    assert list(inspect.signature(Phi.cache_info).parameters) == ["self"]
    assert list(inspect.signature(Phi.count_tokens).parameters) == ["self", "prompt"]
    assert [field.name for field in dataclasses.fields(CacheInfo)] == CACHE_INFO
    assert list(inspect.signature(Phi.from_pretrained).parameters)[:2] == ["repo_id", "filename"]
    assert options(Phi.from_pretrained) == HUB | MODEL
    assert options(Phi.demo) == MODEL


def test_chats() -> None:
    assert options(Phi.chat) == {"messages": None, "tools": None, "exact": False} | CHAT
    assert list(inspect.signature(Phi.chat).parameters)[:2] == ["self", "system"]
    for method in (Chat.send, Chat.stream, Chat.asend, Chat.astream):
        assert options(method) == {"exact": None} | CHAT
        assert list(inspect.signature(method).parameters)[:2] == ["self", "message"]
    assert str(inspect.signature(Chat.rewind)) == "(self, turns: int = 1) -> None"
    assert options(Chat.save) == {"kv": True}
    assert options(Phi.load_chat) == {"strict": False}
    assert {name for name in vars(Chat) if not name.startswith("_")} >= {
        *("send", "stream", "asend", "astream", "fork", "rewind", "save", "close"),
        *("messages", "token_ids", "context_left", "usage"),
    }


@pytest.mark.parametrize("name", READ_ONLY)
def test_attributes_are_read_only(phi: Phi, name: str) -> None:
    before = getattr(phi, name)
    with pytest.raises(AttributeError):
        setattr(phi, name, None)
    assert getattr(phi, name) == before


@pytest.mark.parametrize("name", ERRORS)
def test_error_bases(name: str) -> None:
    error = getattr(candle_phi, name)
    assert issubclass(error, (candle_phi.PhiError, *ERRORS[name]))
    assert all(issubclass(error, base) for base in (candle_phi.PhiError, *ERRORS[name]))


def test_public_names() -> None:
    results = {"Chunk", "Result", "Usage", "Timings", "TokenLogprob", "Progress"}
    results |= {"Message", "OnProgress", "FinishReason", "CacheInfo", "Chat"}
    assert set(candle_phi.__all__) >= {*ERRORS, *results, "Phi", "Stream", "AsyncStream", "hub", "testing"}
    assert all(hasattr(candle_phi, name) for name in candle_phi.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", candle_phi.__version__)


def default(text: str) -> object:
    """A default as the page writes it: `none` is Python's None."""
    return ast.literal_eval(text.replace("none", "None"))


def defaults_of(signature: str) -> dict[str, object]:
    """The options of a signature, those of later versions left out."""
    given = re.findall(r"(\w+)=([^,\s]+)", signature)
    return {name: default(value) for name, value in given if name not in UNBUILT}


def test_the_page_agrees() -> None:
    page = ROOT / "docs" / "api.md"
    compare(page)
    for section, names in [
        ("## 6. The Hub", [name for name in candle_phi.hub.__all__ if name.islower() or name.isupper()]),
        ("## 7. Errors", [*ERRORS, "OptionTypeError", "OptionValueError", "MemoryError"]),
    ]:
        text = page.read_text(encoding="utf-8").split(section)[1].split("\n## ")[0]
        assert set(names) - set(re.findall(r"\w+", text)) == set()


def test_the_contract_agrees(shared: Path) -> None:
    """The contract beside this checkout, which also has what is to be built."""
    compare(shared / "API.md")


def compare(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    constructor = re.search(r"^Phi\(model_path.*?\*, (.*?)\)$", page, re.DOTALL | re.MULTILINE)
    assert constructor is not None
    added = re.findall(r"^`Phi\(\.\.\., (.*?)\)`", page, re.MULTILINE)  # by later sections
    assert defaults_of(", ".join([constructor[1], *added])) == MODEL
    signatures = {
        method: re.search(rf"`phi\.{method}\(\w+, \*, (.*?)\)", page) for method in ("map", "score", "perplexity")
    }
    assert {method: found and defaults_of(found[1]) for method, found in signatures.items()} == {
        "map": MAP,
        "score": options(Phi.score),
        "perplexity": options(Phi.perplexity),
    }
    for method in (Phi.chat, Phi.load_chat, Phi.warm, Chat.save):
        shown = re.search(rf"\b{method.__name__}\(([^()]*\*, [^()]*)\)", page)
        assert shown is not None, method
        named = dict(re.findall(r"(\w+)=([^,\s]+)", shown[1].split("*, ")[1]))
        page_defaults = {name: default(value) for name, value in named.items()}
        own = {n: v for n, v in options(method).items() if n not in CHAT and (n, method) != ("exact", Phi.chat)}
        assert page_defaults == own, method
    assert re.search(r"CacheInfo\((.*?)\)", page)[1].split(", ") == CACHE_INFO  # type: ignore[index]

    table = page.split("| option | default | means |")[1].split("\n\n")[0].splitlines()[2:]
    found: dict[str, str] = {}
    for row in table:
        if not row.startswith("|"):
            break
        names, defaults = row.split("|")[1:3]
        values = [v.strip() for v in re.sub(r"\(.*\)", "", defaults).split(",")]
        for i, name in enumerate(re.findall(r"`(\w+)`", names)):
            found[name] = values[i] if len(values) > 1 else values[0]
    later = re.findall(r"`stream\(\.\.\., (.*?)\)`", page)  # by later sections
    found |= {name: repr(value) for name, value in defaults_of(", ".join(later)).items()}
    assert set(found) == set(GENERATION)
    assert {name: default(value) for name, value in found.items() if value} == {
        name: GENERATION[name] for name, value in found.items() if value
    }

    errors = page.split("## 7. Errors")[1].split("## 8.")[0]
    assert set(re.findall(r"\b(\w+Error)\b", errors)) - set(ERRORS) <= {
        *("FileNotFoundError", "ValueError", "NotImplementedError", "OSError", "RuntimeError", "TypeError"),
        *("MemoryError", "OptionTypeError", "OptionValueError"),
    }
    attributes = re.search(r"^Read-only: `(.*?)`", page, re.MULTILINE)
    assert attributes is not None
    assert attributes[1].split() == READ_ONLY
