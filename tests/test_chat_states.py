"""Chats in any order of calls: each answer is the one that a new model gives to the same turns.

The reference holds nothing and drafts nothing. It computes a whole chat anew for each turn, prompts by prefill and
answers by decode passes. `CHAT_STEPS` sets the number of steps for each model, `CHAT_MODEL` another model file.
"""

import functools
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from candle_phi import Phi
from conftest import ROOT

STEPS = int(os.environ.get("CHAT_STEPS", "150"))
GOLDEN = ROOT / "tests" / "golden"
MODELS = [os.environ["CHAT_MODEL"]] if os.environ.get("CHAT_MODEL") else ["demo", "window", "longrope", "gqa"]
COLUMN = 300_000
"""Some more bytes than a column of the bundled model has."""

TURNS = ["Who are you?", "What is icing?", "What is a power play? Say it in your own words, and take your time.", "Hi"]
SYSTEMS = [None, "You answer in one sentence. " * 12]


class Turn(NamedTuple):
    """A call of `send`."""

    message: str
    temperature: float
    seed: int
    max_tokens: int

    def options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "seed": self.seed, "max_tokens": self.max_tokens}


turns = st.builds(
    Turn, st.sampled_from(TURNS), st.sampled_from([0.0, 1.0]), st.integers(1, 3), st.sampled_from([1, 5, 30])
)
places = st.integers(0, 7)


@functools.cache
def opened(model: str, **options: Any) -> Phi:
    if model == "demo":
        return Phi.demo(**options)
    return Phi(model if os.path.exists(model) else GOLDEN / f"{model}.gguf", **options)


@functools.cache
def answers(model: str, system: str | None, calls: tuple[Turn, ...]) -> tuple[list[int], list[int]]:
    """The ids of the last of these calls, and of the chat after it, by a model that holds nothing."""
    chat = opened(model, prefix_cache=0, speculate=False).chat(system)
    answer = [chat.send(call.message, **call.options()) for call in calls][-1]
    return answer.token_ids, chat.token_ids


class Chats(RuleBasedStateMachine):
    """Chats, and the calls that each of them has seen."""

    model: str

    @initialize(limit=st.sampled_from([0, 1, 2, 4, 1000]), system=st.sampled_from(SYSTEMS), speculate=st.booleans())
    def open(self, limit: int, system: str | None, speculate: bool) -> None:
        self.phi = opened(self.model, prefix_cache=limit * COLUMN, speculate=speculate)
        self.system = system if self.phi.n_ctx > 600 else None
        self.chats: list[tuple[Any, tuple[Turn, ...]]] = [(self.phi.chat(self.system), ())]
        self.folder = TemporaryDirectory()

    def at(self, place: int) -> int:
        return place % len(self.chats)

    @rule(place=places, turn=turns)
    def send(self, place: int, turn: Turn) -> None:
        chat, calls = self.chats[self.at(place)]
        if chat.context_left < 100:
            return
        calls = (*calls, turn)
        answer = chat.send(turn.message, **turn.options())
        assert (answer.token_ids, chat.token_ids) == answers(self.model, self.system, calls)
        self.chats[self.at(place)] = (chat, calls)

    @rule(place=places, turn=turns, pieces=st.integers(0, 3))
    def cancel(self, place: int, turn: Turn, pieces: int) -> None:
        chat, _ = self.chats[self.at(place)]
        if chat.context_left < 100:
            return
        before = (chat.messages, chat.token_ids)
        with chat.stream(turn.message, **{**turn.options(), "max_tokens": 40}, ignore_eos=True) as stream:
            for _ in range(pieces):
                next(stream, None)
        assert (chat.messages, chat.token_ids) == before

    @rule(place=places)
    def fork(self, place: int) -> None:
        if len(self.chats) < 6:
            chat, calls = self.chats[self.at(place)]
            self.chats.append((chat.fork(), calls))

    @rule(place=places, number=st.integers(1, 3))
    def rewind(self, place: int, number: int) -> None:
        chat, calls = self.chats[self.at(place)]
        if number <= len(calls):
            chat.rewind(number)
            self.chats[self.at(place)] = (chat, calls[:-number])

    @rule(place=places, kv=st.booleans(), closes=st.booleans())
    def save_and_load(self, place: int, kv: bool, closes: bool) -> None:
        chat, calls = self.chats[self.at(place)]
        path = Path(self.folder.name) / "chat"
        chat.save(path, kv=kv)
        if closes:
            chat.close()
        loaded = self.phi.load_chat(path)
        assert (loaded.messages, loaded.token_ids) == (chat.messages, chat.token_ids)
        self.chats[self.at(place)] = (loaded, calls)

    @rule(first=st.integers(3, 40))
    def evict(self, first: int) -> None:
        for i in range(4):
            self.phi.generate([first + i] * 200, max_tokens=1)

    @rule(place=places, turn=turns)
    def ask_the_same_as_a_prompt(self, place: int, turn: Turn) -> None:
        """A prompt meets no position of an answer: it has the text that it has without chats."""
        chat, _ = self.chats[self.at(place)]
        ids = (chat.token_ids or [5])[: self.phi.n_ctx - 40]
        options = {**turn.options(), "ignore_eos": True}
        expected = opened(self.model, prefix_cache=0, speculate=False).generate(ids, **options)
        assert self.phi.generate(ids, **options).token_ids == expected.token_ids

    def teardown(self) -> None:
        for chat, _ in self.chats:
            chat.close()
        self.folder.cleanup()


@pytest.mark.parametrize("model", MODELS)
def test_chats_in_any_order_of_calls(model: str) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    examples = max(STEPS // 15, 1)
    run_state_machine_as_test(
        type("ChatsOfModel", (Chats,), {"model": model}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=checks,
            derandomize=True,
            database=None,
        ),
    )
