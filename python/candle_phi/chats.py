"""Chats: conversations that are kept as token ids, so that nothing is computed twice."""
# Decisions: docs/design/python.md

import errno
import logging
import os
from collections.abc import Iterable
from typing import Unpack

from . import options
from .chat import WITHOUT_TEMPLATE, Chat
from .errors import InvalidModelError, NotInThisVersionError
from .generation import Generating
from .keywords import ChatOptions
from .messages import Message, are_ids, items, turns
from .option_names import not_in_this_version
from .progress import wait_for
from .saved import from_metadata
from .signatures import adds_options
from .states import opened_states

_logger = logging.getLogger("candle_phi")


class Chatting(Generating):
    """The methods of a `Phi` that open chats."""

    @adds_options(Generating.stream, Generating.stream.__doc__, without=WITHOUT_TEMPLATE)
    def chat(
        self,
        system: str | None = None,
        *,
        messages: Iterable[Message] | None = None,
        tools: None = None,
        exact: bool = False,
        **defaults: Unpack[ChatOptions],
    ) -> Chat:
        """Opens a chat, which keeps its messages and what was computed for them.

        >>> chat = phi.chat("You answer in one sentence.", temperature=0, max_tokens=4)
        >>> chat.send("What is icing?")
        'A long shot from'
        >>> chat
        <Chat: 1 turn, 22 of 1024 tokens>

        Args:
            system: the text of a system message, before all others. Default: none.
            messages: messages that the chat begins with. Default: none.
            tools: of a later version.
            exact: take the whole chat as a prompt in each call, and compute its answers anew: the text is that of
                `generate` for the same messages and seed.

        Raises:
            ClosedError: the model is closed.
            ForkError: the model was opened before a `fork()`.
            NotInThisVersionError: `tools` is given.
            TypeError, ValueError: an option or a message that is unknown, of the wrong type or out of range. `raw`,
                `parse_special` and `add_bos` are for prompts without a template.

        The options are those of every call of the chat that does not give them itself.
        """
        if tools is not None:
            raise NotInThisVersionError(
                f"{not_in_this_version('tools')}; without it, .send(message) and .stream(message) answer"
            )
        given = {**defaults, "exact": True} if options.flag("exact", exact) else {**defaults}
        self._generation(given, options.CHAT)
        text = options.checked(options.SYSTEM, {"system": system})["system"]
        first = [] if text is None else [("system", text)]
        return Chat(self, opened_states(first + _given_messages(messages, bool(first))), given)

    def load_chat(self, path: str | os.PathLike[str], *, strict: bool = False) -> Chat:
        """Opens a chat from a file that `Chat.save` wrote, with its messages, turns and options.

        Its keys and values are used in place: the file is mapped, and each part is checked at its first use. They are
        computed again, with one line in the log, if they are of another model, KV type or kernel.

        Args:
            path: the file. It is input to trust: its text steers the answers of the chat.
            strict: raise an error where keys and values of the file cannot be used.

        Raises:
            FileNotFoundError: there is no such file.
            InvalidModelError: the file is damaged, or with `strict` that of another model.
            ClosedError, ForkError: as in `chat`.
        """
        where = options.path("path", path)
        refuses = options.checked(options.LOAD, {"strict": strict})["strict"]
        if not os.path.exists(where):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)
        kept = self._model.chat()
        ids, runs, metadata, note = wait_for(self._model.load_chat(where, kept, refuses), None)
        saved = from_metadata(self._model, where, metadata, ids, runs)
        if not saved.is_of_this_tokenizer:
            note = f"{where} is of a model with another tokenizer: the chat is tokenized and computed anew"
            if refuses:
                raise InvalidModelError(note)
        if note is not None:
            _logger.warning("%s", note)
        return Chat(self, saved.states, saved.options, kept)


def _given_messages(messages: object, after_system: bool) -> list[tuple[str, str]]:
    """The checked messages that a chat begins with."""
    if messages is None:
        return []
    if isinstance(messages, str):
        raise TypeError("messages must be a list of messages, not str; chat.send(text) adds a message of the user")
    if isinstance(messages, (list, tuple)) and not messages:
        return []
    values = items(messages)
    if are_ids(values):
        raise TypeError("messages must be a list of messages, not token ids")
    checked = turns(values)
    if after_system and checked[0][0] == "system":
        raise ValueError("messages[0] is a system message, and system is given too: leave one of them out")
    return checked
