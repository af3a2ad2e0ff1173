"""Other machines that a model could run on: how they are named, and what is said of them.

A node is the URL of a coldframe endpoint, which is asked for `/placement`; a peer that gives
weights; or facts that whoever plans knows already. One that cannot be asked is told, and is no
reason to end. Where endpoints want a key it is in COLDFRAME_NODE_KEY, or in the file of nodes as
the name of another variable, which begins with COLDFRAME_ too: a file that somebody else has
written is not to send other secrets anywhere.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from coldframe.loader.errors import RequestError
from coldframe.runtime.units import byte_count, byte_rate

__all__ = ["KEY_VARIABLE", "PLACES", "STATES", "Node", "NodeFacts", "read_nodes"]

KEY_VARIABLE = "COLDFRAME_NODE_KEY"
_KEY_PREFIX = "COLDFRAME_"
_MOST_BYTES = 1 << 20
_MOST_NODES = 1000
_PORT = 8000
PLACES = ("memory", "page_cache", "disk", "elsewhere")
STATES = ("zero", "starting", "ready", "parked", "draining", "failed")
_FIELDS = {"name", "url", "key_env", "memory_free", "rate", "weights", "image", "state"}


@dataclass(frozen=True, slots=True)
class Node:
    """One that is named.

    Args:
        name: For people.
        url: Of an endpoint, or `peer://host:port`; None where facts alone are given.
        key_env: The variable that has its key.
        given: Facts that are known; they win over what it says.
    """

    name: str
    url: str | None
    key_env: str
    given: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is known of one.

    Args:
        name: For people.
        error: Why it could not be asked, or None.
        kind: `endpoint`, `peer` or `given`.
        state: Of the model's replica there: one of `/placement`'s; `zero` where it is not served.
        weights: Where the weights are there: `memory`, `page_cache`, `disk` or `elsewhere`.
        image: Whether workers would be restored there.
        available: Bytes of memory that nobody has, or None.
        rate: Bytes a second at which weights come there, or None.
        last_ttft_s: What its last start took, or None.
        last_tier: The tier that this was of, or None.
        last_cache: `cold` where weights were read or fetched for it, `warm` where they were mapped;
            or None.
        url: Where it is.
    """

    name: str
    error: str | None
    kind: str
    state: str = "zero"
    weights: str = "elsewhere"
    image: bool = False
    available: int | None = None
    rate: float | None = None
    last_ttft_s: float | None = None
    last_tier: str | None = None
    last_cache: str | None = None
    url: str | None = None


def read_nodes(single: Sequence[str], path: str | None) -> list[Node]:
    """The nodes that are named.

    Args:
        single: `HOST`, `HOST:PORT` or URLs.
        path: A JSON file with a list of objects: `name`, and `url` or facts (`memory_free`,
            `rate`, `weights`, `image`, `state`), and `key_env`.

    Raises:
        RequestError: One of them says nothing that could be.
    """
    nodes = [Node(text, _url(text, "--node"), KEY_VARIABLE, {}) for text in single]
    if path is not None:
        nodes += _from_file(path)
    return nodes


def _url(text: str, where: str) -> str:
    written = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(written)
        scheme, host, port, user = parts.scheme, parts.hostname, parts.port, parts.username
    except ValueError:
        scheme, host, port, user = "", None, None, None
    if user is not None:
        raise RequestError(
            "a node's URL has credentials in it",
            where=where,
            hint=f"Give its key in {KEY_VARIABLE}, or by key_env in a file of nodes.",
        )
    if scheme not in ("http", "https", "peer") or not host:
        raise RequestError(
            "this is no node",
            where=where,
            expected="HOST, HOST:PORT, http(s)://..., or peer://HOST:PORT",
            got=repr(text),
        )
    if scheme == "peer" or port is not None or "://" in text:
        return written.rstrip("/")
    return f"http://{f'[{host}]' if ':' in host else host}:{_PORT}"


def _from_file(path: str) -> list[Node]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError) as error:
        raise RequestError(
            "the nodes cannot be read", where=path, expected="a JSON list of nodes", got=str(error)
        ) from error
    if not isinstance(found, list) or len(found) > _MOST_NODES:
        raise RequestError(
            "the nodes are no list",
            where=path,
            expected=f"a JSON list of at most {_MOST_NODES} objects",
            got=type(found).__name__,
        )
    return [_node(item, f"{path}, node {number}") for number, item in enumerate(found)]


def _node(item: object, where: str) -> Node:
    if (
        not isinstance(item, dict)
        or not set(item) <= _FIELDS
        or not isinstance(item.get("name"), str)
    ):
        raise RequestError(
            "this is no node",
            where=where,
            expected=f"an object with a name, and of {', '.join(sorted(_FIELDS))}",
            got=repr(item)[:100],
        )
    given = {key: item[key] for key in item if key not in ("name", "url", "key_env")}
    try:
        if "memory_free" in given:
            given["memory_free"] = _size(given["memory_free"])
        if "rate" in given:
            rate = given["rate"]
            given["rate"] = byte_rate(rate) if isinstance(rate, str) else float(rate)
            if not given["rate"] > 0:
                raise ValueError("rate")
        sound = (
            given.get("weights", "disk") in PLACES
            and given.get("state", "zero") in STATES
            and isinstance(given.get("image", False), bool)
            and isinstance(item.get("key_env", ""), str)
            and isinstance(item.get("url", ""), str)
        )
    except (ValueError, TypeError, ArithmeticError, ArgumentTypeError) as error:
        raise _wrong(where, item) from error
    if not sound or not (item.get("url") or given):
        raise _wrong(where, item)
    url = item.get("url")
    key = item.get("key_env", KEY_VARIABLE)
    if not key.startswith(_KEY_PREFIX):
        raise RequestError(
            "a node's key is in a variable that may hold anything",
            where=where,
            expected=f"key_env with a name that begins with {_KEY_PREFIX}",
            got=repr(key)[:100],
            hint=f"Put the key into a variable of such a name, as {KEY_VARIABLE}_2.",
        )
    return Node(item["name"], None if url is None else _url(url, where), key, given)


def _wrong(where: str, item: object) -> RequestError:
    return RequestError(
        "a node's fields say nothing that could be",
        where=where,
        expected='a url or facts: memory_free "64GiB", rate "2GB/s", weights '
        f"({', '.join(PLACES)}), state ({', '.join(STATES)}), image true or false",
        got=repr(item)[:200],
    )


def _size(value: object) -> int:
    if isinstance(value, str):
        return byte_count(value)
    if type(value) is not int or value < 0:
        raise ValueError("memory_free")
    return value
