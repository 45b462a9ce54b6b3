"""`Phi`: an open model."""
# Decisions: docs/design/python.md

import functools
import inspect
import os
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Never, Self, Unpack, overload

from . import _engine, aio, hub, memory, options
from .aio import AsyncStream
from .errors import ModelNotFoundError, missing_attribute
from .keywords import GenerationOptions, ModelOptions
from .locations import check_file, is_repository, tokenizer_path
from .many import AsyncResults, Batch, Results, several
from .messages import Prompt
from .metadata import Metadata
from .options import Device, Engine, KvCache, OptionValueError
from .progress import OnProgress, progress_callback, token_callback, wait_for
from .prompts import Prompting
from .results import Result
from .scores import Scoring
from .signatures import adds_options, same_options, takes_path, takes_prompt, takes_prompts
from .stream import Stream

_DEMO = "phi3-demo-q4_k_m.gguf"

_LATER = ("accepts", "adapters", "cache_info", "chat", "count_tokens", "load_chat", "warm")
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


class Phi(Prompting, Scoring):
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
                "on_progress": on_progress,
                **unknown,
            },
        )
        del checked["on_progress"]
        check_file(path)
        if checked["tokenizer"] is not None:
            checked["tokenizer"] = tokenizer_path(checked["tokenizer"])
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

    _max_batch = 8
    """Of a model that was not opened from a file."""

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

    @takes_prompt
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
        """Generates text piece by piece. Errors of the call are raised here. Work starts at the first read.

        >>> for chunk in phi.stream("What is icing?", temperature=0, max_tokens=3):
        ...     print(repr(chunk))
        'A'
        ' long'
        ' shot'

        The logits are changed in this order: `logit_bias`, penalties, `temperature`, `top_k`, `top_p`, `min_p`.

        Args:
            prompt: a str (one user turn), messages (`{"role": ..., "content": ...}`), or token ids. A last message of
                the assistant is continued.
            max_tokens: generate at most this many tokens. Default: until a stop token or the end of the context.
            temperature: at least 0. 0 always takes the most likely token. 1 samples from the model's own distribution.
            top_k: keep only this many of the most likely tokens. Default: all, as with 0.
            top_p: keep only the smallest set of tokens with this total probability, above 0 and at most 1. Default:
                all, as with 1. (Nucleus sampling, https://arxiv.org/abs/1904.09751.)
            min_p: keep only tokens with at least this part of the most likely token's probability, from 0 to 1.
                Default: all, as with 0. (https://arxiv.org/abs/2407.01082.)
            repeat_penalty: divides the positive logits of recently generated tokens and multiplies the negative ones,
                except those of stop tokens. Above 1 they become less likely. Default: off, as with 1.
                (https://arxiv.org/abs/1909.05858.)
            repeat_last_n: the number of generated tokens that `repeat_penalty` looks back at. 0: none, -1: all.
            presence_penalty: from -2 to 2. It is subtracted from the logit of every token generated so far.
            frequency_penalty: from -2 to 2. The same, times the number of the token's occurrences.
            logit_bias: maps token ids to numbers from -100 to 100, which are added to their logits.
            seed: the same seed gives the same text. Default: a random one, which the stream and the result report.
            stop: a str or a list of str. The text ends before the first of them.
            ignore_eos: generate past the model's own stop tokens, for benchmarks.
            logprobs: report the log probability of every token.
            top_logprobs: report this many of the most likely tokens at each position too, at most 20.
            timeout: seconds from this call on, including the time in the queue. The text ends there, without an error.
                Default: none.
            on_progress: called with a `Progress` in tokens while a reader waits, in the phases `"wait"`, `"prefill"`
                and `"decode"`. An exception that it raises cancels the stream and is raised by the read.
            raw: take a str unchanged, without the chat template, not as a user turn.
            parse_special: read special tokens in a raw prompt as tokens. False reads them as text. Default: True.
            add_bos: put the beginning-of-text token before a raw prompt.

        Raises:
            ContextLengthError: the prompt leaves no room to generate.
            ClosedError: the model is closed.
            ForkError: the model was opened before a `fork()`.
            TypeError, ValueError: an option or a message that is unknown, of the wrong type or out of range.
            NotInThisVersionError: an option or a role that a later version has.

        A read raises:
            BusyError: with `max_concurrent`, if all slots are held by streams that were not read for 10 seconds.
            ClosedError: the model was closed since the call.
            MemoryError: the prompt or its KV cache does not fit the available memory.
            InvalidModelError: the weights are damaged: every logit is NaN or -inf.
        """
        call = self._generation(
            {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repeat_penalty": repeat_penalty,
                "repeat_last_n": repeat_last_n,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "logit_bias": logit_bias,
                "seed": seed,
                "stop": stop,
                "ignore_eos": ignore_eos,
                "logprobs": logprobs,
                "top_logprobs": top_logprobs,
                "timeout": timeout,
                "on_progress": on_progress,
                "raw": raw,
                "parse_special": parse_special,
                "add_bos": add_bos,
                **unknown,
            }
        )
        return self._stream(prompt, call, whole=False)

    @same_options(stream)
    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Generates the whole text: the same text as `stream`, with the same options and errors.

        >>> result = phi.generate("What is icing?", temperature=0)
        >>> result.finish_reason, result.usage.completion_tokens
        ('stop', 28)
        """
        with self.stream(prompt, **options) as stream:
            for _ in stream:
                pass
            return stream._result()

    @same_options(stream)
    def astream(self, prompt: Prompt, **options: Any) -> AsyncStream:
        """`stream` for event loops: `async for chunk in phi.astream(prompt)`.

        Errors of the call are raised here, without an `await`. Reading it blocks no loop and takes no thread.
        `on_progress` is called in the loop's thread.
        """
        return AsyncStream(self.stream(prompt, **options))

    @same_options(stream)
    def agenerate(self, prompt: Prompt, **options: Any) -> Coroutine[Any, Any, Result]:
        """`generate` for event loops: `await phi.agenerate(prompt)`. Errors of the call come before the `await`."""
        return aio.agenerate(self.astream(prompt, **options))

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        ordered: bool = True,
        return_exceptions: Literal[False] = False,
        max_pending: int | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Results[Result]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        ordered: bool = True,
        return_exceptions: bool,
        max_pending: int | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Results[Result | Exception]: ...

    @takes_prompts
    @adds_options(stream, stream.__doc__, without="on_progress")
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        max_pending: int | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Results[Any]:
        """Generates the texts of many prompts together, with the same options. Yields a `Result` for each.

        >>> for result in phi.map(["What is icing?", "What is a power play?"], temperature=0, max_tokens=4):
        ...     print(result.prompt_index, result)
        0 A long shot from
        1 One team has a

        The prompts may be any iterable, also one without an end: they are drawn as results are read, in the thread that
        reads. Texts are computed to their end while the caller is busy with a result. Each equals that of
        `generate(prompt)` with the same options: every prompt gets the same `seed`, and without one every prompt draws
        its own. Closing the iterator, from any thread, or dropping it cancels what runs.

        Args:
            prompts: an iterable of prompts, each as `stream` takes one.
            ordered: yield the results in the order of the prompts. False: in the order in which they are complete.
            return_exceptions: yield the exception of a prompt in place of its result. False: raise it there, which
                cancels what runs and ends the iterator. Both have the attribute `prompt_index`. `ClosedError` and
                `ForkError` are always raised.
            max_pending: at most this many prompts are started and not yielded. Each may hold a KV cache, unless
                `max_concurrent` is smaller. Default: twice `max_batch`, so that passes stay full while the caller is
                busy or the oldest text is the longest.

        Raises:
            TypeError, ValueError: `prompts` is one prompt, or an option is unknown, of the wrong type or out of range.
            ClosedError, ForkError: as in `stream`.

        A read raises what `stream` and its reads raise for a prompt, and what the iterator of prompts raises, after the
        results of the prompts before it.
        """
        several(prompts, "map")
        own = {"ordered": ordered, "return_exceptions": return_exceptions, "max_pending": max_pending}
        return Results(self._batch("map", **own, **generation), prompts)

    @overload
    def amap(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        ordered: bool = True,
        return_exceptions: Literal[False] = False,
        max_pending: int | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncResults[Result]: ...

    @overload
    def amap(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        ordered: bool = True,
        return_exceptions: bool,
        max_pending: int | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncResults[Result | Exception]: ...

    @takes_prompts
    @adds_options(map, map.__doc__)
    def amap(self, prompts: Iterable[Prompt] | AsyncIterable[Prompt], **options: Any) -> AsyncResults[Any]:
        """`map` for event loops: `async for result in phi.amap(prompts)`.

        A task draws the prompts, so that waiting for the next prompt delays no result. Reading blocks no loop and takes
        no thread. `aclose()`, the end of an `async with` block, cancelling the task that reads, or dropping the
        iterator cancels what runs.

        Args:
            prompts: an iterable or an asynchronous iterable of prompts, each as `stream` takes one.

        Raises:
            TypeError, ValueError, ClosedError, ForkError: as in `map`, without an `await`. A read raises as in `map`.
        """
        several(prompts, "amap")
        return AsyncResults(self._batch("amap", **options), prompts)

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

    def _generation(self, given: Mapping[str, object]) -> options.Generation:
        """The checked options of a call. `given` has a value for each."""
        call = options.generation(given)
        for token_id in call.sampling["logit_bias"]:
            if token_id >= self.n_vocab:
                problem = f"has the token id {token_id}, which is outside the vocabulary of {self.n_vocab}"
                raise OptionValueError("logit_bias", problem)
        return call

    def _stream(self, prompt: object, call: options.Generation, *, whole: bool) -> Stream:
        """The stream of a prompt. `whole`: it is computed without reads, and readable at its end."""
        ids = self._prompt_ids(prompt, **call.prompt)
        stream = self._model.stream(ids, **call.sampling, whole=whole)
        return Stream(self._model, stream, token_callback(call.on_progress), logprobs=call.sampling["logprobs"])

    def _batch(
        self,
        name: str,
        /,
        *,
        ordered: object = True,
        return_exceptions: object = False,
        max_pending: object = None,
        **given: object,
    ) -> Batch:
        """The state of a call of `map` or `amap`, after the checks of its options."""
        if "on_progress" in given:
            raise TypeError(f"{name}() has no option 'on_progress': its results show the progress, one for each prompt")
        own = {"ordered": ordered, "return_exceptions": return_exceptions, "max_pending": max_pending}
        checked = options.checked(options.MAP, own)
        if checked["max_pending"] is None:
            checked["max_pending"] = 2 * self._max_batch
        call = self._generation(_DEFAULTS | given)
        self._model.tokenize_text("", False, False)  # raises if the model is closed, or of another process
        return Batch(functools.partial(self._member, call=call, given=given), **checked)

    def _member(self, prompt: object, call: options.Generation, given: Mapping[str, object]) -> Stream:
        """The stream of a prompt of `map`. `given`: the options as the caller gave them."""
        return self._stream(prompt, call, whole=True)


_DEFAULTS: dict[str, object] = {
    name: parameter.default
    for name, parameter in inspect.signature(Phi.stream).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
"""The default of each option of a generation."""
