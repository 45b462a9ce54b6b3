"""`Phi`: an open model."""
# Decisions: docs/design/python.md

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Never, Self, Unpack

from . import _engine, hub, memory, options
from .cache import Caching
from .chats import Chatting
from .errors import ModelNotFoundError, missing_attribute
from .keywords import ModelOptions
from .locations import check_file, is_repository, tokenizer_path
from .metadata import Metadata
from .options import Device, Engine, KvCache, OptionValueError
from .progress import OnProgress, progress_callback, wait_for
from .scores import Scoring
from .signatures import adds_options, takes_path

_DEMO = "phi3-demo-q4_k_m.gguf"

_LATER = ("accepts", "adapters")
"""Methods and attributes that a later version has."""

_FOREIGN = {
    "create_chat_completion": "use .generate(messages), whose result is the text",
    "create_completion": "use .generate(text, raw=True), whose result is the text",
    "complete": "use .generate(prompt)",
    "invoke": "use .generate(prompt)",
    "predict": "use .generate(prompt)",
    "agenerate_stream": "use .astream(prompt)",
    **dict.fromkeys(("batch", "batch_generate", "generate_batch"), "use .map(prompts)"),
    **dict.fromkeys(("abatch", "abatch_as_completed"), "use .amap(prompts)"),
    "stream_generate": "use .stream(prompt)",
    "encode": "use .tokenize(text)",
    "decode": "use .detokenize(ids)",
    "tokenizer": "use .tokenize(text) and .detokenize(ids)",
    "apply_chat_template": "use .render(messages), or .tokenize(messages) for the ids",
    "eval": "use .logits(ids)",
    "forward": "use .logits(ids)",
    **dict.fromkeys(("start_chat", "chat_session", "conversation"), "use .chat()"),
    **dict.fromkeys(("load_state", "load_session"), "use .load_chat(path)"),
    **dict.fromkeys(("save_state", "save_session"), "use .chat(), whose .save(path) keeps it in a file"),
    **dict.fromkeys(("warmup", "warm_up", "prefill"), "use .warm(prompt)"),
    "get_num_tokens": "use .count_tokens(prompt)",
    "embed": "this package computes no embeddings",
    "create_embedding": "this package computes no embeddings",
    "model_path": "use .path",
    "to": "give the device when opening: Phi(path, device=...)",
}
"""Other libraries' methods and attributes, each with what to use here."""


class _Recipe(NamedTuple):
    """How to open a model again."""

    open: Callable[..., "Phi"]
    args: tuple[object, ...]
    options: dict[str, Any]


