"""Prompts: text and messages as token ids, and back."""
# Decisions: docs/design/python.md

import logging
from collections.abc import Iterable
from typing import SupportsIndex

from . import _engine, options
from .messages import Message, Prompt, are_ids, items, token_ids, turns
from .options import OptionValueError

_logger = logging.getLogger("candle_phi")
_logger.addHandler(logging.NullHandler())  # if the application has no handler, a warning would go to stderr


class Prompting:
    """The methods of a `Phi` that read and write token ids and compute nothing."""

    _model: _engine.Model

    def render(self, messages: str | Iterable[Message]) -> str:
        """Applies the chat template: returns the exact text that messages become. A str is one user turn.

        >>> print(phi.render([{"role": "user", "content": "Hello!"}]), end="")
        <|user|>
        Hello!<|end|>
        <|assistant|>

        Raises:
            ClosedError: the model is closed.
            TypeError, ValueError: a message that is not valid. Its index is named.
        """
        return self._model.render(turns(messages))

    def tokenize(
        self, prompt: str | Iterable[Message], *, parse_special: bool = False, add_bos: bool = False
    ) -> list[int]:
        """The token ids of a text without the chat template, or of messages, exactly as `stream` reads them.

        >>> phi.tokenize("ice hockey")
        [299, 312]

        Args:
            prompt: a str or messages.
            parse_special: read special tokens in a str as tokens. False reads them as text.
            add_bos: put the beginning-of-text token before a str.

        Raises:
            ClosedError: the model is closed.
            TypeError, ValueError: an option or a message that is not valid.
        """
        options.checked(options.PROMPT, {"parse_special": parse_special, "add_bos": add_bos})
        if isinstance(prompt, str):
            return self._model.tokenize_text(options.encodable("the text", prompt), bool(parse_special), add_bos)
        if parse_special or add_bos:
            name = "parse_special" if parse_special else "add_bos"
            raise OptionValueError(name, "is for a str; messages have the special tokens of their template")
        return self._model.tokenize_messages(turns(prompt))

    def detokenize(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """The text of token ids.

        >>> phi.detokenize([299, 312])
        'ice hockey'

        Args:
            ids: token ids.
            skip_special: leave special tokens out. False writes their names.

        Raises:
            ClosedError: the model is closed.
            TypeError, ValueError: an id that is not an int or is outside the vocabulary.
        """
        options.flag("skip_special", skip_special)
        return self._model.detokenize(token_ids(ids, self._model.n_vocab), skip_special)

    def count_tokens(self, prompt: Prompt) -> int:
        """The number of tokens that `stream` reads for a prompt: its `usage.prompt_tokens`.

        >>> phi.count_tokens("What is icing?"), len(phi.tokenize("What is icing?"))
        (7, 4)

        Args:
            prompt: a str (one user turn, with the tokens of the chat template), messages, or token ids.

        Raises:
            ClosedError: the model is closed.
            TypeError, ValueError: a message or an id that is not valid.
        """
        return len(self._prompt_ids(prompt, False, None, False))

    def _prompt_ids(self, prompt: object, raw: bool, parse_special: bool | None, add_bos: bool) -> list[int]:
        """The token ids of a prompt."""
        if raw:
            if not isinstance(prompt, str):
                raise TypeError(f"raw=True needs a str as the prompt, not {type(prompt).__name__}")
            ids = self._model.tokenize_text(
                options.encodable("the prompt", prompt), parse_special is not False, add_bos
            )
            if not ids:
                raise ValueError("the raw prompt has no tokens")
            return ids
        if isinstance(prompt, str) and ("<|user|>" in prompt or "<|assistant|>" in prompt):
            _logger.warning(
                "the prompt has <|user|> or <|assistant|> as plain text; %s reads them as special tokens",
                options.Option("raw", "True"),
            )
        if not isinstance(prompt, str):
            prompt = items(prompt)  # once: it may be a generator
            if are_ids(prompt):
                return token_ids(prompt, self._model.n_vocab)
        return self._model.tokenize_messages(turns(prompt))
