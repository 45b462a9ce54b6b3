"""`candle-phi pull`, `list`, `verify`, `rm`: models of the Hub in the cache."""

import argparse
import dataclasses
from importlib.resources import files

from .. import _engine, hub
from . import output
from .mistakes import UsageError, usage_errors
from .model import DOWNLOAD_GB, HUB
from .names import check_repository
from .parser import Parser, Section

_CACHE_DIR = {"cache_dir": HUB["cache_dir"]}


def pull(arguments: list[str]) -> None:
    """Downloads a model and prints its path."""
    typed = make_pull_parser().parse(arguments)
    repo = _repository(typed, "pull")
    place = {name: getattr(typed, name) for name in HUB if name in typed}
    with usage_errors():
        path = hub.download(repo, typed.filename, **place, on_progress=output.status.on_progress)
    output.write(f"{path}\n")


def list_models(arguments: list[str]) -> None:
    """Prints the short names and what is in the cache."""
    typed = make_list_parser().parse(arguments)
    with usage_errors():
        cached = hub.list_cached(cache_dir=getattr(typed, "cache_dir", None))
    if typed.json:
        entries = [{**dataclasses.asdict(file), "path": str(file.path)} for file in cached]
        output.write_json({"short_names": dict(hub.SHORT_NAMES), "cached": entries})
        return
    sizes = {(file.repo_id, file.filename): file.size for file in cached}
    (demo,) = (file for file in files("candle_phi").joinpath("demo").iterdir() if file.name.endswith(".gguf"))
    rows = [("MODEL", "SIZE", "", "FILE"), ("demo", output.size(len(demo.read_bytes())), "bundled", demo.name)]
    for short, (repo, filename) in hub.SHORT_NAMES.items():
        size = sizes.pop((repo, filename), None)
        state = "not downloaded" if size is None else "downloaded"
        rows.append((short, output.size(DOWNLOAD_GB[short] * 1e9 if size is None else size), state, filename))
    width = max(len(row[0]) for row in rows)
    for (repo, filename), size in sizes.items():
        if len(repo) > width:  # on a line of its own, so that the others stay within 80 columns
            rows.append((repo, "", "", ""))
        rows.append(("" if len(repo) > width else repo, output.size(size), "downloaded", filename))
    output.write(_list_table(rows, width))


def _list_table(rows: list[tuple[str, str, str, str]], width: int) -> str:
    lines = output.table((short if len(short) <= width else "", *rest) for short, *rest in rows).splitlines()
    return "".join((row[0] if len(row[0]) > width else line) + "\n" for row, line in zip(rows, lines, strict=True))


def verify(arguments: list[str]) -> None:
    """Hashes the files in the cache."""
    typed = make_verify_parser().parse(arguments)
    repo = None if typed.repo_id is None else _repository(typed, "verify")
    cache_dir = getattr(typed, "cache_dir", None)
    with usage_errors():
        checked = hub.verify(repo, typed.filename, cache_dir=cache_dir, on_progress=output.status.on_progress)
    if not checked:
        output.write(f"there are no models in the cache {cache_dir or _engine.doctor()['cache_dir']}\n")
        return
    output.write(output.table(("ok", output.size(file.size), file.repo_id, file.filename) for file in checked))


def remove(arguments: list[str]) -> None:
    """Removes a repository, or files of it."""
    typed = make_remove_parser().parse(arguments)
    repo = _repository(typed, "rm")
    with usage_errors():
        freed = hub.remove(repo, typed.filename, cache_dir=getattr(typed, "cache_dir", None))
    output.write(f"removed, {output.size(freed)} are free again\n")


def _repository(typed: argparse.Namespace, command: str) -> str:
    """The repository that a command names, after the mistakes that can be found here."""
    repo: str | None = typed.repo_id
    if repo is None:
        raise UsageError(f"which model? candle-phi {command} REPO, where REPO is a repository or a short name")
    if repo == "demo":
        raise UsageError("demo is bundled with the package, and the cache has no such model")
    check_repository(repo, command)
    return repo


def make_pull_parser() -> Parser:
    """The parser of `candle-phi pull`."""
    parser = Parser("pull", "Downloads a model into the cache, and prints its path.", "REPO [FILE] [OPTION...]")
    section = _add_arguments(parser)
    section.add_table(HUB)
    parser.end_section()
    return parser


def make_list_parser() -> Parser:
    """The parser of `candle-phi list`."""
    parser = Parser("list", "Lists the models: short names, sizes, and what is downloaded.", "[OPTION...]")
    section = parser.section("options")
    section.add_table(_CACHE_DIR)
    section.add("--json", default=False, help="print one JSON object")
    parser.end_section()
    return parser


def make_verify_parser() -> Parser:
    """The parser of `candle-phi verify`."""
    parser = Parser(
        "verify",
        "Checks the files in the cache against their checksums: all, or those named.",
        "[REPO [FILE]] [OPTION...]",
    )
    section = _add_arguments(parser)
    section.add_table(_CACHE_DIR)
    parser.end_section()
    return parser


def make_remove_parser() -> Parser:
    """The parser of `candle-phi rm`."""
    parser = Parser(
        "rm", "Removes a model from the cache: a whole repository, or files of it.", "REPO [FILE] [OPTION...]"
    )
    section = _add_arguments(parser)
    section.add_table(_CACHE_DIR)
    parser.end_section()
    return parser


def _add_arguments(parser: Parser) -> Section:
    section = parser.section("arguments and options")
    section.add_word("repo_id", "REPO", "a repository of the Hub, or a short name that list prints")
    section.add_word("filename", "FILE", "a file of it: its name, or a pattern such as '*q4*'")
    return section
