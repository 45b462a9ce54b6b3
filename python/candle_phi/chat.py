"""A conversation: its messages, and the token ids behind them."""
# Decisions: docs/design/python.md

import os
import threading
import weakref
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias, Unpack

from . import _engine, aio, options
from .aio import AsyncStream
from .errors import BusyError, ClosedError, ContextLengthError, NotInThisVersionAttributeError, missing_attribute
from .generation import Generating
from .keywords import ChatOptions
from .messages import Message, are_ids, items, turns
from .messages import Turn as CheckedMessage
from .options import OptionValueError
from .progress import wait_for
from .results import Result, Usage
from .saved import to_metadata
from .signatures import adds_options, same_options, takes_message
from .states import State, extended, first, opened, without_stop
from .stream import Stream

WITHOUT_TEMPLATE = tuple(options.PROMPT)
"""The options of `Phi.stream` that a chat does not have: its messages have a template."""

_FOREIGN = {
    **dict.fromkeys(("history", "get_history"), "use .messages"),
    **dict.fromkeys(("generate", "ask", "chat", "send_message", "invoke", "prompt"), "use .send(message)"),
    **dict.fromkeys(("send_message_async", "agenerate", "ainvoke"), "use .asend(message)"),
    **dict.fromkeys(("copy", "clone"), "use .fork()"),
    **dict.fromkeys(("undo", "pop", "delete_last"), "use .rewind(turns)"),
    **dict.fromkeys(("reset", "clear"), "open a new chat: phi.chat()"),
    **dict.fromkeys(("append", "add_message"), "use .send([message, message]), or phi.chat(messages=...)"),
    "load": "use phi.load_chat(path)",
}
"""Other libraries' methods and attributes, each with what to use here."""

ChatMessage: TypeAlias = str | Message | Iterable[Message]


class _Turn:
    """A turn that a stream computes. The stream keeps it alive; the chat does not, so that a dropped stream ends it."""

    def __init__(self, chat: "Chat", messages: tuple[CheckedMessage, ...], text: str, ids: list[int]) -> None:
        self.chat = chat
        self.messages = messages
        self.text = text
        self.ids = ids
        self.pieces: list[str] = []
        self.stream: _engine.Stream | None = None
        self.may_stop_early = False
        """Whether a stop string may have ended the text before its ids end."""
        self._settled = False

    def settle(self) -> bool:
        """Commits the turn if its stream's end was read, and it ended by stop or length. Returns whether it runs."""
        if self.stream is None or self._settled:
            return False
        reason = self.stream.finish_reason
        with self.chat._lock:
            if reason is not None and not self._settled:
                self._settled = True
                if reason in ("stop", "length"):
                    self.chat._states += (self._state(self.stream, cut=self.may_stop_early and reason == "stop"),)
        return reason is None

    def _state(self, stream: _engine.Stream, *, cut: bool) -> State:
        """The chat after this turn."""
        answer, ids = "".join(self.pieces), stream.token_ids
        written = answer
        if cut:
            written, ids = without_stop(self.chat._model, self.ids, ids, answer)
        role, content = self.messages[-1]
        messages = self.messages if role != "assistant" else self.messages[:-1]
        started = content if role == "assistant" else ""
        prompt, completion, *others = stream.usage
        return State(
            (*messages, ("assistant", started + answer)),
            self.text + written,
            (*self.ids, *ids),
            tuple(first(stream.runs, len(self.ids) + len(ids))),
            self.chat._states[-1].usage + Usage(prompt, completion, prompt + completion, *others),
        )


