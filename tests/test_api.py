"""What the public contract says of generating and sharing holds for a model and for the fake that stands in for one."""

import asyncio
import contextlib
import copy
import pickle
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any

import pytest

from candle_phi import (
    AsyncStream,
    Chunk,
    ClosedError,
    ContextLengthError,
    InternalError,
    NotInThisVersionError,
    Phi,
    Result,
)
from candle_phi.testing import FakePhi
from conftest import HAIKU

POEM = "The Zamboni rolls\nshadows glide a final shift,\nsnow on the way home."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HAIKU}]
Opens = Callable[[], Phi]


def poem(messages: object, options: dict[str, Any]) -> str:
    return POEM


def fake() -> FakePhi:
    return FakePhi(poem)


@pytest.fixture(scope="module", params=[fake, Phi.demo], ids=["fake", "demo"])
def opens(request: pytest.FixtureRequest) -> Opens:
    opens: Opens = request.param
    return opens


@pytest.fixture(scope="module")
def phi(opens: Opens) -> Iterator[Phi]:
    with opens() as phi:
        yield phi


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 20, "top_p": 0.9}, {"logprobs": True}, {"stop": ["\n", "zz"]}]
)
def test_streamed_is_whole(phi: Phi, options: dict[str, Any]) -> None:
    stream = phi.stream(HAIKU, seed=1, **options)
    chunks = list(stream)
    whole = phi.generate(HAIKU, seed=1, **options)
    assert "".join(chunks) == stream.text == whole
    assert len(chunks) > 1
    assert all(type(chunk) is Chunk and chunk for chunk in chunks)
    assert type(whole) is Result
    ridden = [token for chunk in chunks for token in chunk.token_ids]
    assert ridden == stream.token_ids[: len(ridden)]
    assert stream.token_ids == whole.token_ids
    assert len(whole.token_ids) == whole.usage.completion_tokens == stream.usage.completion_tokens
    assert whole.finish_reason == stream.finish_reason == "stop"


def test_the_ids_are_those_of_the_text(phi: Phi) -> None:
    answer = phi.generate(HAIKU, seed=1)
    assert phi.detokenize(answer.token_ids).strip() == answer.strip()


def test_numbers_along_the_way(phi: Phi) -> None:
    stream = phi.stream(HAIKU, seed=1)
    assert (stream.text, stream.token_ids, stream.finish_reason) == ("", [], None)
    assert stream.usage.prompt_tokens == len(phi.tokenize([{"role": "user", "content": HAIKU}]))
    assert (stream.usage.completion_tokens, stream.timings.time_to_first_token) == (0, None)
    first = next(stream)
    assert (stream.text, stream.token_ids, stream.finish_reason) == (first, first.token_ids, None)
    assert stream.timings.time_to_first_token is not None
    rest = "".join(stream)
    assert (stream.text, stream.finish_reason) == (first + rest, "stop")
    assert stream.usage.total_tokens == stream.usage.prompt_tokens + stream.usage.completion_tokens
    assert list(stream) == []
    stream.cancel()
    assert stream.finish_reason == "stop"


def test_a_result_knows_its_call(phi: Phi) -> None:
    answer = phi.generate(HAIKU, seed=7)
    assert answer.seed == phi.stream(HAIKU, seed=7).seed == 7
    assert 0 <= answer.usage.cached_tokens < answer.usage.prompt_tokens
    assert answer.timings.prefill_seconds > 0
    assert answer.timings.decode_seconds > 0
    assert answer.timings.queue_seconds >= 0
    assert answer.system_fingerprint == phi.generate("Hi", max_tokens=1).system_fingerprint
    for again in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert (again, again.token_ids, again.usage) == (answer, answer.token_ids, answer.usage)


def test_a_drawn_seed_is_reported(phi: Phi) -> None:
    drawn = phi.generate(HAIKU)
    assert phi.generate(HAIKU, seed=drawn.seed) == drawn
    assert phi.stream(HAIKU).seed != phi.stream(HAIKU).seed


def test_max_tokens(phi: Phi) -> None:
    whole, cut = phi.generate(HAIKU, seed=1), phi.generate(HAIKU, seed=1, max_tokens=3)
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 3)
    assert cut.token_ids == whole.token_ids[:3]
    assert whole.startswith(cut)
    assert whole != cut


