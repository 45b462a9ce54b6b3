"""What a chat is after each of its turns: messages, ids, and how the keys and values of the ids were computed."""
# Decisions: docs/design/python.md

from collections.abc import Sequence
from typing import NamedTuple

from . import _engine
from .messages import Turn as CheckedMessage
from .results import Usage


class State(NamedTuple):
    """A chat after one of its turns, or before the first."""

    messages: tuple[CheckedMessage, ...]
    text: str | None = None
    """The text of the ids. Empty: the next turn's ids are those of its messages. None: not rendered yet."""
    ids: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()
    """The number of ids whose keys and values prefill computed, then of those that decode computed, in turn. The ids
    after them have none."""
    usage: Usage = Usage(0, 0, 0, 0, 0, 0)
    """The sum of the turns."""


def opened_states(messages: Sequence[CheckedMessage]) -> list[State]:
    """The states of a chat that has these messages: before the first turn, and after each."""
    users = [i for i, (role, _) in enumerate(messages) if role == "user"]
    start = users[0] if users else len(messages)
    ends = {i + 1 for i, (role, _) in enumerate(messages) if role == "assistant"}
    cuts = sorted({start, *(end for end in ends if end > start), len(messages)})
    return [State(tuple(messages[:cut])) for cut in cuts]


def opened(model: _engine.Model, state: State) -> State:
    """The state with its text and ids.

    After a message of the assistant they are those of the messages. Otherwise the next message decides how they go on,
    and the ids are those that two different ones have in common.
    """
    if state.text is not None:
        return state
    if not state.messages:
        return state._replace(text="")
    messages = [*state.messages]
    if messages[-1][0] == "assistant":
        ids = model.tokenize_messages(messages)
        return state._replace(text=model.render(messages), ids=tuple(ids), runs=(len(ids),))
    one, other = (model.tokenize_messages([*messages, ("user", text)]) for text in ("a", "b"))
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return state._replace(text="", ids=tuple(one[:common]))


def without_stop(model: _engine.Model, prompt: list[int], ids: list[int], answer: str) -> tuple[str, list[int]]:
    """The text and the ids of an answer, up to the id with which the stop string began."""
    before = prompt[-4:]
    offset = len(model.detokenize(before, True))
    for count in range(len(ids), 0, -1):
        alone = model.detokenize(ids[:count], True)
        behind = model.detokenize([*before, *ids[:count]], True)[offset:]  # with the first space, if it is kept
        for text in (alone, behind):
            if text and answer.startswith(text):
                return text, ids[:count]
    return "", []


def first(runs: Sequence[int], count: int) -> list[int]:
    """The runs of the first `count` ids."""
    found = []
    for run in runs:
        if count <= 0:
            break
        found.append(min(run, count))
        count -= run
    return found


def extended(runs: Sequence[int], count: int) -> list[int]:
    """The runs with prefill up to `count` ids."""
    rest = count - sum(runs)
    return [*runs[:-1], runs[-1] + rest] if len(runs) % 2 else [*runs, rest]
