"""Models of the Hugging Face Hub: found in the cache that all its tools share, or fetched into it.

A file is fetched once, resumed where it broke off, and checked against the checksum that the Hub names. What is in the
cache is used without asking anybody. The environment is that of `huggingface_hub`: HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS, HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from . import _engine, options
from .progress import OnProgress, finished, watching

__all__ = [
    "SHORT_NAMES",
    "CachedFile",
    "File",
    "Info",
    "cached",
    "download",
    "info",
    "list_cached",
    "remove",
    "verify",
]

SHORT_NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {short: (repo, file) for short, repo, file in _engine.KNOWN_MODELS}
)
"""Names that may stand for a repository, each with the repository and the file that is meant."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {"phi3": "phi-3-mini-4k", "phi3.5": "phi-3.5-mini", "phi4": "phi-4", "phi4-mini": "phi-4-mini"}
)
"""Names of the same models elsewhere, each with the short name that it stands for."""


def resolve(name: str) -> str:
    """The repository that a short name or an alias stands for, else the name."""
    short = ALIASES.get(name, name)
    return SHORT_NAMES[short][0] if short in SHORT_NAMES else name


def closest(name: str) -> str | None:
    """The short name or alias that a misspelt name is close to."""
    import difflib  # not at import: only a mistake needs it

    return next(iter(difflib.get_close_matches(name, [*SHORT_NAMES, *ALIASES], n=1)), None)


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Attributes:
        filename: its name in the repository.
        size: in bytes.
        sha256: of its content; None for small files, which the Hub names another way.
    """

    filename: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Info:
    """A repository as the Hub has it.

    Attributes:
        repo_id: `"organisation/name"`.
        commit: what the revision is now.
        files: all its files.
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
        commit: of which commit it is.
        revisions: the branches and tags that were at that commit when they were last asked for.
        path: where it is.
        size: in bytes.
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
    """The path of a file of the Hub, which is fetched where it is not in the cache; all parts of a split one.

    Args:
        repo_id: `"organisation/name"`, or one of `SHORT_NAMES`.
        filename: a file of the repository, or a pattern such as `"*Q4_K_M.gguf"` that one model matches. None: what
            `SHORT_NAMES` says, else the only GGUF model.
        revision: a branch, a tag or a commit; None: `main`.
        cache_dir: None: HF_HUB_CACHE, else HF_HOME's `hub`, else the usual folder.
        token: None: HF_TOKEN or a login's, if there is one; True: that one must be there; False: none; or a token.
            It is sent to the Hub alone.
        local_files_only: take what is in the cache or raise; so does HF_HUB_OFFLINE.
        progress: whether to draw a bar on stderr; None: on a terminal or in a notebook.
        on_progress: called with a `Progress` while it works. An exception that it raises stops the download, which
            the next call takes up where it was.

    Raises:
        DownloadError: it cannot be had. `url`, `status` and `host` say where it failed.
        OfflineError: it is not in the cache, and the network may not be used.
        ModelNotFoundError: no file of the repository is meant, or several are; the message lists them.
    """
    given = options.checked(options.HUB, locals())
    repo_id, filename = given["repo_id"], given["filename"]
    place = {"revision": given["revision"], "cache_dir": given["cache_dir"], "token": given["token"]}
    found = _hub(**place).cached(repo_id, filename)
    if found is not None:
        return found
    hub = _hub(**place, local_files_only=local_files_only, proxies=_system_proxies())
    known = {name: file for short, repo, file in _engine.KNOWN_MODELS for name in (short, repo)}
    with watching(filename or known.get(repo_id, repo_id), given["progress"], given["on_progress"]) as watch:
        return finished(hub.download(repo_id, filename), watch)


def cached(
    repo_id: str,
    filename: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """What `download` would return without the network; None where it would need it."""
    given = options.checked(options.HUB, locals())
    return _hub(revision=given["revision"], cache_dir=given["cache_dir"]).cached(given["repo_id"], given["filename"])


def info(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Info:
    """The files of a repository and their sizes. Asks the Hub."""
    given = options.checked(options.HUB, locals())
    hub = _hub(revision=given["revision"], token=given["token"], proxies=_system_proxies())
    repo, commit, files = finished(hub.info(given["repo_id"]), None)
    return Info(repo, commit, tuple(File(*file) for file in files))


def list_cached(*, cache_dir: str | os.PathLike[str] | None = None) -> list[CachedFile]:
    """The GGUF files in the cache, whoever put them there."""
    given = options.checked(options.HUB, locals())
    return [_cached_file(*file) for file in _hub(cache_dir=given["cache_dir"]).files()]


def verify(
    repo_id: str | None = None,
    filename: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    on_progress: OnProgress | None = None,
) -> list[CachedFile]:
    """Hashes the GGUF files in the cache anew and returns those that were looked at.

    Args:
        repo_id: None: all repositories.
        filename: a file or a pattern; None: all of them.
        cache_dir, progress, on_progress: as `download` has them.

    Raises:
        InvalidModelError: some are damaged. The message names them.
        ModelNotFoundError: there is no such file in the cache.
    """
    given = options.checked(
        options.HUB, {name: value for name, value in locals().items() if name != "repo_id" or value}
    )
    hub = _hub(cache_dir=given["cache_dir"], proxies=_system_proxies())
    with watching(repo_id or "cache", progress, given["on_progress"]) as watch:
        return [_cached_file(*file) for file in finished(hub.verify(repo_id, filename), watch)]


def remove(repo_id: str, filename: str | None = None, *, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Removes a repository from the cache, or the files of it that have this name or match this pattern.

    Returns:
        How many bytes are free again.

    Raises:
        BusyError: another process is downloading from that repository.
        ModelNotFoundError: there is no such file in the cache.
    """
    given = options.checked(options.HUB, locals())
    return _hub(cache_dir=given["cache_dir"]).remove(given["repo_id"], given["filename"])


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
    """What the system's settings say, by scheme; the environment is the engine's to read, and comes first."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass  # not at import: it takes as long as all of this package

    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    return {} if host and proxy_bypass(host) else getproxies()
