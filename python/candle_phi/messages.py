"""Checks of prompts: text, messages and token ids."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Protocol, SupportsIndex, TypeAlias

from .errors import NotInThisVersionError
from .option_names import did_you_mean
from .options import encodable

Message: TypeAlias = Mapping[str, object]
"""A message of a conversation: `{"role": ..., "content": ...}`.

The role is `"system"`, `"developer"` (the same), `"user"` or `"assistant"`. The content is a str or a list of
`{"type": "text", "text": ...}`. A `name` is accepted and not used. Other keys must be None or empty.
"""


class TokenIds(Protocol):
    """A sequence of ints. Not bytes, whose `__contains__` does not take every object."""

    def __iter__(self) -> Iterator[SupportsIndex]: ...
    def __len__(self) -> int: ...
    def __contains__(self, key: object, /) -> bool: ...


Prompt: TypeAlias = str | Iterable[Message] | TokenIds
"""One user turn, messages, or token ids."""
Prediction: TypeAlias = str | TokenIds | Message
"""What an answer is expected to repeat: a text, token ids, or OpenAI's `{"type": "content", "content": ...}`."""
Turn: TypeAlias = tuple[str, str]
"""A checked message: `(role, content)`, the role one of system, user, assistant."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KEYS = ("role", "content", "name")
_UNBUILT_ROLES = ("tool", "function")
_UNBUILT_KEYS = ("tool_calls", "tool_call_id", "function_call", "audio")
"""Keys of OpenAI's messages for tools and speech."""


def items(prompt: object) -> list[object]:
    """The messages or token ids of a prompt that is not a str: at least one. Raises TypeError or ValueError."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError(f"the prompt is {type(prompt).__name__}; decode it to str")
    if isinstance(prompt, Mapping):
        raise TypeError("the prompt is a single message; put it in a list")
    if not isinstance(prompt, Iterable):
        raise TypeError(f"the prompt must be a str, messages or token ids, not {type(prompt).__name__}")
    values = list(prompt)
    if not values:
        raise ValueError("the prompt is an empty list, without messages[0]")
    return values


def are_ids(values: list[object]) -> bool:
    """Whether the first item is a token id; otherwise the items are messages."""
    return hasattr(values[0], "__index__")


def turns(messages: object) -> list[Turn]:
    """The turns of messages; a str is one user turn.

    Raises:
        TypeError, ValueError, NotInThisVersionError: naming the message by its index.
    """
    if isinstance(messages, str):
        return [("user", encodable("the prompt", messages))]
    return [_turn(i, message) for i, message in enumerate(items(messages))]


def token_ids(values: object, n_vocab: int) -> list[int]:
    """Token ids, each checked against the vocabulary. Raises TypeError or ValueError with the index."""
    if isinstance(values, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"token ids must be a sequence of int, not {type(values).__name__}")
    ids = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"token ids must be int, but number {i} is {type(value).__name__}")
        token = operator.index(value)
        if not 0 <= token < n_vocab:
            raise ValueError(f"token id {token}, number {i}, is outside the vocabulary of {n_vocab}")
        ids.append(token)
    return ids


def _turn(index: int, message: object) -> Turn:
    at = f"messages[{index}]"
    if isinstance(message, str):
        raise TypeError(f"{at} is a str; a list of prompts is a batch: phi.map(prompts)")
    if not isinstance(message, Mapping):
        hint = " (its .model_dump() returns one)" if hasattr(message, "model_dump") else ""
        raise TypeError(f"{at} is {type(message).__name__}; a message is a dict with role and content{hint}")
    _check_keys(at, message, _KEYS)
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{at}: name must be a str, not {type(name).__name__}")
    role = _role(at, message)
    if "content" not in message:
        raise TypeError(f"{at} has no content")
    return role, _content(f"{at}: content", message["content"])


def _check_keys(at: str, mapping: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Raises for an unknown key, unless its value is None or empty."""
    for key, value in mapping.items():
        if key in known or value is None or (isinstance(value, Sized) and len(value) == 0):
            continue
        if key in _UNBUILT_KEYS:
            raise NotInThisVersionError(f"{at}: {key} is not in this version")
        raise TypeError(f"{at} has an unknown key {key!r}{did_you_mean(str(key), known)}")


def _role(at: str, message: Mapping[str, object]) -> str:
    if "role" not in message:
        raise TypeError(f"{at} has no role")
    role = message["role"]
    if not isinstance(role, str):
        raise TypeError(f"{at}: role must be a str, not {type(role).__name__}")
    if role in _UNBUILT_ROLES:
        raise NotInThisVersionError(f"{at}: the role {role!r} is not in this version")
    if role not in _ROLES:
        raise ValueError(f"{at}: unknown role {role!r}{did_you_mean(role, _ROLES)}")
    return _ROLES[role]


def _content(at: str, content: object) -> str:
    if content is None:
        raise TypeError(f"{at} is None")
    if isinstance(content, str):
        return encodable(at, content)
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{at} must be a str or a list of text parts, not {type(content).__name__}")
    return "".join(_part(f"{at}[{i}]", part) for i, part in enumerate(content))


def _part(at: str, part: object) -> str:
    if not isinstance(part, Mapping):
        raise TypeError(f'{at} must be {{"type": "text", "text": ...}}, not {type(part).__name__}')
    if part.get("type") != "text":
        raise ValueError(f"{at} has type {part.get('type')!r}; only 'text' is supported")
    _check_keys(at, part, ("type", "text"))
    text = part.get("text")
    if not isinstance(text, str):
        raise TypeError(f"{at}: text must be a str, not {type(text).__name__}")
    return encodable(at, text)
