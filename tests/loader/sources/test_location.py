from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

import coldframe.loader
from coldframe.loader.errors import RequestError
from coldframe.loader.sources.location import (
    MODEL_FORMS,
    S3,
    Directory,
    Http,
    Hub,
    Location,
    Peer,
    parse_location,
)


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "location", "uri"),
    [
        ("/models/llama", Directory("/models/llama"), "/models/llama"),
        ("./org/name", Directory("./org/name"), "./org/name"),
        ("../name", Directory("../name"), "../name"),
        ("~/llama", Directory("/home/somebody/llama"), "/home/somebody/llama"),
        ("llama", Directory("llama"), "llama"),
        ("a/b/c", Directory("a/b/c"), "a/b/c"),
        ("org/name/", Directory("org/name/"), "org/name/"),
        ("org/na--me", Directory("org/na--me"), "org/na--me"),
        ("org/name@", Directory("org/name@"), "org/name@"),
        ("org/name@../../x", Directory("org/name@../../x"), "org/name@../../x"),
        ("file:///models/a%20b", Directory("/models/a b"), "/models/a b"),
        ("file://localhost/models", Directory("/models"), "/models"),
        ("org/name", Hub("org/name", "main"), "hf://org/name"),
        ("Qwen/Qwen3-0.6B", Hub("Qwen/Qwen3-0.6B"), "hf://Qwen/Qwen3-0.6B"),
        ("org/name@v1.0", Hub("org/name", "v1.0"), "hf://org/name@v1.0"),
        ("org/name@refs/pr/3", Hub("org/name", "refs/pr/3"), "hf://org/name@refs/pr/3"),
        ("hf://org/name", Hub("org/name"), "hf://org/name"),
        ("hf://gpt2", Hub("gpt2"), "hf://gpt2"),
        ("hf://models/org/name@a%2Fb", Hub("org/name", "a/b"), "hf://org/name@a/b"),
        ("s3://bucket", S3("bucket", ""), "s3://bucket"),
        ("s3://bucket/", S3("bucket", ""), "s3://bucket"),
        ("s3://my.bucket/a/b c?#%/", S3("my.bucket", "a/b c?#%"), "s3://my.bucket/a/b c?#%"),
        ("S3://bucket/a//b", S3("bucket", "a//b"), "s3://bucket/a//b"),
        ("peer://node-1:7070", Peer("node-1", 7070), "peer://node-1:7070"),
        ("peer://[::1]:7070/", Peer("::1", 7070), "peer://[::1]:7070"),
    ],
)
def test_what_a_model_is(text: str, location: Location, uri: str) -> None:
    found = parse_location(text)
    assert found == location
    assert found.uri == str(found) == uri


@pytest.mark.parametrize(
    ("text", "origin", "target", "uri"),
    [
        ("http://host", ("http", "host", 80), "/", "http://host"),
        ("HTTPS://Host/dir/", ("https", "host", 443), "/dir/", "https://host/dir"),
        ("https://host:443/dir", ("https", "host", 443), "/dir", "https://host/dir"),
        ("http://host:8080/a b/%C3%BC", ("http", "host", 8080), "/a%20b/%C3%BC", None),
        ("http://[::1]:80/ü", ("http", "::1", 80), "/%C3%BC", "http://[::1]/%C3%BC"),
        ("http://bücher.example/", ("http", "xn--bcher-kva.example", 80), "/", None),
        ("https://host/d?sig=a%2Bb&x=1#part", ("https", "host", 443), "/d?sig=a%2Bb&x=1", None),
    ],
)
def test_urls(text: str, origin: tuple[str, str, int], target: str, uri: str | None) -> None:
    found = parse_location(text)
    assert isinstance(found, Http)
    assert found.url.origin == origin
    assert found.url.target == target
    if uri is not None:
        assert found.uri == str(found) == uri


