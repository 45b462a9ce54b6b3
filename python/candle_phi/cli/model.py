"""The options that name a model, and the opening of it."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .. import _engine, hub, options
from .._engine import DEFAULT_REPO
from ..errors import DownloadError, ModelNotFoundError, OfflineError
from ..model import Phi
from . import output
from .commands import closest
from .mistakes import UsageError, spelled, usage_errors
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
    "tokenizer": (str, "FILE", "a tokenizer.json, or a repository with one"),
    "chat_template": (str, "TEXT", "a Jinja template (default: the model's)"),
}
HUB: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "revision": (str, "NAME", "a branch, a tag or a commit (default: main)"),
    "cache_dir": (str, "FOLDER", "the cache (default: that of Hugging Face's tools)"),
    "token": (str, "TEXT", "for private repositories (default: HF_TOKEN, a login's)"),
}

DOWNLOAD_GB: Mapping[str, float] = {
    "phi-3-mini-4k": 2.4,
    "phi-3-mini-128k": 2.4,
    "phi-3-medium-4k": 8.6,
    "phi-3.5-mini": 2.4,
    "phi-4": 9.1,
    "phi-4-mini": 2.5,
}
"""Sizes of the short names' files, for a choice without the network."""

_HOSTS = ("huggingface.co/", "www.huggingface.co/", "hf.co/")


def add_model_option(section: Any) -> None:
    """Adds --model."""
    section.add(
        "-m",
        "--model",
        metavar="MODEL",
        help="a short name that list prints, a .gguf file, a repository of the Hub, or demo: the bundled model "
        f"(default: {_VARIABLE}, else phi-3-mini-4k)",
    )


def add_model_options(parser: Parser) -> None:
    """Adds the options of every command that opens a model."""
    section = parser.section("model")
    add_model_option(section)
    section.add_table(_MODEL)
    section.add("--no-mmap", action="store_false", dest="mmap", help="read the file into private memory")
    section.add("--filename", metavar="NAME", help="a file of the repository, or a pattern: '*q4*'")
    section.add_table(HUB)
    section.add("--local-files-only", help="never download")


class _Given(NamedTuple):
    """The model that is meant, and where its name is from."""

    name: str
    source: str
    """"--model", "CANDLE_PHI_MODEL", or "" for the default."""


def open_model(typed: argparse.Namespace) -> Phi:
    """Opens the model that the options name. Mistakes are found before any download."""
    model: dict[str, Any] = {name: getattr(typed, name) for name in options.MODEL if name in typed}
    place: dict[str, Any] = {name: getattr(typed, name) for name in options.HUB if name in typed}
    with usage_errors():
        options.checked(options.MODEL, model)
        options.checked(options.HUB, place)
        _check_values(model)
    given = _given(typed)
    if given.name == "demo":
        for name in ("filename", "revision", "cache_dir", "token"):
            if name in place:
                raise UsageError(f"{spelled(name)} is for models of the Hub, and demo is bundled")
        with usage_errors():
            return Phi.demo(**model, on_progress=output.status.on_progress)
    check_model(given.name, given.source)
    announced = not os.path.exists(given.name) and _prepare_download(given, place)
    try:
        with usage_errors():
            return Phi.from_pretrained(given.name, **place, **model, on_progress=output.status.on_progress)
    except DownloadError as error:
        if not given.source and not announced:
            error.args = (f"{error}; {_WITHOUT_DOWNLOAD}",)
        raise


def _given(typed: argparse.Namespace) -> _Given:
    if "model" in typed:
        return _Given(typed.model, "--model")
    if os.environ.get(_VARIABLE):
        return _Given(os.environ[_VARIABLE], _VARIABLE)
    return _Given(DEFAULT_REPO, "")


def _check_values(model: Mapping[str, Any]) -> None:
    """Finds the mistakes that would show after the download only."""
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


def check_model(name: str, source: str) -> None:
    """Answers a name that is no model, before anything is opened.

    Raises:
        ModelNotFoundError: there is no such file.
        UsageError: it is the name of nothing.
    """
    if not name:
        raise UsageError(f"{source} is empty")
    if "\0" in name or "\n" in name:
        raise UsageError(f"{source} has a control character: {name!r}")
    label = "" if source == "--model" else f"{source}: "
    if _is_url(name):
        raise UsageError(label + _about_url(name, "--model {}", " --filename {}"))
    if os.path.isdir(name):
        raise ModelNotFoundError(label + _about_folder(name))
    if os.path.exists(name) or hub.resolve(name) != name:
        return
    if _is_path(name):
        raise ModelNotFoundError(label + _about_missing_file(name))
    if not is_repository(name):
        raise UsageError(label + about_unknown_name(name))


