"""`python -m coldframe.runtime.integrations.dynamo.peers`: who feeds whom, by Dynamo's discovery.

A process beside a worker, since peers are wanted before there is anything that the worker could be
registered with. The nodes of a model are found at `NAMESPACE.coldframe-peers.HASH`. Each answers
there with the address at which it gives its weights away; the addresses of all are kept in a file,
which `--peers-from file:///PATH` reads whenever a load looks for a peer.

    python -m coldframe.runtime.integrations.dynamo.peers MODEL --list FILE --serves 10.0.0.7:9400
    coldframe worker MODEL --dynamo --serve-peers 10.0.0.7:9400 --peers-from file://FILE
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.peers.directory import parse_peer
from coldframe.loader.peers.node import hashed
from coldframe.loader.sources.location import parse_location

__all__ = ["PeerRegister", "endpoint_of", "main"]

_LOOK_S = 0.25
_ANSWER_S = 2.0
_LAST_S = 3.0
_NAME = 16
"""Hexadecimal digits of a hash that tell models apart."""


def endpoint_of(namespace: str, model: str) -> str:
    """Where the nodes of a model are found.

    Args:
        namespace: Dynamo's.
        model: Where it is, as its user wrote it.
    """
    name = hashed(parse_location(model).uri)[:_NAME]
    return f"{namespace}.coldframe-peers.{name}"


class PeerRegister:
    """The nodes of one model in Dynamo's discovery, and a file with their addresses.

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
        self._known: dict[int, str] = {}
        self._written: list[str] | None = None

    async def run(self, ended: asyncio.Event) -> None:
        """Keeps both until it is told to end.

        Raises:
            PlatformError: This node could not be registered, or is not any more.
        """
        serving: asyncio.Future[None] | None = None
        if self._serves is not None:
            serving = asyncio.ensure_future(
                self._endpoint.serve_endpoint(self._answer, graceful_shutdown=False)
            )
        client = await self._endpoint.client()
        try:
            while not ended.is_set():
                await self._look(client)
                if serving is not None and serving.done():
                    raise PlatformError(
                        "this node is not in Dynamo's discovery any more",
                        where=self._serves,
                        got=serving.exception(),
                    )
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _LOOK_S)
        finally:
            if serving is not None:
                with suppress(Exception):
                    async with asyncio.timeout(_LAST_S):
                        await self._endpoint.unregister_endpoint_instance()
                serving.cancel()

    async def _answer(self, request: Any, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        yield {"peer": self._serves}

    async def _look(self, client: Any) -> None:
        """Writes the file anew where nodes have come or gone."""
        there = set(client.instance_ids())
        self._known = {node: at for node, at in self._known.items() if node in there}
        new = [node for node in there if node not in self._known]
        found = await asyncio.gather(*(self._address(client, node) for node in new))
        self._known |= {node: at for node, at in zip(new, found, strict=True) if at is not None}
        peers = sorted(set(self._known.values()))
        if peers != self._written:
            beside = f"{self._listed}.{os.getpid()}"
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(f"{peer}\n" for peer in peers)
            os.replace(beside, self._listed)
            self._written = peers

    async def _address(self, client: Any, node: int) -> str | None:
        """What a node answers; None where it does not, so that it is asked again."""
        with suppress(Exception):
            async with asyncio.timeout(_ANSWER_S):
                async for said in await client.direct({}, node):
                    found = said.data()["peer"]
                    return parse_peer(found).uri.removeprefix("peer://")
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT.

    Returns:
        The exit status.
    """
    env = os.environ
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="as the workers have it")
    parser.add_argument("--list", metavar="FILE", required=True, help="where the peers are kept")
    parser.add_argument("--serves", metavar="HOST:PORT", help="where this node serves peers")
    parser.add_argument("--namespace", default=env.get("DYN_NAMESPACE") or "dynamo")
    backend = env.get("DYN_DISCOVERY_BACKEND") or "etcd"
    parser.add_argument("--discovery-backend", default=backend)
    parser.add_argument("--request-plane", default=env.get("DYN_REQUEST_PLANE") or "tcp")
    args = parser.parse_args(argv)
    try:
        if args.serves is not None and parse_peer(args.serves).host in ("0.0.0.0", "::"):
            raise PlatformError(
                "others must be told an address",
                where="--serves",
                expected="one of this node's own, such as that of its pod",
                got=args.serves,
            )
        asyncio.run(_run(args))
    except ColdframeError as error:
        print(f"coldframe: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    from dynamo.runtime import DistributedRuntime

    runtime: Any = DistributedRuntime(loop, args.discovery_backend, args.request_plane)
    path = endpoint_of(args.namespace, args.model)
    try:
        await PeerRegister(runtime, path, args.list, args.serves).run(ended)
    finally:
        runtime.shutdown()


if __name__ == "__main__":
    sys.exit(main())
