"""The compiled engine. `candle_phi.Phi` checks options and messages; the engine gets clean values."""

from typing import TypeAlias, final

__all__ = ["DEFAULT_FILE", "DEFAULT_REPO", "Model", "Stream", "__version__", "default_model", "doctor"]

__version__: str
DEFAULT_REPO: str
"""The Hub's repository of the model that the command line runs."""
DEFAULT_FILE: str
"""Its file in that repository."""

_Top: TypeAlias = tuple[int, str, bytes, float]  # token_id, text, bytes, logprob
_Logprob: TypeAlias = tuple[int, str, bytes, float, list[_Top]]

@final
class Model:
    """An open model: weights in the mapped file, tokenizer, chat template."""

    def __new__(
        cls,
        path: str,
        *,
        n_ctx: int | None,
        n_threads: int | None,
        device: str,
        engine: str,
        kernel: str | None,
        kv_cache: str,
        mmap: bool,
        tokenizer: str | None,
        chat_template: str | None,
    ) -> Model: ...
    @property
    def path(self) -> str: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def metadata(self) -> dict[str, object]: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def device(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def system_fingerprint(self) -> str: ...
    def close(self) -> None:
        """Ends every stream. Any thread, any number of times."""

    def render(self, messages: list[tuple[str, str]]) -> str:
        """The prompt text of `(role, content)` pairs; roles: system, user, assistant."""

    def tokenize_text(self, text: str, parse_special: bool, add_bos: bool) -> list[int]:
        """The ids of a text as it stands."""

    def tokenize_messages(self, messages: list[tuple[str, str]]) -> list[int]:
        """The ids of the rendered messages; special tokens inside user text are plain text."""

    def detokenize(self, ids: list[int], skip_special: bool) -> str:
        """The text of ids; ValueError for an id outside the vocabulary."""

    def logits(self, ids: list[int], every_position: bool) -> bytes:
        """float32 in the machine's order: `n_vocab` logits after the last id, or after each."""

    def bandwidth(self) -> float:
        """Bytes per second at which `n_threads` threads read the weights and do nothing else. About a second's work."""

    def bytes_per_token(self, positions: int) -> tuple[int, int]:
        """Bytes that decoding the last of so many positions reads: of weights, and of keys and values."""

    def stream(
        self,
        prompt: list[int],
        *,
        max_tokens: int | None,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        repeat_last_n: int,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: dict[int, float],
        seed: int | None,
        stop: list[str],
        ignore_eos: bool,
        logprobs: bool,
        top_logprobs: int,
    ) -> Stream:
        """A generation that starts at its first `next`. Off: top_k 0, top_p 1, min_p 0, repeat_penalty 1."""

@final
class Stream:
    """One generation."""

    def next(self) -> tuple[str, list[int], list[_Logprob] | None] | None:
        """The next text with the ids and logprobs that ride on it; None at the end. Waits without the GIL."""

    def cancel(self) -> None:
        """Ends the generation; returns at once, from any thread."""

    @property
    def seed(self) -> int: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def usage(self) -> tuple[int, int]:
        """`(prompt_tokens, completion_tokens)`."""

    @property
    def timings(self) -> tuple[float, float, float, float | None, int]:
        """Seconds: `(queue, prefill, decode, time to first token)`, and the passes that decode took."""

def doctor() -> dict[str, object]:
    """What this build finds on this machine: version, cpu, kernels, kernel, n_threads, cache_dir."""

def default_model() -> str | None:
    """The path of Microsoft's Phi-3-mini-4k-instruct-q4.gguf in the Hub cache, if it is there."""
