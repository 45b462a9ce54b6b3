"""The options that choose a model, and how it is opened."""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .. import _engine, hub, options
from .._engine import DEFAULT_REPO
from ..errors import DownloadError, ModelNotFoundError, OfflineError
from ..model import Phi
from . import output
from .mistakes import UsageError, spelled, usage_errors
from .names import check_model, is_repository
from .parser import Parser, whole_number

_VARIABLE = "CANDLE_PHI_MODEL"
_WITHOUT_DOWNLOAD = "--model demo needs no download"

_MODEL: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "n_ctx": (whole_number, "N", "tokens that the context holds (default: the model's)"),
    "n_threads": (whole_number, "N", "threads (default: all that the process may use)"),
    "device": (str, "NAME", "auto, cpu, cuda or metal (default: auto)"),
    "engine": (str, "NAME", "native, or candle, for comparison (default: native)"),
    "kernel": (str, "NAME", "a kernel that doctor prints (default: the best here)"),
    "kv_cache": (str, "TYPE", "f16, f32 or q8_0 (default: f16)"),
    "max_batch": (whole_number, "N", "streams that share a decode pass, 1 to 16 (default: 8)"),
    "prefix_cache": (whole_number, "N", "bytes kept for prompts to come; 0: none (default: 1/8)"),
    "prefix_cache_dir": (str, "FOLDER", "keep them there too, for later runs (default: no)"),
    "tokenizer": (str, "FILE", "a tokenizer.json, or a repository with one"),
    "chat_template": (str, "TEXT", "a Jinja template (default: the model's)"),
}
HUB: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "revision": (str, "NAME", "a branch, a tag or a commit (default: main)"),
    "cache_dir": (str, "FOLDER", "the cache (default: that of Hugging Face's tools)"),
    "token": (str, "TEXT", "an access token (default: HF_TOKEN, else a login's)"),
}

DOWNLOAD_GB: Mapping[str, float] = {
    "phi-3-mini-4k": 2.4,
    "phi-3-mini-128k": 2.4,
    "phi-3-medium-4k": 8.6,
    "phi-3.5-mini": 2.4,
    "phi-4": 9.1,
    "phi-4-mini": 2.5,
}
"""Download sizes of the short names, which are shown without asking the network."""


def add_model_options(parser: Parser) -> None:
    """Adds the options of every command that opens a model."""
    section = parser.section("model")
    section.add(
        "-m",
        "--model",
        metavar="MODEL",
        help="a short name that list prints, a .gguf file, a repository of the Hub, or demo: the bundled model "
        f"(default: {_VARIABLE}, else phi-3-mini-4k)",
    )
    section.add_table(_MODEL)
    section.add("--no-mmap", action="store_false", dest="mmap", help="read the file into private memory")
    section.add("--no-speculate", action="store_false", dest="speculate", help="compute one token in each pass")
    section.add("--filename", metavar="NAME", help="a file of the repository, or a pattern: '*q4*'")
    section.add_table(HUB)
    section.add("--local-files-only", help="never download")


class Choice(NamedTuple):
    """A model that the options name, and how to open it."""

    name: str
    source: str
    """Where the name is from: "--model", "CANDLE_PHI_MODEL", or "" for the default."""
    model: dict[str, Any]
    """Options of `Phi`."""
    place: dict[str, Any]
    """Options of `Phi.from_pretrained`."""


def choose_model(typed: argparse.Namespace) -> Choice:
    """The model that the options name.

    All mistakes that show without the file and the network are found here, before stdin is read.
    """
    model: dict[str, Any] = {name: getattr(typed, name) for name in options.MODEL if name in typed}
    place: dict[str, Any] = {name: getattr(typed, name) for name in options.HUB if name in typed}
    with usage_errors():
        options.checked(options.MODEL, model)
        options.checked(options.HUB, place)
        _check_values(model)
    name, source = _named(typed)
    if name != "demo":
        check_model(name, source)
    if name == "demo" or os.path.exists(name):
        for option in ("filename", "revision", "cache_dir", "token"):
            if option in place:
                raise UsageError(f"{spelled(option)} is for models of the Hub, and {name} is {_described(name)}")
    return Choice(name, source, model, place)


def open_model(choice: Choice) -> Phi:
    """Opens a model, and downloads it first if it is not in the cache."""
    if choice.name == "demo":
        with usage_errors():
            return Phi.demo(**choice.model, on_progress=output.status.on_progress)
    announced = not os.path.exists(choice.name) and _announce_download(choice)
    try:
        with usage_errors():
            return Phi.from_pretrained(
                choice.name, **choice.place, **choice.model, on_progress=output.status.on_progress
            )
    except DownloadError as error:
        if not choice.source and not announced:
            error.args = (f"{error}; {_WITHOUT_DOWNLOAD}",)
        raise


def _named(typed: argparse.Namespace) -> tuple[str, str]:
    """The model's name, and where it is from."""
    if "model" in typed:
        return typed.model, "--model"
    if os.environ.get(_VARIABLE):
        return os.environ[_VARIABLE], _VARIABLE
    return DEFAULT_REPO, ""


def _described(name: str) -> str:
    return "bundled" if name == "demo" else "a file"


def _check_values(model: Mapping[str, Any]) -> None:
    """Finds mistakes that the engine finds only after a download."""
    if "kernel" in model:
        kernels = [str(kernel) for kernel in _list(_engine.doctor()["kernels"])]
        if model["kernel"] not in kernels:
            raise UsageError(f"--kernel must be one of {', '.join(kernels)}, not {model['kernel']!r}")
    template = model.get("chat_template", "{")
    if "{" not in template and (os.path.exists(template) or template.endswith((".jinja", ".jinja2", ".j2"))):
        raise UsageError(f'--chat-template takes the template itself: --chat-template "$(cat {template})"')
    tokenizer = model.get("tokenizer")
    if tokenizer is None:
        return
    if os.path.isdir(tokenizer):
        raise ModelNotFoundError(f"--tokenizer {tokenizer}: a folder; give its tokenizer.json")
    if not os.path.exists(tokenizer) and not is_repository(tokenizer):
        raise ModelNotFoundError(f"--tokenizer {tokenizer}: no such file")


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _announce_download(choice: Choice) -> bool:
    """Prints what will be downloaded, for models whose size is known.

    Returns:
        False if the file is in the cache, or the network may not be used.
    """
    place, filename = choice.place, choice.place.get("filename")
    with usage_errors():
        cached = hub.cached(choice.name, filename, revision=place.get("revision"), cache_dir=place.get("cache_dir"))
    if cached is not None:
        return False
    repo = hub.resolve(choice.name)
    known = next((short for short, (known_repo, _) in hub.SHORT_NAMES.items() if known_repo == repo), None)
    file = filename or (known and hub.SHORT_NAMES[known][1])
    what = f"{file} of {repo}" if file else repo
    hint = "" if choice.source else f"; {_WITHOUT_DOWNLOAD}"
    if place.get("local_files_only"):
        folder = place.get("cache_dir") or _engine.doctor()["cache_dir"]
        raise OfflineError(f"{what} is not in the cache {folder}, and --local-files-only is set{hint}")
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        return False
    with usage_errors():
        _engine.doctor()  # finds a wrong variable, which the engine reads only after the download
    if filename is None and known is not None and known in DOWNLOAD_GB:
        output.say(f"downloading {file} ({DOWNLOAD_GB[known]} GB), once{hint}")
    return True


def _is_set(variable: str) -> bool:
    """Whether a variable is true, as Hugging Face's tools read it."""
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
