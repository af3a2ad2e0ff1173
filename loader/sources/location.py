"""What a MODEL is: a directory, or a place on a network, told by how it is written.

Nothing is asked for here but whether there is such a directory. A location may hold a password or
a signature; neither its `uri` nor its `repr` shows them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from coldframe.loader.errors import RequestError

if TYPE_CHECKING:
    from coldframe.loader.web.url import Url

__all__ = ["MODEL_FORMS", "Directory", "Http", "Hub", "Location", "Peer", "S3", "parse_location"]

MODEL_FORMS = (
    "MODEL is a directory, s3://bucket/prefix, http(s)://host/directory, peer://host:port, or a"
    " Hugging Face id: org/name or org/name@revision."
)
"""For the hint of an error that may come from a MODEL written wrong."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)

# As the hub has it: one or two words of up to 96 letters, digits, dots, hyphens and underscores.
_REPO = re.compile(r"(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)
# What git forbids in the name of a branch or a tag.
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[/.]|/\.|/$|^$")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# A colon in the host is the port's, unless there are brackets.
_HOST_AND_PORT = re.compile(r"(?:\[([^\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")


class _Shown:
    """Shown as its URI."""

    __slots__ = ()

    @property
    def uri(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True, slots=True)
class Directory(_Shown):
    """A local directory, whether it is there or not."""

    path: str

    @property
    def uri(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class S3(_Shown):
    """Objects of a bucket.

    Attributes:
        bucket: Its name.
        prefix: What the keys begin with, without slashes around it; may be empty.
    """

    bucket: str
    prefix: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"


@dataclass(frozen=True, slots=True)
class Http(_Shown):
    """Files below a URL."""

    url: Url

    @property
    def uri(self) -> str:
        return self.url.uri


@dataclass(frozen=True, slots=True)
class Hub(_Shown):
    """A repository of the Hugging Face hub.

    Attributes:
        repo: `org/name`, or a name alone.
        revision: A branch, a tag or a commit.
    """

    repo: str
    revision: str = "main"

    @property
    def uri(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf://{self.repo}{at}"


@dataclass(frozen=True, slots=True)
class Peer(_Shown):
    """Another memory service, which has the model or is loading it."""

    host: str
    port: int

    @property
    def uri(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"peer://{host}:{self.port}"


Location: TypeAlias = Directory | S3 | Http | Hub | Peer


def parse_location(text: str) -> Location:
    """Tells what a MODEL is.

    A URL is what its scheme says. Anything else is a directory if it is there or is written like
    a path; `org/name` and `org/name@revision` that are no path are Hugging Face ids.

    Args:
        text: As it was given on the command line.

    Raises:
        RequestError: No model can be written so. What may be a secret in it is not in the error.
    """
    if not text or "\0" in text:
        raise _refused("this is no MODEL", "a name", "nothing" if not text else "a zero byte")
    url = _SCHEME.match(text)
    if url is not None:
        scheme = url[1].lower()
        parse = _PARSERS.get(scheme)
        if parse is None:
            known = ", ".join(f"{name}://" for name in _PARSERS if name != "gs")
            raise _refused("this scheme is not known", known, f"{scheme}://")
        return parse(url[2])
    if os.path.lexists(text) or text.startswith(("/", "./", "../")):
        return Directory(text)
    if text.startswith("~"):
        return Directory(os.path.expanduser(text))
    repo, at, revision = text.partition("@")
    if "/" in repo and _is_repo(repo) and (not at or _is_revision(revision)):
        return Hub(repo, revision) if at else Hub(repo)
    return Directory(text)


def _http(scheme: str, rest: str) -> Http:
    from coldframe.loader.web.url import Url

    try:
        return Http(Url.parse(f"{scheme}://{rest}"))
    except ValueError as error:
        raise _refused(
            f"this URL cannot be asked: {error}", "http(s)://host[:port]/directory"
        ) from None


def _s3(rest: str) -> S3:
    # Keys may hold ? and #, so this is no URL to be parsed as one.
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise _refused(
            "this is not the name of a bucket",
            "s3://bucket/prefix",
            hint="Credentials don't go into it, but where boto3 looks for them: the environment,"
            " the profile, the role. Of an access point give the alias.",
        )
    return S3(bucket, prefix.strip("/"))


def _gs(rest: str) -> NoReturn:
    raise _refused(
        "Google Cloud Storage is read through its S3 interface",
        "s3://bucket/prefix",
        "gs://",
        hint="Set AWS_ENDPOINT_URL=https://storage.googleapis.com and an HMAC key; see"
        " docs/sources.md.",
    )


def _hub(rest: str) -> Hub:
    from urllib.parse import unquote

    repo, at, revision = rest.removeprefix("models/").partition("@")
    revision = unquote(revision)  # a slash in a branch's name may be written %2F
    if not _is_repo(repo) or (at and not _is_revision(revision)):
        raise _refused(
            "this is no repository of a model", "hf://org/name or hf://org/name@revision"
        )
    return Hub(repo, revision) if at else Hub(repo)


def _peer(rest: str) -> Peer:
    from coldframe.loader.web.url import host_name

    found = _HOST_AND_PORT.fullmatch(rest.removesuffix("/"))
    try:
        if found is not None and 0 < int(found[3]) < 65536:
            return Peer(host_name(found[1] or found[2]), int(found[3]))
    except ValueError:
        pass
    raise _refused("this is no peer", "peer://host:port or peer://[address]:port")


def _file(rest: str) -> Directory:
    from urllib.parse import unquote

    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise _refused("this file is on another machine", "file:///directory")
    return Directory("/" + unquote(path))


_PARSERS: dict[str, Callable[[str], Location]] = {
    "file": _file,
    "s3": _s3,
    "gs": _gs,
    "http": partial(_http, "http"),
    "https": partial(_http, "https"),
    "hf": _hub,
    "peer": _peer,
}


def _is_repo(text: str) -> bool:
    return (
        _REPO.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def _is_revision(text: str) -> bool:
    return _NO_REVISION.search(text) is None


def _refused(
    what: str, expected: str, got: str | None = None, hint: str | None = None
) -> RequestError:
    return RequestError(
        what, where="MODEL", expected=expected, got=got, hint=MODEL_FORMS if hint is None else hint
    )
