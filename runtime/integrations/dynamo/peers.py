"""Who feeds whom, by Dynamo's discovery: the process beside a worker of `--peers-from dynamo`.

Peers are wanted before there is anything that the worker could be registered with, and before its
gateway has imported Dynamo's runtime. So the front starts this first of all (`peer_finder`). The
nodes of a model are found at `NAMESPACE.coldframe-peers.HASH`. Each answers there with the address
at which it gives its weights away; the addresses of the others are kept in a file, which a load
reads whenever it looks for a peer. The first list is there as soon as one of them has answered.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.peers.directory import parse_peer
from coldframe.loader.peers.node import hashed
from coldframe.loader.sources.location import parse_location
from coldframe.loader.wire import Channel

__all__ = ["PeerRegister", "endpoint_of", "main"]

_LOOK_S = 0.25
_ANSWER_S = 2.0
_MORE_S = 0.1
"""How long the list waits for further answers once there is one."""
_STILL_S = 0.05
"""The discovery tells of its nodes one by one: when it has said nothing for so long, it was all."""
_OWN_S = 0.3
"""How long this node itself may be missing among them; only then is that believed."""
_TICK_S = 0.01
_LAST_S = 1.0
_NAME = 16
"""Hexadecimal digits of a hash that tell models apart."""


def endpoint_of(namespace: str, model: str) -> str:
    """Where the nodes of a model are found.

    Args:
        namespace: Dynamo's, without what tells generations of workers apart: each may feed others.
        model: Where it is, as its user wrote it.
    """
    name = hashed(parse_location(model).uri)[:_NAME]
    return f"{namespace}.coldframe-peers.{name}"


class PeerRegister:
    """The nodes of one model in Dynamo's discovery, and a file with the addresses of the others.

    Args:
        runtime: Dynamo's `DistributedRuntime`.
        path: The endpoint; see `endpoint_of`.
        listed: The file. It is written as soon as the discovery has been read once.
        serves: `HOST:PORT` where this node gives its weights away; None only looks.
    """

    def __init__(self, runtime: Any, path: str, listed: str, serves: str | None) -> None:
        self._endpoint = runtime.endpoint(path)
        self._listed = listed
        self._serves = serves
        self._asked: dict[int, asyncio.Task[str | None]] = {}
        """By node, what it answers."""
        self._written: list[str] | None = None

    async def run(self, ended: asyncio.Event) -> None:
        """Keeps both until it is told to end.

        Raises:
            PlatformError: This node could not be registered, or is not any more.
        """
        tasks = [asyncio.ensure_future(ended.wait()), asyncio.ensure_future(self._keep())]
        if self._serves is not None:
            serving = self._endpoint.serve_endpoint(self._answer, graceful_shutdown=False)
            tasks.append(asyncio.ensure_future(serving))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not ended.is_set():
                raise PlatformError(
                    "this node is not in Dynamo's discovery any more",
                    where=self._serves,
                    got=next(iter(done)).exception(),
                )
        finally:
            if self._serves is not None:
                with suppress(Exception):
                    async with asyncio.timeout(_LAST_S):
                        await self._endpoint.unregister_endpoint_instance()
            for task in [*tasks, *self._asked.values()]:
                task.cancel()

    async def _answer(self, request: Any, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        yield {"peer": self._serves}

    async def _keep(self) -> None:
        client = await self._endpoint.client()
        await self._settle(client)
        while True:
            await self._look(client)
            await asyncio.sleep(_LOOK_S)

    async def _settle(self, client: Any) -> None:
        """Waits until the discovery has said who is there."""
        own = None if self._serves is None else self._endpoint.connection_id()
        began = changed = time.monotonic()
        before: set[int] = set()
        while True:
            there, moment = set(client.instance_ids()), time.monotonic()
            if there != before:
                before, changed = there, moment
            told = own in there or moment - began > _OWN_S
            if told and moment - changed > _STILL_S:
                return
            await asyncio.sleep(_TICK_S)

    async def _look(self, client: Any) -> None:
        """Writes the file anew where nodes have come or gone."""
        there = set(client.instance_ids())
        if self._serves is not None:
            there.discard(self._endpoint.connection_id())
        for node in self._asked.keys() - there:
            self._asked.pop(node).cancel()
        for node in there - self._asked.keys():
            self._asked[node] = asyncio.ensure_future(self._address(client, node))
        await self._hear()
        peers = self._known()
        if peers != self._written:
            beside = f"{self._listed}.{os.getpid()}"
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(f"{peer}\n" for peer in peers)
            os.replace(beside, self._listed)
            self._written = peers
        for node, asking in list(self._asked.items()):
            if asking.done() and asking.result() is None:
                del self._asked[node]  # to be asked again

    async def _hear(self) -> None:
        """Waits for one that answers, and a moment for the others: some may be long dead."""
        waiting = {asking for asking in self._asked.values() if not asking.done()}
        while waiting and not self._known():
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if waiting:
            await asyncio.wait(waiting, timeout=_MORE_S)

    def _known(self) -> list[str]:
        found = (asking.result() for asking in self._asked.values() if asking.done())
        return sorted({address for address in found if address is not None})

    async def _address(self, client: Any, node: int) -> str | None:
        """What a node answers; None where it does not."""
        with suppress(Exception):
            async with asyncio.timeout(_ANSWER_S):
                async for said in await client.direct({}, node):
                    found = said.data()["peer"]
                    return parse_peer(found).uri.removeprefix("peer://")
        return None


def main(fd: int, parent: int) -> None:
    """The process: until its front is gone, or has closed the socket.

    Args:
        fd: The inherited end of the front's socket pair.
        parent: The front.
    """
    from coldframe.loader.process import collect_garbage, die_with_parent

    die_with_parent(parent)
    channel = Channel.from_fd(fd)
    # What takes long, while the front reads its arguments.
    try:
        from dynamo.runtime import DistributedRuntime
    except ImportError:
        sys.exit(1)  # the front knows, and says what to install
    collect_garbage()
    told = channel.recv()
    if told is None:
        return
    try:
        asyncio.run(_run(DistributedRuntime, told.body, channel))
    except ColdframeError as error:
        sys.exit(f"coldframe: {error}")


async def _run(make: Any, order: dict[str, Any], channel: Channel) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(channel.fileno(), ended.set)
    try:
        runtime: Any = make(loop, order["discovery"], order["request_plane"])
    except Exception as error:  # noqa: BLE001 - of no type that is told
        raise PlatformError("Dynamo's discovery cannot be reached", got=error) from None
    try:
        register = PeerRegister(runtime, order["path"], order["listed"], order["serves"])
        await register.run(ended)
    finally:
        loop.remove_reader(channel.fileno())
        runtime.shutdown()
