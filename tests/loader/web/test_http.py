from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from coldframe.loader.errors import (
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
    SourceProtocol,
)
from coldframe.loader.sources.location import Http, parse_location
from coldframe.loader.web.address import Again, Refusal
from coldframe.loader.web.http import HttpAddress
from coldframe.loader.web.redirects import FoundTarget, Redirects
from coldframe.loader.web.url import Url
from tests.loader.web.asking import ask, refusal
from tests.loader.web.reading import read_model, sharded_model, weights_of
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx

NAME = "config.json"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFRAME_HTTP_TOKEN", raising=False)


def address(text: str) -> HttpAddress:
    location = parse_location(text)
    assert isinstance(location, Http)
    return HttpAddress(location)


def refused(found: HttpAddress, status: int, headers: dict[str, str] | None = None) -> Again:
    return found.refused(refusal(found, found.target(NAME, {}), status, headers))


@pytest.mark.parametrize(
    ("text", "name", "path", "uri"),
    [
        ("http://host", "a", "/a", "http://host/a"),
        ("http://host/", "a", "/a", "http://host/a"),
        ("http://host/x/y/", "a", "/x/y/a", "http://host/x/y/a"),
        ("http://host/x?sig=a%2Fb&c", "a", "/x/a?sig=a%2Fb&c", "http://host/x/a"),
        ("http://host/x", "ü ?#%.json", "/x/%C3%BC%20%3F%23%25.json", None),
    ],
)
def test_a_file_is_below_the_url(text: str, name: str, path: str, uri: str | None) -> None:
    found = address(text)
    target = found.target(name, {"Range": "bytes=0-9"})
    assert (target.scheme, target.host, target.port, target.path) == ("http", "host", 80, path)
    assert target.headers["Range"] == "bytes=0-9"
    assert "Authorization" not in target.headers
    if uri is not None:
        assert found.uri_of(name) == uri


@pytest.mark.parametrize(
    ("text", "token", "sent"),
    [
        ("https://user:p%40ss@host/x", None, "Basic dXNlcjpwQHNz"),
        ("https://user@host/x", None, "Basic dXNlcjo="),
        ("https://user:p%40ss@host/x", "TOKEN", "Basic dXNlcjpwQHNz"),
        ("https://host/x", "TOKEN", "Bearer TOKEN"),
        ("https://host/x", " TOKEN\n", "Bearer TOKEN"),
        ("https://host/x", "TOKEN@Host", "Bearer TOKEN"),
        ("https://host/x", "TOKEN@other", None),
        ("https://host/x", "", None),
    ],
)
def test_credentials(
    text: str, token: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is not None:
        monkeypatch.setenv("COLDFRAME_HTTP_TOKEN", token)
    assert address(text).target(NAME, {}).headers.get("Authorization") == sent


@pytest.mark.parametrize("token", ["TOP SECRET", "SECRET\r\nX: 1", "SECRETÜ"])
def test_a_token_that_no_header_can_hold(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_HTTP_TOKEN", token)
    with pytest.raises(SourceCredentials) as error:
        address("https://host/x")
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (400, SourceError, "status 400 Bad Request"),
        (401, SourceCredentials, "COLDFRAME_HTTP_TOKEN"),
        (403, SourceDenied, "status 403 Forbidden"),
        (404, SourceNotFound, "config.json is in"),
        (407, SourceCredentials, "HTTPS_PROXY"),
        (410, SourceNotFound, "status 410 Gone"),
        (418, SourceError, "status 418"),
        (599 - 100, SourceError, "status 499"),
    ],
)
def test_what_a_refusal_means(status: int, kind: type[SourceError], text: str) -> None:
    with pytest.raises(SourceError, match=text) as error:
        refused(address("http://host/x"), status)
    assert type(error.value) is kind
    assert error.value.where == "http://host/x/config.json, bytes 0-99"


def test_credentials_that_are_refused_are_named_by_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SourceCredentials, match="those of the URL"):
        refused(address("https://user:pw@host"), 401)
    monkeypatch.setenv("COLDFRAME_HTTP_TOKEN", "TOKEN")
    with pytest.raises(SourceCredentials, match="does not take the token of COLDFRAME_HTTP_TOKEN"):
        refused(address("https://host"), 401)


