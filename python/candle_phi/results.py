"""The results of a generation: text with its token ids and figures."""

import builtins
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .errors import missing_attribute

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a generation ended. `"stop"`: a stop token or a stop string; `"length"`: `max_tokens` or the context's end."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The number of tokens of a call.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, without the stop token.
        total_tokens: the sum of the two.
        cached_tokens: prompt tokens whose keys and values were held, so that they were not computed again.
        draft_tokens: tokens that speculation guessed.
        accepted_tokens: those of them that were right. Each of them saved a pass over the weights.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """The usage of two calls together."""
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Timings:
    """The time of a call, in seconds, and its speeds. A value is None until it is measured.

    Attributes:
        queue_seconds: waiting for a slot and for other streams.
        prefill_seconds: reading the prompt.
        decode_seconds: generating.
        time_to_first_token: from the first read to the first token.
        prefill_tokens_per_second: computed prompt tokens per second of prefill. Cached ones do not count.
        decode_tokens_per_second: generated tokens per second of decode, without the first, which prefill computes.
    """

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    time_to_first_token: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability under the model's own distribution, before penalties and temperature.

    Attributes:
        token_id: the token's id.
        text: the token's text. Bytes that are not whole characters are replaced.
        bytes: the token's bytes, which may be part of a character.
        logprob: the natural logarithm of its probability.
        top: the `top_logprobs` most likely tokens at this position, best first. Their own `top` is empty.
    """

    token_id: int
    text: str
    bytes: builtins.bytes
    logprob: float
    top: tuple["TokenLogprob", ...]


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What a model keeps of prompts and chats.

    Attributes:
        bytes: memory of the keys and values that are kept and not in use.
        limit: the most that `bytes` may be: the model's `prefix_cache`.
        positions: tokens whose keys and values are kept.
        hits: calls that found the beginning of their prompt.
        misses: calls that found nothing.
        chats: open chats.
    """

    bytes: int
    limit: int
    positions: int
    hits: int
    misses: int
    chats: int


class _Text(str):
    """A str that carries the tokens behind it."""

    __slots__ = ("logprobs", "token_ids")

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None

    _LATER: ClassVar[Collection[str]] = ()
    _FOREIGN: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # a type checker would take every name

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute(self, name, later=self._LATER, foreign=self._FOREIGN)

    @property
    def text(self) -> str:
        """The same text as a plain str."""
        return str.__str__(self)


class Chunk(_Text):
    """A piece of a stream's text, never empty.

    Attributes:
        text: the same text as a plain str.
        token_ids: its token ids, and the ids before it that had no text of their own.
        logprobs: one entry per id if the call has `logprobs=True`, else None.
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
    """IPython's, as far as it is used here."""

    stack: list[int]
    """The objects that are being printed, this one included."""

    def text(self, text: str, /) -> Any: ...


class Result(_Text):
    """A whole answer: a str with attributes. IPython displays it as text.

    Attributes:
        text: the same text as a plain str.
        token_ids: the generated ids, without the stop id.
        logprobs: one entry per id if the call has `logprobs=True`, else None.
        finish_reason: `"stop"`, `"length"`, `"cancelled"` or `"timeout"`.
        usage: the number of tokens.
        timings: seconds and speeds.
        seed: the seed in use. Passing it back gives the same text.
        system_fingerprint: identifies the file, the version and the kernel. The same seed, options and fingerprint
            give the same text.
        prompt_index: the number of its prompt among those of `map` or `amap`, from 0; None for other calls.
    """

    __slots__ = ("finish_reason", "prompt_index", "seed", "system_fingerprint", "timings", "usage")

    _LATER = ("parsed", "reasoning", "tool_calls")
    _FOREIGN: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("choices", "content", "message", "outputs", "response", "generated_text"), "a Result is the text itself"
    )

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    system_fingerprint: str
    prompt_index: int | None

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
        prompt_index: int | None = None,
    ) -> "Result":
        self = super().__new__(cls, text)
        self.token_ids = token_ids
        self.logprobs = logprobs
        self.finish_reason = finish_reason
        self.usage = usage
        self.timings = timings
        self.seed = seed
        self.system_fingerprint = system_fingerprint
        self.prompt_index = prompt_index
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
            self.prompt_index,
        )

    def _repr_pretty_(self, printer: _PrettyPrinter, cycle: bool) -> None:
        outermost = len(printer.stack) == 1
        printer.text(self.text if outermost else repr(self))
