"""The model's distribution over given tokens: logits, log probabilities, perplexity."""
# Decisions: docs/design/python.md

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Never, SupportsIndex

from . import _engine, options
from .messages import Prompt, are_ids, items, token_ids, turns
from .options import OptionValueError
from .progress import OnProgress, each_item, token_callback, wait_for
from .results import TokenLogprob
from .signatures import hides_unknown
from .stream import token_logprob

if TYPE_CHECKING:
    _Logits = memoryview[float]
else:
    _Logits = memoryview  # not generic at run time before Python 3.14


class Scoring:
    """The methods of a `Phi` that read the model's distribution and generate nothing."""

    _model: _engine.Model

    @hides_unknown
    def logits(
        self,
        ids: Iterable[SupportsIndex],
        *,
        every_position: bool = False,
        on_progress: OnProgress | None = None,
        **unknown: Never,
    ) -> _Logits:
        """The logits after the last id, float32 of shape (n_vocab,).

        `numpy.asarray` takes the buffer without a copy. The call waits for a slot of `max_concurrent`.

        >>> phi.logits([299, 312]).shape
        (2048,)

        Args:
            ids: token ids, at least one.
            every_position: return the logits after each id, of shape (len(ids), n_vocab).
            on_progress: called with a `Progress` in tokens during the call. An exception that it raises ends the call.

        Raises:
            ContextLengthError: there are more ids than the context holds.
            BusyError, ClosedError, ForkError: as in `stream`.
            TypeError, ValueError: `ids` is empty, or has an id that is not an int or is outside the vocabulary.
            MemoryError: the logits do not fit the available memory.
        """
        options.checked(options.LOGITS, {"every_position": every_position, "on_progress": on_progress, **unknown})
        checked = token_ids(ids, self._model.n_vocab)
        if not checked:
            raise ValueError("ids is empty; logits() needs at least 1")
        shape = [len(checked), self._model.n_vocab] if every_position else [self._model.n_vocab]
        logits = wait_for(self._model.logits(checked, every_position), token_callback(on_progress))
        return memoryview(logits).cast("f", shape)

    @hides_unknown
    def score(
        self,
        prompt: Prompt,
        *,
        start: int = 1,
        top_logprobs: int = 0,
        on_progress: OnProgress | None = None,
        **unknown: Never,
    ) -> list[TokenLogprob]:
        """The log probability of each token of a text, given all tokens before it.

        Logits are computed for a few positions at a time, so that memory does not grow with the vocabulary times the
        length. The call waits for a slot of `max_concurrent`.

        >>> question = [{"role": "user", "content": "What is icing?"}]
        >>> answer = [*question, {"role": "assistant", "content": "A long shot"}]
        >>> [token.text for token in phi.score(answer, start=len(phi.tokenize(question)))]
        [' A', ' long', ' shot']

        Args:
            prompt: a str, without the chat template and with its special tokens as text, as `tokenize` reads it;
                messages; or token ids.
            start: the index of the first token to score. The token at 0 has nothing before it.
            top_logprobs: report this many of the most likely tokens at each position too, at most 20.
            on_progress: called with a `Progress` in tokens during the call. An exception that it raises ends the call.

        Raises:
            ContextLengthError: there are more tokens than the context holds. `perplexity` has no such limit.
            BusyError, ClosedError, ForkError: as in `stream`.
            TypeError, ValueError: an option or a message that is not valid, a prompt of fewer than 2 tokens, or `start`
                beyond the last token.
            UnsupportedModelError: the model was opened with `engine="candle"`.
            MemoryError: the KV cache does not fit the available memory.
            InvalidModelError: the weights are damaged: a log probability is NaN.
        """
        given = {"start": start, "top_logprobs": top_logprobs, "on_progress": on_progress, **unknown}
        checked = options.checked(options.SCORE, given)
        ids = self._given_ids(prompt)
        if len(ids) < 2:
            raise ValueError(f"the prompt has {_count(ids)}; score() needs at least 2")
        if checked["start"] >= len(ids):
            problem = f"must be from 1 to {len(ids) - 1}, the index of the last token, not {checked['start']}"
            raise OptionValueError("start", problem)
        scores = self._model.score(ids, start=checked["start"], top_logprobs=checked["top_logprobs"])
        found = each_item(scores, token_callback(on_progress))
        return [token_logprob(entry) for entries in found for entry in entries]

    @hides_unknown
    def perplexity(self, text: str, *, stride: int | None = None, **unknown: Never) -> float:
        """The perplexity of a text: `exp` of the mean negative log probability of its tokens.

        The text is taken as `tokenize` reads it: without the chat template, without a beginning-of-text token, special
        tokens as text. Every token but the first is scored once, given the tokens before it. A text that is longer than
        the context is scored in windows of `n_ctx` tokens, each `stride` tokens after the one before; of a later window
        only the last `stride` tokens are scored, so that each of them has at least `n_ctx - stride` tokens before it.
        This is the strided sliding window of https://huggingface.co/docs/transformers/perplexity. llama.cpp's tool
        scores the second half of each separate window, and puts a beginning-of-text token before it if the model asks
        for one: its figures differ.

        >>> round(phi.perplexity("One team has a player in the box."), 2)
        12.02

        Args:
            text: a text of at least 2 tokens.
            stride: the distance of two windows in tokens, at least 1 and less than `n_ctx`. A smaller one gives every
                token more context, and takes longer. Default: half of `n_ctx`, which computes every token twice.

        Raises:
            BusyError, ClosedError, ForkError, UnsupportedModelError, MemoryError, InvalidModelError: as in `score`.
            TypeError, ValueError: an option that is not valid, or a text of fewer than 2 tokens.
        """
        checked = options.checked(options.PERPLEXITY, {"stride": stride, **unknown})
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"perplexity() takes a str, not {kind}; score() takes messages and token ids")
        return perplexity_of(self._model, self._given_ids(text), checked["stride"])

    def _given_ids(self, prompt: object) -> list[int]:
        """The ids of a text, of messages, or as they are given."""
        if isinstance(prompt, str):
            return self._model.tokenize_text(options.encodable("the text", prompt), False, False)
        values = items(prompt)
        if are_ids(values):
            return token_ids(values, self._model.n_vocab)
        return self._model.tokenize_messages(turns(values))


