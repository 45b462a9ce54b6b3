"""Environments that have llama-cpp-python, compiled for named sets of instructions."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from engines import say

LLAMA = "llama-cpp-python==0.3.36"
AVX2 = ["AVX", "AVX2", "FMA", "F16C", "BMI2"]
AVX512 = ["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"]
AMX = ["AMX_TILE", "AMX_INT8", "AMX_BF16"]


def cmake(on: list[str]) -> str:
    """Arguments for llama.cpp's build that allow these instructions and no others."""
    switches = [f"-DGGML_{name}={'ON' if name in on else 'OFF'}" for name in [*AVX2, *AVX512, *AMX]]
    return " ".join(["-DGGML_NATIVE=OFF", *switches])


BUILDS = {"native": "-DGGML_NATIVE=ON", "avx512": cmake([*AVX2, *AVX512]), "avx2": cmake(AVX2)}
"""The instructions that llama.cpp is compiled for: those of this processor, or a named set."""


def llama_python(build: str, folder: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python compiled for `build`. It is made if missing."""
    home = folder / f"llama-{build}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = home / "made"
    if not made.exists():
        say(f"compiling {LLAMA} for {build} into {home}: some minutes")
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        env = os.environ | compilers() | {"CMAKE_ARGS": BUILDS[build]}
        # no cache: wheels of different builds have the same name
        options = ["--quiet", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        subprocess.run([python, "-m", "pip", "install", *options, LLAMA], env=env, check=True)
        made.touch()
    return python


def compilers() -> dict[str, str]:
    """Clang, if it is installed: llama.cpp's AMX code crashes when GCC 12 compiles it."""
    for suffix in ["", *(f"-{version}" for version in range(25, 13, -1))]:
        c, cxx = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if c and cxx:
            return {"CC": c, "CXX": cxx}
    return {}


def usual_builds() -> list[str]:
    """One for this processor, and one for each smaller set of instructions that has a kernel here."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    except OSError:
        return ["native"]
    lesser = {"amx_tile": "avx512", "avx512f": "avx2"}
    return ["native", *(build for flag, build in lesser.items() if flag in flags)]


def add_llama_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the builds."""
    parser.add_argument(
        "--llama",
        action="append",
        metavar="BUILD",
        help=f"{', '.join(BUILDS)}, or none; may be repeated (default: by the CPU)",
    )
    parser.add_argument(
        "--llama-python",
        action="append",
        default=[],
        metavar="BUILD=PATH",
        help="the Python of an environment that has it",
    )


def check_llama_options(parser: argparse.ArgumentParser, typed: argparse.Namespace) -> None:
    """Exits if a build is unknown."""
    for build in [*(typed.llama or []), *(entry.partition("=")[0] for entry in typed.llama_python)]:
        if build not in (*BUILDS, "none"):
            parser.error(f"unknown build of llama.cpp {build!r}; expected one of: {', '.join(BUILDS)}")


def llama_environments(typed: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each build that the options choose. Environments that are missing are made in `typed.out`."""
    given = dict(entry.split("=", 1) for entry in typed.llama_python)
    chosen = [build for build in typed.llama or list(given) or usual_builds() if build != "none"]
    return {build: given.get(build) or str(llama_python(build, typed.out)) for build in chosen}
