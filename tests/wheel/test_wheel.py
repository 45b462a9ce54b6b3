"""The wheel in dist, in bare environments, on old CPUs and frozen into an app. `make test-wheel`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MACHINE = sysconfig.get_platform().rpartition("-")[2]  # x86_64, aarch64, arm64, amd64
WHEELS = sorted((HERE.parents[1] / "dist").glob(f"candle_phi-*-abi3-*{MACHINE}.whl"), key=os.path.getmtime)
EMULATOR = shutil.which("qemu-x86_64")


def pythons() -> list[str]:
    """Every CPython from 3.11 on that is installed here and has the GIL. The free-threaded one has its own wheel."""
    names = [f"python3.{minor}" for minor in range(11, 20)]
    named = [path for name in names if (path := shutil.which(name))]
    of_pyenv = sorted(str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python"))
    ask = (
        "import sys, sysconfig, venv, ensurepip\n"
        "assert sys.version_info >= (3, 11) and not sysconfig.get_config_var('Py_GIL_DISABLED')\n"
        "print(sys.version, sys.base_prefix)"
    )
    found: dict[str, str] = {}
    for python in [sys.executable, *named, *of_pyenv]:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0:
            found.setdefault(done.stdout, python)
    return list(found.values())


def ended(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900, **options)  # type: ignore[call-overload]  # any option of subprocess.run
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel() -> Path:
    assert WHEELS, "no wheel in dist: make wheel"
    return WHEELS[-1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    ended(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ended(python, "-m", "pip", "install", "--no-index", wheel)
    return python


@pytest.mark.parametrize("python", pythons())
def test_it_installs_and_streams_without_rust(wheel: Path, python: str) -> None:
    print(ended(python, HERE / "install.py", wheel))


@pytest.mark.skipif(sys.platform != "linux", reason="about the C library of Linux")
def test_it_links_only_to_libraries_of_any_recent_linux(wheel: Path) -> None:
    assert f"manylinux_2_17_{MACHINE}" in wheel.name
    shown = ended(sys.executable, "-m", "auditwheel", "show", wheel)
    assert f'the following platform tag:\n"manylinux_2_17_{MACHINE}"' in shown


def test_it_calls_only_the_stable_abi_of_3_11(wheel: Path) -> None:
    report = json.loads(ended(sys.executable, "-m", "abi3audit", "--strict", "--report", wheel))
    (library,) = report["specs"][str(wheel)]["wheel"]
    assert (library["result"]["baseline"], library["result"]["non_abi3_symbols"]) == ("3.11", [])


def test_it_carries_the_licences_of_what_it_contains(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.rpartition("/licenses/")[2] for name in archive.namelist() if "/licenses/" in name}
    assert names == {"LICENSE-APACHE", "LICENSE-MIT", "THIRD_PARTY.md"}


@pytest.mark.skipif(EMULATOR is None, reason="no qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(("cpu", "kernel"), [("Nehalem", "portable"), ("Haswell", "avx2"), ("max", "avx2")])
def test_old_cpus(python: Path, cpu: str, kernel: str) -> None:
    found = json.loads(ended(str(EMULATOR), "-cpu", cpu, python, HERE / "smoke.py"))
    assert (found["kernel"], found["haiku"], found["same"]) == (kernel, True, True)


def test_inside_an_archive_the_error_names_what_works(python: Path, wheel: Path, tmp_path: Path) -> None:
    command = [str(python), "-S", "-c", "import candle_phi"]
    done = subprocess.run(command, env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: candle_phi: it cannot be imported from inside" in done.stderr
    assert "shiv and pex" in done.stderr


@pytest.fixture(scope="module")
def app(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A onefile app that writes a haiku to a file, with or without standard streams."""
    folder = tmp_path_factory.mktemp("app")
    source = """
        import sys
        from candle_phi import Phi
        if "none" in sys.argv:  # as in a windowed app
            sys.stdin = sys.stdout = sys.stderr = None
        with open(sys.argv[1], "w", encoding="utf-8") as file, Phi.demo(kernel="portable") as phi:
            for chunk in phi.stream("Write a haiku about ice hockey", seed=1, temperature=1.0):
                file.write(chunk)
                print(chunk, end="", flush=True)
    """
    folder.joinpath("haiku.py").write_text(textwrap.dedent(source), encoding="utf-8")
    ended(python, "-m", "pip", "install", "pyinstaller>=6,<7")
    ended(python, "-m", "PyInstaller", "--onefile", "--log-level=WARN", "haiku.py", cwd=folder)
    return folder / "dist" / ("haiku.exe" if os.name == "nt" else "haiku")


@pytest.mark.parametrize("streams", ["streams", "none", "closed"])
def test_a_frozen_app_streams(app: Path, tmp_path: Path, streams: str) -> None:
    path = tmp_path / "haiku.txt"
    close = (lambda: os.closerange(0, 3)) if streams == "closed" else None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([app, path, streams], preexec_fn=close, env=environment, timeout=300, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3
    assert done.stdout.decode() == (text if streams == "streams" else "")
