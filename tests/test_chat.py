"""Chats: turns, what is part of them and what is not."""

import asyncio
import contextlib
import pickle
import threading
from typing import Any

import pytest

from candle_phi import BusyError, Chat, ClosedError, ContextLengthError, NotInThisVersionError, Phi, Result
from candle_phi.testing import FakePhi

GREEDY: dict[str, Any] = {"temperature": 0}
FIRST, SECOND = "Who are you?", "What is icing?"


@pytest.fixture
def chat(phi: Phi) -> Chat:
    return phi.chat("Be brief.", **GREEDY)


def test_a_turn_computes_its_own_tokens_alone(chat: Chat) -> None:
    first = chat.send(FIRST)
    assert type(first) is Result
    known = len(chat.token_ids)
    second = chat.send(SECOND)
    assert second.usage.cached_tokens == known
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in chat.messages[1:]] == [FIRST, first, SECOND, second]
    assert chat.usage == first.usage + second.usage
    assert chat.context_left == 1024 - len(chat.token_ids)
    assert chat.turns == 2
    chat.messages.clear()
    chat.token_ids.clear()
    assert (len(chat.messages), len(chat.token_ids) > 0) == (5, True), "copies"


def test_the_ids_of_an_answer_are_kept(phi: Phi, chat: Chat) -> None:
    answer = chat.send(FIRST)
    ids = chat.token_ids
    chat.send(SECOND)
    assert chat.token_ids[: len(ids)] == ids
    assert ids[-len(answer.token_ids) :] == answer.token_ids
    assert phi.detokenize(answer.token_ids) == answer


def test_a_stream_is_part_of_the_chat_once_its_end_was_read(chat: Chat) -> None:
    stream = chat.stream(FIRST)
    assert chat.turns == 0
    text = "".join(stream)
    assert (chat.turns, chat.messages[-1]["content"]) == (1, text)
    with chat.stream(SECOND) as half:
        next(half)
    assert half.finish_reason == "cancelled"
    assert chat.turns == 1
    chat.stream(SECOND)  # dropped
    late = chat.send(SECOND, timeout=1e-9)
    assert (late.finish_reason, chat.turns) == ("timeout", 1)
    assert chat.send(SECOND, max_tokens=2).finish_reason == "length"
    assert chat.turns == 2


