"""What can go wrong. Every class is a `PhiError`; where Python has a word for it, the built-in is the second base.

The caller's own mistakes are not here: an unknown option is a `TypeError`, a value out of range a `ValueError`.
"""


class PhiError(Exception):
    """The root of this package's exceptions."""


class ModelNotFoundError(PhiError, FileNotFoundError):
    """There is no such model file."""


class InvalidModelError(PhiError, ValueError):
    """The file is damaged, or contradicts itself. The message names the file, the key or tensor, and the number."""


class UnsupportedModelError(PhiError):
    """The file is sound, but not one that this build can run."""


class NotInThisVersionError(PhiError, NotImplementedError):
    """An option or a method that a later version has."""


class ContextLengthError(PhiError, ValueError):
    """The prompt leaves no room to generate.

    Attributes:
        prompt_tokens: how many tokens the prompt has.
        n_ctx: how many the context holds.
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
        url: what was asked for.
        status: the HTTP status, None when there was no answer.
        host: the host that was asked, without credentials.
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
    """The file is not here, and the network may not be used."""


class BusyError(PhiError):
    """Every slot is held by a stream that nobody reads."""


class ClosedError(PhiError):
    """The model was closed."""


class ForkError(PhiError, RuntimeError):
    """The model was loaded before a `fork()`: load it in the child, or use spawn or forkserver."""


class InternalError(PhiError, RuntimeError):
    """A bug of this package, caught before it could harm the process. Please report it."""