def test_nothing_of_a_stop_string_leaks(phi: Phi) -> None:
    whole = phi.generate(HAIKU, seed=1)
    for start in range(1, len(whole) - 3, 5):
        stop = whole[start : start + 3]
        stream = phi.stream(HAIKU, seed=1, stop=[stop, "never"])
        assert "".join(stream) == whole[: whole.index(stop)]
        assert stream.finish_reason == "stop"
        assert stop in phi.detokenize(stream.token_ids)
        assert stop not in phi.detokenize(stream.token_ids[:-1])
    begun = phi.generate(HAIKU, seed=1, stop=whole[-2:] + "never")
    assert (begun, begun.token_ids) == (whole, whole.token_ids)


def test_logprobs(phi: Phi) -> None:
    stream = phi.stream(HAIKU, seed=1, logprobs=True, top_logprobs=1)
    for chunk in stream:
        assert chunk.logprobs is not None
        assert [entry.token_id for entry in chunk.logprobs] == chunk.token_ids
    answer = phi.generate(HAIKU, seed=1, logprobs=True, top_logprobs=1)
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert all(entry.logprob <= 0 and len(entry.top) == 1 for entry in answer.logprobs)
    assert b"".join(entry.bytes for entry in answer.logprobs).decode().strip() == answer.strip()
    assert phi.generate(HAIKU, seed=1).logprobs is None


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"stop": [7]}, TypeError, r"stop\[0\]"),
        ({"max_new_tokens": 5}, TypeError, "use max_tokens"),
        ({"tempature": 1}, TypeError, "did you mean 'temperature'"),
        ({"top_logprobs": 2}, ValueError, "logprobs=True"),
        ({"parse_special": True}, ValueError, "raw=True"),
        ({"logit_bias": {2**31: 1}}, ValueError, "outside the vocabulary"),
    ],
)
def test_options_are_checked_at_the_call(phi: Phi, options: dict[str, Any], error: type[Exception], says: str) -> None:
    for method in (phi.stream, phi.generate):
        with pytest.raises(error, match=says):
            method(HAIKU, **options)


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        ([], ValueError, "the prompt is (an )?empty"),
        (["Hi", "there"], TypeError, "a list of prompts is a batch"),
        ([{"role": "user", "content": None}], TypeError, r"messages\[0\]: content is None"),
        ([{"rol": "user", "content": "Hi"}], TypeError, "did you mean 'role'"),
        ([{"role": "robot", "content": "Hi"}], ValueError, "unknown role 'robot'"),
        ([{"role": "tool", "content": "Hi"}], NotInThisVersionError, "tool"),
        (b"Hi", TypeError, "decode it"),
        ([1, 2**40], ValueError, "outside the vocabulary"),
        ([1] * 100_000, ContextLengthError, "the prompt has 100000 tokens, the context"),
    ],
)
def test_prompts_are_checked_at_the_call(phi: Phi, prompt: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        phi.stream(prompt)


def test_prompts(phi: Phi) -> None:
    whole = phi.generate(MESSAGES, seed=1)
    assert phi.generate((message for message in MESSAGES), seed=1) == whole
    assert phi.generate(phi.tokenize(MESSAGES), seed=1) == whole
    rendered = phi.render(MESSAGES)
    assert all(str(message["content"]) in rendered for message in MESSAGES)
    assert phi.tokenize(rendered, parse_special=True) == phi.tokenize(MESSAGES)
    assert phi.stream(rendered, raw=True).usage.prompt_tokens == len(phi.tokenize(MESSAGES))
    going_on = [*MESSAGES, {"role": "assistant", "content": "Cold"}]
    assert phi.render(going_on).endswith("Cold")
    plain = phi.tokenize([{"role": "user", "content": "<|end|>"}])
    assert plain.count(phi.tokenize("<|end|>", parse_special=True)[0]) == 1  # the template's own
    assert phi.detokenize(phi.tokenize(POEM)) == POEM


@pytest.mark.parametrize("end", ["cancel", "close", "with", "throw"])
def test_ending_it_early(phi: Phi, end: str) -> None:
    stream = phi.stream(HAIKU, seed=1)
    with stream:
        seen = next(stream)
        if end == "throw":
            with pytest.raises(LookupError, match="enough"):
                stream.throw(LookupError("enough"))
        elif end != "with":
            getattr(stream, end)()
            getattr(stream, end)()
    assert stream.finish_reason == "cancelled"
    assert list(stream) == []
    assert (stream.text, stream.token_ids) == (seen, seen.token_ids)
    unread = phi.stream(HAIKU)
    unread.cancel()
    assert (list(unread), unread.finish_reason) == ([], "cancelled")


def test_it_is_a_generator(phi: Phi) -> None:
    stream = phi.stream(HAIKU, seed=1)
    assert isinstance(stream, Generator)
    assert iter(stream) is stream
    assert stream.send(None) + "".join(stream) == phi.generate(HAIKU, seed=1)
    with pytest.raises(TypeError, match="no values"):
        phi.stream(HAIKU).send(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(stream)


def test_streams_and_threads_share_a_model(phi: Phi) -> None:
    expected = phi.generate(HAIKU, seed=1)
    streams = [phi.stream(HAIKU, seed=1) for _ in range(3)]
    texts = [""] * 3
    while any(stream.finish_reason is None for stream in streams):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == [expected] * 3
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(phi.generate(HAIKU, seed=1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 4


def test_two_threads_read_one_stream(phi: Phi) -> None:
    stream = phi.stream(HAIKU, seed=1)
    seen: list[Chunk] = []
    threads = [threading.Thread(target=lambda: seen.extend(stream)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seen) == sorted(phi.stream(HAIKU, seed=1))
    assert stream.text == phi.generate(HAIKU, seed=1)


def test_closing_is_told_to_readers(opens: Opens) -> None:
    phi = opens()
    started, unread, cancelled = (phi.stream(HAIKU, seed=1) for _ in range(3))
    next(started)
    cancelled.cancel()
    phi.close()
    phi.close()
    assert phi.closed
    for stream in (started, unread):
        with pytest.raises(ClosedError):
            list(stream)
        assert (stream.finish_reason, list(stream)) == ("error", [])
    assert cancelled.finish_reason == "cancelled"
    for call in (phi.stream, phi.generate, phi.tokenize, phi.render):
        with pytest.raises(ClosedError):
            call("Hi")
    with pytest.raises(ClosedError):
        _ = phi.metadata
    assert "closed" in repr(phi)


def test_a_stream_outlives_the_name_of_its_model(opens: Opens) -> None:
    assert "".join(opens().stream(HAIKU, seed=1)).count("\n") >= 2


def test_a_model_pickles_as_its_recipe(opens: Opens) -> None:
    with opens() as phi, pickle.loads(pickle.dumps(phi)) as again:
        assert type(again) is type(phi)
        assert again.generate(HAIKU, seed=1) == phi.generate(HAIKU, seed=1)


def test_attributes(phi: Phi) -> None:
    assert phi.n_ctx > 0
    assert phi.n_vocab > max(phi.eos_token_ids)
    assert phi.metadata["general.architecture"] == "phi3"
    assert "message" in phi.chat_template
    assert "\n" not in repr(phi)
    for name in ("path", "device", "engine", "kernel"):
        assert isinstance(getattr(phi, name), str)
    with pytest.raises(AttributeError):
        phi.n_ctx = 5  # type: ignore[misc]


def test_cancel_ends_a_wait() -> None:
    phi = FakePhi(poem, delay=60)
    stream = phi.stream(HAIKU)
    threading.Timer(0.1, stream.cancel).start()
    before = time.monotonic()
    assert list(stream) == []
    stream = phi.stream(HAIKU)
    threading.Timer(0.1, phi.close).start()
    with pytest.raises(ClosedError):
        next(stream)
    assert time.monotonic() - before < 60  # the delay


# The same for event loops.


async def read(stream: AsyncStream) -> list[Chunk]:
    return [chunk async for chunk in stream]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"logprobs": True}, {"stop": ["\n", "zz"]}])
def test_async_text_is_the_same(phi: Phi, options: dict[str, Any]) -> None:
    async def both() -> tuple[AsyncStream, list[Chunk], Result]:
        stream = phi.astream(HAIKU, seed=1, **options)
        return stream, await read(stream), await phi.agenerate(HAIKU, seed=1, **options)

    stream, chunks, whole = asyncio.run(both())
    expected = phi.generate(HAIKU, seed=1, **options)
    assert "".join(chunks) == stream.text == whole == expected
    assert stream.token_ids == whole.token_ids == expected.token_ids
    assert whole.logprobs == expected.logprobs
    assert all(type(chunk) is Chunk and chunk for chunk in chunks)
    assert type(whole) is Result
    assert stream.usage == whole.usage == expected.usage
    assert stream.finish_reason == whole.finish_reason == "stop"
    assert stream.seed == whole.seed == 1
    assert stream.timings.time_to_first_token is not None


@pytest.mark.parametrize("method", ["astream", "agenerate"])
def test_async_errors_come_at_the_call(phi: Phi, opens: Opens, method: str) -> None:
    call = getattr(phi, method)  # without a loop, and without an await
    for options, error, says in [
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"max_new_tokens": 5}, TypeError, "use max_tokens"),
        ({"tempature": 1}, TypeError, "did you mean 'temperature'"),
    ]:
        with pytest.raises(error, match=says):
            call(HAIKU, **options)
    with pytest.raises(ContextLengthError):
        call([1] * 100_000)
    with opens() as closed:
        pass
    with pytest.raises(ClosedError):
        getattr(closed, method)(HAIKU)