def test_a_signature_that_is_refused_may_have_expired() -> None:
    with pytest.raises(SourceDenied, match="signature may have expired"):
        refused(address("https://host/x?sig=1"), 403)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520])
def test_what_passes_is_asked_again(status: int) -> None:
    again = refused(address("http://host/x"), status)
    assert again.after_s is None
    assert not again.at_once
    assert again.slow_down is (status in (429, 503))
    assert str(status) in again.why


def test_retry_after() -> None:
    found = address("http://host/x")
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    past = "Fri, 31 Dec 1999 23:59:59 GMT"
    for text, least, most in [("17", 17, 17), (" 3 ", 3, 3), (soon, 30, 40), (past, 0, 0)]:
        after_s = refused(found, 503, {"retry-after": text}).after_s
        assert after_s is not None
        assert least <= after_s <= most
    for text in ("soon", "-1", "", "1e9"):
        assert refused(found, 503, {"retry-after": text}).after_s is None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_and_remembered(status: int) -> None:
    found = address("https://user:pw@host/x")
    again = refused(found, status, {"location": "https://cdn:444/y/z?sig=a%2Bb"})
    assert again.at_once
    target = found.target(NAME, {"Range": "bytes=0-9"})
    assert (target.host, target.port, target.path) == ("cdn", 444, "/y/z?sig=a%2Bb")
    assert target.headers["Range"] == "bytes=0-9"
    assert "Authorization" not in target.headers
    other = found.target("other", {})
    assert (other.host, other.path) == ("host", "/x/other")
    assert other.headers["Authorization"].startswith("Basic")


@pytest.mark.parametrize(
    ("location", "host", "path", "credentials"),
    [
        ("/y/z", "host", "/y/z", True),
        ("z?q=1", "host", "/x/z?q=1", True),
        ("//other/z", "other", "/z", False),
        ("https://HOST/z", "host", "/z", True),
        ("https://host:444/z", "host", "/z", False),
        ("https://host.other/z", "host.other", "/z", False),
        ("https://other@cdn/z", "cdn", "/z", False),
    ],
)
def test_where_a_redirect_leads(location: str, host: str, path: str, credentials: bool) -> None:
    found = address("https://user:pw@host/x")
    refused(found, 302, {"location": location})
    target = found.target(NAME, {})
    assert (target.host, target.path) == (host, path)
    assert ("Authorization" in target.headers) is credentials


def test_credentials_follow_to_https_of_the_same_host_alone() -> None:
    for location, credentials in [("https://host/x", True), ("https://host:8443/x", False)]:
        found = address("http://user:pw@host/x")
        refused(found, 301, {"location": location})
        assert ("Authorization" in found.target(NAME, {}).headers) is credentials


@pytest.mark.parametrize(
    ("headers", "what"),
    [
        ({}, "does not say where"),
        ({"location": "http://host/x"}, "from https to http"),
        ({"location": "ftp://host/SECRET"}, "neither http nor https"),
        ({"location": "file:///etc/SECRET"}, "neither http nor https"),
        ({"location": "https://SECRET:SECRET"}, "port"),
        ({"location": "https://[SECRET"}, "cannot be parsed"),
    ],
)
def test_redirects_that_are_not_followed(headers: dict[str, str], what: str) -> None:
    with pytest.raises(SourceProtocol, match=what) as error:
        refused(address("https://host/x"), 302, headers)
    assert "SECRET" not in str(error.value)


