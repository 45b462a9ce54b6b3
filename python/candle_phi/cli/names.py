"""Names of models: which are valid, and the messages for those that are not."""

import os
import re

from .. import hub
from ..errors import ModelNotFoundError
from .commands import closest
from .mistakes import UsageError

_HOSTS = ("huggingface.co/", "www.huggingface.co/", "hf.co/")


def check_model(name: str, source: str) -> None:
    """Checks the name of a model. `source` is the option or variable that it is from.

    Raises:
        ModelNotFoundError: the name is a path, and there is no such file.
        UsageError: no model has this name.
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
        raise UsageError(label + _about_unknown_name(name))


def check_repository(name: str, command: str) -> None:
    """Checks the name of a repository, for a command that takes one. Raises UsageError."""
    if hub.resolve(name) != name or is_repository(name):
        return
    if _is_url(name):
        raise UsageError(_about_url(name, f"candle-phi {command} {{}}", " {}"))
    if os.path.exists(name) or _is_path(name):
        raise UsageError(f"{name} is a path, and {command} takes a repository of the Hub or a short name")
    raise UsageError(_about_unknown_name(name))


def is_repository(name: str) -> bool:
    """Whether a name has the form of the Hub's: `organisation/name`."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None and "--" not in name and ".." not in name


def _about_unknown_name(name: str) -> str:
    """The message for a word that is not a short name."""
    word = name.strip()
    close = hub.closest(word) or hub.closest(word.partition(":")[0])  # "phi3:fp16", with a tag as Ollama's
    if closest(word.lower(), ["demo"], cutoff=0.75):
        close = "demo"
    name = name if len(name) <= 80 else name[:77] + "..."
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
        files = [file for file in os.listdir(folder or ".") if file.endswith(".gguf") and file.isprintable()]
    except OSError:
        files = []
    close = closest(name, files)
    return f"{path}: no such file" + (f"; did you mean {path.removesuffix(name)}{close}?" if close else "")