def test_it_is_an_async_generator(phi: Phi) -> None:
    async def check() -> None:
        stream = phi.astream(HAIKU, seed=1)
        assert isinstance(stream, AsyncGenerator)
        assert aiter(stream) is stream
        first = await stream.asend(None)
        assert stream.text == first
        assert stream.finish_reason is None
        assert first + "".join(await read(stream)) == phi.generate(HAIKU, seed=1)
        assert await anext(stream, None) is None
        with pytest.raises(TypeError, match="no values"):
            await stream.asend(1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(stream)
        assert repr(stream) == f"<AsyncStream: {len(stream.token_ids)} tokens, stop>"

    asyncio.run(check())


@pytest.mark.parametrize("end", ["cancel", "aclose", "with", "aclosing", "athrow"])
def test_ending_an_async_stream_early(phi: Phi, end: str) -> None:
    async def check() -> None:
        stream = phi.astream(HAIKU, seed=1)
        if end in ("with", "aclosing"):
            async with stream if end == "with" else contextlib.aclosing(stream):
                seen = await anext(stream)
        else:
            seen = await anext(stream)
        if end == "cancel":
            stream.cancel()
        elif end == "aclose":
            await stream.aclose()
        elif end == "athrow":
            with pytest.raises(LookupError, match="enough"):
                await stream.athrow(LookupError("enough"))
        assert stream.finish_reason == "cancelled"
        assert await read(stream) == []
        assert (stream.text, stream.token_ids) == (seen, seen.token_ids)

    asyncio.run(check())


def test_tasks_share_a_model_and_a_stream(phi: Phi) -> None:
    async def check() -> None:
        expected = phi.generate(HAIKU, seed=1)
        assert await asyncio.gather(*(phi.agenerate(HAIKU, seed=1) for _ in range(5))) == [expected] * 5
        stream = phi.astream(HAIKU, seed=1)
        parts = await asyncio.gather(*(read(stream) for _ in range(3)))
        assert stream.text == expected
        assert sorted(chunk for part in parts for chunk in part) == sorted(phi.stream(HAIKU, seed=1))

    asyncio.run(check())


def test_closing_is_told_to_async_readers(opens: Opens) -> None:
    async def check() -> None:
        phi = opens()
        started, unread = phi.astream(HAIKU, seed=1), phi.astream(HAIKU, seed=1)
        await anext(started)
        phi.close()
        for stream in (started, unread):
            with pytest.raises(ClosedError):
                await read(stream)
            assert (stream.finish_reason, await read(stream)) == ("error", [])

    asyncio.run(check())


def test_every_task_that_shares_a_stream_is_told() -> None:
    async def check() -> None:
        phi = FakePhi([["one", InternalError("two")]], delay=0.05)
        stream = phi.astream(HAIKU)
        ends = await asyncio.gather(*(read(stream) for _ in range(3)), return_exceptions=True)
        assert [str(end) for end in ends] == ["two"] * 3
        assert await read(stream) == []

    asyncio.run(check())


def test_what_ends_an_async_wait() -> None:
    async def check() -> None:
        phi = FakePhi(poem, delay=60)
        loop = asyncio.get_running_loop()
        stream = phi.astream(HAIKU)
        loop.call_later(0.05, stream.cancel)
        assert await read(stream) == []
        stream = phi.astream(HAIKU)
        task = asyncio.create_task(read(stream))
        loop.call_later(0.05, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.finish_reason == "cancelled"
        stream = phi.astream(HAIKU)
        threading.Timer(0.05, phi.close).start()
        with pytest.raises(ClosedError):
            await anext(stream)

    before = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - before < 60  # the delay
