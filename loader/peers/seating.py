"""What a node answers about itself, and to those who want to read from it.

A reader asks with the fingerprint of what it wants, where it knows that. It is refused where it
would never get all of it: by another model, by a rank's slice, by a node that takes its own bytes
from it, and by one that has less than it has already. The last two are what keeps nodes that look
for another source in mid-load from feeding each other in a circle.
"""

from __future__ import annotations

import json
import re

from coldframe.loader.errors import RequestError, SourceBusy, SourceChanged, SourceError
from coldframe.loader.peers.answers import Refusal, whole_answer
from coldframe.loader.peers.http import (
    AVOID_HEADER,
    CHECKPOINT_HEADER,
    DONE_HEADER,
    NODE,
    READERS,
    SERVES_HEADER,
    Answer,
    Request,
)
from coldframe.loader.peers.node import CHOOSING, FAILED, LOADED, Node

__all__ = ["about_node"]

_NODE_ID = re.compile(r"[0-9a-f]{32}")
_SERVES = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]*):([0-9]{1,5})")
_MOST_AVOIDED = 64


def about_node(request: Request, node: Node, host: str) -> Answer | None:
    """The answer to a request about a node and its readers.

    Args:
        request: The request; its token has been looked at.
        node: This one.
        host: The address that it came from.

    Returns:
        None where it is about something else.

    Raises:
        Refusal: It is not granted.
        RequestError: It makes no sense.
    """
    if request.target == NODE:
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, RequestError("a node can only be asked"), Allow="GET, HEAD")
        return whole_answer(json.dumps(node.to_wire()).encode())
    if not request.target.startswith(READERS):
        return None
    reader = request.target.removeprefix(READERS)
    if _NODE_ID.fullmatch(reader) is None:
        raise RequestError("this is no node", expected="32 hexadecimal digits", got=reader[:40])
    if request.method == "DELETE":
        node.seats.leave(reader)
        return whole_answer(b"{}")
    if request.method != "PUT":
        raise Refusal(405, RequestError("a seat is taken or left"), Allow="PUT, DELETE")
    return _seat(request, node, reader, host)


def _seat(request: Request, node: Node, reader: str, host: str) -> Answer:
    if reader == node.id:
        raise Refusal(409, SourceError("this is the node itself"), state="self")
    if reader in node.via:
        raise Refusal(409, SourceError("this node takes its weights from that one"), state="cycle")
    wanted, ours = request.headers.get(CHECKPOINT_HEADER.lower()), node.fingerprint
    if wanted is not None and ours is not None and wanted != ours:
        what = "the peer serves another model, or another version of it"
        raise Refusal(412, SourceChanged(what, expected=wanted, got=ours))
    state = node.state
    if state == FAILED:
        raise Refusal(503, SourceError("the peer could not load the model itself"), state="failed")
    if state == CHOOSING:
        busy = SourceBusy("the peer has not found its own source yet")
        raise Refusal(503, busy, state="choosing", Retry_After="1")
    if not node.whole:
        raise Refusal(409, SourceError("the peer has only a slice of the weights"), state="slice")
    _check_ahead(request, node, state)
    serves = _serves(request.headers.get(SERVES_HEADER.lower()), host)
    other = node.seats.take(reader, serves, _avoided(request))
    if other is not None:
        body = json.dumps({"ask": other.serves, "node": other.node}).encode()
        return whole_answer(body, 307, Location=f"http://{other.serves}{request.target}")
    via = [*node.via, node.id]
    return whole_answer(json.dumps({**node.to_wire(), "via": via}).encode())


def _check_ahead(request: Request, node: Node, state: str) -> None:
    """Refuses a reader that is in mid-load and has as much as there is here."""
    text = request.headers.get(DONE_HEADER.lower())
    if text is None:
        return
    if not text.isascii() or not text.isdigit():
        raise RequestError("this is no number of bytes", where=DONE_HEADER)
    if state != LOADED and node.progress.done <= int(text):
        error = SourceError("the peer has no more of it than whoever asks")
        raise Refusal(409, error, state="behind")


def _serves(text: str | None, host: str) -> str | None:
    """`HOST:PORT` where a reader serves; the host is that of its connection where it gives none."""
    if text is None:
        return None
    found = _SERVES.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise RequestError("nobody can be served there", where=SERVES_HEADER, got=text[:100])
    host = host.removeprefix("::ffff:")
    own = f"[{host}]" if ":" in host else host
    return f"{found[1] or own}:{found[2]}"


def _avoided(request: Request) -> set[str]:
    text = request.headers.get(AVOID_HEADER.lower(), "")
    found = [part.strip() for part in text.split(",") if part.strip()]
    if len(found) > _MOST_AVOIDED or not all(_NODE_ID.fullmatch(part) for part in found):
        raise RequestError("these are no nodes", where=AVOID_HEADER)
    return set(found)
