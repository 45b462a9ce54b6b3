"""Models of the Hugging Face Hub, in the cache that all Hugging Face tools share.

A file is downloaded once, resumed after an interruption, and checked against the Hub's checksum. A file in the cache is
used without the network. The environment variables are those of `huggingface_hub`: HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS, HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT.

from candle_phi import hub

path = hub.download("phi-4-mini")
hub.verify("phi-4-mini")
hub.remove("phi-4-mini")
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import _engine, options
from .progress import OnProgress, progress_callback, wait_for

__all__ = [
    "ALIASES",
    "SHORT_NAMES",
    "CachedFile",
    "File",
    "Info",
    "cached",
    "closest",
    "download",
    "info",
    "list_cached",
    "remove",
    "resolve",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


SHORT_NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {short: (repo, file) for short, repo, file in _engine.KNOWN_MODELS}
)
"""Short names of repositories: name to repository and default file."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "phi3": "phi-3-mini-4k",
        "phi3:mini": "phi-3-mini-4k",
        "phi3:3.8b": "phi-3-mini-4k",
        "phi3:mini-4k": "phi-3-mini-4k",
        "phi3:mini-128k": "phi-3-mini-128k",
        "phi3:medium": "phi-3-medium-4k",
        "phi3:14b": "phi-3-medium-4k",
        "phi3:medium-4k": "phi-3-medium-4k",
        "phi3.5": "phi-3.5-mini",
        "phi3.5:3.8b": "phi-3.5-mini",
        "phi4": "phi-4",
        "phi4:14b": "phi-4",
        "phi4-mini": "phi-4-mini",
        "phi4-mini:3.8b": "phi-4-mini",
    }
)
"""Ollama's names for these models: alias to short name. They work wherever a short name does."""


def resolve(name: str) -> str:
    """The repository that a short name or an alias stands for. Any other name is returned unchanged."""
    short = ALIASES.get(name.removesuffix(":latest"), name)
    return SHORT_NAMES[short][0] if short in SHORT_NAMES else name


def closest(name: str) -> str | None:
    """The short name or alias that is most similar to `name`; None if none is similar."""
    import difflib  # not at import: only a mistake needs it

    name, names = name.lower(), [*SHORT_NAMES, *ALIASES]
    if len(name) >= 3:
        names = [known for known in names if known.startswith(name)] or names
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5 if names[0].startswith(name) else 0.7)
    return close[0] if close else None


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Attributes:
        filename: its name in the repository.
        size: its size in bytes.
        sha256: the SHA-256 of its content. None for small files, for which the Hub has none.
    """

    filename: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Info:
    """A repository of the Hub at one revision.

    Attributes:
        repo_id: `"organisation/name"`.
        commit: the commit that the revision names now.
        files: all files of the repository.
    """

    repo_id: str
    commit: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class CachedFile:
    """A GGUF file in the cache.

    Attributes:
        repo_id: `"organisation/name"`.
        filename: its name in the repository.
        commit: its commit.
        revisions: the branches and tags that named this commit when they were last requested.
        path: its path.
        size: its size in bytes.
    """

    repo_id: str
    filename: str
    commit: str
    revisions: tuple[str, ...]
    path: Path
    size: int


def download(
    repo_id: str,
    filename: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Returns the path of a file of the Hub, and downloads it if it is not in the cache.

    Of a model that is split into parts, all parts are downloaded, and the path is the first part's.

    Args:
        repo_id: `"organisation/name"`, or one of `SHORT_NAMES` or `ALIASES`.
        filename: a file of the repository, or a pattern such as `"*Q4_K_M.gguf"` that matches one model. None: the
            file that `SHORT_NAMES` has, else the only GGUF model.
        revision: a branch, a tag or a commit. None: `main`.
        cache_dir: the cache folder. None: HF_HUB_CACHE, else the folder `hub` in HF_HOME, else the usual one.
        token: an access token. None: that of HF_TOKEN or of a login, if there is one. True: the same, which must
            exist. False: none. The token is sent to the Hub only.
        local_files_only: never use the network. HF_HUB_OFFLINE does the same.
        progress: whether to draw a progress bar on stderr. None: on a terminal or in a notebook.
        on_progress: called with a `Progress` during the download. An exception that it raises stops the download,
            and the next call resumes it.

    Raises:
        DownloadError: the download failed. `url`, `status` and `host` say where.
        OfflineError: the file is not in the cache, and downloads are not allowed.
        ModelNotFoundError: no file of the repository matches, or several do. The message lists them.
        TypeError, ValueError: an option of the wrong type or out of range.
    """
    args = _check(
        repo_id=repo_id,
        filename=filename,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        progress=progress,
        on_progress=on_progress,
    )
    repo, location = resolve(repo_id), {name: args[name] for name in ("revision", "cache_dir", "token")}
    path = _hub(**location).cached(repo, filename)
    if path is not None:
        return path
    hub = _hub(**location, local_files_only=local_files_only, proxies=_system_proxies())
    default_file = next((file for known, file in SHORT_NAMES.values() if known == repo), repo)
    with progress_callback(filename or default_file, progress, on_progress) as watch:
        return wait_for(hub.download(repo, filename), watch)