def test_an_exception_leaves_the_chat_as_it_was(chat: Chat) -> None:
    chat.send(FIRST)
    before = (chat.messages, chat.token_ids, chat.usage)

    def stop(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        chat.send(SECOND, on_progress=stop)
    wrongs: list[tuple[Any, type[Exception]]] = [({"max_tokens": -1}, ValueError), ({"max_new_tokens": 3}, TypeError)]
    for wrong, error in wrongs:
        with pytest.raises(error):
            chat.send(SECOND, **wrong)
    with pytest.raises(ContextLengthError) as raised:
        chat.send("word " * 2000)
    assert raised.value.prompt_tokens > raised.value.n_ctx == 1024
    assert (chat.messages, chat.token_ids, chat.usage) == before
    assert chat.send(SECOND)


def test_a_second_call_while_one_runs(chat: Chat) -> None:
    with chat.stream(FIRST) as stream:
        next(stream)
        for call in (chat.send, chat.stream):
            with pytest.raises(BusyError, match="chat"):
                call(SECOND)
    assert chat.send(SECOND)


def test_fork_and_rewind(phi: Phi, chat: Chat) -> None:
    first = chat.send(FIRST)
    before = (chat.messages, chat.token_ids)
    other = chat.fork()
    second = chat.send(SECOND)
    assert (other.messages, other.token_ids) == before
    assert other.send(SECOND) == second
    chat.rewind()
    assert (chat.messages, chat.token_ids) == before
    assert chat.send(SECOND) == second
    chat.rewind(2)
    assert (chat.turns, [message["role"] for message in chat.messages]) == (0, ["system"])
    assert chat.send(FIRST) == first
    for turns in (2, -1):
        with pytest.raises(ValueError, match="turns"):
            chat.rewind(turns)
    with pytest.raises(TypeError):
        chat.rewind("1")  # type: ignore[arg-type]


def test_messages_begin_a_chat(phi: Phi, chat: Chat) -> None:
    chat.send(FIRST)
    other = phi.chat(messages=chat.messages, **GREEDY)
    assert other.messages == chat.messages
    assert other.send(SECOND)
    with pytest.raises((TypeError, ValueError), match="messages"):
        phi.chat(messages=[{"role": "usr", "content": "Hi"}])


def test_answers_as_a_prompt(phi: Phi, chat: Chat) -> None:
    chat.send(FIRST)
    with Phi.demo(prefix_cache=0) as other:
        conversation = [*chat.messages, {"role": "user", "content": SECOND}]
        alone = other.generate(conversation, max_tokens=5, **GREEDY)
    exact = chat.fork().send(SECOND, exact=True, max_tokens=5)
    assert exact == alone


def test_a_stop_string_is_no_part_of_the_chat(phi: Phi, chat: Chat) -> None:
    answer = chat.send(FIRST, stop="model")
    assert answer == "I am the demonstration "
    assert chat.messages[-1]["content"] == answer
    assert chat.token_ids[-4:] == phi.generate(FIRST, max_tokens=4, **GREEDY).token_ids  # "I am the demonstration"
    held = len(chat.token_ids)
    assert chat.send(SECOND).usage.cached_tokens == held


def test_a_stop_string_after_the_beginning_of_an_answer(phi: Phi) -> None:
    with phi.chat(**GREEDY) as chat:
        messages = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": "I am"}]
        answer = chat.send(messages, stop="model")
        assert chat.messages[-1]["content"] == f"I am{answer}"
        held = len(chat.token_ids)
        assert phi.detokenize(chat.token_ids).endswith("demonstration")
        assert chat.send(SECOND).usage.cached_tokens == held


def test_options_of_the_chat_and_of_a_call(phi: Phi) -> None:
    with phi.chat(max_tokens=3, **GREEDY) as chat:
        assert chat.send(FIRST) == "I am the"
        assert chat.fork().send(FIRST, max_tokens=1) == "I"
        assert chat.fork().send(FIRST).usage.completion_tokens == 3


def test_what_a_later_version_has(phi: Phi, chat: Chat) -> None:
    with pytest.raises(NotInThisVersionError, match="tools"):
        phi.chat(tools=[print])  # type: ignore[arg-type]
    with pytest.raises(NotInThisVersionError, match="run"):
        chat.run("Hi")  # type: ignore[attr-defined]
    with pytest.raises(NotInThisVersionError, match="draft"):
        Phi.demo(draft="x")  # type: ignore[call-arg]


def test_a_closed_chat_keeps_its_messages(phi: Phi) -> None:
    with phi.chat(**GREEDY) as chat:
        chat.send(FIRST)
        open_chats = phi.cache_info().chats
    assert phi.cache_info().chats == open_chats - 1
    assert len(chat.messages) == 2
    for call in (lambda: chat.send(SECOND), chat.fork, lambda: chat.save("nowhere")):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(TypeError, match=r"fork\(\)"):
        pickle.dumps(chat)


def test_async_chats(phi: Phi) -> None:
    async def talk(question: str) -> list[str]:
        chat = phi.chat(**GREEDY)
        answer = await chat.asend(FIRST)
        text = ""
        async with contextlib.aclosing(chat.astream(question)) as stream:
            async for chunk in stream:
                text += chunk
        assert chat.turns == 2
        return [str(answer), text]

    async def main() -> list[list[str]]:
        return list(await asyncio.gather(*(talk(SECOND) for _ in range(3))))

    chat = phi.chat(**GREEDY)
    expected = [str(chat.send(FIRST)), str(chat.send(SECOND))]
    assert asyncio.run(main()) == [expected] * 3


def test_chats_of_many_threads(phi: Phi, chat: Chat) -> None:
    chat.send(FIRST)
    expected = chat.fork().send(SECOND)
    answers: list[str] = []

    def talk() -> None:
        for _ in range(5):
            with chat.fork() as other:
                answers.append(other.send(SECOND))

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 20


def test_engine_candle_has_chats() -> None:
    with Phi.demo(engine="candle") as phi, phi.chat(**GREEDY) as chat:
        chat.send(FIRST, max_tokens=3)
        assert chat.send(SECOND, max_tokens=3).usage.cached_tokens == 0
        phi.warm("Hi")
        assert phi.cache_info().positions == 0


def test_a_fake_has_chats() -> None:
    phi = FakePhi(["I am a fake.", "Icing is a foul."])
    with phi.chat("Be brief.") as chat:
        assert chat.send(FIRST) == "I am a fake."
        assert chat.send(SECOND) == "Icing is a foul."
        assert len(chat.messages) == 5
    messages: Any = phi.calls[-1][0]
    assert [message["content"] for message in messages][-1] == SECOND
    phi.warm("Hi")
    assert phi.cache_info().limit >= 0
