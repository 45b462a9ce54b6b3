"""Explains why the compiled module cannot be imported, and what to do. Imported only in that case."""

from __future__ import annotations  # the Python may be an old one

import os
import platform
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from zipimport import zipimporter

_REINSTALL = "python -m pip install --force-reinstall --no-cache-dir candle-phi"
_FROM_SOURCE = "python -m pip install --no-binary candle-phi candle-phi (this needs Rust and a C compiler)"
_NAMES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def fault(error: ImportError) -> str | None:
    """What is wrong with this installation. None if the error itself says it."""
    loader = sys.modules[__name__].__loader__
    if isinstance(loader, zipimporter):
        return (
            f"it cannot be imported from inside {loader.archive}: the compiled module and the model must be files. "
            "shiv and pex build archives that unpack themselves; a plain zip file or zipapp does not"
        )
    if sys.version_info < (3, 11):  # noqa: UP036  # only pip enforces it
        return f"this is Python {platform.python_version()} ({sys.executable}), and 3.11 or later is needed"
    if sys.maxsize < 2**32:
        return f"this is a 32-bit Python ({sys.executable}), and models are larger than 2 GB: install a 64-bit Python"
    folder = Path(__file__).parent
    modules = sorted(path for path in folder.glob("_engine.*") if path.suffix in (".so", ".pyd"))
    if not modules:
        return (
            f"there is no compiled module in {folder}. If this is a clone, build it (python -m pip install .) and run "
            f"Python outside its folder python. Otherwise reinstall the package: {_REINSTALL}"
        )
    loadable = [path for path in modules if path.name.removeprefix("_engine") in EXTENSION_SUFFIXES]
    if not loadable:
        return (
            f"{modules[0].name} was built for another Python than this {platform.python_implementation()} "
            f"{platform.python_version()}, which loads *{EXTENSION_SUFFIXES[0]}: {_REINSTALL}"
        )
    return _load_fault(loadable[0], str(error))


def _load_fault(path: Path, error: str) -> str | None:
    machine, target = _NAMES.get(platform.machine().lower(), platform.machine().lower()), architecture(path)
    if target not in (None, machine):
        return f"{path.name} was built for {target}, and this Python runs on {machine}: {_REINSTALL}"
    if glibc := re.search(r"GLIBC_(\d+\.\d+)' not found", error):
        return (
            f"{path.name} needs glibc {glibc[1]} or later, and this system has {_glibc()}. Published wheels need 2.17: "
            f"{_REINSTALL}. Or build it here: {_FROM_SOURCE}"
        )
    if re.search(r"libc\.so\.6|libc\.musl|ld-linux|ld-musl|symbol not found", error):
        return (
            f"{path.name} was built for another C library than this system's {_glibc()} ({error}). It was probably "
            f"copied from another Linux: {_REINSTALL}"
        )
    return None


def _glibc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "musl"  # "glibc 2.36"
    except (AttributeError, OSError, ValueError):  # Windows; musl
        return "C library"


def architecture(path: Path) -> str | None:
    """The processor architecture of a compiled module, from its header: ELF, PE, or Mach-O of one architecture."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"\x7fELF":
        at, names = 18, {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64"}
    elif head[:2] == b"MZ":
        at, names = int.from_bytes(head[60:64], "little") + 4, {0x14C: "i686", 0x8664: "x86_64", 0xAA64: "aarch64"}
    elif head[:4] == b"\xcf\xfa\xed\xfe":
        at, names = 4, {7: "x86_64", 12: "aarch64"}
    else:
        return None
    return names.get(int.from_bytes(head[at : at + 2], "little"))
