"""A server in the role of the Hugging Face Hub, and of the host of its large files. Faults change its replies."""

import hashlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a64113399c2f6b8ad3e11c394733a2ddadaa7f33"


@dataclass
class Reply:
    """The reply to a request, which a fault may change."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """Break the connection after this many bytes of the body; -1: before the reply."""
    stall: int | None = None
    """Send nothing more after this many bytes of the body; -1: before the reply."""
    slow: float = 0
    """Seconds between pieces of 16 KiB."""


@dataclass(frozen=True)
class Request:
    where: str
    """`"hub"`, or `"cdn"`: the host of the large files."""
    method: str
    path: str
    headers: dict[str, str]


Fault = Callable[[Reply, Request], object]


@dataclass
class _Rule:
    where: str
    method: str
    fault: Fault
    times: int | None


class FakeHub:
    """One repository, `org/model`, at one commit."""

    repo = "org/model"

    def __init__(self, files: dict[str, bytes], tls: ssl.SSLContext | None = None) -> None:
        self.files = files
        self.requests: list[Request] = []
        self.sent = 0
        """Bytes that the second host has sent."""
        self._changed = threading.Condition()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._servers = {where: self._serve(where, tls) for where in ("hub", "cdn")}
        scheme = "https" if tls else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._servers['hub'].server_port}"
        self.cdn = f"{scheme}://localhost:{self._servers['cdn'].server_port}"

    def _serve(self, where: str, tls: ssl.SSLContext | None) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self, "where": where}))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def close(self) -> None:
        self._end.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def break_with(self, fault: Fault, where: str = "cdn", method: str = "GET", times: int | None = 1) -> None:
        """Lets `fault` change this many replies from now on; None: all."""
        self._rules.append(_Rule(where, method, fault, times))

    def mend(self) -> None:
        self._rules.clear()

    def forget(self) -> None:
        """Restarts the counts of requests and bytes."""
        self.requests.clear()
        self.sent = 0

    def until_sent(self, size: int) -> None:
        """Waits until the second host has sent this many bytes."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.sent >= size, timeout=20)

    def add_sent(self, size: int) -> None:
        with self._changed:
            self.sent += size
            self._changed.notify_all()

    def count(self, where: str = "cdn", method: str = "GET") -> int:
        return sum((request.where, request.method) == (where, method) for request in self.requests)

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def reply(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            reply = self._hub(request) if request.where == "hub" else self._cdn(request)
            for rule in self._rules:
                if (rule.where, rule.method) == (request.where, request.method) and rule.times != 0:
                    if rule.times is not None:
                        rule.times -= 1
                    rule.fault(reply, request)
                    break
        return reply

    def _hub(self, request: Request) -> Reply:
        path = unquote(urlsplit(request.path).path)
        if path.startswith(f"/api/models/{self.repo}/revision/"):
            return self._listing()
        prefix = f"/{self.repo}/resolve/"
        if not path.startswith(prefix):
            return Reply(404, {"x-error-code": "RepoNotFound"})
        revision, _, name = path.removeprefix(prefix).partition("/")
        if revision not in ("main", "v1", COMMIT):
            return Reply(404, {"x-error-code": "RevisionNotFound"})
        if name not in self.files:
            return Reply(404, {"x-error-code": "EntryNotFound", "x-repo-commit": COMMIT})
        content = self.files[name]
        if not name.endswith(".gguf"):
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return _ranged(content, request, {"x-repo-commit": COMMIT, "etag": f'"{git}"'})
        return Reply(
            302,
            {
                "location": f"{self.cdn}/{self.sha256(name)}?Signature=secret",
                "x-repo-commit": COMMIT,
                "x-linked-etag": f'"{self.sha256(name)}"',
                "x-linked-size": str(len(content)),
            },
            b"Found. Redirecting",
        )

    def _listing(self) -> Reply:
        siblings = [
            {"rfilename": name, "size": len(content), "lfs": {"sha256": self.sha256(name), "size": len(content)}}
            for name, content in self.files.items()
        ]
        return Reply(
            200, {"content-type": "application/json"}, json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
        )

    def _cdn(self, request: Request) -> Reply:
        wanted = urlsplit(request.path).path.removeprefix("/")
        for name, content in self.files.items():
            if self.sha256(name) == wanted:
                return _ranged(content, request, {"etag": '"of-the-cdn"', "content-type": "application/octet-stream"})
        return Reply(404)


def _ranged(content: bytes, request: Request, headers: dict[str, str]) -> Reply:
    wanted = request.headers.get("range")
    if wanted is None:
        return Reply(200, headers, content)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if int(first) >= len(content):
        return Reply(416, {"content-range": f"bytes */{len(content)}"})
    part = content[int(first) : int(last) + 1 if last else None]
    end = int(first) + len(part) - 1
    return Reply(206, {**headers, "content-range": f"bytes {first}-{end}/{len(content)}"}, part)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Says nothing: clients that disconnect belong to the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    where: str

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.hub.reply(Request(self.where, self.command, self.path, headers))
        if self._stops(reply, -1):
            return
        self.send_response_only(reply.status)
        for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        for end in sorted({*range(0, len(reply.body), 1 << 14), len(reply.body), reply.cut or 0, reply.stall or 0}):
            piece = reply.body[sent : max(end, sent)]
            self.wfile.write(piece)
            sent += len(piece)
            self.hub.add_sent(len(piece) if self.where == "cdn" else 0)
            if self._stops(reply, sent) or self.hub._end.wait(reply.slow):
                return

    def _stops(self, reply: Reply, sent: int) -> bool:
        if reply.stall == sent:
            self.hub._end.wait(30)
        elif reply.cut != sent:
            return False
        self.close_connection = True
        if reply.cut == sent:  # a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return True

    do_GET = do_HEAD = _answer


class FakeProxy:
    """A proxy for CONNECT and for SOCKS 5, which may require a password or refuse to connect."""

    def __init__(self, *, password: str | None = None, refuse: bool = False) -> None:
        self.password = password
        self.refuse = refuse
        self.targets: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        head = client.recv(2)
        if head[:1] == b"\5":
            client.recv(head[1])
            client.sendall(b"\5\0")  # no password
            _, _, _, kind = client.recv(4)
            host = client.recv(client.recv(1)[0]).decode() if kind == 3 else socket.inet_ntoa(client.recv(4))
            (port,) = struct.unpack(">H", client.recv(2))
            self.targets.append(f"{host}:{port}")
            self._tunnel(client, host, port, b"\5\0\0\1" + bytes(6))
            return
        while b"\r\n\r\n" not in head:
            piece = client.recv(4096)
            if not piece:
                return
            head += piece
        target = head.split()[1].decode()
        self.targets.append(target)
        if self.refuse:
            client.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        elif self.password and f"Basic {self.password}".encode() not in head:
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        else:
            host, _, port = target.rpartition(":")
            self._tunnel(client, host, int(port), b"HTTP/1.1 200 Connection established\r\n\r\n")
        client.close()

    def _tunnel(self, client: socket.socket, host: str, port: int, done: bytes) -> None:
        with client, socket.create_connection((host, port)) as server:
            client.sendall(done)
            back = threading.Thread(target=_pipe, args=(server, client), daemon=True)
            back.start()
            _pipe(client, server)
            back.join()


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def wrong_contents(cache: Path) -> list[Path]:
    """Files with a final name whose content has another checksum."""
    wrong = []
    for path in cache.rglob("blobs/*"):
        content = path.read_bytes()
        sums = {hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        if not path.name.endswith(".incomplete") and path.name not in sums:
            wrong.append(path)
    return wrong
