"""The free memory, and a warning if a model does not fit into it."""

import contextlib
import logging
import os
import re
import sys

from . import _engine
from .errors import PhiError

_logger = logging.getLogger("candle_phi")


def warn_if_too_large(path: str, n_ctx: int | None, kv_cache: str) -> None:
    """Logs a warning with the numbers if a model needs more memory than is free. Never raises."""
    free = available()
    if free is None:
        return
    with contextlib.suppress(OSError, ValueError, PhiError):  # opening the file raises the same error
        split = re.search(r"-of-(\d{5})\.gguf$", path)
        size = os.path.getsize(path) * int(split[1] if split else 1)
        if size < free // 8:  # a small model: its header is not read twice
            return
        weights, context, activations = _engine.memory_needed(path, n_ctx, kv_cache)
        needed = weights + context + activations
        if needed > free:
            _logger.warning(
                "%s needs about %.1f GB of memory (%.1f of weights, %.1f of context, %.1f of activations), "
                "and %.1f GB are free: it may be slow",
                path,
                *(number / 1e9 for number in (needed, weights, context, activations, free)),
            )


def available() -> int | None:
    """The bytes that this process may still use. None if the system does not say."""
    if sys.platform == "linux":
        return _engine.memory_available()
    try:
        if sys.platform == "win32":
            return _of_windows()
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all memory, an upper bound of the free memory
    except (AttributeError, OSError, ValueError):
        return None


def _of_windows() -> int | None:
    import ctypes  # imported here: its import takes as long as the rest of this file

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", *("more" + str(i) for i in range(5)))),
        )

    status = Status(length=ctypes.sizeof(Status))
    done = ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]  # Windows
    return int(status.free) if done else None
