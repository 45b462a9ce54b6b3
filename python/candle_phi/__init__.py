"""Phi-3-family GGUF models as a stream of text.

from candle_phi import Phi

with Phi.demo() as phi:
    for chunk in phi.stream("Write a haiku about ice hockey"):
        print(chunk, end="", flush=True)
"""
# Decisions: docs/design/python.md

from typing import TYPE_CHECKING

try:
    from ._engine import __version__
except ImportError as error:
    from . import _installation

    if reason := _installation.fault(error):
        raise ImportError(f"candle_phi: {reason}") from error
    raise

from . import hub
from .aio import AsyncStream
from .chat import Chat
from .errors import (
    BusyError,
    ClosedError,
    ContextLengthError,
    DownloadError,
    ForkError,
    InternalError,
    InvalidModelError,
    ModelNotFoundError,
    NotInThisVersionAttributeError,
    NotInThisVersionError,
    OfflineError,
    PhiError,
    UnsupportedModelError,
)
from .messages import Message
from .model import Phi
from .progress import OnProgress, Progress
from .results import CacheInfo, Chunk, FinishReason, Result, Timings, TokenLogprob, Usage
from .stream import Stream

if TYPE_CHECKING:  # else imported at its first use: only tests need it
    from . import testing

__all__ = [
    "AsyncStream",
    "BusyError",
    "CacheInfo",
    "Chat",
    "Chunk",
    "ClosedError",
    "ContextLengthError",
    "DownloadError",
    "FinishReason",
    "ForkError",
    "InternalError",
    "InvalidModelError",
    "Message",
    "ModelNotFoundError",
    "NotInThisVersionError",
    "OfflineError",
    "OnProgress",
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

_LATER = ("Event", "OutputError", "ParsedResult", "ToolCall", "integrations", "server")
"""Names of a later version."""
_OPEN = "open a model first: phi = Phi.demo(), or Phi.from_pretrained(name)"
_FOREIGN = {
    "load": "use Phi(path) or Phi.from_pretrained(name)",
    "load_model": "use Phi(path) or Phi.from_pretrained(name)",
    "from_pretrained": "use Phi.from_pretrained(name)",
    "demo": "use Phi.demo()",
    "Model": "the class is Phi",
    "LLM": "the class is Phi",
    "Llama": "the class is Phi",
    "generate": f"{_OPEN}; then phi.generate(prompt)",
    "stream": f"{_OPEN}; then phi.stream(prompt)",
    "stream_generate": f"{_OPEN}; then phi.stream(prompt)",
    "chat": f"{_OPEN}; then phi.chat()",
    "pipeline": f"{_OPEN}; then phi.generate(prompt)",
}
"""Other libraries' names, each with what to use here."""

# The submodules would answer candle_phi.stream(prompt) with "'module' object is not callable".
del globals()["stream"], globals()["chat"]


def __getattr__(name: str) -> object:
    if name == "testing":
        import importlib

        return importlib.import_module(".testing", __name__)
    if name in _LATER:
        raise NotInThisVersionAttributeError(f"{__name__}.{name} is not in this version")
    hint = f": {_FOREIGN[name]}" if name in _FOREIGN else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
