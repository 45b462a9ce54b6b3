"""The house's own rules, where a search can check them."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import candle_phi
from conftest import ROOT

RUST = sorted((ROOT / "src").rglob("*.rs"))
PYTHON = sorted((ROOT / "python").rglob("*.py"))


def offenders(pattern: str, paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_there_is_something_to_search() -> None:
    assert len(RUST) > 5
    assert len(PYTHON) > 5


def test_only_the_door_knows_python() -> None:
    assert offenders(r"\bpyo3\b", [path for path in RUST if path.parent != ROOT / "src" / "python"]) == []


# From the door down. A floor may use those after it; `text` and `model` do not use each other.
FLOORS = ["python", "engine", "runtime", "text", "model", "kv", "compute", "files", "system", "error"]


def floors_used(path: Path) -> set[str]:
    """The floors that a file of src/ names, without its comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("//"))
    grouped = re.findall(r"\bcrate::\{([^}]*)\}", code)
    names = [name.strip().split("::")[0] for group in grouped for name in group.split(",")]
    return {*names, *re.findall(r"\bcrate::(\w+)", code)} & set(FLOORS)


def test_each_floor_uses_those_below_it() -> None:
    seen = set()
    for path in RUST:
        floor = path.relative_to(ROOT / "src").parts[0].removesuffix(".rs")
        if floor == "lib":
            continue
        below = set(FLOORS[FLOORS.index(floor) :]) - ({"model"} if floor == "text" else set())
        used = floors_used(path)
        assert used <= below, f"{path.relative_to(ROOT)} uses {', '.join(sorted(used - below))}"
        seen.add(floor)
    assert seen == set(FLOORS)


def test_kernels_know_neither_files_nor_models() -> None:
    kernels = [path for path in RUST if "kernels" in path.parts]
    assert [path.name for path in kernels if floors_used(path) - {"compute", "error", "system"}] == []
    inside = [path for path in kernels if re.search(r"crate::compute::(?!kernels\b)", path.read_text(encoding="utf-8"))]
    assert inside == []


def test_no_file_of_the_engine_is_long() -> None:
    def length(path: Path) -> int:
        return len(path.read_text(encoding="utf-8").partition("#[cfg(test)]")[0].splitlines())

    long = {path.name: length(path) for path in RUST if "tests" not in path.name and length(path) > 500}
    assert long == {}


def test_only_kernels_know_the_cpu() -> None:
    outside = [path for path in RUST if "kernels" not in path.parts]
    assert offenders(r"\b(std|core)::arch\b", outside) == []


def test_nothing_is_left_to_do() -> None:
    marks = r"\b(TODO|FIXME|XXX|HACK)\b|\b(todo|unimplemented)!"
    assert offenders(marks, [*RUST, *PYTHON, *sorted((ROOT / "tests").glob("*.rs"))]) == []


def test_every_allow_has_its_reason() -> None:
    rust = r"#!?\[(allow|expect)\((?!.*reason\s*=)(?!.*//)"
    assert offenders(rust, RUST) == []
    assert offenders(r"#\s*(noqa|type: ignore)(?!.*  # )", PYTHON) == []


def test_python_modules_import_only_downwards() -> None:
    order = [
        "errors",
        "_private_memory",
        "_engine",
        "metadata",
        "signatures",
        "option_names",
        "options",
        "progress",
        "messages",
        "keywords",
        "hub",
        "memory",
        "locations",
        "prompts",
        "results",
        "stream",
        "aio",
        "many",
        "generation",
        "states",
        "saved",
        "chat",
        "chats",
        "cache",
        "scores",
        "model",
        "testing",
        "_bench",
        "_replay",
        "cli",
    ]
    # inside the package cli
    commands = ["mistakes", "output", "commands", "names", "parser", "model", "prompt"]
    commands += ["run", "tokenize", "doctor", "bench", "cache", "perplexity", "help"]
    for path in PYTHON:
        package, *rest = path.relative_to(ROOT / "python" / "candle_phi").parts
        module = package.removesuffix(".py")
        if module not in order:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            names = [node.module] if node.module else [alias.name for alias in node.names]
            inside = bool(rest) and node.level == 1
            floors, here = (commands, path.stem) if inside else (order, module)
            for name in names:
                if name in floors and here in floors:
                    assert floors.index(name) < floors.index(here), f"{path.name} imports {name}"


def test_builds_are_not_tied_to_one_cpu() -> None:
    targets = tomllib.loads((ROOT / ".cargo" / "config.toml").read_text(encoding="utf-8"))["target"]
    flags = {name: " ".join(target["rustflags"]) for name, target in targets.items()}
    assert not [name for name, given in flags.items() if "target-cpu" in given]
    for name in ("aarch64-unknown-linux-gnu", "aarch64-unknown-linux-musl", "aarch64-pc-windows-msvc"):
        assert "+fp16" in flags[name]
    assert not [name for name, given in flags.items() if "+fp16" in given and not name.startswith("aarch64")]


def test_the_version_is_in_one_place() -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
    locked = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))["package"]
    assert [package["version"] for package in locked if package["name"] == "candle_phi"] == [version]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"] == ["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert candle_phi.__version__ == version


def test_actions_are_pinned() -> None:
    uses = [
        line.strip()
        for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line and "uses: ./" not in line
    ]
    assert len(uses) > 10
    assert [line for line in uses if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []


def test_no_file_is_large() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    large = [name for name in listed.split("\0") if name and (ROOT / name).stat().st_size > 6 * 2**20]
    assert large == []


def test_a_release_is_not_published_by_a_tag_alone() -> None:
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    triggers, _, jobs = workflow.partition("\njobs:\n")
    assert not re.search(r"^  (push|release|create|schedule):", triggers, re.MULTILINE)
    assert "workflow_dispatch:" in triggers
    (paths,) = re.findall(r"^    paths: \[(.*)\]$", triggers, re.MULTILINE)
    assert not {"Cargo.toml", "pyproject.toml"} & set(paths.split(", "))  # a new version alone builds no 16 wheels
    publish = jobs.partition("\n  publish:\n")[2]
    needs = re.search(r"^    needs: \[(.*)\]$", publish, re.MULTILINE)
    assert needs is not None
    assert {*needs[1].split(", "), "publish"} == set(re.findall(r"^  ([a-z]+):", "\n" + jobs, re.MULTILINE))
    assert "environment: pypi" in publish


def test_ci_runs_the_oldest_and_the_newest_python() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]
    tested = set(re.findall(r'"(3\.\d+t?)"', workflow))
    assert {promised[0], promised[-1], f"{promised[-1]}t"} <= tested
    assert "make test-timing" in workflow


def test_ci_keeps_every_run_of_main_and_tests_musl_with_the_oldest_rust() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (group,) = re.findall(r"^  group: (.*)$", workflow, re.MULTILINE)
    assert "github.sha" in group  # of one group, only the newest waiting run stays
    rust_version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["rust-version"]
    assert re.findall(r"\brust:(\S+)-alpine\b", workflow) == [rust_version]
