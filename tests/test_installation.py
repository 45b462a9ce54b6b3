"""An installation that cannot work says at import why, and what to do."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import candle_phi
from candle_phi import _engine, _installation
from conftest import ROOT

PACKAGE = Path(candle_phi.__file__).parent
ENGINE = Path(str(_engine.__file__))
linux = pytest.mark.skipif(sys.platform != "linux", reason="about ELF files")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's modules without the compiled one."""
    folder = tmp_path / "candle_phi"
    folder.mkdir()
    for path in PACKAGE.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def error_of(path: Path) -> str:
    """The last line that `import candle_phi` from here writes."""
    command = [sys.executable, "-c", "import candle_phi"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_in_an_archive(copy: Path, tmp_path: Path) -> None:
    archive = tmp_path / "app.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in copy.iterdir():
            file.write(path, f"candle_phi/{path.name}")
    error = error_of(archive)
    assert error.startswith(f"ImportError: candle_phi: it cannot be imported from inside {archive}")
    assert "shiv and pex" in error


def test_a_clone_that_was_not_built(copy: Path) -> None:
    assert re.search(r"no compiled module in .*candle_phi\. If this is a clone.*pip install", error_of(copy.parent))


def test_built_for_another_python(copy: Path) -> None:
    name = "_engine.cp39-win_amd64.pyd" if os.name == "nt" else "_engine.cpython-39-x86_64-linux-gnu.so"
    copy.joinpath(name).touch()
    error = error_of(copy.parent)
    assert f"{name} was built for another Python than this CPython {sys.version.split()[0]}" in error
    assert "pip install --force-reinstall" in error


@linux
def test_built_for_another_processor(copy: Path) -> None:
    image = bytearray(ENGINE.read_bytes())
    other, number = ("x86_64", 62) if image[18] == 183 else ("aarch64", 183)
    image[18] = number
    copy.joinpath(ENGINE.name).write_bytes(image)
    assert f"{ENGINE.name} was built for {other}, and this Python runs on" in error_of(copy.parent)


@linux
def test_a_c_library_that_is_too_old(copy: Path) -> None:
    image = ENGINE.read_bytes()
    versions = re.findall(rb"\0(GLIBC_2\.\d\d)(?=\0)", image)
    if not versions:
        pytest.skip("not linked to glibc")
    copy.joinpath(ENGINE.name).write_bytes(image.replace(b"\0%s\0" % max(versions), b"\0GLIBC_9.99\0"))
    error = error_of(copy.parent)
    assert f"{ENGINE.name} needs glibc 9.99 or later, and this system has {os.confstr('CS_GNU_LIBC_VERSION')}" in error
    assert "pip install --no-binary candle-phi" in error


def test_another_c_library() -> None:
    musl = ImportError("libc.musl-x86_64.so.1: cannot open shared object file: No such file or directory")
    assert re.search("another C library than this system's .*reinstall", _installation.fault(musl) or "")


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert "3.11 or later is needed" in (_installation.fault(ImportError()) or "")


def test_a_32_bit_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert "install a 64-bit Python" in (_installation.fault(ImportError()) or "")


def test_a_clear_error_is_not_replaced() -> None:
    assert _installation.fault(ImportError("candle_phi was built for CPUs with half-precision arithmetic")) is None


@pytest.mark.parametrize(
    ("image", "machine"),
    [
        (b"\x7fELF" + bytes(14) + b"\xb7\0", "aarch64"),
        (b"MZ" + bytes(58) + b"\x40\0\0\0PE\0\0\x64\x86", "x86_64"),
        (b"MZ" + bytes(58) + b"\x40\0\0\0PE\0\0\x64\xaa", "aarch64"),
        (b"\xcf\xfa\xed\xfe\x0c\0\0\x01", "aarch64"),
        (b"\xcf\xfa\xed\xfe\x07\0\0\x01", "x86_64"),
        (b"\xca\xfe\xba\xbe\0\0\0\x02", None),
        (b"", None),
    ],
)
def test_the_processor_in_a_header(tmp_path: Path, image: bytes, machine: str | None) -> None:
    path = tmp_path / "module"
    path.write_bytes(image)
    assert _installation.architecture(path) == machine


def test_this_build_is_for_this_processor() -> None:
    with ENGINE.open("rb") as file:
        if file.read(4) == b"\xca\xfe\xba\xbe":
            pytest.skip("a build for several processors")
    assert _installation.architecture(ENGINE) in ("x86_64", "aarch64")


BUILD = (
    "import sys\n"
    f"sys.path.insert(0, {str(ROOT / 'packaging')!r})\n"
    "import build_backend\n"
    "build_backend.build_wheel('nowhere')\n"
)


@linux
@pytest.mark.parametrize(
    ("commands", "says"),
    [
        ([], "no C compiler on PATH: install one (Debian: gcc"),
        (["gcc"], "no Rust on PATH (cargo), and installing it failed (No module named 'puccinialin'): see"),
    ],
)
def test_a_build_from_source_without_a_compiler(tmp_path: Path, commands: list[str], says: str) -> None:
    for name in commands:
        tmp_path.joinpath(name).touch(0o755)
    done = subprocess.run([sys.executable, "-c", BUILD], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("candle-phi: there is no wheel for this platform")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