class Phi(Chatting, Caching, Scoring):
    """An open Phi-3-family model. Any number of threads and streams may share one.

    >>> with Phi.demo() as phi:
    ...     print(phi.generate("What is a power play?", temperature=0))
    One team has a player in the box, so the other team skates with one more for a while.

    Args:
        model_path: a GGUF file. Of a split model, its first part.
        n_ctx: the context's length in tokens. Default: the file's. The KV cache grows with use.
        n_threads: the number of threads that compute. Default: `CANDLE_PHI_NUM_THREADS`, else the number of CPUs that
            affinity and the cgroup's quota allow.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"metal"`. The last two need a build with the cargo feature of that name.
        engine: `"native"`, or `"candle"` for Candle's own loop, for comparison.
        kernel: a name that `candle-phi doctor` prints. Default: `CANDLE_PHI_KERNEL`, else the fastest for this CPU.
        kv_cache: the type of the stored keys and values: `"f16"`, `"f32"` or `"q8_0"`.
        mmap: False reads the file into private memory. Use it for files that may change and for network mounts.
        tokenizer: the path of a `tokenizer.json`, or a repository of the Hub that has one. Default: the file's own.
        chat_template: a Jinja source. Default: the file's, else the model family's.
        max_concurrent: at most this many streams hold a KV cache at once. Default: no limit. A stream takes a slot at
            its first read and frees it at its end, or when it is cancelled, closed or dropped. Further streams queue.
            `logits` and `score` take a slot too.
        max_batch: at most this many streams that decode at the same time share a pass over the weights, from 1 to 16.
            It changes speeds, not texts.
        prefix_cache: at most this many bytes of keys and values are kept for prompts to come, beside those in use. A
            prompt that begins as an earlier one did, or as a chat, takes its keys and values from there. It changes
            speeds, not texts. Default: an eighth of the memory that is free now, at most 2 GiB. 0: none are kept.
        prefix_cache_dir: a folder in which keys and values are kept too, for other processes and after a restart. It
            is made if it does not exist. Default: none.
        speculate: guess the next tokens from what the text so far says, and check several in one pass. It changes
            speeds, not texts.
        on_progress: called with a `Progress` while the model loads. An exception that it raises stops the loading.

    Raises:
        ModelNotFoundError: the file does not exist. The message names the call that works.
        InvalidModelError: the file is damaged or contradicts itself.
        UnsupportedModelError: the file is valid, but this build cannot run it.
        NotInThisVersionError: an option that a later version has.
        TypeError, ValueError: an option that is unknown, of the wrong type or out of range.
        MemoryError: the copy of a file with `mmap=False` does not fit the available memory.
    """

    @takes_path
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
        max_batch: int = 8,
        prefix_cache: int | None = None,
        prefix_cache_dir: str | os.PathLike[str] | None = None,
        speculate: bool = True,
        on_progress: OnProgress | None = None,
        **unknown: Never,
    ) -> None:
        path = options.path("model_path", model_path)
        checked = options.checked(
            options.MODEL,
            {
                "n_ctx": n_ctx,
                "n_threads": n_threads,
                "device": device,
                "engine": engine,
                "kernel": kernel,
                "kv_cache": kv_cache,
                "mmap": mmap,
                "tokenizer": tokenizer,
                "chat_template": chat_template,
                "max_concurrent": max_concurrent,
                "max_batch": max_batch,
                "prefix_cache": prefix_cache,
                "prefix_cache_dir": prefix_cache_dir,
                "speculate": speculate,
                "on_progress": on_progress,
                **unknown,
            },
        )
        del checked["on_progress"]
        check_file(path)
        if checked["tokenizer"] is not None:
            checked["tokenizer"] = tokenizer_path(checked["tokenizer"])
        if checked["prefix_cache_dir"] is not None:
            checked["prefix_cache_dir"] = os.path.abspath(checked["prefix_cache_dir"])
        memory.warn_if_too_large(path, checked["n_ctx"], checked["kv_cache"])
        with progress_callback("", False, on_progress) as watch:
            self._model = wait_for(_engine.Model.load(path, **checked), watch)
        self._recipe = _Recipe(type(self), (os.path.abspath(path),), checked)
        self._max_batch = checked["max_batch"]

    @classmethod
    @adds_options(__init__, __doc__)
    def demo(cls, **options: Unpack[ModelOptions]) -> Self:
        """Opens the model that comes with this package: 3 MB, trained to write haiku about ice hockey.

        Raises:
            ModelNotFoundError: the installation lacks the file.
        """
        from importlib.resources import files

        path = str(files(__package__ or "candle_phi").joinpath("demo", _DEMO))
        if not os.path.exists(path):
            raise ModelNotFoundError(f"this installation lacks the bundled model, {path}: install candle-phi again")
        phi = cls(path, **options)
        phi._recipe = _Recipe(cls.demo, (), phi._recipe.options)  # another installation has the file elsewhere
        return phi

    @classmethod
    @adds_options(__init__, __doc__)
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
        """Opens a model of the Hugging Face Hub, and downloads it at the first call. Opens an existing path as it is.

        `on_progress` is called during the download too.

        Args:
            repo_id: `"organisation/name"`, a short name such as `"phi-4-mini"` (`hub.SHORT_NAMES`), one of Ollama's
                names (`hub.ALIASES`), or a path.
            filename: a file of the repository, or a pattern such as `"*Q4_K_M.gguf"` that matches one model. Default:
                the file that `hub.SHORT_NAMES` has, else the only GGUF model.
            revision: a branch, a tag or a commit. Default: `main`.
            cache_dir: the cache folder. Default: HF_HUB_CACHE, else the folder `hub` in HF_HOME, else the usual one.
            token: an access token. True: that of HF_TOKEN or of a login, which must exist. False: none. Default: that
                of HF_TOKEN or of a login, if there is one.
            local_files_only: never use the network.
            progress: whether to draw a progress bar on stderr. Default: on a terminal or in a notebook.

        Raises:
            DownloadError: the download failed.
            OfflineError: the file is not in the cache, and downloads are not allowed.
            ModelNotFoundError: no file of the repository matches, or several do. The message lists them.
            Further errors: those of `Phi`.
        """
        repo_id = options.path("repo_id", repo_id)
        location: dict[str, Any] = {
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "progress": progress,
            "on_progress": model_options.get("on_progress"),
        }
        options.checked(
            {**options.HUB, **options.MODEL}, {**model_options, **location, "filename": filename, "revision": revision}
        )
        tokenizer = model_options.get("tokenizer")
        if tokenizer is not None and is_repository(tokenizer):
            model_options["tokenizer"] = hub.download(os.fspath(tokenizer), "tokenizer.json", **location)
        if not is_repository(repo_id):
            for name, value in (("revision", revision), ("cache_dir", cache_dir)):
                if value:
                    raise OptionValueError(name, f"is for repositories of the Hub, and {repo_id!r} is a path")
            return cls(repo_id if filename is None else os.path.join(repo_id, filename), **model_options)
        path = hub.download(repo_id, filename, revision=revision, **location)
        return cls(path, **model_options)

    @property
    def path(self) -> str:
        """The path of the file, as it was given."""
        return self._model.path

    @property
    def n_ctx(self) -> int:
        """The context's length in tokens."""
        return self._model.n_ctx

    @property
    def n_vocab(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._model.n_vocab

    @property
    def metadata(self) -> dict[str, object]:
        """The metadata of the GGUF file. A dict whose repr is short.

        Raises:
            ClosedError: the model is closed, and with it the file.
        """
        return Metadata(self._model.metadata)

    @property
    def chat_template(self) -> str:
        """The Jinja source of the chat template in use."""
        return self._model.chat_template

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-text token, which `add_bos=True` puts first; None if the tokenizer has none."""
        return self._model.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end an answer, not only the file's one EOS id."""
        return self._model.eos_token_ids

    @property
    def device(self) -> str:
        """The device in use: `"cpu"`, `"cuda"` or `"metal"`."""
        return self._model.device

    @property
    def engine(self) -> str:
        """The engine in use: `"native"` or `"candle"`."""
        return self._model.engine

    @property
    def kernel(self) -> str:
        """The name of the kernel in use."""
        return self._model.kernel

    @property
    def n_threads(self) -> int:
        """The number of threads that compute."""
        return self._model.n_threads

    @property
    def closed(self) -> bool:
        """Whether the model is closed."""
        return self._model.closed

    def close(self) -> None:
        """Ends every stream and closes the file. Readers get `ClosedError`. Safe from any thread, repeatedly."""
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"kernel={self.kernel!r}, n_threads={self.n_threads}"
        return f"{type(self).__name__}({self.path!r}, n_ctx={self.n_ctx}, device={self.device!r}, {state})"

    def __reduce__(self) -> tuple[Callable[[], "Phi"], tuple[()]]:
        recipe = self._recipe
        return functools.partial(recipe.open, *recipe.args, **recipe.options), ()

    if not TYPE_CHECKING:  # a type checker would take every name, and every call

        def __getattr__(self, name: str) -> Any:
            if "_model" not in vars(self):
                raise AttributeError(f"this {type(self).__name__} is not open: its __init__ did not call Phi.__init__")
            raise missing_attribute(self, name, later=_LATER, foreign=_FOREIGN)

        def __call__(self, *args: object, **options: object) -> Never:
            raise TypeError(f"a {type(self).__name__} cannot be called: use .generate(prompt) or .stream(prompt)")
