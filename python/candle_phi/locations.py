"""What the path of a model or tokenizer means: a file, a repository of the Hub, or a mistake."""
# Decisions: docs/design/python.md

import os
import re

from . import hub
from ._engine import DEFAULT_REPO
from .errors import ModelNotFoundError


def is_repository(path: object) -> bool:
    """Whether it is a repository (`organisation/name`, a short name or an alias) and not an existing path."""
    if not isinstance(path, str) or path.endswith((".gguf", ".json")) or os.path.exists(path):
        return False
    return hub.resolve(path) != path or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def check_file(path: str) -> None:
    """Names the call that works, if the path is a repository, a misspelt name or a folder."""
    if is_repository(path):
        repo = hub.resolve(path)
        what = "the repository" if repo == path else repo
        raise ModelNotFoundError(f"{path!r} is not a file. To download {what}: Phi.from_pretrained({path!r})")
    if not path.endswith(".gguf") and not os.path.exists(path):
        close = hub.closest(path)
        question = f"; did you mean Phi.from_pretrained({close!r})?" if close else "."
        raise ModelNotFoundError(
            f"{path!r} is neither a file nor a model's name{question} Phi.demo() opens the bundled model, "
            f"Phi.from_pretrained(name) downloads one. Its short names: {', '.join(hub.SHORT_NAMES)}"
        )
    if not os.path.isdir(path):
        return
    files = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
    if files:
        first = os.path.join(path, files[0])
        raise ModelNotFoundError(f"{path!r} is a folder with {len(files)} .gguf files: Phi({first!r}) opens the first")
    raise ModelNotFoundError(
        f"{path!r} is a folder without .gguf files. Phi.from_pretrained({DEFAULT_REPO!r}) downloads a model"
    )


def tokenizer_path(path: str) -> str:
    """The absolute path of a `tokenizer.json`, downloaded if `path` is a repository."""
    if is_repository(path):
        path = str(hub.download(path, "tokenizer.json"))
    if not os.path.isfile(path):
        raise ModelNotFoundError(f"tokenizer={path!r}: no such file; give the path of a tokenizer.json")
    return os.path.abspath(path)