def test_what_is_there_is_a_directory(empty_directory: Path) -> None:
    for name in ("org/name", "org/name@v1", "~x"):
        (empty_directory / name).mkdir(parents=True)
        assert parse_location(name) == Directory(name)
    (empty_directory / "org" / "file").touch()  # its own error says that it is no directory
    assert parse_location("org/file") == Directory("org/file")
    (empty_directory / "org" / "link").symlink_to("nowhere")
    assert parse_location("org/link") == Directory("org/link")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no MODEL"),
        ("a\0b", "no MODEL"),
        ("ftp://host/x", "scheme is not known"),
        ("gcs://bucket/x", "scheme is not known"),
        ("gs://bucket/x", "S3 interface"),
        ("s3://", "name of a bucket"),
        ("s3:///key", "name of a bucket"),
        ("http://", "host name"),
        ("http:///path", "host name"),
        ("http://a..b/", "host name"),
        ("http://a b/", "host name"),
        ("http://host:0x50/", "port"),
        ("http://host:70000/", "port"),
        ("http://[::1/", "cannot be parsed"),
        ("peer://host", "no peer"),
        ("peer://host:0", "no peer"),
        ("peer://host:65536", "no peer"),
        ("peer://::1:80", "no peer"),
        ("peer://host:80/path", "no peer"),
        ("peer://a..b:80", "no peer"),
        ("hf://a/b/c", "no repository"),
        ("hf://a/b@", "no repository"),
        ("hf://a/b@../c", "no repository"),
        ("hf://datasets/a/b", "no repository"),
        ("file://host/x", "another machine"),
    ],
)
def test_what_no_model_is(text: str, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        parse_location(text)


def test_an_unknown_scheme_is_told_which_are_known() -> None:
    with pytest.raises(RequestError) as error:
        parse_location("ftp://host/x")
    for scheme in ("file://", "s3://", "http://", "https://", "hf://", "peer://"):
        assert scheme in str(error.value)
    assert error.value.hint == MODEL_FORMS


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host/dir",
        "https://hunter2@host/dir",
        "https://user:hunter%32@host/dir?sig=hunter2#hunter2",
        "http://host/dir?X-Amz-Signature=hunter2",
    ],
)
def test_what_is_secret_in_a_url_is_not_shown(text: str) -> None:
    found = parse_location(text)
    assert isinstance(found, Http)
    for shown in (str(found), repr(found), found.uri, str(found.url), repr(found.url)):
        assert "hunter" not in shown
        assert "user" not in shown
        assert "aHVudGVyM" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host:port/",
        "https://user:hunter2/x@host/",  # a password with a slash that is not quoted
        "https://user:hunter2@[::1/",
        "https://user:hunter2@a..b/",
        "https://user:hunter2@ho\u2100st/",
        "ftp://user:hunter2@host/",
        "s3://hunter2:hunter2@bucket/prefix",
        "gs://hunter2:hunter2@bucket/prefix",
        "peer://hunter2@host:80",
        "hf://user:hunter2@org/name",
        "file://user:hunter2@host/dir",
    ],
)
def test_what_may_be_secret_is_in_no_error(text: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_location(text)
    chain: BaseException | None = error.value
    while chain is not None:
        assert "hunter" not in f"{chain!s} {chain!r}"
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


names = st.text(st.sampled_from("aZ0._-/é "), min_size=1, max_size=8)


@given(names, names)
def test_ids_are_what_the_hub_takes_for_one(org: str, name: str) -> None:
    text = f"{org}/{name}"
    try:
        validate_repo_id(text)
        valid = not text.startswith(("/", "./", "../"))
    except HFValidationError:
        valid = False
    assert isinstance(parse_location(text), Hub) is valid


def test_nothing_slow_is_imported_for_it() -> None:
    root = Path(coldframe.loader.__path__[0]).parent
    code = f"""
import sys
package = type(sys)("coldframe")
package.__path__ = [{str(root)!r}]
sys.modules["coldframe"] = package
from coldframe.loader.sources.location import parse_location
parse_location("org/name")
slow = ("urllib.parse", "http.client", "ssl", "socket", "email", "asyncio", "json")
print([name for name in slow if name in sys.modules])
"""
    # Without the site module: what finds an editable installation imports some of them itself.
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
