"""New connections: TLS, proxies, and servers that are not there."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from coldframe.loader.errors import (
    PlatformError,
    SourceBusy,
    SourceProtocol,
    SourceUnreachable,
    SourceUntrusted,
)
from coldframe.loader.throttle import Throttle
from tests.loader.web.reader_kit import (
    FAST,
    SHORT,
    nothing_left,
    read_range,
    reader_of,
    write_random,
)
from tests.loader.web.servers import Fault, FaultProxy, nginx

SIZE = 300_000


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_random(tmp_path / "file", SIZE)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def leaf(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("127.0.0.1", "localhost")


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def https(tmp_path: Path, content: bytes, leaf: trustme.LeafCert) -> Iterator[str]:
    with nothing_left(), nginx(tmp_path, tls=leaf) as base:
        yield base


def test_tls_with_an_authority_of_ones_own(https: str, content: bytes, ca_file: str) -> None:
    with reader_of(https, ca_file=ca_file) as reader:
        opening = reader.open("file", 100)
        assert read_range(reader, opening, 5, SIZE - 5) == content[5:]
    with reader_of(https, ca_file=lambda: ca_file) as reader:
        assert reader.open("file").data == content


def test_tls_with_ssl_cert_file(
    https: str, content: bytes, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    with reader_of(https) as reader:
        assert reader.open("file").data == content


def test_tls_in_small_pieces(https: str, content: bytes, ca_file: str) -> None:
    with reader_of(https, ca_file=ca_file, throttle=Throttle(1e9)) as reader:
        opening = reader.open("file", 100)
        assert read_range(reader, opening, 0, SIZE) == content


def test_an_unknown_authority(https: str) -> None:
    with reader_of(https) as reader, pytest.raises(SourceUntrusted, match="SSL_CERT_FILE"):
        reader.open("file")


def test_a_certificate_for_another_host(
    tmp_path: Path, content: bytes, authority: trustme.CA, ca_file: str
) -> None:
    other = authority.issue_cert("other.example")
    with (
        nothing_left(),
        nginx(tmp_path, tls=other) as base,
        reader_of(base, ca_file=ca_file) as reader,
        pytest.raises(SourceUntrusted, match="127"),
    ):
        reader.open("file")


def test_certificates_that_cannot_be_read(https: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    with reader_of(https, ca_file=missing) as reader, pytest.raises(PlatformError, match="missing"):
        reader.open("file")


def test_a_server_without_tls(tmp_path: Path, content: bytes) -> None:
    with nothing_left(), nginx(tmp_path) as base:
        url = base.replace("http:", "https:")
        with reader_of(url) as reader, pytest.raises(SourceProtocol, match="TLS"):
            reader.open("file")


def test_http_spoken_to_a_server_with_tls(https: str) -> None:
    url = https.replace("https:", "http:")
    with reader_of(url) as reader, pytest.raises(Exception, match="400"):
        reader.open("file")


@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_faults_over_tls(
    tmp_path: Path, content: bytes, leaf: trustme.LeafCert, ca_file: str, kind: str
) -> None:
    faults = {
        "cut": Fault(cut_after=100_000),
        "reset": Fault(reset_after=100_000),
        "stall": Fault(stall_after=100_000),
    }
    with (
        nothing_left(),
        nginx(tmp_path) as base,
        FaultProxy(base, tls=leaf) as proxy,
        reader_of(proxy.url, ca_file=ca_file) as reader,
    ):
        opening = reader.open("file", 100)
        proxy.faults = [faults[kind]]
        assert read_range(reader, opening, 0, 250_000) == content[:250_000]
        first, again = (request.range for request in proxy.log[1:])
        assert first == (0, 249_999)
        # A record of TLS whose end did not come is lost as a whole.
        assert again is not None
        assert 100_000 - 16_384 <= again[0] <= 100_000


def test_cancelling_over_tls(
    tmp_path: Path, content: bytes, leaf: trustme.LeafCert, ca_file: str
) -> None:
    limits = replace(FAST, stall_s=60.0, patience_s=60.0)
    failed: list[BaseException] = []
    with (
        nothing_left(),
        nginx(tmp_path) as base,
        FaultProxy(base, tls=leaf) as proxy,
        reader_of(proxy.url, limits, ca_file=ca_file) as reader,
    ):
        opening = reader.open("file", 100)
        proxy.faults = [Fault(stall_after=100_000)]

        def read() -> None:
            try:
                read_range(reader, opening, 0, 250_000)
            except Exception as error:  # noqa: BLE001 - looked at below
                failed.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        while len(proxy.log) < 2 or proxy.log[1].sent < 100_000:
            threading.Event().wait(0.01)
        reader.cancel()
        thread.join(10)
        assert "given up" in str(failed[0])


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/m?key=SECRET"
        with reader_of(url, SHORT) as reader, pytest.raises(SourceUnreachable) as caught:
            reader.open("file")
    assert "refused the connection" in str(caught.value)
    assert "attempts" in str(caught.value)
    assert not isinstance(caught.value, SourceBusy)
    assert "SECRET" not in str(caught.value)


def test_a_server_that_comes_up_late(tmp_path: Path, content: bytes) -> None:
    """A refused connection is no reason to give up: whoever serves may be starting, too."""
    with socket.socket() as listener, nginx(tmp_path) as base:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with FaultProxy(base) as proxy:
            moved = Fault(status=302, headers={"Location": f"{proxy.url}/file"})

            def answer() -> None:
                listener.listen()
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    location = moved.headers["Location"]
                    head = f"HTTP/1.1 302 x\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
                    connection.sendall(head.encode())

            timer = threading.Timer(0.1, answer)
            timer.start()
            with reader_of(url) as reader:
                assert reader.open("file").data == content
                assert reader.counters.retries > 0
            timer.join()


def test_an_unknown_host_is_told_at_once() -> None:
    url = "http://nobody.invalid/m"
    with reader_of(url, SHORT) as reader:
        with pytest.raises(SourceUnreachable, match=r"nobody\.invalid") as caught:
            reader.open("file")
        # Where there is no network, no resolver can say that it knows no such name.
        assert reader.counters.retries == 0 or "Temporary failure" in str(caught.value)


def test_an_http_proxy(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        nothing_left(),
        nginx(tmp_path) as base,
        FaultProxy("http://unused") as proxy,
        reader_of(base) as reader,
    ):
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:PW%21@"))
        opening = reader.open("file", 100)
        assert read_range(reader, opening, 0, SIZE) == content
        assert len(proxy.log) == 2
        assert proxy.log[0].path == f"{base}/file"
        assert proxy.log[0].headers["host"] == base.removeprefix("http://")
        assert proxy.log[0].headers["proxy-authorization"] == "Basic bWU6UFch"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with reader_of(base) as direct:
            assert direct.open("file").data == content
        assert len(proxy.log) == 2


def test_a_tunnel_for_https(
    https: str, content: bytes, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy("http://unused") as proxy, reader_of(https, ca_file=ca_file) as reader:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:PW@"))
        opening = reader.open("file", 100)
        assert read_range(reader, opening, 0, SIZE) == content
        (request,) = proxy.log
        assert request.method == "CONNECT"
        assert request.path == https.removeprefix("https://")
        assert request.headers["proxy-authorization"] == "Basic bWU6UFc="


def test_a_proxy_that_refuses(https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy("http://unused") as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:SECRET@"))
        proxy.faults = [Fault(status=407)]
        with reader_of(https) as reader, pytest.raises(SourceProtocol) as caught:
            reader.open("file")
        assert "407" in str(caught.value)
        assert "SECRET" not in str(caught.value)
        proxy.faults = lambda request: Fault(status=502)
        with (
            reader_of(https, SHORT) as reader,
            pytest.raises(SourceUnreachable, match="502"),
        ):
            reader.open("file")


def test_a_proxy_of_an_unknown_kind(https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:SECRET@127.0.0.1:1")
    with reader_of(https) as reader, pytest.raises(PlatformError) as caught:
        reader.open("file")
    assert "SECRET" not in str(caught.value)


def test_the_system_trusts_no_made_up_authority() -> None:
    """What the tests above rest on: without `ca_file` the default context is used."""
    assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED
