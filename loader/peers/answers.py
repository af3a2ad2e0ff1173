"""What a peer gets for a request, whatever connection it came by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol
from urllib.parse import unquote

from coldframe.loader.checkpoints.checkpoint import Shard
from coldframe.loader.errors import (
    ColdframeError,
    RequestError,
    SourceBusy,
    SourceChanged,
    SourceCredentials,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.peers.http import (
    CHECKPOINT_HEADER,
    FILES,
    PLAN,
    PLAN_HEADER,
    SHARDS,
    TOKEN_VARIABLE,
    Answer,
    ByteRange,
    Request,
    matches,
    parse_range,
)
from coldframe.loader.peers.serving import Offer

__all__ = ["About", "Refusal", "Wait", "answer", "busy", "whole_answer"]

About = Callable[[Request], Answer | None]
"""Answers what is asked about the node itself; None where something else is asked for."""

_MAX_FILE_BYTES = 100 << 20  # as much as an index may have
# What a start needs beside weights is named so. Whatever else is in the directory is nobody's.
_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_RETRY_S = "1"
_BYTES = "application/octet-stream"


class Wait(Protocol):
    """Waits until something is there."""

    def __call__(self, there: Callable[[float], bool], *, planned: bool = True) -> bool:
        """Waits as long as the client may have to.

        Args:
            there: Says whether it is there, after a number of seconds at most.
            planned: Whether it is known what is served. Until then we may be waiting for that
                client ourselves, so it hears soon that there is nothing yet.

        Returns:
            Whether it is.
        """
        ...


class Refusal(Exception):
    """Carries an answer that says no."""

    def __init__(
        self, status: int, error: ColdframeError, *, state: str | None = None, **headers: str
    ) -> None:
        super().__init__(status)
        wire = error.to_wire() if state is None else {**error.to_wire(), "state": state}
        self.answer = whole_answer(json.dumps(wire).encode(), status, **headers)


def answer(
    request: Request,
    bearer: bytes | None,
    offered: Callable[[float], Offer | None],
    wait: Wait,
    about: About = lambda request: None,
) -> Answer:
    """The answer to a request.

    Args:
        request: The request.
        bearer: What `Authorization` must be, or None.
        offered: What is served; waits for it so many seconds at most.
        wait: Waits as long as the client may have to.
        about: Asked first.

    Raises:
        Refusal: It is not granted.
        RequestError: It makes no sense.
    """
    _check_bearer(request, bearer)
    told = about(request)
    if told is not None:
        return told
    target = request.target
    if target != PLAN and not target.startswith((FILES, SHARDS)):
        raise Refusal(404, SourceNotFound("there is nothing of that name"))
    if request.method not in ("GET", "HEAD"):
        raise Refusal(405, RequestError("peers only read"), Allow="GET, HEAD")
    offer: Offer | None = None

    def known(timeout: float) -> bool:
        nonlocal offer
        offer = offered(timeout)
        return offer is not None

    _until(wait, known, planned=False)
    assert offer is not None
    if target == PLAN:
        return whole_answer(json.dumps(offer.to_wire()).encode())
    _check_expected(request, offer)
    if target.startswith(FILES):
        return _file(request, offer, unquote(target.removeprefix(FILES)))
    shard = offer.shards.get(unquote(target.removeprefix(SHARDS)))
    if shard is None:
        raise Refusal(404, SourceNotFound("the checkpoint has no such shard"))
    return _shard(request, offer, shard, wait)


def busy() -> Refusal:
    """For one connection too many."""
    error = SourceBusy("the peer has as many connections as it takes")
    return Refusal(503, error, state="busy", Retry_After=_RETRY_S)


def _until(wait: Wait, there: Callable[[float], bool], *, planned: bool = True) -> None:
    try:
        if wait(there, planned=planned):
            return
    except ColdframeError as error:
        raise Refusal(503, error, state="failed") from None
    loading = SourceBusy("the peer is still loading itself")
    raise Refusal(503, loading, state="loading", Retry_After=_RETRY_S)


def _check_bearer(request: Request, bearer: bytes | None) -> None:
    if bearer is None:
        return
    import hmac

    given = request.headers.get("authorization", "").encode("latin-1")
    if not hmac.compare_digest(given, bearer):
        error = SourceCredentials("this is not the token of the peer", where=TOKEN_VARIABLE)
        raise Refusal(401, error, WWW_Authenticate="Bearer")


def _check_expected(request: Request, offer: Offer) -> None:
    """Refuses who has planned something else than what is served."""
    ours = {PLAN_HEADER: offer.plan_hash, CHECKPOINT_HEADER: offer.fingerprint}
    for header, value in ours.items():
        theirs = request.headers.get(header.lower(), value)
        if theirs != value:
            raise _another(theirs, value)


def _another(expected: str, got: str) -> Refusal:
    what = "the peer serves another model, or another version of it"
    return Refusal(412, SourceChanged(what, expected=expected, got=got))


def _file(request: Request, offer: Offer, name: str) -> Answer:
    plain = not name.startswith(".") and not set(name) & set("/\\\0")
    if not plain or not name.endswith(_FILE_SUFFIXES):
        raise Refusal(404, SourceNotFound("peers get no file of that name"))
    try:
        data = offer.read_small(name, _MAX_FILE_BYTES)
    except SourceNotFound as error:
        raise Refusal(404, error) from None
    except ColdframeError as error:
        raise Refusal(503, error, state="failed") from None
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    part, head = _part(request, len(data), tag)
    return replace(head, parts=(memoryview(data)[part.start : part.stop],))


def _shard(request: Request, offer: Offer, shard: Shard, wait: Wait) -> Answer:
    part, head = _part(request, shard.size, f'"{offer.version}"')
    if request.method == "HEAD":
        return head
    found = offer.find(shard.name, part.start, part.stop)
    if found is None:
        error = SourceError(
            "the peer has not all of these bytes in its arena",
            where=f"{shard.name}, bytes {part.start}-{part.stop - 1}",
            hint="Load from where it loads, or from a peer that has the whole model.",
        )
        raise Refusal(409, error)
    _until(wait, lambda timeout: offer.gate.wait_for(shard.name, found.needs, timeout))
    try:
        offer.fill(shard.name, found)
    except ColdframeError as error:
        raise Refusal(503, error, state="failed") from None
    return replace(head, parts=found.parts)


def _part(request: Request, size: int, tag: str) -> tuple[ByteRange, Answer]:
    """The part of a file that is asked for, and the head of the answer."""
    headers = request.headers
    if not matches(headers.get("if-match", "*"), tag):
        raise _another(headers["if-match"], tag)
    given = {"Content-Type": _BYTES, "Accept-Ranges": "bytes", "ETag": tag}
    wanted = headers.get("range")
    if request.method == "HEAD" or headers.get("if-range", tag) != tag:
        wanted = None
    part = None if wanted is None else parse_range(wanted, size)
    if part is None:
        return ByteRange(0, size), Answer(200, given, size)
    if part.start >= part.stop:
        error = RequestError("there are no such bytes", got=wanted)
        raise Refusal(416, error, Content_Range=f"bytes */{size}")
    given["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    return part, Answer(206, given, part.stop - part.start)


def whole_answer(body: bytes, status: int = 200, **headers: str) -> Answer:
    """An answer of JSON; an underscore in the name of a header is a hyphen."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"Content-Type": "application/json", **named}
    return Answer(status, given, len(body), (memoryview(body),))
