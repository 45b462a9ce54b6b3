"""The compiled engine. `candle_phi.Phi` checks options and messages before they come here."""

from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, final

__all__ = [
    "DEFAULT_FILE",
    "DEFAULT_REPO",
    "KNOWN_MODELS",
    "Chat",
    "Hub",
    "Logits",
    "Model",
    "ReadyQueue",
    "Scores",
    "Stream",
    "Task",
    "Warm",
    "__version__",
    "doctor",
    "memory_available",
    "memory_needed",
]

__version__: str
DEFAULT_REPO: str
"""The Hub repository of the command line's default model."""
DEFAULT_FILE: str
"""Its file in that repository."""
KNOWN_MODELS: list[tuple[str, str, str]]
"""Short names, each with its repository and file."""

_Result = TypeVar("_Result")
_Progress: TypeAlias = tuple[str, int, int | None]
"""Phase, done, total; in bytes or tokens."""
_Top: TypeAlias = tuple[int, str, bytes, float]  # token_id, text, bytes, logprob
_Logprob: TypeAlias = tuple[int, str, bytes, float, list[_Top]]
_Piece: TypeAlias = tuple[str, list[int], list[_Logprob] | None]
"""Text with its ids and log probabilities."""

@final
class Task(Generic[_Result]):
    """Work on a thread of its own. Dropping the task cancels it."""

    def poll(self) -> tuple[bool, _Result | None]:
        """`(True, result)` once when the work is done, else `(False, None)`. Raises the work's error. Never waits."""

    def wait(self) -> None:
        """Waits without the GIL until `poll` has a result, for at most 60 ms."""

    def progress(self, end: bool) -> list[_Progress]:
        """The last progress report."""

    def cancel(self) -> None:
        """Cancels the work, from any thread. Returns at once."""

@final
class Model:
    """An open model: weights in the mapped file, tokenizer, chat template."""

    @staticmethod
    def load(
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
        max_concurrent: int | None,
        max_batch: int,
        prefix_cache: int | None,
        prefix_cache_dir: str | None,
        speculate: bool,
    ) -> Task[Model]: ...
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
        """Ends every stream and unmaps the file. Safe from any thread, repeatedly."""

    def render(self, messages: list[tuple[str, str]]) -> str:
        """The prompt text of `(role, content)` pairs; roles: system, user, assistant."""

    def tokenize_text(self, text: str, parse_special: bool, add_bos: bool) -> list[int]:
        """The ids of a text without a template."""

    def tokenize_messages(self, messages: list[tuple[str, str]]) -> list[int]:
        """The ids of the rendered messages; special tokens inside user text are plain text."""

    def detokenize(self, ids: list[int], skip_special: bool) -> str:
        """The text of ids; ValueError for an id outside the vocabulary."""

    def logits(self, ids: list[int], every_position: bool) -> Logits:
        """The logits after the last id or after each. Computed from the first `poll` on."""

    def score(self, ids: list[int], *, start: int, top_logprobs: int) -> Scores:
        """The log probability of each id from index `start` on. Computed from the first `poll` on."""

    def continue_messages(
        self, messages: list[tuple[str, str]], text: str, ids: list[int]
    ) -> tuple[str, list[int], int]:
        """The text of the rendered messages, its ids, and how many of the given ids they begin with.

        `text` is that of the given ids. They are kept if the new text begins with it.
        """

    def chat(self) -> Chat:
        """Keys and values of its streams are evicted last while it lives."""

    def warm(self, ids: list[int], *, pin: bool, scope: str | None) -> Warm:
        """Computes the keys and values of ids, and keeps them. Its only item is the number of ids."""

    def cache_info(self) -> tuple[int, int, int, int, int, int]:
        """`(bytes, limit, positions, hits, misses, chats)`."""

    def save_chat(
        self, chat: Chat, ids: list[int], runs: list[int], path: str, metadata: dict[str, str], kv: bool
    ) -> Task[None]: ...
    def load_chat(
        self, path: str, chat: Chat, strict: bool
    ) -> Task[tuple[list[int], list[int], dict[str, str], str | None]]:
        """Ids, runs, metadata, and why keys and values of the file cannot be used."""

    def bandwidth(self) -> float:
        """Bytes per second at which `n_threads` threads can read the weights. Takes about a second."""

    def decode_pass(self, tokens: int) -> float:
        """Seconds of one decode pass over `tokens` tokens, with the logits of each."""

    def bytes_per_token(self, positions: int) -> tuple[int, int]:
        """Bytes of weights, and of keys and values, that decoding a token at `positions` reads."""

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
        timeout: float | None,
        cache_scope: str | None,
        speculate: bool | None,
        prediction: list[int] | None,
        runs: list[int] | None,
        chat: Chat | None,
        whole: bool,
        replay: list[int] | None = None,
    ) -> Stream:
        """A generation that starts at its first `poll`. Off: top_k 0, top_p 1, min_p 0, repeat_penalty 1.

        `runs`: the number of ids whose keys and values prefill computes, then of those that decode computes, in turn.
        None: prefill computes all.

        `replay`: the ids that are drawn, whatever the logits say.

        `whole`: it is computed without further reads, and `poll` has nothing before the end.
        """