def cached(
    repo_id: str,
    filename: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Returns the path that `download` would return without the network, or None.

    Args:
        repo_id, filename, revision, cache_dir: as in `download`.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """
    args = _check(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    return _hub(revision=revision, cache_dir=args["cache_dir"]).cached(resolve(repo_id), filename)


def info(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Info:
    """Requests the list of a repository's files from the Hub.

    Args:
        repo_id, revision, token: as in `download`.

    Raises:
        DownloadError: the request failed.
        OfflineError: HF_HUB_OFFLINE is set.
    """
    _check(repo_id=repo_id, revision=revision, token=token)
    hub = _hub(revision=revision, token=token, proxies=_system_proxies())
    repo, commit, files = wait_for(hub.info(resolve(repo_id)), None)
    return Info(repo, commit, tuple(File(*file) for file in files))


def list_cached(*, cache_dir: str | os.PathLike[str] | None = None) -> list[CachedFile]:
    """Returns the GGUF files in the cache, also those that other tools downloaded.

    Args:
        cache_dir: as in `download`.
    """
    args = _check(cache_dir=cache_dir)
    return [_cached_file(*file) for file in _hub(cache_dir=args["cache_dir"]).files()]


def verify(
    repo_id: str | None = None,
    filename: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    on_progress: OnProgress | None = None,
) -> list[CachedFile]:
    """Checks the GGUF files in the cache against their checksums.

    Args:
        repo_id: a repository, a short name or an alias. None: all repositories.
        filename: a file or a pattern. None: all files.
        cache_dir, progress, on_progress: as in `download`.

    Returns:
        The files that were checked.

    Raises:
        InvalidModelError: files are damaged. The message names them.
        ModelNotFoundError: the cache has no such file.
    """
    args = _check(filename=filename, cache_dir=cache_dir, progress=progress, on_progress=on_progress)
    if repo_id is not None:
        _check(repo_id=repo_id)
        repo_id = resolve(repo_id)
    hub = _hub(cache_dir=args["cache_dir"], proxies=_system_proxies())
    with progress_callback(repo_id or "cache", progress, on_progress) as watch:
        return [_cached_file(*file) for file in wait_for(hub.verify(repo_id, filename), watch)]


def remove(repo_id: str, filename: str | None = None, *, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Removes a repository from the cache, or only the files that match `filename`.

    Args:
        repo_id, cache_dir: as in `download`.
        filename: a file or a pattern. None: the whole repository.

    Returns:
        The number of bytes that are free again.

    Raises:
        BusyError: another process is downloading from this repository.
        ModelNotFoundError: the cache has no such file.
    """
    args = _check(repo_id=repo_id, filename=filename, cache_dir=cache_dir)
    return _hub(cache_dir=args["cache_dir"]).remove(resolve(repo_id), filename)


def _check(**given: object) -> dict[str, Any]:
    return options.checked(options.HUB, given)


def _hub(
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    proxies: dict[str, str] | None = None,
) -> _engine.Hub:
    return _engine.Hub(
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        proxies=proxies or {},
    )


def _cached_file(repo: str, name: str, commit: str, revisions: list[str], path: Path, size: int) -> CachedFile:
    return CachedFile(repo, name, commit, tuple(revisions), path, size)


def _system_proxies() -> dict[str, str]:
    """The proxies of the system's settings, by scheme. The engine itself reads those of the environment first."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass  # not at import: it takes as long as all of this package

    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    return {} if host and proxy_bypass(host) else getproxies()
