"""What a type checker infers of the public names, and what it must refuse. mypy reads this; nothing runs it."""

from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, closing
from typing import Any, assert_type

import numpy as np

from candle_phi import (
    AsyncStream,
    CacheInfo,
    Chat,
    Chunk,
    FinishReason,
    Message,
    OnProgress,
    Phi,
    Progress,
    Result,
    Stream,
    TokenLogprob,
    Usage,
)


def inferred(phi: Phi) -> None:
    assert_type(Phi("model.gguf", n_ctx=4096), Phi)
    assert_type(Phi.demo(device="cpu"), Phi)
    assert_type(Phi.from_pretrained("phi-4-mini", revision="main", n_ctx=4096), Phi)
    assert_type(phi.stream("Hi", temperature=0), Stream)
    assert_type(phi.generate("Hi", max_tokens=5), Result)
    assert_type(phi.astream("Hi"), AsyncStream)
    coroutine = phi.agenerate("Hi")
    assert_type(coroutine, Coroutine[Any, Any, Result])  # type: ignore[unused-coroutine]  # not run at all
    assert_type(next(phi.stream("Hi")), Chunk)
    assert_type(phi.stream("Hi").finish_reason, FinishReason | None)
    assert_type(phi.metadata, dict[str, object])
    assert_type(next(phi.map(["Hi"], temperature=0)), Result)
    assert_type(next(phi.map(["Hi"], return_exceptions=True)), Result | Exception)
    assert_type(phi.score("Hi there", top_logprobs=5), list[TokenLogprob])
    assert_type(phi.perplexity("Hi there"), float)
    assert_type(phi.count_tokens("Hi there"), int)
    assert_type(phi.cache_info(), CacheInfo)
    chat = phi.chat("Be brief.", temperature=0)
    assert_type(chat, Chat)
    assert_type(phi.load_chat("a.chat"), Chat)
    assert_type(chat.send("Hi"), Result)
    assert_type(chat.stream("Hi", exact=True), Stream)
    assert_type(chat.astream("Hi"), AsyncStream)
    assert_type(chat.fork(), Chat)
    assert_type(chat.messages, list[dict[str, str]])
    assert_type(chat.usage, Usage)


async def inferred_in_a_loop(phi: Phi) -> None:
    async with aclosing(phi.amap(["Hi"])) as results:
        assert_type(await anext(results), Result)
    async for outcome in phi.amap(later(), return_exceptions=True):
        assert_type(outcome, Result | Exception)


async def later() -> AsyncIterator[str]:
    yield "Hi"


def accepted(phi: Phi) -> None:
    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    watch: OnProgress = print
    phi.generate(messages, on_progress=watch)
    phi.generate([{"role": "user", "content": "Hi"}])
    phi.generate(message for message in messages)
    phi.generate([1, 2, 3])
    phi.generate((1, 2, 3))
    phi.generate(range(3))
    phi.generate(np.array([1, 2, 3]))
    phi.generate("Hi", logit_bias={5: 1.0}, stop=["a", "b"])
    phi.generate("Hi", prediction="Hi there", cache_scope="a", speculate=False)
    phi.generate("Hi", prediction=[1, 2])
    phi.chat(messages=messages).send(messages)
    phi.chat().send({"role": "user", "content": "Hi"})

    def enough(progress: Progress) -> None:
        raise LookupError(progress.phase)

    phi.logits([1], on_progress=enough)
    prompts: Iterator[str | list[Message]] = iter(["Hi", messages])
    some: Iterator[Result] = phi.map(prompts, ordered=False, max_pending=3, seed=1)
    list(some)
    phi.map([[1, 2], range(3), np.array([1, 2])])
    with closing(phi.map(str(n) for n in range(3))) as results:
        list(results)


def refused(phi: Phi) -> None:
    phi.generate(b"Hi")  # type: ignore[arg-type]  # text is str
    phi.stream(bytearray(b"Hi"))  # type: ignore[arg-type]
    phi.generate(5)  # type: ignore[arg-type]
    phi.generate(["a", "b"])  # type: ignore[arg-type]  # a batch
    phi.generate("Hi", max_new_tokens=5)  # type: ignore[arg-type]
    phi.generate("Hi", max_tokens="5")  # type: ignore[arg-type]
    phi.generate("Hi", 50)  # type: ignore[call-arg]
    phi.generate()  # type: ignore[call-arg]
    Phi("model.gguf", device="mps")  # type: ignore[arg-type]
    phi.map(5)  # type: ignore[call-overload]
    phi.map(["Hi"], max_new_tokens=5)  # type: ignore[call-overload]
    phi.map(["Hi"], max_tokens="5")  # type: ignore[call-overload]
    phi.map(later())  # type: ignore[call-overload]  # of amap
    phi.perplexity([1, 2])  # type: ignore[arg-type]
    Phi.demo(n_thread=4)  # type: ignore[call-arg]
    Phi()  # type: ignore[call-arg]
    phi.accepts("Hi")  # type: ignore[attr-defined]  # of a later version
    phi.chat(max_token=5)  # type: ignore[call-arg]
    phi.chat(raw=True)  # type: ignore[call-arg]
    phi.chat().send(5)  # type: ignore[arg-type]
    phi.chat().send("Hi", 50)  # type: ignore[call-arg, arg-type]
    phi.warm("Hi", pin="yes")  # type: ignore[arg-type]
    Phi.demo(prefix_cache="2GB")  # type: ignore[arg-type]
    phi("Hi")  # type: ignore[operator]
