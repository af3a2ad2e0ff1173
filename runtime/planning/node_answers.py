"""What other machines say of themselves: each is asked once, for a limited time.

They may say anything: an answer that is none, too large, too slow or of another version makes one
node unreachable, and no plan fail.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import urlsplit

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.errors import ColdframeError
from coldframe.loader.sources.location import Peer, parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.machine.probe import probe
from coldframe.runtime.planning.law import CACHES
from coldframe.runtime.planning.nodes import PLACES, STATES, Node, NodeFacts

__all__ = ["WAIT_S", "ask_nodes", "facts_of"]

WAIT_S = 5.0
"""For an endpoint, from the first packet to the last."""
_PEER_S = 20.0
"""For a peer, of which a rate is probed."""
_GRACE_S = 0.5
"""What bounds a single read ends most threads in good order, a moment after that."""
_MOST_BYTES = 1 << 20
_MOST_NUMBER = 1 << 62
_CHUNK = 64 << 10
_AT_ONCE = 64
_BROKEN = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
    http.client.HTTPException,
)
"""All that an answer which is none can come to."""


def ask_nodes(nodes: Sequence[Node], fingerprint: str, wait_s: float = WAIT_S) -> list[NodeFacts]:
    """What they are, many asked at once.

    Args:
        nodes: Which ones.
        fingerprint: Of the checkpoint that is to run.
        wait_s: How long an endpoint may take for all of its answer.
    """
    found: list[NodeFacts] = []
    for first in range(0, len(nodes), _AT_ONCE):
        found += _ask_some(nodes[first : first + _AT_ONCE], fingerprint, wait_s)
    return found


def _ask_some(nodes: Sequence[Node], fingerprint: str, wait_s: float) -> list[NodeFacts]:
    answers: dict[int, NodeFacts] = {}

    def ask(index: int, node: Node) -> None:
        answers[index] = _facts(node, fingerprint, wait_s)

    # Daemons, since one that a name server or a slow peer holds is left behind, not waited for.
    threads = [
        threading.Thread(target=ask, args=item, daemon=True, name="node")
        for item in enumerate(nodes)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    found = []
    for index, (node, thread) in enumerate(zip(nodes, threads, strict=True)):
        limit = _PEER_S if _is_peer(node) else wait_s
        thread.join(max(0.0, started + limit + _GRACE_S - time.monotonic()))
        late = NodeFacts(node.name, _late(limit), _kind(node), url=node.url)
        found.append(answers.get(index, late))
    return found


def _is_peer(node: Node) -> bool:
    return node.url is not None and node.url.startswith("peer://")


def _kind(node: Node) -> str:
    return "given" if node.url is None else "peer" if _is_peer(node) else "endpoint"


def _late(limit: float) -> str:
    return f"it does not answer within {limit:g} s"


def _facts(node: Node, fingerprint: str, wait_s: float) -> NodeFacts:
    kind = _kind(node)
    try:
        if kind == "given":
            found = NodeFacts(node.name, None, kind)
        elif kind == "peer":
            found = _ask_peer(node, fingerprint)
        else:
            found = facts_of(node, _fetch(node, wait_s), fingerprint)
    except ColdframeError as error:
        return NodeFacts(node.name, f"{type(error).__name__}: {error}", kind, url=node.url)
    except TimeoutError:
        return NodeFacts(node.name, _late(wait_s), kind, url=node.url)
    except OSError as error:
        return NodeFacts(node.name, f"it cannot be reached: {error}", kind, url=node.url)
    except _BROKEN as error:
        said = f"it is no endpoint of coldframe: {type(error).__name__}: {error}"
        return NodeFacts(node.name, said[:500], kind, url=node.url)
    return _with(found, node.given) if found.error is None else found


def _with(facts: NodeFacts, given: Mapping[str, Any]) -> NodeFacts:
    names = {"memory_free": "available"}
    return replace(facts, **{names.get(key, key): value for key, value in given.items()})


class _Refused(ColdframeError):
    """It answers, and says no."""

    def __str__(self) -> str:
        return self.what


def _fetch(node: Node, wait_s: float) -> bytes:
    """What it answers to `/placement`.

    Raises:
        ColdframeError: It says no, or more than anybody would.
        OSError, HTTPException, ValueError: It cannot be reached, or talks something else.
    """
    assert node.url is not None
    until = time.monotonic() + wait_s
    parts = urlsplit(node.url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    assert parts.hostname is not None
    # Nothing here follows a redirect: a key is for this host alone.
    with closing(kind(parts.hostname, parts.port, timeout=wait_s)) as connection:
        headers = {"accept": "application/json"}
        key = os.environ.get(node.key_env)
        if key:
            headers["x-api-key"] = key
        connection.request("GET", f"{parts.path.rstrip('/')}/placement", headers=headers)
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            keys = ": it wants a key" if answer.status in (401, 403) else ""
            raise _Refused(f"it answers {answer.status} to /placement{keys}")
        body = b""
        while part := answer.read1(_CHUNK):
            body += part
            if len(body) > _MOST_BYTES:
                raise _Refused(f"it answers more than {_MOST_BYTES:,} bytes to /placement")
            if time.monotonic() > until:
                raise TimeoutError
    return body


def facts_of(node: Node, body: bytes, fingerprint: str) -> NodeFacts:
    """What a running `coldframe serve` tells; see `runtime.endpoint.whereabouts`.

    Args:
        node: Who was asked.
        body: What it answered.
        fingerprint: Of the checkpoint that is to run.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RecursionError: It is nothing of the
            kind.
    """
    models = list(json.loads(body, parse_constant=_no_number)["models"].values())
    free = [number for m in models if (number := _number(m["memory_available"])) is not None]
    facts = NodeFacts(
        node.name, None, "endpoint", available=int(min(free)) if free else None, url=node.url
    )
    for model in models:
        if model["fingerprint"] != fingerprint:
            continue
        last = model["last_start"] or {}
        return replace(
            facts,
            state=_one_of(STATES, model["state"], "state"),
            weights=_one_of(PLACES, model["weights"]["at"], "weights"),
            image=model["image"] is True,
            last_ttft_s=_number(last.get("ttft_s")),
            last_tier=_text(last.get("tier")),
            last_cache=None if last.get("cache") not in CACHES else last["cache"],
        )
    return facts


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _number(value: object) -> float | None:
    """One that can be: finite, not negative, and not beyond all machines; or None for null."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.100} is no number")
    if not 0 <= value <= _MOST_NUMBER or not math.isfinite(value):
        raise ValueError("a number is beyond all that can be")
    return value


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return value


def _one_of(known: Sequence[str], value: object, what: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"its {what} is unknown to this version: {value!r:.100}")
    return value


def _ask_peer(node: Node, fingerprint: str) -> NodeFacts:
    """Asks who gives weights, and how fast they come from there.

    Raises:
        ColdframeError: It cannot be asked.
    """
    assert node.url is not None
    place = parse_location(node.url)
    assert isinstance(place, Peer)
    with closing(open_origin(place, hurry=True)) as origin:
        checkpoint = Checkpoint.open(origin)
        if checkpoint.fingerprint != fingerprint:
            return NodeFacts(node.name, "it gives another model", "peer", url=place.uri)
        plan = Plan.build(checkpoint, layout=Layout.ALIGNED)
        rate = probe(origin, checkpoint, plan, maps=False).rate
    return NodeFacts(node.name, None, "peer", weights="memory", rate=rate, url=place.uri)
