"""`--peers-from dynamo` in the front: the process that finds peers (`peers`), ordered and replaced.

It was started before the arguments were read (`early.PeersProcess`), since importing Dynamo's
runtime takes longer than all that a load does before it has to know where to read. The load waits
for its first list, but no longer than was said, and goes on without one.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from urllib.parse import quote

from coldframe.loader.errors import PlatformError, ReplicaError, RequestError
from coldframe.loader.own_address import own_address
from coldframe.loader.peers.directory import parse_peer
from coldframe.loader.process import make_run_dir, remove_run_dir
from coldframe.loader.wire import Channel
from coldframe.runtime.flags.peers import DYNAMO
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.integrations.dynamo.peers import endpoint_of
from coldframe.runtime.integrations.dynamo.settings import DynamoSettings
from coldframe.runtime.start.early import PeersProcess

__all__ = ["PeerFinder", "wait_of"]

_WAIT_S = 2.0
_MOST_WAIT_S = 3600.0
_FIRST_DELAY_S, _MOST_DELAY_S = 1.0, 5.0
_END_S = 1.5


def wait_of(place: str) -> float | None:
    """How long a load waits for peers, where a place of `--peers-from` is Dynamo's discovery.

    Args:
        place: `dynamo`, or `dynamo:SECONDS`; anything else gives None.

    Raises:
        RequestError: These are no seconds.
    """
    name, colon, text = place.partition(":")
    if name != DYNAMO:
        return None
    try:
        seconds = float(text) if colon else _WAIT_S
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _MOST_WAIT_S:
        raise RequestError(
            "this is no time to wait for peers",
            where="--peers-from",
            expected=f"{DYNAMO}, or {DYNAMO}:SECONDS",
            got=place,
        )
    return seconds


class PeerFinder:
    """Finds the peers of one model, and has them find this node, until it is closed.

    Args:
        settings: How this worker is known to Dynamo.
        model: Where the model is, as its user wrote it.
        serve_peers: `HOST:PORT` where this node gives its weights away, or None.
        process: Was started before.

    Raises:
        RequestError: Others cannot be told that address, or this discovery has no room for it.
        PlatformError: The process cannot be started.
    """

    def __init__(
        self,
        settings: DynamoSettings,
        model: str,
        serve_peers: str | None,
        process: PeersProcess | None = None,
    ) -> None:
        if settings.discovery == "kubernetes":
            raise RequestError(
                "in Kubernetes' discovery a pod is one node, which is the worker itself",
                where="--peers-from",
                got=DYNAMO,
                hint="Name a headless service of the workers: --peers-from dns://NAME:PORT.",
            )
        self._serves = None if serve_peers is None else _told(serve_peers)
        self._order = {
            "type": "find",
            "path": endpoint_of(settings.namespace, model),
            "discovery": settings.discovery,
            "request_plane": settings.request_plane,
            "serves": self._serves,
        }
        self._folder, self._lock = make_run_dir()
        self._listed = os.path.join(self._folder, "peers")
        self._leaving = False
        self._again_at: float | None = None
        self._deaths = 0
        self._begin(process)

    def place(self, wait_s: float) -> str:
        """The list, as `--peers-from` names it to a load.

        Args:
            wait_s: How long a load waits for the first one.
        """
        return f"awaited://{wait_s:g}{quote(self._listed)}"

    def step(self, log: Log) -> None:
        """Starts the process anew where it has died; to be called now and then."""
        if self._leaving:
            return
        moment = time.monotonic()
        if self._again_at is None and self._process.child.poll() is not None:
            delay = min(_FIRST_DELAY_S * 2**self._deaths, _MOST_DELAY_S)
            self._deaths += 1
            self._channel.close()
            self._again_at = moment + delay
            log.warning("not among peers", why="what finds them has died", next_in_s=delay)
        elif self._again_at is not None and moment >= self._again_at:
            self._again_at = None
            try:
                self._begin(None)
            except PlatformError as error:
                self._again_at = moment + _MOST_DELAY_S
                log.warning("not among peers", why=str(error), next_in_s=_MOST_DELAY_S)

    def leave(self) -> None:
        """Has this node leave the discovery: others are to find another one."""
        if not self._leaving:
            self._leaving = True
            self._channel.close()

    def close(self) -> None:
        """Ends it, by force where it does not end by itself."""
        self.leave()
        until = time.monotonic() + _END_S
        while self._process.child.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        self._process.child.kill()
        remove_run_dir(self._folder)
        os.close(self._lock)

    def _begin(self, process: PeersProcess | None) -> None:
        self._process = process or PeersProcess()
        self._channel = Channel(self._process.socket)
        with suppress(ReplicaError):  # it has died already, which `step` sees
            self._channel.send({**self._order, "listed": self._listed})


def _told(address: str) -> str:
    """Where peers are served, as others can reach it.

    Raises:
        RequestError: There is no port in it that others could be told.
        PlatformError: It is every address of a machine that seems to have none.
    """
    try:
        peer = parse_peer(address)
    except RequestError:
        raise RequestError(
            "others cannot be told that address",
            where="--serve-peers",
            expected="HOST:PORT, with a port of your choice",
            got=address,
        ) from None
    found = own_address(peer.host, "Name one of its addresses with --serve-peers, or set POD_IP.")
    return f"[{found}]:{peer.port}" if ":" in found else f"{found}:{peer.port}"
