"""A rehearsal's client: knocks until somebody listens, and takes the time of the first token."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from coldframe.loader.errors import PlatformError

__all__ = ["ask", "first_token_ns", "free_port", "knock"]

_KNOCK_S = 0.001


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def knock(
    port: int, process: subprocess.Popen[bytes], patience_s: float
) -> http.client.HTTPConnection:
    """A connection, as soon as somebody listens.

    Args:
        port: On loopback.
        process: Who is to listen there.
        patience_s: For how long to try; and how long anything may take on the connection then.

    Raises:
        PlatformError: Nobody does.
    """
    until = time.monotonic() + patience_s
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience_s)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            if process.poll() is not None or time.monotonic() > until:
                raise PlatformError(
                    "a rehearsal's endpoint is not there", got=str(error)
                ) from error
            time.sleep(_KNOCK_S)
        else:
            assert connection.sock is not None
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def first_token_ns(
    connection: http.client.HTTPConnection, model: str, prompt: Sequence[int], tokens: int
) -> int:
    """Asks for an answer of so many tokens; when its first event was there (CLOCK_MONOTONIC).

    Raises:
        PlatformError: It was refused.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        # Else the first event may be the second token's: some tokens are no whole character.
        "return_token_ids": True,
    }
    head = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body).encode(), head)
    answer = connection.getresponse()
    line = b""
    while not line.startswith(b"data: {"):
        line = answer.readline()
        if not line or answer.status != http.client.OK:
            raise PlatformError(
                "a rehearsal's request was refused", got=f"{answer.status} {line!r}"
            )
    first = time.monotonic_ns()
    answer.read()
    return first


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> Any:
    """The JSON document that is answered, or None where it is none.

    Raises:
        PlatformError: It was refused.
    """
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != http.client.OK:
        raise PlatformError("a rehearsal's request was refused", got=f"{answer.status} {body!r}")
    return json.loads(body) if body.startswith(b"{") else None