def test_redirects_end() -> None:
    found = address("https://host/x")
    for hop in range(5):
        assert refused(found, 302, {"location": f"/{hop}"}).at_once
    with pytest.raises(SourceProtocol, match="again and again"):
        refused(found, 302, {"location": "/6"})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Walk:
    """Requests for one file, and what is said of each."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.links = 0
        self.redirects = Redirects(
            lambda name: Url("https", "host", 443, f"/{name}"), clock=self.clock
        )

    def ask(self) -> FoundTarget:
        return self.redirects.target(NAME, lambda url: {})

    def refuse(
        self, status: int, target: FoundTarget | None = None, location: str = ""
    ) -> Again | None:
        headers = {"location": location} if location else {}
        target = target or self.ask()
        return self.redirects.again(Refusal(status, "", headers, b"", target, "it"))

    def redirect(self, target: FoundTarget | None = None) -> None:
        self.links += 1
        again = self.refuse(302, target, f"https://cdn/{self.links}")
        assert again is not None
        assert again.at_once

    def is_home(self) -> bool:
        return self.ask().host == "host"


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_link_that_has_expired_is_asked_for_anew(status: int) -> None:
    walk = Walk()
    for _ in range(3):
        walk.redirect()
        walk.clock.now += 3600
        again = walk.refuse(status)
        assert again is not None
        assert again.at_once
        assert walk.is_home()


def test_a_new_link_that_is_refused_is_refused() -> None:
    walk = Walk()
    walk.redirect()
    assert walk.refuse(403) is not None  # it may have been given out by a cache
    walk.redirect()
    assert walk.refuse(403) is None
    walk.clock.now += 3600
    assert walk.refuse(403) is not None


def test_a_refusal_at_the_first_place_stands() -> None:
    walk = Walk()
    assert walk.refuse(403) is None
    walk.redirect()
    for status in (400, 412, 416, 429, 500):
        assert walk.refuse(status) is None
        assert not walk.is_home()


def test_what_another_thread_has_found_stays() -> None:
    walk = Walk()
    first, second = walk.ask(), walk.ask()
    walk.redirect(first)
    walk.redirect(second)  # comes late: the first link is as good
    old = walk.ask()
    assert old.path == "/1"
    walk.clock.now += 3600
    assert walk.refuse(403, old) is not None
    walk.redirect()
    new = walk.ask()
    assert walk.refuse(403, old) is not None
    assert walk.ask().place is new.place


def test_many_threads_over_links_that_expire() -> None:
    """Whatever they do at once, each gets to a link that is good, in a few requests."""
    good = [0]
    lock = threading.Lock()
    clock = Clock()
    redirects = Redirects(lambda name: Url("https", "host", 443, f"/{name}"), clock=clock)

    def read(_: int) -> int:
        for requests in range(1, 50):
            target = redirects.target(NAME, lambda url: {})
            with lock:
                clock.now += 20
                if target.host == "host":
                    status, headers = 302, {"location": f"https://cdn/{good[0]}"}
                elif target.path == f"/{good[0]}":
                    return requests
                else:
                    status, headers = 403, {}
            assert redirects.again(Refusal(status, "", headers, b"", target, "it")) is not None
        raise AssertionError("never")

    with ThreadPoolExecutor(12) as pool:
        for expiry in range(20):
            good[0] = expiry
            assert max(pool.map(read, range(50))) < 30


def test_nothing_secret_is_in_any_error_or_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_HTTP_TOKEN", "TOKEN-SECRET")
    base64 = "VVNFUi1TRUNSRVQ6UFctU0VDUkVU"  # of USER-SECRET:PW-SECRET
    secrets = {"location": "https://USER-SECRET:PW-SECRET@cdn/SECRET?sig=SECRET", "x": "SECRET"}
    for text in (
        "https://USER-SECRET:PW-SECRET@host/x?sig=QUERY-SECRET",
        "https://host/x?sig=QUERY-SECRET",
    ):
        shown = []
        for redirected in (False, True):
            for status in range(300, 600):
                found = address(text)
                if redirected:
                    refused(found, 302, secrets)
                    refused(found, 403, secrets)
                    refused(found, 302, secrets)
                target = found.target(NAME, {})
                said = refusal(found, target, status, secrets, b"SECRET SECRET")
                shown += [repr(found), repr(target), found.uri, found.uri_of(NAME)]
                try:
                    shown.append(repr(found.refused(said)))
                except SourceError as error:
                    shown += [str(error), repr(error), str(error.to_wire())]
        assert len(shown) > 3000
        text = "\n".join(shown)
        assert "SECRET" not in text
        assert base64 not in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / NAME).write_bytes(bytes(range(256)))
    return tmp_path


def test_a_real_server(folder: Path) -> None:
    with nginx(folder) as base:
        found = address(f"{base}/model")
        answer = ask(found, NAME, {"Range": "bytes=10-19"})
        assert (answer.status, answer.body) == (206, bytes(range(10, 20)))
        with pytest.raises(SourceNotFound) as error:
            ask(found, "no.json", {"Range": "bytes=10-19"})
        assert f"{base}/model/no.json" in str(error.value)


def test_a_real_server_with_a_password(folder: Path) -> None:
    (folder / "users").write_text("user:{PLAIN}p@ss word\n")
    extra = f'auth_basic "x"; auth_basic_user_file "{folder}/users";'
    with nginx(folder, extra=extra) as base:
        with pytest.raises(SourceCredentials, match="Give them as"):
            ask(address(f"{base}/model"), NAME)
        wrong = base.replace("//", "//user:wrong@")
        with pytest.raises(SourceCredentials, match="does not take those of the URL"):
            ask(address(f"{wrong}/model"), NAME)
        right = base.replace("//", "//user:p%40ss%20word@")
        assert ask(address(f"{right}/model"), NAME).body == bytes(range(256))


def test_a_real_redirect_goes_without_the_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_HTTP_TOKEN", "TOKEN")
    with nginx(folder) as base, FaultProxy(base) as other:
        moved = f'location /old/ {{ return 302 "{other.url}/model/$arg_name"; }}'
        with nginx(folder, extra=moved) as first, FaultProxy(first) as server:
            found = address(f"{server.url}/old?name={NAME}")
            for part in (slice(0, 10), slice(10, 20)):
                answer = ask(found, NAME, {"Range": f"bytes={part.start}-{part.stop - 1}"})
                assert answer.body == bytes(range(256))[part]
            assert [len(server.log), len(other.log)] == [1, 2]  # it is remembered
            assert server.log[0].headers["authorization"] == "Bearer TOKEN"
            assert all("authorization" not in seen.headers for seen in other.log)

            other.faults = [Fault(status=403)]  # the link has expired
            assert ask(found, NAME).body == bytes(range(256))
            assert [len(server.log), len(other.log)] == [2, 4]

            other.faults = lambda seen: Fault(status=403)
            with pytest.raises(SourceDenied, match=f"from {other.url}, where it was redirected"):
                ask(found, NAME)
            assert len(server.log) == 2  # a link just given out has not expired


# -- whole checkpoints, through the reader


def test_a_checkpoint_over_http(tmp_path: Path) -> None:
    model = sharded_model(tmp_path / "a model")
    with nginx(tmp_path) as base:
        checkpoint, found = read_model(f"{base}/a%20model/")
        assert checkpoint.config == {"model_type": "x"}
        assert checkpoint.path == f"{base}/a%20model"
        assert found == weights_of(model)
        with pytest.raises(SourceNotFound, match=f"{base}/no/config.json"):
            read_model(f"{base}/no")


def test_a_checkpoint_behind_a_password_and_redirects(tmp_path: Path) -> None:
    model = sharded_model(tmp_path / "model")
    (tmp_path / "users").write_text("user:{PLAIN}PW-SECRET\n")
    guard = f'auth_basic "x"; auth_basic_user_file "{tmp_path}/users";'
    with nginx(tmp_path) as base, FaultProxy(base) as cdn:
        moved = (
            guard
            + f"location ~ /model/(.*safetensors)$ {{ {guard}"
            + f' return 302 "{cdn.url}/model/$1?sig=SIG-SECRET"; }}'
        )
        with nginx(tmp_path, extra=moved) as server:
            url = server.replace("//", "//user:PW-SECRET@") + "/model?key=KEY-SECRET"
            seen = set()

            def script(request: Request) -> Fault | None:
                """The first link to each file has expired before it is used."""
                if request.path in seen:
                    return None
                seen.add(request.path)
                return Fault(status=403, body=b"SIG-SECRET")

            cdn.faults = script
            checkpoint, found = read_model(url)
            assert found == weights_of(model)
            assert {f"/model/{name}?sig=SIG-SECRET" for name in found} <= seen
            assert "SECRET" not in repr(checkpoint)
            assert all("authorization" not in request.headers for request in cdn.log)
            assert all("KEY-SECRET" not in request.path for request in cdn.log)

            cdn.faults = lambda request: Fault(status=403, body=b"SIG-SECRET")
            with pytest.raises(SourceDenied) as error:
                read_model(url)
            assert "SECRET" not in f"{error.value} {error.value!r} {error.value.to_wire()}"
            with pytest.raises(SourceCredentials) as error2:
                read_model(url.replace("PW-", "WRONG-"))
            assert "SECRET" not in f"{error2.value} {error2.value!r}"
