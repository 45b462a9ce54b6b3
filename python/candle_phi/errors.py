"""The exceptions of this package. Each is a `PhiError`, and a built-in exception too where Python has a fitting one.

Mistakes of the caller are built-in exceptions: an unknown option is a `TypeError`, a value out of range a `ValueError`.
"""

from collections.abc import Collection, Mapping


class PhiError(Exception):
    """The base class of this package's exceptions."""


class ModelNotFoundError(PhiError, FileNotFoundError):
    """The model file does not exist."""


class InvalidModelError(PhiError, ValueError):
    """The file is damaged or contradicts itself. The message names the file, the key or tensor, and the number."""


class UnsupportedModelError(PhiError):
    """The file is valid, but this build cannot run it."""


class NotInThisVersionError(PhiError, NotImplementedError):
    """A later version has this option or method."""


class NotInThisVersionAttributeError(NotInThisVersionError, AttributeError):
    """The same for an attribute: `hasattr` is False."""


class ContextLengthError(PhiError, ValueError):
    """The prompt leaves no room to generate.

    Attributes:
        prompt_tokens: the prompt's length in tokens.
        n_ctx: the context's length in tokens.
    """

    def __init__(self, message: str, prompt_tokens: int, n_ctx: int) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.n_ctx = n_ctx

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.prompt_tokens, self.n_ctx)


class DownloadError(PhiError, OSError):
    """A download failed.

    Attributes:
        url: the requested address.
        status: the HTTP status; None without a response.
        host: the host of that address, without credentials.
    """

    def __init__(
        self, message: str, url: str | None = None, status: int | None = None, host: str | None = None
    ) -> None:
        super().__init__(message)
        self.url = url
        self.status = status
        self.host = host

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.url, self.status, self.host)


class OfflineError(DownloadError):
    """The file is not in the cache, and downloads are not allowed."""


class BusyError(PhiError):
    """All slots are held by streams that are not being read, or a stream of the same chat is running."""


class ClosedError(PhiError):
    """The model or the chat is closed."""


class ForkError(PhiError, RuntimeError):
    """The model was opened before a `fork()`. Open it in the child, or use spawn or forkserver."""


class InternalError(PhiError, RuntimeError):
    """A bug in this package. The process is unharmed. Please report it."""


def missing_attribute(
    owner: object, name: str, *, later: Collection[str], foreign: Mapping[str, str]
) -> AttributeError:
    """The error for an attribute that `owner` does not have.

    Args:
        later: attributes of a later version.
        foreign: other libraries' attributes, each with what to do instead.
    """
    kind = type(owner).__name__
    if name in later:
        return NotInThisVersionAttributeError(f"{kind}.{name} is not in this version")
    message = f"{kind!r} object has no attribute {name!r}"
    if name in foreign:
        return AttributeError(f"{message}: {foreign[name]}")
    return AttributeError(message, name=name, obj=owner)  # Python adds a suggestion of its own
