"""What a generation yields: text that knows its tokens."""

import builtins
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a call took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed again; 0 until prefixes are reused."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a call went. A speed is None until something was measured."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    time_to_first_token: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    """Without the first token, which the prefill gives."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability under the model's own distribution, before penalties and temperature."""

    token_id: int
    text: str
    bytes: builtins.bytes
    """The token's own bytes, which need not be whole characters."""
    logprob: float
    top: tuple["TokenLogprob", ...]
    """The `top_logprobs` most likely tokens at this position, best first; their own `top` is empty."""


class _Text(str):
    """A str that carries the tokens behind it."""

    __slots__ = ("logprobs", "token_ids")

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None

    @property
    def text(self) -> str:
        """The same text as a plain str."""
        return str.__str__(self)


class Chunk(_Text):
    """A piece of a stream's text, never empty.

    Attributes:
        text: the same as a plain str.
        token_ids: the ids behind it, with those before it that had no text of their own.
        logprobs: one entry per id, when the call asked for `logprobs`; else None.
    """

    __slots__ = ()

    def __new__(cls, text: str, token_ids: list[int], logprobs: list[TokenLogprob] | None = None) -> "Chunk":
        self = super().__new__(cls, text)
        self.token_ids = token_ids
        self.logprobs = logprobs
        return self

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.text, self.token_ids, self.logprobs)


class _PrettyPrinter(Protocol):
    def text(self, text: str, /) -> Any: ...


class Result(_Text):
    """A whole answer: a str, displayed as text in IPython.

    Attributes:
        text: the same as a plain str.
        token_ids: the sampled ids, without the stop id.
        logprobs: one entry per id, when the call asked for `logprobs`; else None.
        finish_reason: `"stop"`, `"length"`, `"cancelled"` or `"timeout"`.
        usage: how many tokens it took.
        timings: where the time went.
        seed: passing it back gives the same text.
        system_fingerprint: same seed, options and fingerprint, same text.
    """

    __slots__ = ("finish_reason", "seed", "system_fingerprint", "timings", "usage")

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    system_fingerprint: str

    def __new__(
        cls,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        finish_reason: FinishReason,
        usage: Usage,
        timings: Timings,
        seed: int,
        system_fingerprint: str,
    ) -> "Result":
        self = super().__new__(cls, text)
        self.token_ids = token_ids
        self.logprobs = logprobs
        self.finish_reason = finish_reason
        self.usage = usage
        self.timings = timings
        self.seed = seed
        self.system_fingerprint = system_fingerprint
        return self

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (
            self.text,
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            self.usage,
            self.timings,
            self.seed,
            self.system_fingerprint,
        )

    def _repr_pretty_(self, printer: _PrettyPrinter, cycle: bool) -> None:
        printer.text(self.text)
