"""`Phi`: an open model."""

import functools
import inspect
import logging
import os
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Literal, Never, ParamSpec, Self, SupportsIndex, TypedDict, TypeVar, Unpack, cast

from . import _engine, aio, hub, memory, options
from ._engine import DEFAULT_REPO
from .aio import AsyncStream
from .errors import ModelNotFoundError
from .messages import Message, Prompt, are_ids, items, token_ids, turns
from .progress import OnProgress, finished, watching, watching_tokens
from .results import Result
from .stream import Stream

Device = Literal["auto", "cpu", "cuda", "metal"]
Engine = Literal["native", "candle"]
KvCache = Literal["f16", "f32", "q8_0"]

_logger = logging.getLogger("candle_phi")
_logger.addHandler(logging.NullHandler())  # without a handler of the application's, a warning would go to stderr
_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")


class ModelOptions(TypedDict, total=False):
    """The options of `Phi`, which `Phi.demo` and `Phi.from_pretrained` pass on to it."""

    n_ctx: int | None
    n_threads: int | None
    device: Device
    engine: Engine
    kernel: str | None
    kv_cache: KvCache
    mmap: bool
    tokenizer: str | os.PathLike[str] | None
    chat_template: str | None
    max_concurrent: int | None
    on_progress: OnProgress | None


def _parameters_of(
    method: Callable[_Parameters, object],
) -> Callable[[Callable[..., _Returned]], Callable[_Parameters, _Returned]]:
    """Gives a method the parameters of another, so that thirty names and defaults are written down once."""

    def decorate(function: Callable[..., _Returned]) -> Callable[_Parameters, _Returned]:
        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(method).replace(return_annotation=returned)
        function.__signature__ = signature  # type: ignore[attr-defined]  # what inspect and help() read
        return function

    return decorate