def check_repository(name: str, command: str) -> None:
    """Answers a name that is no repository, for a command that takes one. Raises UsageError."""
    if hub.resolve(name) != name or is_repository(name):
        return
    if _is_url(name):
        raise UsageError(_about_url(name, f"candle-phi {command} {{}}", " {}"))
    if os.path.exists(name) or _is_path(name):
        raise UsageError(f"{name} is a path, and {command} takes a repository of the Hub or a short name")
    raise UsageError(about_unknown_name(name))


def is_repository(name: str) -> bool:
    """Whether a name is written as the Hub's are: `organisation/name`."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None and "--" not in name and ".." not in name


def about_unknown_name(name: str) -> str:
    """The message for a word that is no short name."""
    close = hub.closest(name) or hub.closest(name.partition(":")[0])  # "phi3:fp16", with a tag as Ollama's
    known = f"short names: demo, {', '.join(hub.SHORT_NAMES)}"
    if close is not None:
        return f"unknown model {name!r}; did you mean {close}? {known[0].upper()}{known[1:]}"
    return f"unknown model {name!r}; {known}; or give a .gguf file or a repository of the Hub, ORGANISATION/NAME"


def _is_path(name: str) -> bool:
    return (
        name.startswith(("/", "./", "../", "~", ".\\", "..\\"))
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or re.search(r"\.(gguf|ggml|bin|safetensors|onnx|pth?|txt|json)$", name, re.IGNORECASE) is not None
    )


def _is_url(name: str) -> bool:
    return "://" in name or name.lower().startswith(_HOSTS)


def _about_url(url: str, repository: str, file: str) -> str:
    """The message for a URL. `repository` and `file` say what to type instead."""
    rest = url.partition("://")[2] or url
    host, _, path = rest.partition("/")
    if (host + "/").lower() not in _HOSTS:
        return f"{url} is a URL, and a model is a short name, a .gguf file or a repository of the Hub"
    parts = path.rstrip("/").split("/")
    repo, _, tag = "/".join(parts[:2]).partition(":")
    if not is_repository(repo):
        return f"{url} is a URL, and not of a repository"
    more = file.format(f"'*{tag}*'") if tag else ""
    if len(parts) > 4 and parts[2] in ("blob", "resolve"):
        more = file.format("/".join(parts[4:]).partition("?")[0])
    return f"{url} is a URL; did you mean {repository.format(repo)}{more}?"


def _about_folder(folder: str) -> str:
    files = sorted(name for name in os.listdir(folder) if name.endswith(".gguf"))
    if not files:
        return f"{folder} is a folder without .gguf files"
    count = "a .gguf file" if len(files) == 1 else f"{len(files)} .gguf files"
    return f"{folder} is a folder with {count}; did you mean --model {os.path.join(folder, files[0])}?"


def _about_missing_file(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded != path and os.path.exists(expanded):
        return f"{path}: no such file; did you mean {expanded}? The shell expands ~ at the start of a word only"
    folder, name = os.path.split(path)
    try:
        files = [file for file in os.listdir(folder or ".") if file.endswith(".gguf")]
    except OSError:
        files = []
    close = closest(name, files)
    return f"{path}: no such file" + (f"; did you mean {os.path.join(folder, close)}?" if close else "")


def _prepare_download(given: _Given, place: Mapping[str, Any]) -> bool:
    """Says what is about to be downloaded, for the models whose size is known.

    Returns:
        False if it is in the cache, or the network may not be used.
    """
    filename = place.get("filename")
    with usage_errors():
        cached = hub.cached(given.name, filename, revision=place.get("revision"), cache_dir=place.get("cache_dir"))
    if cached is not None:
        return False
    repo = hub.resolve(given.name)
    known = next((short for short, (known_repo, _) in hub.SHORT_NAMES.items() if known_repo == repo), None)
    file = filename or (known and hub.SHORT_NAMES[known][1])
    what = f"{file} of {repo}" if file else repo
    hint = "" if given.source else f"; {_WITHOUT_DOWNLOAD}"
    if place.get("local_files_only"):
        folder = place.get("cache_dir") or _engine.doctor()["cache_dir"]
        raise OfflineError(f"{what} is not in the cache {folder}, and --local-files-only is set{hint}")
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        return False
    with usage_errors():
        _engine.doctor()  # a variable that is wrong would show after the download only
    if filename is None and known is not None and known in DOWNLOAD_GB:
        output.say(f"downloading {what} ({DOWNLOAD_GB[known]} GB), once{hint}")
    return True


def _is_set(variable: str) -> bool:
    """Whether a variable is true, as Hugging Face's tools read it."""
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
