"""The README and docs/ are true: Python runs and prints what they show, commands are known, links resolve."""

import ast
import asyncio
import doctest
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import candle_phi
from candle_phi import AsyncStream, Chat, Phi, Stream, hub
from candle_phi.cache import Caching
from candle_phi.chats import Chatting
from candle_phi.generation import Generating
from candle_phi.prompts import Prompting
from candle_phi.scores import Scoring
from conftest import HAIKU, HANG, ROOT
from fake_hub import FakeHub

README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")), *(ROOT / "docs").rglob("*.md")])


class Block(NamedTuple):
    language: str
    text: str
    output: str | None
    """The block right behind it, which has no language."""


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```\n(?:```\n(.*?)^```$)?", text_of(page), re.DOTALL | re.MULTILINE)
    return [Block(language, text, output or None) for language, text, output in found]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_readmes_python_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    examples = [block for block in blocks(README) if block.language == "python" and "FastAPI" not in block.text]
    for example in examples:
        exec(compile(example.text, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        assert printed == (example.output or ""), example.text
    assert len(examples) >= 6
    assert sum(example.output is not None for example in examples) == len(examples)


def test_the_readmes_server() -> None:
    serving = pytest.importorskip("test_serving")  # skips where FastAPI is missing
    (example,) = [block.text for block in blocks(README) if "FastAPI" in block.text]
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    with names["phi"] as phi, serving.serving(names["app"]) as port:
        status, text = serving.ask(port, f"/ask?question={urllib.parse.quote(HAIKU)}")
        assert (status, len(text.strip().splitlines())) == (200, 3)
        assert serving.ask(port, "/ask?question=")[0] == 200
        status, text = serving.ask(port, f"/ask?question={'ice+' * phi.n_ctx}")
        assert status == 413
        assert str(phi.n_ctx) in text


@pytest.fixture
def server(phi: Phi, use: Callable[[FakeHub], Path]) -> Iterator[FakeHub]:
    server = FakeHub({})
    use(server)
    yield server
    server.close()


def test_the_downloads(server: FakeHub, phi: Phi) -> None:
    """Statement by statement, each from a Hub that has the model it asks for."""
    (example,) = [block.text for block in blocks(ROOT / "docs" / "hub.md") if block.language == "python"]
    names: dict[str, Any] = {}
    for statement in ast.parse(example).body:
        asked = [node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)]
        if asked:
            known = {repo: (repo, file) for repo, file in hub.SHORT_NAMES.values()} | dict(hub.SHORT_NAMES)
            server.repo, file = known[str(asked[0])]
            if len(asked) > 1:
                file = str(asked[1]).replace("*", "model-")
            server.files = {file: Path(phi.path).read_bytes()}
        exec(compile(ast.Module([statement], []), "hub.md", "exec"), names)
    assert isinstance(names["phi"], Phi)
    assert names["path"].is_file()


@pytest.mark.parametrize(
    ("thing", "count"),
    [
        *((Phi, 1), (Prompting, 4), (Generating, 3), (Chatting, 1), (Caching, 1), (Scoring, 3)),
        *((Stream, 1), (AsyncStream, 1), (Chat, 3)),
    ],
)
def test_the_examples_of_docstrings_print_what_they_show(phi: Phi, thing: type, count: int) -> None:
    names = {"Phi": Phi, "phi": phi, "asyncio": asyncio}
    found = doctest.DocTestFinder().find(thing, thing.__name__, globs=names)
    examples = [test for test in found if test.examples]
    assert len(examples) == count
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


@pytest.mark.parametrize("module", [candle_phi, candle_phi.testing], ids=lambda module: module.__name__)
def test_the_code_of_a_modules_docstring_runs(module: ModuleType) -> None:
    assert module.__doc__ is not None
    _, _, code = module.__doc__.partition("\n\n")
    assert "Phi" in code
    exec(code, {})


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page) if not block.language for line in block.text.splitlines()]
    return sorted({line for line in lines if re.match(r"(candle-phi|make|pip) ", line)})


def test_there_are_commands() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize("line", commands())
def test_a_command_is_known(line: str, server: FakeHub, phi: Phi) -> None:
    """A candle-phi command runs where it needs no real model, and is parsed where it does."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(
            r"^([a-z0-9-]+):", text_of(ROOT / "Makefile") + text_of(ROOT / "platforms.mk"), re.MULTILINE
        )
        assert set(arguments) <= set(targets)
    elif program == "candle-phi":
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "candle_phi", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, timeout=HANG, stdin=subprocess.DEVNULL)
        offline = "demo" in arguments or arguments[0] in ("list", "verify", "doctor", "--help")
        # 1: a model that is not in the cache; 2 would be a mistake in the command
        assert done.returncode == (0 if offline else 1), done.stderr.decode()
    else:
        assert line.split("#")[0].split() == ["pip", "install", "."]


# ---- links ----


def repository() -> str:
    found = re.search(r'^repository = "(.*)"', text_of(ROOT / "Cargo.toml"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    """The README's are absolute, since the package index shows it too."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path = target.removeprefix(f"{repository()}/blob/main/").partition("#")[0]
        if page == README:
            assert path != target, f"{target} is not in this repository, or is relative"
            assert (ROOT / path).exists(), target
        elif not target.startswith("https://"):
            assert (page.parent / path).exists(), target


def test_the_repository_has_one_address() -> None:
    project = repository().removeprefix("https://github.com/")
    owner = project.partition("/")[0]
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml", "Cargo.toml", "fuzz/Cargo.toml"):
        for found in re.findall(rf"github\.com/({owner}/[\w.-]+|[\w.-]+/candle-phi)", text_of(ROOT / name)):
            assert found == project, name


def test_design_pages_are_linked_from_the_code() -> None:
    """A page names files and folders of code after `Code:`. Each file, and a file of each folder, links back."""
    folders = ("src", "python", "packaging", "benches", "tests", "fuzz/targets", ".github")
    suffixes = (".rs", ".py", ".yml")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    files += [ROOT / name for name in ("platforms.mk", "pyproject.toml")]
    links = {
        (path, name)
        for path in files
        if path != Path(__file__)
        for name in re.findall(r"Decisions: docs/design/([\w-]+)\.md$", text_of(path), re.MULTILINE)
    }
    pages = {path.stem: path for path in (ROOT / "docs" / "design").glob("*.md") if path.stem != "README"}
    assert set(re.findall(r"\]\(([\w-]+)\.md\)", text_of(ROOT / "docs" / "design" / "README.md"))) == set(pages)
    assert {name for _, name in links} == set(pages)
    for name, page in pages.items():
        code = re.search(r"^Code: (.*?)\.(?: |\n)", text_of(page), re.MULTILINE | re.DOTALL)
        assert code is not None, name
        named = [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)]+)\)", code[1])]
        linked = [path for path, other in links if other == name]
        for target in named:
            assert any(path.is_relative_to(target) for path in linked), f"{target} does not link to {name}.md"


def test_the_code_that_design_pages_name_exists() -> None:
    """Files by path or by name, and identifiers in capitals or with an underscore."""
    folders = ("src", "python", "packaging", "benches", "tests", "fuzz")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".rs", ".py", ".md")]
    names = {path.relative_to(ROOT).as_posix() for path in files}
    code = "\n".join(text_of(path) for path in files)
    code += "".join(text_of(ROOT / name) for name in ("Makefile", "platforms.mk", "Cargo.toml", "pyproject.toml"))
    for page in (ROOT / "docs" / "design").glob("*.md"):
        for quoted in re.findall(r"`([^`\n]+)`", text_of(page)):
            if re.fullmatch(r"[\w/]+\.(rs|py)", quoted):
                assert any(f"/{name}".endswith(f"/{quoted}") for name in names), f"{page.name}: {quoted}"
            elif re.fullmatch(r"[\w:]*[A-Z_]\w*", quoted):
                assert re.search(rf"\b{quoted.rpartition(':')[2]}\b", code), f"{page.name}: {quoted}"
