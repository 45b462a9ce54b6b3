"""Phi-3-family GGUF models as a stream of text.

from candle_phi import Phi

with Phi.demo() as phi:
    for chunk in phi.stream("Write a haiku about ice hockey"):
        print(chunk, end="", flush=True)
"""
# Decisions: docs/design/python.md

try:
    from ._engine import __version__
except ImportError as error:
    from . import _installation

    if reason := _installation.fault(error):
        raise ImportError(f"candle_phi: {reason}") from error
    raise

from . import hub, testing
from .aio import AsyncStream
from .errors import (
    BusyError,
    ClosedError,
    ContextLengthError,
    DownloadError,
    ForkError,
    InternalError,
    InvalidModelError,
    ModelNotFoundError,
    NotInThisVersionError,
    OfflineError,
    PhiError,
    UnsupportedModelError,
)
from .model import Phi
from .progress import Progress
from .results import Chunk, Result, Timings, TokenLogprob, Usage
from .stream import Stream

__all__ = [
    "AsyncStream",
    "BusyError",
    "Chunk",
    "ClosedError",
    "ContextLengthError",
    "DownloadError",
    "ForkError",
    "InternalError",
    "InvalidModelError",
    "ModelNotFoundError",
    "NotInThisVersionError",
    "OfflineError",
    "Phi",
    "PhiError",
    "Progress",
    "Result",
    "Stream",
    "Timings",
    "TokenLogprob",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "hub",
    "testing",
]