class Phi:
    """An open Phi-3-family model. Any number of threads and streams may share one.

    Args:
        model_path: a GGUF file, or the first part of a split one.
        n_ctx: how many tokens the context holds; None: the file's. The cache grows with use.
        n_threads: None: `CANDLE_PHI_NUM_THREADS`, else what affinity and the cgroup's quota allow.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"metal"`; the last two where the build has that cargo feature.
        engine: `"native"`, or `"candle"`: Candle's own loop, for comparison.
        kernel: None: `CANDLE_PHI_KERNEL`, else the best that runs here; a name from `candle-phi doctor`.
        kv_cache: what keys and values are stored as: `"f16"`, `"f32"` or `"q8_0"`.
        mmap: False reads the file into private memory, for files that may change or lie on a network mount.
        tokenizer: the path of a `tokenizer.json`, or a repository of the Hub that has one; None: the GGUF's own.
        chat_template: a Jinja source; None: the file's, else the family's.
        max_concurrent: how many streams may hold a KV cache at once; None: no bound. A stream takes its slot at its
            first read and gives it up when its text is complete, or when it is cancelled, closed or dropped; the others
            wait in the order they came. `logits` takes one, too.
        on_progress: called with a `Progress` while it loads. An exception that it raises ends that.

    Raises:
        ModelNotFoundError: there is no such file. The message names the call that works.
        InvalidModelError: the file is damaged or contradicts itself.
        UnsupportedModelError: the file is sound, but not one that this build can run.
        TypeError, ValueError: an option that is unknown, of the wrong type or out of range.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        device: Device = "auto",
        engine: Engine = "native",
        kernel: str | None = None,
        kv_cache: KvCache = "f16",
        mmap: bool = True,
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | None = None,
        max_concurrent: int | None = None,
        on_progress: OnProgress | None = None,
        **unknown: Never,
    ) -> None:
        given = _arguments(locals(), "model_path")
        path = options.path("model_path", model_path)
        checked = options.checked(options.MODEL, given)
        del checked["on_progress"]
        _check_file(path)
        if checked["tokenizer"] is not None:
            checked["tokenizer"] = _tokenizer_path(checked["tokenizer"])
        memory.warn_if_too_large(path, checked["n_ctx"], checked["kv_cache"])
        with watching("", False, on_progress) as watch:
            self._model = finished(_engine.Model.load(path, **checked), watch)
        # how to open it again: what to call, with which path, with which options
        self._recipe: tuple[Callable[..., Phi], tuple[object, ...], dict[str, Any]]
        self._recipe = type(self), (os.path.abspath(path),), checked

    @classmethod
    def demo(cls, **options: Unpack[ModelOptions]) -> Self:
        """Opens the model that comes with this package: small, real, and good for haiku about ice hockey only."""
        from importlib.resources import files

        bundled = [file for file in files(__package__).joinpath("demo").iterdir() if file.name.endswith(".gguf")]
        if len(bundled) != 1:
            raise ModelNotFoundError(f"this installation has {len(bundled)} bundled models where 1 belongs")
        phi = cls(str(bundled[0]), **options)
        phi._recipe = cls.demo, (), phi._recipe[2]  # another installation keeps the file elsewhere
        return phi

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | os.PathLike[str],
        filename: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        progress: bool | None = None,
        **model_options: Unpack[ModelOptions],
    ) -> Self:
        """Opens a model of the Hugging Face Hub, which is downloaded once; an existing local path is opened as it is.

        Args:
            repo_id, filename, revision, cache_dir, token, local_files_only, progress: as `hub.download` has them.
            model_options: those of `Phi`. `on_progress` is told of the download too; `tokenizer` may be a repository
                that has a `tokenizer.json`.

        Raises:
            DownloadError, OfflineError: the file cannot be had.
            ModelNotFoundError: no file of the repository is meant, or several are; the message lists them.
        """
        options.checked(options.MODEL, model_options)
        repo_id = options.path("repo_id", repo_id)
        place: dict[str, Any] = {
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "progress": progress,
            "on_progress": model_options.get("on_progress"),
        }
        options.checked(options.HUB, {**place, "filename": filename, "revision": revision})
        tokenizer = model_options.get("tokenizer")
        if tokenizer is not None and _is_repository(tokenizer):
            model_options["tokenizer"] = hub.download(os.fspath(tokenizer), "tokenizer.json", **place)
        if not _is_repository(repo_id):
            if revision or cache_dir:
                raise ValueError(f"revision and cache_dir are for the Hub's repositories, and {repo_id!r} is a path")
            return cls(repo_id if filename is None else os.path.join(repo_id, filename), **model_options)
        path = hub.download(repo_id, filename, revision=revision, **place)
        return cls(path, **model_options)

    @property
    def path(self) -> str:
        """The file, as it was given."""
        return self._model.path

    @property
    def n_ctx(self) -> int:
        """How many tokens the context holds."""
        return self._model.n_ctx

    @property
    def n_vocab(self) -> int:
        """How many tokens the vocabulary has."""
        return self._model.n_vocab

    @property
    def metadata(self) -> dict[str, object]:
        """The file's keys and values; `ClosedError` once the model is closed, since they lie in the file."""
        return self._model.metadata

    @property
    def chat_template(self) -> str:
        """The Jinja source in use."""
        return self._model.chat_template

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, which `add_bos=True` prepends."""
        return self._model.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end an answer."""
        return self._model.eos_token_ids

    @property
    def device(self) -> str:
        """Where it computes: `"cpu"`, `"cuda"` or `"metal"`."""
        return self._model.device

    @property
    def engine(self) -> str:
        """`"native"` or `"candle"`."""
        return self._model.engine

    @property
    def kernel(self) -> str:
        """The kernel in use."""
        return self._model.kernel

    @property
    def n_threads(self) -> int:
        """How many threads compute."""
        return self._model.n_threads

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._model.closed

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int = 64,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | Mapping[str, float] | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        top_logprobs: int = 0,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        raw: bool = False,
        parse_special: bool | None = None,
        add_bos: bool = False,
        **unknown: Never,
    ) -> Stream:
        """Generates text piece by piece. Whatever is wrong with the call is raised here; work starts at the first read.

        Args:
            prompt: a str (one user turn), messages (`{"role": ..., "content": ...}`), or token ids. A last message of
                the assistant is continued.
            max_tokens: how many tokens at most; None: until a stop or the end of the context.
            temperature: 0 always takes the most likely token.
            top_k: keep this many of the most likely tokens; None or 0: all.
            top_p: keep the smallest set of tokens with this probability together; None or 1: all.
            min_p: keep tokens at least this probable relative to the most likely one; None or 0: all.
            repeat_penalty: lowers tokens among the last generated; None: 1.2, or 1 (off) when temperature is 0.
            repeat_last_n: how many generated tokens repeat_penalty looks back at; 0: none, -1: all.
            presence_penalty: subtracted from the logit of every token generated so far, -2 to 2.
            frequency_penalty: the same, times how often it was generated.
            logit_bias: token id to what is added to its logit, -100 to 100.
            seed: the same seed gives the same text; None draws one, which the stream and the result report.
            stop: a str or several that end the text, and are no part of it.
            ignore_eos: generate through the model's own stop ids, for benchmarks.
            logprobs: report the log probability of every token.
            top_logprobs: and of this many of the most likely at its place, at most 20.
            timeout: seconds from this call on, the time in the queue included; then the text ends as it is.
            on_progress: called with a `Progress` while a reader waits: phase `"wait"`, `"prefill"` or `"decode"`, in
                tokens. An exception that it raises cancels the stream, and comes out of the read.
            raw: take a str as it stands instead of as a user turn.
            parse_special: whether special tokens in a raw prompt count as such; None: they do.
            add_bos: put the beginning-of-text token before a raw prompt.

        Raises:
            ContextLengthError: the prompt leaves no room to generate.
            ClosedError: the model is closed.
            TypeError, ValueError: an option or a message that is unknown, of the wrong type or out of range.
            NotInThisVersionError: a role that a later version has.

        A read raises:
            BusyError: with `max_concurrent`, when all slots are held by streams that nobody has read for 10 seconds.
            ClosedError: the model was closed meanwhile.
        """
        given = _arguments(locals(), "prompt")
        read = options.checked(options.PROMPT, {name: given.pop(name) for name in options.PROMPT})
        watch = watching_tokens(
            options.checked(options.WATCH, {"on_progress": given.pop("on_progress")})["on_progress"]
        )
        chosen = options.sampling(given)
        for token in chosen["logit_bias"]:
            if token >= self.n_vocab:
                raise ValueError(f"logit_bias: token id {token} is outside the vocabulary of {self.n_vocab}")
        ids = self._read(prompt, **read)
        return Stream(self._model, self._model.stream(ids, **chosen), watch, logprobs=chosen["logprobs"])

    @_parameters_of(stream)
    def generate(self, *args: Any, **kwargs: Any) -> Result:
        """Generates the whole text: the options and errors of `stream`, and the same text."""
        with self.stream(*args, **kwargs) as stream:
            for _ in stream:
                pass
            return stream._result()

    @_parameters_of(stream)
    def astream(self, *args: Any, **kwargs: Any) -> AsyncStream:
        """The same for event loops: the options of `stream` and, at the call, its errors; nothing here waits.

        Reading it blocks no loop and takes no thread. `on_progress` is called in the loop's thread.
        """
        return AsyncStream(self.stream(*args, **kwargs))

    @_parameters_of(stream)
    def agenerate(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Result]:
        """Generates the whole text for event loops: the options of `stream`, its errors at the call, the same text."""
        return aio.generate(self.astream(*args, **kwargs))

    def render(self, messages: str | Iterable[Message]) -> str:
        """The exact text that messages become; a str is one user turn."""
        return self._model.render(turns(messages))

    def tokenize(
        self, prompt: str | Iterable[Message], *, parse_special: bool = False, add_bos: bool = False
    ) -> list[int]:
        """The token ids of a text as it stands; or of messages, exactly as `stream` would read them.

        Args:
            prompt: a str or messages.
            parse_special: whether special tokens in a str count as such.
            add_bos: put the beginning-of-text token before a str.
        """
        options.checked(options.PROMPT, {"parse_special": parse_special, "add_bos": add_bos})
        if isinstance(prompt, str):
            return self._model.tokenize_text(options.encodable("the text", prompt), bool(parse_special), add_bos)
        if parse_special or add_bos:
            raise ValueError("parse_special and add_bos are for a str: messages have their template's special tokens")
        return self._model.tokenize_messages(turns(prompt))

    def detokenize(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """The text of token ids, with special tokens left out or spelled out."""
        options.checked({"skip_special": options.PROMPT["raw"]}, {"skip_special": skip_special})
        return self._model.detokenize(token_ids(ids, self.n_vocab), skip_special)

    def logits(
        self,
        ids: Iterable[SupportsIndex],
        *,
        every_position: bool = False,
        on_progress: OnProgress | None = None,
    ) -> "memoryview[float]":
        """The logits after the last id, float32 of shape (n_vocab,); or after each, (len(ids), n_vocab).

        `numpy.asarray` takes the buffer without a copy. The call takes a slot of `max_concurrent`, and waits for one;
        meanwhile, and while it computes, it calls `on_progress`, whose exception ends it. Logits that do not fit the
        available memory raise `MemoryError`.
        """
        options.checked({"every_position": options.PROMPT["raw"]}, {"every_position": every_position})
        options.checked(options.WATCH, {"on_progress": on_progress})
        checked = token_ids(ids, self.n_vocab)
        if not checked:
            raise ValueError("logits() of no ids: give at least 1")
        shape = [len(checked), self.n_vocab] if every_position else [self.n_vocab]
        logits = finished(self._model.logits(checked, every_position), watching_tokens(on_progress))
        return memoryview(logits).cast("f", shape)

    def close(self) -> None:
        """Ends every stream, whose readers get `ClosedError`, and lets go of the file. Any thread may, and again."""
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"kernel={self.kernel!r}, n_threads={self.n_threads}"
        return f"{type(self).__name__}({self.path!r}, n_ctx={self.n_ctx}, device={self.device!r}, {state})"

    def __reduce__(self) -> tuple[Callable[[], "Phi"], tuple[()]]:
        opens, arguments, options = self._recipe
        return functools.partial(opens, *arguments, **options), ()

    def _read(self, prompt: object, raw: bool, parse_special: bool | None, add_bos: bool) -> list[int]:
        """The ids of what a generation was given."""
        if raw:
            if not isinstance(prompt, str):
                raise TypeError(f"raw=True takes a str as it stands, not {type(prompt).__name__}")
            ids = self._model.tokenize_text(
                options.encodable("the prompt", prompt), parse_special is not False, add_bos
            )
            if not ids:
                raise ValueError("the raw prompt has no tokens")
            return ids
        if parse_special is not None or add_bos:
            raise ValueError("parse_special and add_bos are for raw=True")
        if isinstance(prompt, str) and ("<|user|>" in prompt or "<|assistant|>" in prompt):
            _logger.warning("the prompt has <|user|> or <|assistant|> as plain text; raw=True takes it as it stands")
        if not isinstance(prompt, str):
            prompt = items(prompt)  # once: it may be a generator
            if are_ids(prompt):
                return token_ids(prompt, self.n_vocab)
        return self._model.tokenize_messages(turns(prompt))


def _arguments(local: dict[str, object], *positional: str) -> dict[str, object]:
    """The keyword arguments of a call, from the `locals()` of its first line."""
    given = {name: value for name, value in local.items() if name not in ("self", "unknown", *positional)}
    return given | cast(dict[str, object], local["unknown"])


def _is_repository(path: object) -> bool:
    """Whether it reads as `organisation/name` or is a short name, and no such path exists."""
    if not isinstance(path, str) or path.endswith((".gguf", ".json")) or os.path.exists(path):
        return False
    return path in hub.SHORT_NAMES or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def _check_file(path: str) -> None:
    """Names the call that works for what is no file: a repository's name, another name, a folder."""
    if _is_repository(path):
        raise ModelNotFoundError(f"{path!r} is no file; for the Hub's repository: Phi.from_pretrained({path!r})")
    if not path.endswith(".gguf") and not os.path.exists(path):
        raise ModelNotFoundError(
            f"{path!r}: no such file; Phi.demo() opens the bundled model, "
            f"Phi.from_pretrained({DEFAULT_REPO!r}) Microsoft's"
        )
    if not os.path.isdir(path):
        return
    files = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
    if files:
        first = os.path.join(path, files[0])
        raise ModelNotFoundError(f"{path!r} is a folder with {len(files)} .gguf files: Phi({first!r}) opens the first")
    raise ModelNotFoundError(f"{path!r} is a folder without .gguf files: Phi.from_pretrained({DEFAULT_REPO!r})")


def _tokenizer_path(path: str) -> str:
    """The absolute path of a `tokenizer.json`."""
    if _is_repository(path):
        path = str(hub.download(path, "tokenizer.json"))
    if not os.path.isfile(path):
        raise ModelNotFoundError(f"tokenizer={path!r}: no such file; give the path of a tokenizer.json")
    return os.path.abspath(path)
