"""maturin as the build backend, with one sentence that says what a build from source lacks.

With a network, maturin itself installs a missing Rust for the build. It cannot install a C compiler.
"""
# Decisions: docs/design/packaging.md

import functools
import os
import shutil
import sys
from collections.abc import Callable
from typing import NoReturn

import maturin  # type: ignore[import-untyped]  # it has no annotations

C_COMPILERS = ("cc", "gcc", "clang")

os.environ["MATURIN_NO_MISSING_BUILD_BACKEND_WARNING"] = "1"  # maturin looks for its own name in pyproject.toml


def explained(hook: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(hook)
    def explaining(*arguments: object, **options: object) -> object:
        if sys.maxsize < 2**32:
            fail(f"{sys.executable} is a 32-bit Python, and models are larger than 2 GB: install a 64-bit Python")
        if sys.platform == "linux" and "CC" not in os.environ and not any(map(shutil.which, C_COMPILERS)):
            fail("there is no C compiler on PATH: install one (Debian: gcc libc6-dev; Fedora: gcc; Alpine: build-base)")
        try:
            return hook(*arguments, **options)
        except Exception as error:
            if shutil.which("cargo"):
                raise
            fail(f"there is no Rust on PATH (cargo), and installing it failed ({error}): see https://rustup.rs")

    return explaining


def fail(reason: str) -> NoReturn:
    sys.exit(f"candle-phi: there is no wheel for this platform, and a build from source fails: {reason}")


get_requires_for_build_sdist = maturin.get_requires_for_build_sdist
get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
prepare_metadata_for_build_wheel = explained(maturin.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = explained(maturin.prepare_metadata_for_build_editable)
build_sdist = explained(maturin.build_sdist)
build_wheel = explained(maturin.build_wheel)
build_editable = explained(maturin.build_editable)
