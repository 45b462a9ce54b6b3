"""Whether a model fits into the memory that is free."""

import contextlib
import logging
import os
import re
import sys
from pathlib import Path

from . import _engine
from .errors import PhiError

_logger = logging.getLogger("candle_phi")


def warn(path: str, n_ctx: int | None, kv_cache: str) -> None:
    """Logs a warning that names both numbers if a model needs more memory than is free; never raises."""
    free = available()
    with contextlib.suppress(OSError, ValueError, PhiError):  # opening it says what is wrong with it
        split = re.search(r"-of-(\d{5})\.gguf$", path)
        if (
            free is None or os.path.getsize(path) * int(split[1] if split else 1) < free // 8
        ):  # far from it: no need to read the header twice
            return
        weights, context = _engine.memory_needed(path, n_ctx, kv_cache)
        if weights + context > free:
            _logger.warning(
                "%s needs about %.1f GB of memory (%.1f of weights, %.1f of context), and %.1f GB are free: "
                "it may be slow",
                path,
                (weights + context) / 1e9,
                weights / 1e9,
                context / 1e9,
                free / 1e9,
            )


def available() -> int | None:
    """Bytes that this process may still use, as far as the system says: None where it does not."""
    try:
        if sys.platform == "win32":
            return _of_windows()
        if sys.platform == "linux":
            return min([_of_linux(), *_of_cgroup()])
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all there is: more cannot be free
    except (AttributeError, OSError, ValueError):
        return None


def _of_linux() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable")


def _of_cgroup() -> list[int]:
    """What a container's limit leaves."""
    found = []
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max"
            most, now = (int(Path(folder, name).read_text(encoding="ascii")) for name in (limit, used))
            cached = 0
            for line in Path(folder, "memory.stat").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name in ("inactive_file", "total_inactive_file"):  # given up when it is needed
                    cached = int(value)
            found.append(max(0, most - now + cached))
    return found


def _of_windows() -> int | None:
    import ctypes  # not at import: it takes as long as the rest of this file

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", *("more" + str(i) for i in range(5)))),
        )

    status = Status(length=ctypes.sizeof(Status))
    done = ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]  # Windows
    return int(status.free) if done else None
