"""Generating text: one answer at a time, or many."""
# Decisions: docs/design/python.md

import functools
import inspect
from collections.abc import AsyncIterable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Literal, Never, Unpack, overload

from . import _engine, aio, options
from .aio import AsyncStream
from .keywords import GenerationOptions
from .many import AsyncResults, Batch, Results, several
from .messages import Message, Prediction, Prompt
from .options import OptionValueError
from .progress import OnProgress, token_callback
from .prompts import Prompting
from .results import Result
from .signatures import adds_options, same_options, takes_prompt, takes_prompts
from .stream import Stream, Turn


class Generating(Prompting):
    """The methods of a `Phi` that generate."""

    _model: _engine.Model

    _max_batch = 8
    """Of a model that was not opened from a file."""

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
        cache_scope: str | None = None,
        speculate: bool | None = None,
        prediction: Prediction | None = None,
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
            cache_scope: the name of a tenant. Calls share what is kept of prompts only with calls of the same name, so
                that the time of a call says nothing about the prompts of another tenant. Default: none, which all
                calls without a name share.
            speculate: guess the next tokens from the text so far, and check several in one pass. It changes speeds,
                not texts. Default: as the model was opened.
            prediction: what the answer is expected to repeat for the most part, such as the file that it edits: a str,
                or token ids. Guesses are taken from it too.
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
                "cache_scope": cache_scope,
                "speculate": speculate,
                "prediction": prediction,
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
    @adds_options(stream, stream.__doc__, without=("on_progress",))
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

    def _generation(
        self, given: Mapping[str, object], table: Mapping[str, options.Check] = options.GENERATION
    ) -> options.Generation:
        """The checked options of a call. Those that `given` lacks have their defaults."""
        call = options.generation({**_DEFAULTS, **given}, table)
        for token_id in call.sampling["logit_bias"]:
            if token_id >= self._model.n_vocab:
                problem = f"has the token id {token_id}, which is outside the vocabulary of {self._model.n_vocab}"
                raise OptionValueError("logit_bias", problem)
        prediction = call.sampling["prediction"]
        if isinstance(prediction, str):
            call.sampling["prediction"] = self._model.tokenize_text(prediction, False, False)
        for i, token_id in enumerate(() if isinstance(prediction, str) else prediction or ()):
            if token_id >= self._model.n_vocab:
                problem = f"is {token_id}, which is outside the vocabulary of {self._model.n_vocab}"
                raise OptionValueError(f"prediction[{i}]", problem)
        return call

    def _stream(self, prompt: object, call: options.Generation, *, whole: bool) -> Stream:
        """The stream of a prompt. `whole`: it is computed without reads, and readable at its end."""
        ids = self._prompt_ids(prompt, **call.prompt)
        stream = self._model.stream(ids, **call.sampling, runs=None, chat=None, whole=whole)
        return Stream(self._model, stream, token_callback(call.on_progress), logprobs=call.sampling["logprobs"])

    def _turn_stream(
        self,
        messages: Sequence[Message],
        call: options.Generation,
        given: Mapping[str, object],
        *,
        ids: list[int],
        runs: list[int],
        chat: "_engine.Chat",
        turn: Turn,
    ) -> Stream:
        """The stream of a chat's turn.

        Args:
            messages: all of the chat, with those of the turn.
            given: the options, as the caller gave them.
            ids: the ids of the messages.
            runs: the number of ids whose keys and values prefill computes, then of those that decode computes, in turn.
        """
        stream = self._model.stream(ids, **call.sampling, runs=runs, chat=chat, whole=False)
        watch = token_callback(call.on_progress)
        return Stream(self._model, stream, watch, logprobs=call.sampling["logprobs"], turn=turn)

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
        call = self._generation(given)
        self._model.tokenize_text("", False, False)  # raises if the model is closed, or of another process
        return Batch(functools.partial(self._member, call=call, given=given), **checked)

    def _member(self, prompt: object, call: options.Generation, given: Mapping[str, object]) -> Stream:
        """The stream of a prompt of `map`. `given`: the options as the caller gave them."""
        return self._stream(prompt, call, whole=True)


_DEFAULTS: dict[str, object] = {
    name: parameter.default
    for name, parameter in inspect.signature(Generating.stream).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
"""The default of each option of a generation."""