@final
class Stream:
    """One generation."""

    def poll(self) -> tuple[bool, _Piece | None]:
        """`(True, piece)`, `(True, None)` at the end, or `(False, None)` if there is nothing yet. Never waits."""

    def wait(self) -> None:
        """Waits without the GIL until `poll` has something, for at most 75 ms."""

    def notify(self, queue: ReadyQueue, ticket: int) -> None:
        """Puts the ticket into the queue once when `poll` has something, perhaps at once."""

    @property
    def time_left(self) -> float | None:
        """Seconds until the timeout. `poll` has the end then."""

    def progress(self, end: bool) -> list[_Progress]:
        """The progress since the last report. Empty within 75 ms of it, unless a phase has begun or `end` is set."""

    def cancel(self) -> None:
        """Cancels the generation, from any thread. Returns at once."""

    def check_process(self) -> None:
        """Raises ForkError in a process that was forked after the model was opened."""

    @property
    def seed(self) -> int: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def usage(self) -> tuple[int, int, int, int, int]:
        """`(prompt_tokens, completion_tokens, cached_tokens, draft_tokens, accepted_tokens)`."""

    @property
    def runs(self) -> list[int]:
        """After an end by stop or length: the runs of the ids whose keys and values are computed."""

    @property
    def timings(self) -> tuple[float, float, float, float | None, int]:
        """Seconds of queue, prefill, decode and until the first token, and the number of decode passes."""

@final
class Chat:
    """Keeps what the streams of a chat computed."""

    def close(self) -> None: ...

@final
class Warm:
    """The keys and values of given ids: a `Stream` of one item."""

    def poll(self) -> tuple[bool, int | None]: ...
    def wait(self) -> None: ...
    def progress(self, end: bool) -> list[_Progress]: ...
    def cancel(self) -> None: ...

@final
class Logits:
    """The logits of given ids: a `Stream` of one item."""

    def poll(self) -> tuple[bool, bytes | None]:
        """`(True, float32 in native byte order)`, or `(False, None)` if they are not there yet."""

    def wait(self) -> None: ...
    def progress(self, end: bool) -> list[_Progress]: ...
    def cancel(self) -> None: ...

@final
class Scores:
    """The log probabilities of given ids: a `Stream` of lists."""

    def poll(self) -> tuple[bool, list[_Logprob] | None]:
        """`(True, entries of the next positions)`, `(True, None)` at the end, or `(False, None)`. Never waits."""

    def wait(self) -> None: ...
    def progress(self, end: bool) -> list[_Progress]: ...
    def cancel(self) -> None: ...

@final
class ReadyQueue:
    """A queue on which one thread waits for many streams."""

    def __new__(cls) -> ReadyQueue: ...
    def put(self, ticket: int) -> None: ...
    def take(self, seconds: float | None) -> list[int]:
        """Waits for tickets without the GIL and takes all of them. None after `seconds`; None waits without a limit."""

def doctor() -> dict[str, object]:
    """Facts on this build and machine: version, cpu, kernels, kernel, n_threads, cache_dir."""

def memory_available() -> int | None:
    """The bytes that this process may still use, within the limit of its container. None if the system is not Linux."""

def memory_needed(path: str, n_ctx: int | None, kv_cache: str) -> tuple[int, int, int]:
    """Bytes of a file's weights, of the keys and values of `n_ctx` tokens (None: of 4096), and of activations."""

_CachedFile: TypeAlias = tuple[str, str, str, list[str], Path, int]
"""repository, file, commit, branches and tags, path, size"""

@final
class Hub:
    """The Hub and the cache of its files."""

    def __new__(
        cls,
        *,
        revision: str | None,
        cache_dir: str | None,
        token: str | bool | None,
        local_files_only: bool,
        proxies: dict[str, str],
    ) -> Hub: ...
    def cached(self, repo: str, filename: str | None) -> Path | None:
        """The file, or the first part of a split one, if all of it is in the cache. Opens no socket."""

    def download(self, repo: str, filename: str | None) -> Task[Path]:
        """The same, downloaded if it is not in the cache."""

    def info(self, repo: str) -> Task[tuple[str, str, list[tuple[str, int, str | None]]]]:
        """Repository, commit, and its files: name, size, SHA-256 of large ones."""

    def files(self) -> list[_CachedFile]:
        """The GGUF files in the cache."""

    def verify(self, repo: str | None, filename: str | None) -> Task[list[_CachedFile]]:
        """Checks files in the cache against their checksums. InvalidModelError names the damaged ones."""

    def remove(self, repo: str, filename: str | None) -> int:
        """Removes files from the cache. Returns the bytes that are free again."""
