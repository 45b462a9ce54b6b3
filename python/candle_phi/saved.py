"""What the file of a chat says beside ids, keys and values: its messages, turns and options, as JSON."""
# Decisions: docs/design/python.md

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from . import _engine, options
from .errors import InvalidModelError
from .messages import turns
from .results import Usage
from .states import State

_KEY = "chat"
_SCOPE = "scope"
"""The engine reads it: keys and values of the file are those of this scope."""
_VERSION = 1


class Saved(NamedTuple):
    """The chat of a file."""

    states: list[State]
    options: dict[str, Any]
    """Of `Phi.chat`."""
    is_of_this_tokenizer: bool
    """False: the ids are of another tokenizer, and the states are without them."""


def to_metadata(model: _engine.Model, states: Sequence[State], defaults: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a chat. `states`: before the first turn, and after each. `defaults`: the checked options."""
    last = states[-1]
    content = {
        "version": _VERSION,
        "messages": last.messages,
        "text": last.text,
        "tokenizer": _fingerprint(model, last.ids),
        "states": [_encoded(state, last) for state in states],
        "options": defaults,
    }
    scope = defaults.get("cache_scope")
    return {_KEY: json.dumps(content, ensure_ascii=False), **({} if scope is None else {_SCOPE: scope})}


def from_metadata(
    model: _engine.Model, path: str, metadata: Mapping[str, str], ids: Sequence[int], runs: Sequence[int]
) -> Saved:
    """The chat of a file with this metadata, these ids and their runs.

    Raises:
        InvalidModelError: the file is not that of a chat, or it contradicts itself.
    """
    if _KEY not in metadata:
        raise InvalidModelError(f"{path} is not the file of a chat: its metadata lacks {_KEY}")
    try:
        content = json.loads(metadata[_KEY])
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, and this package reads version {_VERSION}")
        messages = [{"role": role, "content": text} for role, text in content["messages"]]
        last = State(tuple(turns(messages)) if messages else (), _str(content["text"]), tuple(ids), tuple(runs))
        is_of_this_tokenizer = content["tokenizer"] == _fingerprint(model, ids)
        n_vocab = model.n_vocab if is_of_this_tokenizer else 2**32  # ids of another tokenizer are not used
        states = [_decoded(state, last, n_vocab) for state in content["states"]]
        if not states or states[-1].messages != last.messages or states[-1].ids != last.ids:
            raise ValueError("the last turn is not that of the messages and ids")
        defaults = dict(content["options"])
        options.checked(options.CHAT, defaults)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InvalidModelError(f"{path} is damaged: {_KEY} of its metadata: {error}") from error
    if is_of_this_tokenizer:
        return Saved(states, defaults, True)
    return Saved([State(state.messages, usage=state.usage) for state in states], defaults, False)


def _fingerprint(model: _engine.Model, ids: Sequence[int]) -> str | None:
    """The hash of the text of ids, which is another with another tokenizer. None if an id is not in the vocabulary."""
    if any(token_id >= model.n_vocab for token_id in ids):
        return None
    return hashlib.sha256(model.detokenize([*ids], False).encode()).hexdigest()


def _encoded(state: State, last: State) -> dict[str, Any]:
    """A state for JSON. Of ids and text with which those of the last state begin, the length is enough."""
    text = state.text or ""
    return {
        "messages": len(state.messages),
        "text": len(text) if (last.text or "").startswith(text) else text,
        "ids": len(state.ids) if last.ids[: len(state.ids)] == state.ids else state.ids,
        "runs": state.runs,
        "is_open": state.text is not None,
        "usage": astuple(state.usage),
    }


def _decoded(found: Mapping[str, Any], last: State, n_vocab: int) -> State:
    text, ids = found["text"], found["ids"]
    state = State(
        last.messages[: _count(found["messages"], len(last.messages))],
        None if not found["is_open"] else _beginning(_str(last.text), text) if isinstance(text, int) else _str(text),
        _beginning(last.ids, ids) if isinstance(ids, int) else tuple(_count(token_id, n_vocab - 1) for token_id in ids),
        tuple(_int(run) for run in found["runs"]),
        Usage(*(_int(count) for count in found["usage"])),
    )
    (state.text or "").encode()  # a lone surrogate is an error
    _count(sum(state.runs), len(state.ids))
    return state


def _beginning(whole: Any, length: int) -> Any:
    """The first `length` elements of a tuple or a str that has as many."""
    return whole[: _count(length, len(whole))]


def _count(value: object, most: int) -> int:
    count = _int(value)
    if count > most:
        raise ValueError(f"a count or an id is {count}, and the limit is {most}")
    return count


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is {type(value).__name__}")
    return value


def _int(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"a count is {value!r}")
    return value
