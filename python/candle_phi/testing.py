"""A fake `Phi` for the tests of applications. It answers with given replies, at once and without a model file.

from candle_phi.testing import FakePhi

phi = FakePhi(["The puck drops.", ["It ", "melts."], TimeoutError("no more ice")])
assert phi.generate("Once upon a time", max_tokens=2) == "The puck"
assert phi.calls[0] == ("Once upon a time", {"max_tokens": 2})
"""
# Decisions: docs/design/python.md

import copy
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

from . import _engine, options
from .errors import ClosedError, ContextLengthError, InvalidModelError, UnsupportedModelError
from .messages import Message, Prompt, Turn, items
from .model import Phi, _Recipe
from .signatures import same_options
from .stream import Stream

Failure: TypeAlias = BaseException | type[BaseException]
Reply: TypeAlias = str | Sequence[str | Failure] | Failure
"""A text, a list of chunks (the last may be an exception), or an exception."""

_SPECIAL = ("<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_BOS, _END = 0, 1
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_SAVED = "candle_phi.fake"
_WORD = re.compile(r"\s*\S+|\s+")
_POLL_INTERVAL = 0.075  # seconds, as in the engine


class Call(NamedTuple):
    """A call of a `FakePhi`, with the arguments as they were given, without defaults."""

    messages: object
    """The prompt: a str, messages or token ids. A copy, made at the call. Of a chat: all its messages."""
    options: dict[str, Any]


class FakePhi(Phi):
    """A `Phi` whose replies are given. Only the model is fake: checks, streams, results and cancelling are real.

    A token is a chunk of a reply, or a word of a prompt, and certain: its log probability is 0. `max_tokens`,
    `stop`, `timeout`, `logprobs` and the context's end count and cut as they do with a model. The options of
    sampling are checked and have no effect. Chats are real too, and `usage.cached_tokens` counts what open chats and
    `warm` have kept. A reply that is not cut ends with `"stop"`.

    Args:
        replies: one reply for each call: a str, which is split into words that keep their spaces; a list of chunks; or
            an exception, which is raised where a model's failure would be: by `generate`, or by the first read of a
            stream. The last chunk of a list may be an exception. `replies` may also be a function of `(messages,
            options)` that returns a reply. The arguments are those of `calls`.
        delay: seconds before each chunk.

    Raises:
        TypeError, ValueError: `replies` or `delay` is not valid.

    A call beyond the last reply raises AssertionError.

    Attributes:
        calls: the calls so far, a `Call` each. A call that raised for its own arguments is not among them.
    """

    def __init__(self, replies: Iterable[Reply] | Callable[[Any, dict[str, Any]], Reply], *, delay: float = 0) -> None:
        seconds = options.seconds("delay", delay)
        if not callable(replies):
            if isinstance(replies, (str, bytes, Mapping)) or not isinstance(replies, Iterable):
                raise TypeError(
                    f"replies must be a list with one entry per call, or a function, not {type(replies).__name__}"
                )
            replies = list(replies)
            for i, reply in enumerate(replies):
                _chunks(f"replies[{i}]", reply)
        self.calls: list[Call] = []
        self._replies = replies
        self._calling = threading.Lock()
        self._model = cast(_engine.Model, _Model(seconds))
        self._recipe = _Recipe(type(self), (replies,), {"delay": delay})

    @classmethod
    def demo(cls, **options: Any) -> NoReturn:
        """Raises TypeError: a fake opens no model."""
        raise TypeError(f"{cls.__name__} opens no model: use {cls.__name__}(replies)")

    @classmethod
    def from_pretrained(cls, *args: object, **options: Any) -> NoReturn:
        """Raises TypeError: a fake opens no model."""
        cls.demo()

    @same_options(Phi.stream)
    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Streams the next reply, with the options and errors of `Phi.stream`."""
        prompt = prompt if isinstance(prompt, str) else cast(Prompt, items(prompt))  # once: it may be a generator
        stream = super().stream(prompt, **options)
        self._play(stream, Call(copy.deepcopy(prompt), options))
        return stream

    def _member(self, prompt: object, call: options.Generation, given: Mapping[str, object]) -> Stream:
        prompt = prompt if isinstance(prompt, str) else items(prompt)
        stream = super()._member(prompt, call, given)
        self._play(stream, Call(copy.deepcopy(prompt), dict(given)))
        return stream

    def _turn_stream(
        self, messages: Sequence[Message], call: options.Generation, given: Mapping[str, object], **engine: Any
    ) -> Stream:
        stream = super()._turn_stream(messages, call, given, **engine)
        self._play(stream, Call(messages, dict(given)))
        return stream

    def _play(self, stream: Stream, call: Call) -> None:
        """Makes a stream play the next reply."""
        with self._calling:
            self.calls.append(call)
            number = len(self.calls)
        cast(_Stream, stream._stream).play(*self._reply(number, call))

    def _reply(self, number: int, call: Call) -> tuple[list[str], BaseException | None]:
        """The chunks of a reply, and the exception that ends them, if there is one."""
        if callable(self._replies):
            return _chunks(f"the reply to call {number}", self._replies(*call))
        if number > len(self._replies):
            given = len(self._replies)
            raise AssertionError(
                f"FakePhi: call {number} has no reply; {given} {'was' if given == 1 else 'were'} given"
            )
        return _chunks(f"replies[{number - 1}]", self._replies[number - 1])

    def __repr__(self) -> str:
        return f"<FakePhi: {len(self.calls)} calls{', closed' if self.closed else ''}>"


def _chunks(name: str, reply: object) -> tuple[list[str], BaseException | None]:
    """Checks a reply and splits it into chunks, and the exception that ends them."""
    if isinstance(reply, str):
        return _WORD.findall(options.encodable(name, reply)), None
    if (failure := _failure(reply)) is not None:
        return [], failure
    if not isinstance(reply, Iterable) or isinstance(reply, (bytes, bytearray, Mapping)):
        raise TypeError(f"{name} must be a str, a list of str or an exception, not {type(reply).__name__}")
    chunks = list(reply)
    failure = _failure(chunks[-1]) if chunks else None
    if failure is not None:
        chunks.pop()
    for i, chunk in enumerate(chunks):
        if not isinstance(chunk, str):
            raise TypeError(f"{name}[{i}] must be a str, not {type(chunk).__name__}")
        options.encodable(f"{name}[{i}]", chunk)
    return [str(chunk) for chunk in chunks], failure


def _failure(value: object) -> BaseException | None:
    if isinstance(value, type) and issubclass(value, BaseException):
        return value()
    return value if isinstance(value, BaseException) else None


class _Model:
    """The fake of `_engine.Model`. Its tokens are words, numbered in the order of their first use."""

    path = "FakePhi"
    n_ctx = 4096
    n_vocab = 2**20
    chat_template = _TEMPLATE
    bos_token_id = _BOS
    device = "cpu"
    engine = "fake"
    kernel = "fake"
    n_threads = 1
    system_fingerprint = "phi_fake"

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.closed = False
        self.changed = threading.Condition()  # guards this and its streams
        self.chats: weakref.WeakSet[_Chat] = weakref.WeakSet()
        self.warmed: list[list[int]] = []
        self.lookups = [0, 0]  # without and with a prefix that is kept
        self._words: list[str] = list(_SPECIAL)
        self._timers: dict[tuple[_engine.ReadyQueue, int], threading.Timer] = {}
        self._ids: dict[str, int] = {}  # without the special tokens: no text becomes one

    @property
    def eos_token_ids(self) -> list[int]:
        return [_END]

    @property
    def metadata(self) -> dict[str, object]:
        self.check()
        return {"general.architecture": "phi3", "general.name": self.path}

    def check(self) -> None:
        if self.closed:
            raise ClosedError("the model is closed")

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.change()

    def change(self) -> None:
        """Wakes all readers that wait."""
        self.changed.notify_all()
        for queue, ticket in list(self._timers):
            self._ring(queue, ticket)

    def call(self, queue: _engine.ReadyQueue, ticket: int, seconds: float) -> None:
        """Puts a ticket into a queue after `seconds`, or at the next change."""
        timer = threading.Timer(max(seconds, 0), self._ring, (queue, ticket))
        timer.daemon = True
        self._timers[queue, ticket] = timer
        timer.start()

    def _ring(self, queue: _engine.ReadyQueue, ticket: int) -> None:
        with self.changed:
            timer = self._timers.pop((queue, ticket), None)
        if timer is not None:
            timer.cancel()
            queue.put(ticket)

    def token_id(self, word: str) -> int:
        with self.changed:
            if word not in self._ids:
                if len(self._words) == self.n_vocab:
                    raise ValueError(f"this FakePhi has seen {self.n_vocab} different words: create a new one")
                self._ids[word] = len(self._words)
                self._words.append(word)
            return self._ids[word]

    def render(self, turns: list[Turn]) -> str:
        self.check()
        return "".join(text for text, _ in _rendered(turns))

    def tokenize_messages(self, turns: list[Turn]) -> list[int]:
        self.check()
        return [token for text, special in _rendered(turns) for token in self._tokenize(text, special)]

    def tokenize_text(self, text: str, parse_special: bool, add_bos: bool) -> list[int]:
        self.check()
        pieces = re.split(f"({'|'.join(map(re.escape, _SPECIAL))})", text) if parse_special else [text]
        ids = [token for piece in pieces for token in self._tokenize(piece, parse_special and piece in _SPECIAL)]
        return [_BOS, *ids] if add_bos else ids

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return [_SPECIAL.index(text)] if special else [self.token_id(word) for word in _WORD.findall(text)]

    def detokenize(self, ids: list[int], skip_special: bool) -> str:
        self.check()
        known = len(self._words)
        for token in ids:
            if token >= known:
                raise ValueError(f"token id {token} is unknown to this FakePhi, which has {known} so far")
        return "".join(self._words[token] for token in ids if token >= len(_SPECIAL) or not skip_special)

    def logits(self, ids: list[int], *_: object) -> NoReturn:
        raise UnsupportedModelError(f"a FakePhi has no weights: no logits of {len(ids)} ids")

    def score(self, ids: list[int], *, start: int, top_logprobs: int) -> "_Scores":
        self.check()
        if len(ids) > self.n_ctx:
            message = f"there are {len(ids)} tokens, and the context holds {self.n_ctx}"
            raise ContextLengthError(message, len(ids), self.n_ctx)
        words = [self.detokenize([token], False) for token in ids[start:]]
        return _Scores([_certain(*pair, top_logprobs) for pair in zip(ids[start:], words, strict=True)], len(ids))

    def chat(self) -> "_Chat":
        self.check()
        chat = _Chat()
        self.chats.add(chat)
        return chat

    def continue_messages(self, turns: list[Turn], text: str, ids: list[int]) -> tuple[str, list[int], int]:
        whole = self.render(turns)
        if text and whole.startswith(text):
            pieces, passed = [], 0
            for piece, special in _rendered(turns):
                begin = max(len(text) - passed, 0)
                passed += len(piece)
                if begin < len(piece):
                    pieces += self._tokenize(piece[begin:], special)
            return whole, [*ids, *pieces], len(ids)
        found = self.tokenize_messages(turns)
        return whole, found, _common(found, ids)

    def cached(self, prompt: list[int]) -> int:
        """The number of ids at the beginning of a prompt that are kept. The last id is computed in any case."""
        kept = [*self.warmed, *(chat.ids for chat in self.chats)]
        count = min(max([_common(prompt, ids) for ids in kept], default=0), len(prompt) - 1)
        self.lookups[count > 0] += 1
        return count

    def warm(self, ids: list[int], *, pin: bool, scope: str | None) -> "_Work[int]":
        self.check()
        self.warmed.append(ids)
        return _Work(len(ids))

    def cache_info(self) -> tuple[int, int, int, int, int, int]:
        self.check()
        positions = sum(map(len, [*self.warmed, *(chat.ids for chat in self.chats)]))
        return 0, 0, positions, self.lookups[1], self.lookups[0], len(self.chats)

    def save_chat(
        self, chat: "_Chat", ids: list[int], runs: list[int], path: str, metadata: dict[str, str], kv: bool
    ) -> "_Work[None]":
        """Writes a safetensors file without tensors: ids of words mean nothing to another fake, so it has the words."""
        own = {_SAVED: json.dumps({"words": [self._words[i] for i in ids], "ids": ids, "runs": runs})}
        header = json.dumps({"__metadata__": metadata | own}).encode()
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
        return _Work(None)

    def load_chat(
        self, path: str, chat: "_Chat", strict: bool
    ) -> "_Work[tuple[list[int], list[int], dict[str, str], str | None]]":
        try:
            with open(path, "rb") as file:
                metadata = json.loads(file.read()[8:])["__metadata__"]
            own = json.loads(metadata.pop(_SAVED))
        except (LookupError, ValueError) as error:
            raise InvalidModelError(f"{path} is not the file of a FakePhi's chat: {error}") from error
        special = len(_SPECIAL)
        pairs = zip(own["ids"], own["words"], strict=True)
        chat.ids = [token if token < special else self.token_id(word) for token, word in pairs]
        return _Work(([*chat.ids], own["runs"], metadata, None))

    def stream(self, prompt: list[int], *, runs: list[int] | None, chat: "_Chat | None", **sampling: Any) -> "_Stream":
        self.check()
        if len(prompt) >= self.n_ctx:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, the context {self.n_ctx}; "
                "generating needs room for at least 1 more",
                len(prompt),
                self.n_ctx,
            )
        return _Stream(self, prompt, chat, sampling)


def _rendered(turns: list[Turn]) -> list[tuple[str, bool]]:
    """The pieces of a prompt, each with whether it is a special token. A last message of the assistant is continued."""
    pieces = []
    for role, content in turns:
        pieces += [(f"<|{role}|>", True), ("\n" + content, False), ("<|end|>", True), ("\n", False)]
    return pieces[:-2] if turns[-1][0] == "assistant" else [*pieces, ("<|assistant|>", True), ("\n", False)]


def _common(one: list[int], other: list[int]) -> int:
    """The number of ids that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Chat:
    """The fake of `_engine.Chat`: the ids that are kept for a chat."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def close(self) -> None:
        self.ids = []


_Value = TypeVar("_Value")


class _Work(Generic[_Value]):
    """The fake of work of the engine, which is done at once."""

    def __init__(self, value: _Value) -> None:
        self._value = value

    def poll(self) -> tuple[bool, _Value | None]:
        return True, self._value

    def wait(self) -> None:
        """Everything is ready."""

    def progress(self, end: bool) -> list[tuple[str, int, int | None]]:
        return []

    def cancel(self) -> None:
        """There is nothing to cancel."""


class _Stream:
    """The fake of `_engine.Stream`."""

    def __init__(self, model: _Model, prompt: list[int], chat: _Chat | None, sampling: dict[str, Any]) -> None:
        self.seed: int = int.from_bytes(os.urandom(4)) if sampling["seed"] is None else sampling["seed"]
        self._model = model
        self._prompt = prompt
        self._prompt_tokens = len(prompt)
        self._chat = chat
        self._cached = 0  # until it starts
        self._sampling = sampling
        self._pieces: list[_engine._Piece] = []
        self._end = "stop"
        self._failure: BaseException | None = None
        self._ids: list[int] = []  # of the pieces that were read
        self._n_read = 0
        self._finish_reason: str | None = None
        self._reported = "", 0.0  # a phase, and when
        self._called = time.perf_counter()
        self._started: float | None = None
        self._first: float | None = None
        self._last = 0.0

    def play(self, chunks: list[str], failure: BaseException | None) -> None:
        """Sets the reply. Cuts it at `max_tokens`, at the context's end and at a stop string.

        Text that may be the beginning of a stop string is held back.
        """
        self._failure = failure
        stops: list[str] = self._sampling["stop"]
        room = self._model.n_ctx - self._prompt_tokens
        most = min(self._sampling["max_tokens"] or room, room)
        text, told, ids, entries = "", 0, list[int](), list["_engine._Logprob"]()
        for number, chunk in enumerate(chunks, 1):
            text += chunk
            token = self._model.token_id(chunk)
            ids.append(token)
            entries.append(_certain(token, chunk, self._sampling["top_logprobs"]))
            found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
            certain = min(found)[1] if found else _length_before_stop(text, stops)
            ended = bool(found) or number == most
            if not found and (ended or number == len(chunks)):
                certain = len(text)
            if certain > told or ended:
                self._pieces.append((text[told:certain], ids, entries if self._sampling["logprobs"] else None))
                told, ids, entries = max(told, certain), [], []
            if ended:
                self._failure = None
                self._end = "stop" if found else "length"
                break
        if ids:  # of chunks without text, at the end
            self._pieces.append(("", ids, entries if self._sampling["logprobs"] else None))

    def poll(self) -> "tuple[bool, _engine._Piece | None]":
        with self._model.changed:
            self._start()
            return (False, None) if self._seconds() > 0 else (True, self._now())

    def wait(self) -> None:
        with self._model.changed:
            if (seconds := self._seconds()) > 0:
                self._model.changed.wait(min(seconds, _POLL_INTERVAL))

    def notify(self, queue: _engine.ReadyQueue, ticket: int) -> None:
        with self._model.changed:
            self._model.call(queue, ticket, self._seconds())

    @property
    def time_left(self) -> float | None:
        timeout: float | None = self._sampling["timeout"]
        return None if timeout is None else max(self._called + timeout - time.perf_counter(), 0.0)

    def progress(self, end: bool) -> list[tuple[str, int, int | None]]:
        """The progress since the last report: at most 13 reports a second, and every phase at least once."""
        reached = ["prefill", "decode"][: 1 + (self._first is not None)]
        since, at = self._reported
        phases = reached[reached.index(since) :] if since else reached
        now = time.perf_counter()
        if now - at < _POLL_INTERVAL and len(phases) == 1 and not end:
            return []
        self._reported = phases[-1], now
        prompt, most = self._prompt_tokens, self._sampling["max_tokens"]
        counts = {
            "prefill": (prompt if self._first is not None else self._cached, prompt),
            "decode": (len(self._ids), most),
        }
        return [(phase, *counts[phase]) for phase in phases]

    def _start(self) -> None:
        if self._started is None:
            self._started = self._last = time.perf_counter()
            self._cached = self._model.cached(self._prompt)

    def _seconds(self) -> float:
        """Seconds until the next piece is ready."""
        if self._finish_reason is not None or self._model.closed or self._n_read == len(self._pieces):
            return 0
        seconds = self._last + self._model.delay - time.perf_counter()
        return seconds if self.time_left is None else min(seconds, self.time_left)

    def _now(self) -> "_engine._Piece | None":
        """The next piece, or None at the end."""
        if self._finish_reason is not None:
            return None
        if self._model.closed:
            self._finish_reason = "error"
            self._model.check()
        if self.time_left == 0:
            self._finish_reason = "timeout"
            return None
        if self._n_read < len(self._pieces):
            return self._take()
        self._finish_reason = self._end if self._failure is None else "error"
        if self._chat is not None and self._failure is None:
            self._chat.ids = [*self._prompt, *self._ids]
        if self._failure is not None:
            raise self._failure
        return None

    def _take(self) -> "_engine._Piece":
        self._last = time.perf_counter()
        self._first = self._first or self._last
        piece = self._pieces[self._n_read]
        self._n_read += 1
        self._ids += piece[1]
        return piece

    def cancel(self) -> None:
        with self._model.changed:
            if self._finish_reason is None:
                self._finish_reason = "cancelled"
            self._model.change()

    def check_process(self) -> None:
        """The fake has no threads that a fork would lose."""

    @property
    def finish_reason(self) -> str | None:
        return self._finish_reason

    @property
    def token_ids(self) -> list[int]:
        return list(self._ids)

    @property
    def usage(self) -> tuple[int, int, int, int, int]:
        return self._prompt_tokens, len(self._ids), self._cached, 0, 0

    @property
    def runs(self) -> list[int]:
        computed = len(self._ids) - (self._end == "length")  # not the last id, which no later one asked for
        return [self._prompt_tokens, max(computed, 0)]

    @property
    def timings(self) -> tuple[float, float, float, float | None, int]:
        if self._started is None or self._first is None:
            return 0.0, 0.0, 0.0, None, 0
        prefill = self._first - self._started
        return 0.0, prefill, self._last - self._first, prefill, self._n_read - 1


class _Scores:
    """The fake of `_engine.Scores`: a list for each token, so that its reader waits for several."""

    def __init__(self, entries: "list[_engine._Logprob]", tokens: int) -> None:
        self._left = entries
        self._tokens = tokens

    def poll(self) -> "tuple[bool, list[_engine._Logprob] | None]":
        return True, [self._left.pop(0)] if self._left else None

    def wait(self) -> None:
        """Everything is ready."""

    def progress(self, end: bool) -> list[tuple[str, int, int | None]]:
        return [("prefill", self._tokens - 1, self._tokens - 1)] if end else []

    def cancel(self) -> None:
        self._left = []


def _certain(token: int, text: str, top_logprobs: int) -> "_engine._Logprob":
    """The entry of a token that is certain: its log probability is 0."""
    top = (token, text, text.encode(), 0.0)
    return (*top, [top] if top_logprobs else [])


def _length_before_stop(text: str, stops: list[str]) -> int:
    """The length of the part of a text that is not the beginning of a stop string."""
    longest = max(map(len, stops), default=1)
    for start in range(max(len(text) - longest + 1, 0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)