def perplexity_of(
    model: _engine.Model,
    ids: Sequence[int],
    stride: int | None,
    on_scored: Callable[[int], object] = lambda tokens: None,
) -> float:
    """The perplexity of token ids, as `Phi.perplexity` has it.

    Args:
        model: the engine's model.
        ids: at least 2 ids.
        stride: the distance of two windows; None: half of the context.
        on_scored: called with the number of ids that are scored so far.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {_count(ids)}, and a perplexity needs at least 2")
    if stride is not None and stride >= model.n_ctx:
        raise OptionValueError("stride", f"must be less than n_ctx, {model.n_ctx}, not {stride}")
    logprobs = []
    for begin, end, start in _windows(len(ids), model.n_ctx, stride or max(model.n_ctx // 2, 1)):
        scores = model.score(list(ids[begin:end]), start=start, top_logprobs=0)
        for entries in each_item(scores, None):
            logprobs += [logprob for _, _, _, logprob, _ in entries]
            on_scored(len(logprobs))
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def _windows(tokens: int, n_ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows over a text: where each begins and ends, and the index in it of the first token to score."""
    begin, scored = 0, 1
    while scored < tokens:
        end = min(begin + n_ctx, tokens)
        yield begin, end, scored - begin
        begin, scored = begin + stride, end


def _count(ids: Sequence[int]) -> str:
    return f"{len(ids)} token" if len(ids) == 1 else f"{len(ids)} tokens"