class Chat:
    """A conversation with a model. `Phi.chat` opens one, `Phi.load_chat` one from a file.

    >>> with phi.chat(temperature=0) as chat:
    ...     print(chat.send("What is icing?", max_tokens=4))
    ...     print(chat.send("What is a power play?", max_tokens=4))
    ...     print(chat.messages[-1])
    A long shot from
    One team has a
    {'role': 'assistant', 'content': 'One team has a'}

    A turn is a call of `send`, `stream`, `asend` or `astream`. It becomes part of the chat once its stream was read to
    its end, and ended by `"stop"` or `"length"`. After a cancel, a timeout or an error the chat is as it was before.
    Nothing is computed twice: the keys and values of earlier turns are kept while they fit `prefix_cache`, and are
    computed again when they are not. An answer is kept as the ids that the model wrote, and not tokenized again.

    One turn at a time: a call while a stream of the chat is read raises `BusyError`. A stream that was cancelled,
    closed or dropped does not count. Any thread may call any method. The chat keeps its model alive.
    """

    def __init__(
        self,
        phi: Generating,
        states: Sequence[State],
        defaults: Mapping[str, object],
        kept: "_engine.Chat | None" = None,
    ) -> None:
        self._phi = phi
        self._model = phi._model
        self._kept = phi._model.chat() if kept is None else kept  # while it lives, the engine evicts this chat last
        self._defaults = dict(defaults)
        self._lock = threading.RLock()  # a signal handler may use the chat inside a call of the same thread
        self._turn: weakref.ref[_Turn] | None = None
        self._closed = False
        self._states = (*states[:-1], opened(self._model, states[-1]))

    @takes_message
    @adds_options(Generating.stream, Generating.stream.__doc__, without=WITHOUT_TEMPLATE)
    def stream(
        self, message: ChatMessage, *, exact: bool | None = None, **options_of_call: Unpack[ChatOptions]
    ) -> Stream:
        """Adds a message and streams the answer. Errors of the call are raised here. Work starts at the first read.

        >>> chat = phi.chat()
        >>> for chunk in chat.stream("What is icing?", temperature=0, max_tokens=3):
        ...     print(repr(chunk))
        'A'
        ' long'
        ' shot'

        Args:
            message: a str (a message of the user), a message (`{"role": ..., "content": ...}`), or several messages. A
                last message of the assistant is continued.
            exact: take the whole chat as a prompt, and compute its answers anew: the text is that of `generate` for
                the same messages and seed. Without it the text may differ from that, since an answer's keys and values
                are those of the passes that wrote it, and are rounded in another way. Default: as in `Phi.chat`.

        Raises:
            BusyError: a stream of this chat is running.
            ContextLengthError: the chat leaves no room to generate. Nothing is cut silently. `rewind` makes room.
            ClosedError: the chat or the model is closed.
            ForkError: the model was opened before a `fork()`.
            TypeError, ValueError: an option or a message that is unknown, of the wrong type or out of range. `raw`,
                `parse_special` and `add_bos` are for prompts without a template.

        An option that is not given is that of `Phi.chat`. A read raises as a read of `Phi.stream` does.
        """
        given = {**self._defaults, **options_of_call}
        if exact is not None:
            given["exact"] = exact
        call = self._phi._generation(given, options.CHAT)
        added = _added(message)
        self._check_open()
        with self._lock:
            self._check_idle()
            return self._start((*self._states[-1].messages, *added), call, given)

    @same_options(stream, takes_message)
    def send(self, message: ChatMessage, **options_of_call: Any) -> Result:
        """Adds a message and returns the answer: the same text as `stream`, with the same options and errors.

        >>> chat = phi.chat(temperature=0)
        >>> chat.send("What is icing?").usage.completion_tokens
        28
        """
        with self.stream(message, **options_of_call) as stream:
            for _ in stream:
                pass
            return stream._result()

    @same_options(stream, takes_message)
    def astream(self, message: ChatMessage, **options_of_call: Any) -> AsyncStream:
        """`stream` for event loops: `async for chunk in chat.astream(message)`.

        Errors of the call are raised here, without an `await`. Reading it blocks no loop and takes no thread.
        """
        return AsyncStream(self.stream(message, **options_of_call))

    @same_options(stream, takes_message)
    def asend(self, message: ChatMessage, **options_of_call: Any) -> Coroutine[Any, Any, Result]:
        """`send` for event loops: `await chat.asend(message)`. Errors of the call come before the `await`."""
        return aio.agenerate(self.astream(message, **options_of_call))

    def fork(self) -> "Chat":
        """A copy that goes on by itself, from the last turn that is part of the chat.

        Nothing is copied but the list of turns: the two chats share the keys and values of their common beginning.

        Raises:
            ClosedError, ForkError: as in `stream`.
        """
        self._check_open()
        return Chat(self._phi, self._states, self._defaults)

    def rewind(self, turns: int = 1) -> None:
        """Removes the last turns: the chat is as it was before them.

        A turn is a call of `send` or `stream`. Among the messages of `Phi.chat(messages=...)` it ends with a message of
        the assistant.

        Args:
            turns: the number of turns, at least 1.

        Raises:
            ValueError: the chat has fewer turns. The message has their number.
            BusyError, ClosedError, ForkError: as in `stream`.
        """
        count = options.checked(options.REWIND, {"turns": turns})["turns"]
        self._check_open()
        with self._lock:
            self._check_idle()
            if count > self.turns:
                raise OptionValueError("turns", f"must be at most {self.turns}, the turns of this chat, not {count}")
            states = self._states[:-count]
            self._states = (*states[:-1], opened(self._model, states[-1]))

    def save(self, path: str | os.PathLike[str], *, kv: bool = True) -> None:
        """Writes the chat to a file, from which `Phi.load_chat` opens it. A turn that is running is not part of it.

        The file is a safetensors file with the messages, the ids, the options of `Phi.chat` without `on_progress`, and
        the keys and values. It is replaced in one step: another process sees the old file or the new one.

        Args:
            path: the file. It is overwritten.
            kv: write keys and values. Without them the file has kilobytes, and the first turn after a load computes
                the whole chat.

        Raises:
            ClosedError, ForkError: as in `stream`.
            OSError: the file cannot be written.
        """
        where = options.path("path", path)
        with_kv = options.checked(options.SAVE, {"kv": kv})["kv"]
        self._check_open()
        states = self._states
        last = states[-1]
        checked = options.checked(options.CHAT, self._defaults)
        metadata = to_metadata(
            self._model, states, {k: v for k, v in checked.items() if k in options.SAMPLING or k == "exact"}
        )
        wait_for(self._model.save_chat(self._kept, [*last.ids], [*last.runs], where, metadata, with_kv), None)

    def close(self) -> None:
        """Cancels a stream that runs, and gives up the chat's keys and values. The messages stay."""
        self._closed = True
        turn = None if self._turn is None else self._turn()
        if turn is not None and turn.stream is not None:
            turn.stream.cancel()
        self._kept.close()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages of all turns, each `{"role": ..., "content": ...}`. A copy."""
        return [{"role": role, "content": content} for role, content in self._states[-1].messages]

    @property
    def token_ids(self) -> list[int]:
        """The ids that the next prompt begins with: those of all turns. A copy."""
        return list(self._states[-1].ids)

    @property
    def context_left(self) -> int:
        """The tokens that the context has room for beyond `token_ids`."""
        return max(self._model.n_ctx - len(self._states[-1].ids), 0)

    @property
    def usage(self) -> Usage:
        """The sum of the usage of all turns."""
        return self._states[-1].usage

    @property
    def turns(self) -> int:
        """The number of turns, which `rewind` can remove."""
        return len(self._states) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        n = self.turns
        used = len(self._states[-1].ids)
        end = ", closed" if self._closed else ""
        return f"<Chat: {n} turn{'' if n == 1 else 's'}, {used} of {self._model.n_ctx} tokens{end}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Chat cannot be pickled or copied: fork() copies it, save(path) keeps it in a file")

    if not TYPE_CHECKING:  # a type checker would take every name

        def __getattr__(self, name: str) -> Any:
            if name == "run":
                raise NotInThisVersionAttributeError("Chat.run (tool calls) is not in this version: use .send(message)")
            raise missing_attribute(self, name, later=(), foreign=_FOREIGN)

    def _start(
        self, messages: tuple[CheckedMessage, ...], call: options.Generation, given: Mapping[str, object]
    ) -> Stream:
        """Starts a turn with all messages of the chat."""
        state = self._states[-1]
        if call.exact:
            text, ids = self._model.render([*messages]), self._model.tokenize_messages([*messages])
            kept = 0
        else:
            known = state.ids if state.text else ()
            text, ids, kept = self._model.continue_messages([*messages], state.text or "", [*known])
        if len(ids) >= self._model.n_ctx:
            problem = f"with this message the chat has {len(ids)} tokens, and the context holds {self._model.n_ctx}"
            hint = "generating needs room for at least 1 more; rewind() makes room, or a new chat"
            raise ContextLengthError(f"{problem}; {hint}", len(ids), self._model.n_ctx)
        turn = _Turn(self, messages, text, ids)
        turn.may_stop_early = bool(call.sampling["stop"])
        stream = self._phi._turn_stream(
            [{"role": role, "content": content} for role, content in messages],
            call,
            given,
            ids=ids,
            runs=extended(first(state.runs, kept), len(ids)),
            chat=self._kept,
            turn=turn,
        )
        turn.stream = stream._stream
        self._turn = weakref.ref(turn)
        return stream

    def _check_open(self) -> None:
        """Raises if the chat or its model is closed, or the model is of another process: there, a thread that does not
        exist in this one may hold the lock."""
        self._model.tokenize_text("", False, False)
        if self._closed:
            raise ClosedError("the chat is closed")

    def _check_idle(self) -> None:
        """Raises if a stream of this chat is running."""
        turn = None if self._turn is None else self._turn()
        if turn is not None and turn.settle():
            raise BusyError("a stream of this chat is running: read it to its end, or cancel it")


def _added(message: object) -> list[CheckedMessage]:
    """The messages of a turn."""
    if isinstance(message, str):
        return turns(message)
    if isinstance(message, Mapping):
        return turns([message])
    if isinstance(message, (bytes, bytearray, memoryview)) or not isinstance(message, Iterable):
        raise TypeError(f"the message must be a str, a message or messages, not {type(message).__name__}")
    values = items(message)
    if are_ids(values):
        raise TypeError("the message is token ids; a chat takes a str or messages, phi.stream() takes ids")
    return turns(values)
