"""A web application streams from one model while its clients connect and disconnect."""

import contextlib
import http.client
import logging
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from candle_phi import AsyncStream, Phi
from conftest import HAIKU, Stopwatch, wait_until

fastapi = pytest.importorskip("fastapi")  # not for every Python there is
uvicorn = pytest.importorskip("uvicorn")
responses = pytest.importorskip("starlette.responses")

LONG = "ice " * 900
PAD = " " * 2**20
ROUNDS = 51


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serves an application from a thread; gives its port."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", loop="asyncio", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


def ask(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def client(port: int, path: str, reset: bool) -> Iterator[socket.socket]:
    """A client that disconnects early, with or without a reset."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        yield connection
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_leave_in_prefill_in_decode_and_in_a_stalled_send(
    caplog: pytest.LogCaptureFixture, stopwatch: Stopwatch
) -> None:
    streams: list[AsyncStream] = []  # referenced, so that no stream ends by being dropped

    async def answer(request: Any) -> Any:
        options = {"ignore_eos": True} if "long" in request.query_params else {"seed": 1}
        stream = phi.astream(request.query_params["question"], **options)
        streams.append(stream)
        return responses.StreamingResponse(padded(stream) if "padded" in request.query_params else stream)

    async def padded(stream: AsyncStream) -> AsyncIterator[str]:
        async for chunk in stream:
            yield chunk + PAD

    def leave(stage: str, reset: bool) -> None:
        padding = "&padded=1" if stage == "stalled" else ""
        question = urllib.parse.quote(LONG if stage == "prefill" else HAIKU)
        with client(port, f"/?question={question}&long=1{padding}", reset) as connection:
            wait_until(lambda: streams)
            stream = streams.pop()
            if stage == "prefill":
                wait_until(lambda: stream.timings.queue_seconds > 0)
                assert stream.token_ids == []
            else:
                connection.recv(100)
                wait_until(lambda: stream.token_ids)
            if stage == "stalled":
                seen = -1
                while len(stream.token_ids) > seen:
                    seen = len(stream.token_ids)
                    time.sleep(0.03)
            assert stream.finish_reason is None
        wait_until(lambda: stream.finish_reason == "cancelled")

    app = fastapi.FastAPI()
    app.router.add_route("/", answer)
    with Phi.demo(max_concurrent=1, kernel="portable", prefix_cache=0) as phi, serving(app) as port:
        expected = phi.generate(HAIKU, seed=1)
        for i in range(ROUNDS):
            leave(("prefill", "decode", "stalled")[i % 3], reset=i % 2 == 0)
        begin = time.monotonic()
        assert ask(port, f"/?question={urllib.parse.quote(HAIKU)}") == (200, expected)
        stopwatch.check(time.monotonic() - begin, 8)  # BusyError comes after 10 s
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
