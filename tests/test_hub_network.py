"""Connections to the Hub: certificates, proxies, and the scope of the token."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from candle_phi import DownloadError, hub
from fake_hub import FakeHub, FakeProxy

CONTENT = b"GGUF" + bytes(300_000)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server(authority: trustme.CA) -> Iterator[FakeHub]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    server = FakeHub({"model.gguf": CONTENT}, context)
    yield server
    server.close()


@pytest.fixture
def home(server: FakeHub, use: Callable[[FakeHub], Path]) -> Path:
    return use(server)


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> Path:
    folder = tmp_path / "certificates"
    folder.mkdir()
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def trusted(certificate: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return home


@pytest.fixture
def proxy() -> Iterator[FakeProxy]:
    proxy = FakeProxy()
    yield proxy
    proxy.close()


def fetched() -> bool:
    return hub.download("org/model", "model.gguf").read_bytes() == CONTENT


def test_an_unknown_authority(home: Path, server: FakeHub) -> None:
    with pytest.raises(
        DownloadError,
        match=r"127\.0\.0\.1: TLS certificate rejected: unknown issuer.*SSL_CERT_FILE.*browser and give its path",
    ) as raised:
        fetched()
    assert raised.value.host == "127.0.0.1"
    assert server.requests == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
def test_an_authority_of_ones_own(
    home: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(certificate.parent if variable == "SSL_CERT_DIR" else certificate))
    assert fetched()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n"])
def test_invalid_certificates(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, content: str | None
) -> None:
    path = tmp_path / "some" / "bundle.pem"
    path.parent.mkdir()
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(variable, str(path.parent if variable == "SSL_CERT_DIR" else path))
    with pytest.raises(DownloadError, match=variable):
        fetched()


def test_a_given_authority_replaces_the_others(
    home: Path, server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(other))
    with pytest.raises(DownloadError, match=r"unknown issuer.*REQUESTS_CA_BUNDLE"):
        fetched()


def test_a_certificate_of_another_host(
    authority: trustme.CA, certificate: Path, use: Callable[[FakeHub], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("elsewhere.org").configure_cert(context)
    server = FakeHub({"model.gguf": CONTENT}, context)
    use(server)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1: TLS certificate rejected: .*not valid for name"):
        fetched()
    server.close()


def test_never_from_https_to_http(trusted: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.break_with(lambda reply, _: reply.headers.__setitem__("location", "http://127.0.0.1:9/x"), where="hub")
    with pytest.raises(DownloadError, match="redirects from https to http"):
        fetched()


def test_another_port_is_another_host(trusted: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cdn = server.cdn.replace("localhost", "127.0.0.1")
    server.break_with(
        lambda reply, _: reply.headers.__setitem__("location", f"{cdn}/{server.sha256('model.gguf')}"),
        where="hub",
        times=None,
    )
    assert fetched()
    sent = {(request.where, request.headers.get("authorization")) for request in server.requests}
    assert sent == {("hub", "Bearer hf_secret"), ("cdn", None)}


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy(trusted: Path, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    assert fetched()
    assert {target.split(":")[0] for target in proxy.targets} == {"127.0.0.1", "localhost"}


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_socks_proxy(trusted: Path, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://{proxy.address}")
    assert fetched()
    hosts = {target.split(":")[0] for target in proxy.targets}
    # h: the proxy resolves names
    assert hosts == ({"127.0.0.1", "localhost"} if scheme == "socks5h" else {"127.0.0.1"})


def test_the_systems_proxy(trusted: Path, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": f"http://{proxy.address}"})
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert fetched()
    assert {target.split(":")[0] for target in proxy.targets} == {"127.0.0.1"}
    hub.remove("org/model")
    proxy.targets.clear()
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: host == "127.0.0.1")
    assert fetched()
    assert proxy.targets == []


@pytest.mark.parametrize("direct", ["*", "127.0.0.1,localhost", "127.0.0.0/8 localhost"])
def test_no_proxy(trusted: Path, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch, direct: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    monkeypatch.setenv("NO_PROXY", direct)
    assert fetched()
    assert proxy.targets == []


def test_a_proxy_with_a_password(trusted: Path, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.password = "dXNlcjpwQHNz"  # user:p@ss
    for address in (proxy.address, f"user:wrong@{proxy.address}"):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
        with pytest.raises(
            DownloadError, match=rf"http://{proxy.address} \(set by HTTPS_PROXY\).*127\.0\.0\.1.*407.*USER:PASSWORD"
        ) as raised:
            fetched()
        assert "wrong" not in str(raised.value)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:p%40ss@{proxy.address}")
    assert fetched()


def test_a_proxy_that_refuses(trusted: Path, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.refuse = True
    monkeypatch.setenv("https_proxy", f"http://user:secret@{proxy.address}")
    with pytest.raises(
        DownloadError, match=rf"{proxy.address} \(set by https_proxy\) refuses.*127\.0\.0\.1.*403.*NO_PROXY.*browser"
    ) as raised:
        fetched()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://127.0.0.1:9", "cannot be reached"),
        ("http://nowhere.invalid:3128", r"cannot resolve the proxy http://nowhere\.invalid:3128"),
        ("socks5h://nowhere.invalid", r"cannot resolve the proxy socks5h://nowhere\.invalid"),
        ("::nonsense::", "not the URL of a proxy"),
        ("ftp://host", "not the URL of a proxy"),
    ],
)
def test_an_invalid_proxy(trusted: Path, monkeypatch: pytest.MonkeyPatch, address: str, problem: str) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(DownloadError, match=f"{problem}.*ALL_PROXY|ALL_PROXY.*{problem}") as raised:
        fetched()
    assert address in str(raised.value)


def test_a_firewall_that_blocks_the_redirect(
    trusted: Path, proxy: FakeProxy, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall may allow the Hub, and not the host of its large files."""
    proxy.refuse = True
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DownloadError, match=r"refuses to connect to localhost.*127\.0\.0\.1.*browser") as raised:
        fetched()
    assert raised.value.host == "localhost"
