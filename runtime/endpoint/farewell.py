"""A gateway without a replica: there is none to be had, and clients get to know why."""

from __future__ import annotations

import os
import socket
import time

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.wire import Channel
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.start.early import GatewayProcess

__all__ = ["turn_away"]

_SECONDS = 2.0
"""How long clients are told. Most have come while the gateway was still imported."""


def turn_away(
    gateway: GatewayProcess,
    listeners: list[socket.socket],
    settings: GatewaySettings,
    error: ColdframeError,
) -> None:
    """Has a gateway tell clients why there never was a replica to answer them; then ends it.

    Args:
        gateway: Its process, as it was started.
        listeners: The bound ports. They are closed.
        settings: What the gateway is told.
        error: Why.
    """
    channel = Channel(gateway.socket)
    state = LoadState(phase="failed", stage=None, error=error.to_wire())
    told = {"type": "settings", "settings": settings.to_wire(), "parent": os.getpid()}
    try:
        channel.send(told, tuple(listener.fileno() for listener in listeners))
        for model in settings.models:
            channel.send({"type": "state", "model": model, **state.to_wire()})
        time.sleep(_SECONDS)
    except ReplicaError:
        pass  # it is dead as well, and nobody can be told
    finally:
        channel.close()
        gateway.child.kill()
        for listener in listeners:
            listener.close()
