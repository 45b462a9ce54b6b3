"""Faults between the Hub and the disk.

Each case ends in the right file or in one clear exception, and never in a wrong file with its final name. The next
call, without faults, always ends in the right file."""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from candle_phi import DownloadError, hub
from fake_hub import FakeHub, Fault, Reply, Request, wrong_contents

CONTENT = random.Random(1).randbytes(1_000_003)
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HTML = b"<!DOCTYPE html><html><body>Welcome to the hotel's network</body></html>"


def cut(at: float) -> Fault:
    """Reset after this share of the content; -1: before any answer."""
    return lambda reply, _: setattr(reply, "cut", -1 if at < 0 else int(at * SIZE))


def stall(at: float) -> Fault:
    return lambda reply, _: setattr(reply, "stall", -1 if at < 0 else int(at * SIZE))


def status(code: int, **headers: str) -> Fault:
    def fault(reply: Reply, _: Request) -> None:
        reply.status, reply.body = code, b"" if code == 204 else b"an error page"
        reply.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    return fault


def header(name: str, value: str) -> Fault:
    """This header, or without it if `value` is empty."""
    return lambda reply, _: reply.headers.__setitem__(name, value)


def body(content: bytes, **headers: str) -> Fault:
    def fault(reply: Reply, _: Request) -> None:
        reply.status, reply.body = 200, content
        reply.headers |= {name.replace("_", "-"): value for name, value in headers.items()} | {"content-range": ""}

    return fault


def shifted(reply: Reply, _: Request) -> None:
    """Another part of the file than requested."""
    reply.headers["content-range"] = f"bytes 7-{SIZE - 1}/{SIZE}"


def dropped_then(fault: Fault) -> tuple[Fault, Fault]:
    return cut(0.5), fault


FLIPPED = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
WHOLE = body(CONTENT)
HUGE = header("x-linked-size", str(10**15))


@dataclass(frozen=True)
class Case:
    name: str
    faults: tuple[Fault, ...]
    """One reply each; the last one again and again if `forever`."""
    error: str | None = None
    """A pattern in the message; None: the file arrives."""
    status: int | None = None
    where: str = "cdn"
    method: str = "GET"
    forever: bool = False
    left: bytes = b""
    """The incomplete file of an earlier call."""


def ok(name: str, *faults: Fault, where: str = "cdn", method: str = "GET", left: bytes = b"") -> Case:
    return Case(name, faults, where=where, method=method, left=left)


def bad(name: str, fault: Fault, error: str, code: int | None = None, where: str = "cdn", method: str = "GET") -> Case:
    return Case(name, (fault,), error, code, where, method, forever=True)


CASES = [
    # the connection
    *[ok(f"drop at {share:.0%}", cut(share)) for share in (0, 0.01, 0.5, 0.99)],
    ok("drop at the first byte", cut(1 / SIZE)),
    ok("drop at the last byte", lambda reply, _: setattr(reply, "cut", SIZE - 1)),
    ok("drop at 100%", cut(1)),
    ok("drop before the answer", cut(-1)),
    ok("drop five times", *[cut(share) for share in (0.1, 0.1, 0.1, 0.1, 0.1)]),
    ok("drop before the answer of HEAD", cut(-1), where="hub", method="HEAD"),
    ok("drop before the redirect", cut(-1), where="hub"),
    bad("drop at 0% always", cut(0), "connection broke"),
    bad("drop before every answer", cut(-1), "localhost: the connection broke"),
    bad("drop after every byte", cut(1 / SIZE), "connection broke at .* of 1000003 bytes"),
    bad("drop before every answer of HEAD", cut(-1), "127.0.0.1", where="hub", method="HEAD"),
    ok("silence in the middle", stall(0.5)),
    ok("silence before the answer", stall(-1)),
    ok("silence at HEAD", stall(-1), where="hub", method="HEAD"),
    bad("silence always", stall(-1), "does not answer within"),
    bad("silence at HEAD always", stall(-1), "does not answer within", where="hub", method="HEAD"),
    # ranges
    ok("a Range answered with everything", *dropped_then(WHOLE)),
    ok("416 to a Range", *dropped_then(status(416))),
    ok("a Range answered with another part", *dropped_then(shifted)),
    ok("a Range answered with another size", *dropped_then(header("content-range", "bytes 500001-999999/1000000"))),
    ok("a Range answered without Content-Range", *dropped_then(header("content-range", ""))),
    ok("a Range answered with nonsense", *dropped_then(header("content-range", "bytes x-y/z"))),
    ok("a Range that is dropped too", cut(0.2), cut(0.2), cut(0.2)),
    bad("416 without a Range", status(416), "416", 416),
    # statuses
    *[ok(f"{code} once", status(code)) for code in (408, 429, 500, 502, 503, 504)],
    *[ok(f"{code} once at HEAD", status(code), where="hub", method="HEAD") for code in (408, 429, 500, 502, 503, 504)],
    *[ok(f"{code} once at the redirect", status(code), where="hub") for code in (429, 503)],
    ok("429 with Retry-After", status(429, retry_after="1")),
    ok("503 with Retry-After at HEAD", status(503, retry_after="1"), where="hub", method="HEAD"),
    bad("429 with no time to wait, always", status(429, retry_after="0"), "answers 429", 429),
    bad("429 with an hour to wait", status(429, retry_after="3600"), "429.*3600 s", 429),
    ok("429 with a date to wait for", status(429, retry_after="Sun, 22 Nov 2026 20:00:00 GMT")),
    *[bad(f"{code} always", status(code), f"answers {code}", code) for code in (400, 401, 403, 404, 410, 429, 503)],
    *[
        bad(f"{code} at HEAD", status(code), f"answers {code}", code, "hub", "HEAD")
        for code in (401, 404, 410, 429, 500, 503)
    ],
    *[bad(f"{code} at the redirect", status(code), f"answers {code}", code, "hub") for code in (401, 403, 404, 500)],
    bad("no content", status(204), "answers 204: no content", 204),
    bad("no such repository", status(401, x_error_code="RepoNotFound"), "private.*HF_TOKEN", 401, "hub", "HEAD"),
    bad("gated", status(403, x_error_code="GatedRepo"), "terms.*HF_TOKEN", 403, "hub", "HEAD"),
    bad("no such revision", status(404, x_error_code="RevisionNotFound"), "no such revision", 404, "hub", "HEAD"),
    bad("no such file", status(404, x_error_code="EntryNotFound"), r"no such file.*model\.gguf", 404, "hub", "HEAD"),
    # contents
    bad("a login page with 200", body(HTML, content_type="text/html"), "text/html.*login page", 200),
    bad("a login page at HEAD", status(200, content_type="text/html"), "is not a Hugging Face Hub", 200, "hub", "HEAD"),
    bad("an empty content", body(b""), "0 bytes", 200),
    bad("a content that is too short", body(CONTENT[:-1]), f"{SIZE - 1} bytes.*{SIZE}", 200),
    bad("a content that is too long", body(CONTENT + b"x"), f"{SIZE + 1} bytes.*{SIZE}", 200),
    bad("a wrong content", body(FLIPPED), f"checksum.*{SHA256}"),
    ok("a wrong content once after a drop", cut(0.5), lambda reply, _: setattr(reply, "body", b"\0" * len(reply.body))),
    bad("fewer bytes than announced", lambda reply, _: setattr(reply, "body", b""), "bytes"),
    # headers of HEAD
    bad("no commit", header("x-repo-commit", ""), "x-repo-commit", where="hub", method="HEAD"),
    *[
        bad(f"the commit {commit!r}", header("x-repo-commit", commit), "not a commit", where="hub", method="HEAD")
        for commit in ("../../../../outside", "main", "A" * 40, "0" * 39, "0" * 64, "/etc")
    ],
    *[
        bad(f"the etag {etag!r}", header("x-linked-etag", etag), "not a checksum", where="hub", method="HEAD")
        for etag in ('"../../outside"', "x", '"' + "0" * 63 + '"', '"' + "Z" * 64 + '"', "W/")
    ],
    ok("a weak etag", header("x-linked-etag", f'W/"{SHA256}"'), where="hub", method="HEAD"),
    bad("another file's checksum", header("x-linked-etag", f'"{"0" * 64}"'), "checksum", where="hub", method="HEAD"),
    bad("no size", header("x-linked-size", "many"), "size", where="hub", method="HEAD"),
    bad("a size that is too small", header("x-linked-size", "1000"), "1000 bytes", where="hub", method="HEAD"),
    bad("a size that is too large", header("x-linked-size", str(SIZE + 1)), "bytes", where="hub", method="HEAD"),
    bad("more than the disk holds", HUGE, "not enough disk space.*free.*HF_HUB_CACHE", where="hub", method="HEAD"),
    ok("HEAD is blocked by a firewall", status(403), where="hub", method="HEAD"),
    ok("HEAD is not implemented", status(501), where="hub", method="HEAD"),
    ok("HEAD is not allowed", status(405), where="hub", method="HEAD"),
    # redirects
    bad("a redirect in a circle", status(302, location="/self"), "more than 10 times"),
    bad("a redirect to a file", status(302, location="file:///etc/passwd"), "not an http or https URL", 302),
    bad("a redirect to nowhere", status(302, location="http://"), "not an http or https URL", 302),
    bad("a redirect without a target", status(302), "answers 302: a redirect without a target", 302),
    bad("a redirect at HEAD in a circle", status(302, location="?"), "10 times", where="hub", method="HEAD"),
    bad("an unknown host", status(302, location="http://nowhere.invalid/x"), r"cannot resolve nowhere\.invalid"),
    ok("a redirect with a URL in its query", status(302, location=f"/{SHA256}?from=https://elsewhere.invalid/x")),
    ok("a redirect to another folder", status(302, location=f"x/../{SHA256}")),
    bad("a host that refuses", status(302, location="http://127.0.0.1:9/x"), "cannot be reached"),
    # files of earlier calls
    ok("half of it is there", left=CONTENT[: SIZE // 2]),
    ok("all of it is there, without its name", left=CONTENT),
    ok("more than all of it is there", left=CONTENT + b"x" * 1000),
    ok("something else is there", left=bytes(SIZE // 2)),
    ok("something else of the same size is there", left=bytes(SIZE)),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    server = FakeHub({"model.gguf": CONTENT})
    yield server
    server.close()


@pytest.fixture
def cache(server: FakeHub, use: Callable[[FakeHub], Path]) -> Path:
    return use(server)


def test_there_are_at_least_sixty_faults() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(case: Case, server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.forever and (case.status in (429, 500, 503) or re.search("always|every", case.name)):  # with retries
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    for i, fault in enumerate(case.faults):
        forever = case.forever and i == len(case.faults) - 1
        server.break_with(fault, case.where, case.method, None if forever else 1)
    if case.left:
        blobs = cache / "hub" / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{SHA256}.incomplete").write_bytes(case.left)
    if case.error is None:
        assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT
    else:
        with pytest.raises(DownloadError, match=case.error) as raised:
            hub.download("org/model", "model.gguf")
        assert "\n" not in str(raised.value)
        assert "Signature" not in f"{raised.value} {raised.value.url}"
        if case.status is not None:
            assert raised.value.status == case.status
        assert hub.cached("org/model", "model.gguf") is None
    assert wrong_contents(cache) == []
    assert not list(cache.parent.glob("outside*"))
    assert server.count("hub", "HEAD") + server.count() < 20
    server.mend()
    assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT
    assert wrong_contents(cache) == []
    assert [path.name for path in cache.rglob("*.incomplete")] in ([], [f"{'0' * 64}.incomplete"])


WRONG = bytes([CONTENT[0] ^ 1]) + CONTENT[1:-1] + bytes([CONTENT[-1] ^ 1])
"""It differs from the content at both ends."""
BREAKS = {"no break": (), "a break in each pass": (0.5,), "breaks at several places": (0.7, 0.3, 0.5, 0.4)}
LEFT = {
    "nothing left": b"",
    "half of it left": CONTENT[: SIZE // 2],
    "half of something else left": bytes(SIZE // 2),
    "all of something else left": bytes(SIZE),
    "too much left": CONTENT + b"x",
}


@pytest.mark.parametrize("content", [CONTENT, WRONG], ids=["right", "wrong"])
@pytest.mark.parametrize("ranges", ["kept", "ignored", "refused", "shifted"])
@pytest.mark.parametrize("breaks", BREAKS)
@pytest.mark.parametrize("left", LEFT)
def test_faults_in_combination(
    content: bytes,
    ranges: str,
    breaks: str,
    left: str,
    server: FakeHub,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that has the wrong bytes, breaks each pass and handles ranges its own way is left after two attempts."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5")
    shares = itertools.cycle(BREAKS[breaks])

    def fault(reply: Reply, request: Request) -> None:
        first = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first and ranges == "refused":
            status(416)(reply, request)
            return
        if first and ranges == "ignored":
            first = 0
            body(content)(reply, request)
        elif first and ranges == "shifted":
            shifted(reply, request)
        reply.body = content[first:]
        if first == 0 and BREAKS[breaks]:
            reply.cut = int(next(shares) * SIZE)

    server.break_with(fault, times=None)
    if LEFT[left]:
        blobs = cache / "hub" / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{SHA256}.incomplete").write_bytes(LEFT[left])
    try:
        arrived = hub.download("org/model", "model.gguf").read_bytes()
    except DownloadError as error:
        message = str(error)
        damaged = rf"model\.gguf arrived damaged.*in attempt [12]: its checksum is [0-9a-f]{{64}}, .* says {SHA256}"
        other = r"(cannot resume|sends the range|has no bytes from).*\(attempt 2\)"
        assert re.search(damaged if content == WRONG and ranges == "kept" else f"{damaged}|{other}", message), message
        assert content == WRONG or (breaks != "no break" and ranges != "kept"), message
    else:
        assert content == arrived == CONTENT
    assert server.count() <= 4
    assert server.sent <= 3 * SIZE
    assert wrong_contents(cache) == []
    server.mend()
    assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT


def test_bytes_are_not_fetched_twice(server: FakeHub, cache: Path) -> None:
    blobs = cache / "hub" / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{SHA256}.incomplete").write_bytes(CONTENT[:-1000])
    assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT
    assert server.sent == 1000
    server.forget()
    (cache / "hub" / "models--org--model" / "blobs" / SHA256).rename(blobs / f"{SHA256}.incomplete")
    assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT
    assert (server.sent, server.count()) == (0, 0)


def test_a_wrong_content_of_one_response_is_fetched_once(server: FakeHub, cache: Path) -> None:
    server.break_with(status(503))
    server.break_with(body(FLIPPED), times=None)
    with pytest.raises(DownloadError, match=r"arrived damaged.*in attempt 1"):
        hub.download("org/model", "model.gguf")
    assert server.count() == 2


def test_a_wrong_part_is_not_read(server: FakeHub, cache: Path) -> None:
    def slowly(reply: Reply, request: Request) -> None:
        shifted(reply, request)
        reply.slow = 0.005

    server.break_with(cut(0.5))
    server.break_with(slowly)
    assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT
    assert server.count() == 3
    assert server.sent < 1.75 * SIZE  # half of it, a little of the wrong part, and all of it again


def test_a_broken_link_is_replaced(cache: Path, server: FakeHub) -> None:
    path = hub.download("org/model", "model.gguf")
    path.resolve().unlink()
    assert hub.cached("org/model", "model.gguf") is None
    assert hub.download("org/model", "model.gguf").read_bytes() == CONTENT
