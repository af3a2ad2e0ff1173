"""The memory service's desk for KV that goes to other replicas and comes from them.

Messages in:  `transfer` (from the owner: where to listen), `offer` (from whoever passes a request
on), `lend`, `lent_back` (from a memory service of this machine), and `bring` with a ticket (from
workers; see `KvDesk.bring` for that without).
Messages out: `gives_at`, `offered`, `offer_over`, `lent`, `brought`, `fetched`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError, TransferRefused
from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.kv.runs import runs_of
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.transport.base import (
    DEFAULT_WAYS,
    Ticket,
    Way,
    host_id,
    new_token,
    parse_address,
)
from coldframe.loader.transport.giver import Giver
from coldframe.loader.transport.offers import Offer, Offers
from coldframe.loader.transport.registry import OpenTaker, check_names, open_takers
from coldframe.loader.transport.secret import read_secret
from coldframe.loader.transport.takes import Take, TakeThreads, ways_from
from coldframe.loader.wire import MAX_FDS

if TYPE_CHECKING:
    from coldframe.loader.transport.nixl import NixlAgent

__all__ = ["TransferDesk"]


class TransferDesk:
    """Gives and takes; all calls come from the service's loop.

    Args:
        kv: Has the blocks.
        send: Sends a message to a connection.
        post: Has something done by the loop; any thread may call it.
        fail: Told why nothing can be given where that was asked for.
        device: Where the blocks are.
        path: Of the socket that workers, and memory services of this machine, connect to.
    """

    def __init__(
        self,
        kv: KvDesk,
        send: Callable[..., None],
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[ColdframeError], None],
        device: Callable[[], Device],
        path: str,
    ) -> None:
        self._kv = kv
        self._send = send
        self._post = post
        self._fail = fail
        self._device = device
        self._path = path
        self._order: tuple[str, ...] = DEFAULT_WAYS
        self._agent: NixlAgent | None = None
        self._keyed = False
        self._address = ""
        self._giver: Giver | None = None
        self._offers = Offers(lambda offer: post(lambda: self._over(offer)))
        self._offered: dict[str, tuple[Offer, Connection]] = {}
        """By token, with who passed the request on."""
        self._lent: dict[str, tuple[Offer, Callable[[], None]]] = {}
        """Who of this machine copies which blocks, by connection."""
        self._takers: dict[str, OpenTaker] | None = None
        self._takes: dict[tuple[str, str], Take] = {}
        """By the worker's connection and the request."""
        self._threads = TakeThreads()
        kv.is_written = self._is_written
        kv.on_released = self._released

    def close(self) -> None:
        """Breaks off what is under way, and waits until nobody looks at the arena."""
        if self._giver is not None:
            self._giver.close()
        for take in self._takes.values():
            take.abandon()
        self._threads.close()
        for taker in (self._takers or {}).values():
            taker.close()

    def gone(self, connection: Connection) -> None:
        """A connection has ended: what it brought, lent or offered."""
        lent = self._lent.pop(connection.key, None)
        if lent is not None:
            self._offers.end(*lent)
        for offer, offerer in list(self._offered.values()):
            if offerer is connection:
                self._offers.withdraw(offer.token)
        for key, take in list(self._takes.items()):
            if take.connection is connection:
                take.abandon()
                if not take.running:
                    del self._takes[key]

    def tick(self) -> None:
        """Ends the offers whose time is over."""
        self._offers.expire()

    # -- giving ----------------------------------------------------------------------------------

    def on_transfer(
        self,
        connection: Connection,
        listen: str | None,
        advertise: str | None,
        transports: list[str],
        keyed: bool,
    ) -> None:
        """The owner says which ways there are, and where to listen for those who come."""
        if connection.key != "owner" or self._giver is not None:
            raise ReplicaError("only the owner says how KV travels, and once", where=connection.key)
        try:
            self._order = check_names(transports, "transports")
            self._keyed = keyed
            if "nixl" in self._order:
                self._open_agent()
            if listen is not None and set(self._order) - {"shared"}:
                self._address = self._listen(listen, advertise)
                self._send(connection, {"type": "gives_at", "address": self._address})
        except ColdframeError as error:
            self._fail(error)

    def _listen(self, listen: str, advertise: str | None) -> str:
        place, secret = parse_address(listen), read_secret()
        if place is None:
            raise _no_address(listen)
        if secret is None:
            raise PlatformError(
                "KV is given to nobody who does not know a secret, and there is none",
                where=listen,
                expected="COLDFRAME_KV_SECRET_FILE",
                hint="Make one with `openssl rand -hex 32`, the same on all hosts.",
            )
        listener = _bound(*place, listen)
        self._giver = Giver(
            *(listener, secret, self._offers, lambda: self._arena, lambda: self._kv.block_bytes),
            None if self._agent is None else self._agent.offer,
        )
        host, port, *_ = listener.getsockname()
        if advertise == "":
            return f":{port}"  # who passes a ticket on knows by which address it reaches the other
        host = advertise or _reachable(host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _open_agent(self) -> None:
        from coldframe.loader.transport.nixl import NixlAgent, nixl_package

        if nixl_package() is None:
            raise PlatformError(
                "KV cannot go by NIXL here",
                where="nixl",
                expected="nixl_cu12 or nixl_cu13",
                got="neither is installed",
                hint="Install it: pip install 'coldframe[nixl]'.",
            )
        self._agent = NixlAgent(lambda: self._arena, self._device)

    def on_offer(
        self,
        connection: Connection,
        request: str,
        attempt: int,
        written: int,
        kv_tokens: int,
        fingerprint: str,
        kv_format: str,
        ttl_s: float,
    ) -> None:
        """Keeps a request's blocks for whoever comes with a ticket, which is the answer.

        Args:
            connection: Who passes the request on. If it goes, the blocks are as if they had been
                dropped: on a lease.
            request: Whose KV; nobody may hold it.
            attempt: The latest.
            written: How many of its blocks, from the first, hold KV.
            kv_tokens: Of how many tokens.
            fingerprint: See `Ticket`.
            kv_format: See `Ticket`.
            ttl_s: For how long.
        """
        token = new_token()
        blocks = self._kv.claim_for(_holder(token), request, attempt)
        if blocks is None or len(blocks) < written:
            if blocks is not None:
                self._kv.let_go(_holder(token), request)
            body = {"type": "offered", "request": request, "ticket": None}
            self._send(connection, body)
            return
        offer = Offer(token, request, tuple(blocks[:written]), time.monotonic() + ttl_s)
        size, ways = self._kv.block_bytes, tuple(self._ways())
        ticket = Ticket(
            token, request, fingerprint, kv_format, size, written, kv_tokens, ttl_s, ways
        )
        self._offered[token] = (offer, connection)
        self._offers.add(offer)
        told = {"type": "offered", "request": request, "ticket": ticket.to_wire()}
        self._send(connection, told)

    def _ways(self) -> list[Way]:
        ways = []
        for name in self._order:
            if name == "shared":
                kind = self._device().name.partition(":")[0]
                ways.append(Way(name, self._path, host_id(), kind))
            elif self._address:
                ways.append(Way(name, self._address))
        return ways

    def _released(self, request: str) -> None:
        """A request has ended: nobody is to take its KV."""
        for offer, _ in list(self._offered.values()):
            if offer.request == request:
                self._offers.withdraw(offer.token)

    def _over(self, offer: Offer) -> None:
        """Nobody reads an offer's blocks, nor will."""
        _, connection = self._offered.pop(offer.token)
        # Whoever passed it on is dead: then somebody else may, from the same blocks.
        self._kv.let_go(_holder(offer.token), offer.request, leased=connection.gone)
        if not connection.gone:
            body = {"type": "offer_over", "request": offer.request, "taken": offer.taken}
            self._send(connection, body)

    def on_lend(self, connection: Connection, token: str) -> None:
        """A memory service of this machine wants to copy."""

        def stop() -> None:
            """It is waited for: what it copies from cannot be taken away from it."""

        try:
            if connection.key in self._lent or "shared" not in self._order:
                raise TransferRefused("KV is not given this way", where=connection.key)
            offer = self._offers.begin(token, stop)
        except TransferRefused as refusal:
            body = {"type": "lent", "error": refusal.to_wire(), "last": True}
            self._send(connection, body)
            return
        self._lent[connection.key] = (offer, stop)
        arena = self._arena
        segments = arena.segments
        for start in range(0, len(segments), MAX_FDS):
            some = segments[start : start + MAX_FDS]
            body = {
                "type": "lent",
                "segments": [segment.to_wire() for segment in some],
                "blocks": list(offer.blocks),
                "size": arena.size,
                "last": start + MAX_FDS >= len(segments),
            }
            self._send(connection, body, tuple(segment.fd for segment in some))

    def on_lent_back(self, connection: Connection) -> None:
        """It has copied all of it."""
        offer, stop = self._lent.pop(connection.key)
        self._offers.take(offer.token)
        self._offers.end(offer, stop)

    # -- taking ----------------------------------------------------------------------------------

    def bring(
        self,
        connection: Connection,
        ticket: Any,
        request: str,
        attempt: int,
        count: int,
        written: int,
        keys: list[str],
    ) -> None:
        """Brings a request's KV into blocks here; the worker asks again once it is there.

        Args:
            connection: The worker.
            ticket: For the KV.
            request: Whose.
            attempt: The worker's.
            count: How many blocks it is to have.
            written: How many of them are to hold KV.
            keys: Of its first blocks: those that are published here need not be brought.
        """
        known = self._takes.get((connection.key, request))
        if known is not None and known.running:
            self._answer(connection, None, pending=True)
            return
        if known is not None:
            del self._takes[connection.key, request]
            if known.attempt == attempt:
                self._answer(connection, None if known.error else known.got, error=known.error)
                return
        try:
            wanted = Ticket.from_wire(ticket)
            self._check(wanted, written)
            ways = ways_from(wanted, self._open_takers(), self._order)
        except ColdframeError as error:
            self._answer(connection, None, error=error)
            return
        got = self._kv.assign_for(connection, request, attempt, count, keys)
        if got is None:
            self._answer(connection, None)
            return
        take = Take(connection, request, attempt, got)
        self._takes[connection.key, request] = take
        connection.busy += 1
        runs = runs_of(got.blocks, got.reused, written)

        def done(error: ColdframeError | None) -> None:
            self._post(lambda: self._taken(take, error))

        self._threads.run(take, wanted, ways, runs, self._arena, self._device(), done)
        self._answer(connection, None, pending=True)

    def _check(self, ticket: Ticket, written: int) -> None:
        size = self._kv.block_bytes
        if ticket.block_bytes != size or ticket.blocks < written:
            raise TransferRefused(
                "the sender's KV does not fit here",
                where=ticket.request,
                expected=f"{written} blocks of {size:,} bytes",
                got=f"{ticket.blocks} of {ticket.block_bytes:,}",
            )

    def _open_takers(self) -> dict[str, OpenTaker]:
        if self._takers is None:
            self._takers = open_takers(
                *(self._order, self._device(), read_secret(), self._agent), keyed=self._keyed
            )
        return self._takers

    def _answer(
        self,
        connection: Connection,
        got: Blocks | None,
        *,
        pending: bool = False,
        error: ColdframeError | None = None,
    ) -> None:
        body: dict[str, Any] = {
            "type": "brought",
            "blocks": None if got is None else got.blocks,
            "reused": 0 if got is None else got.reused,
            "lost": error is not None,
            "pending": pending,
        }
        if error is not None:
            body["error"] = error.to_wire()
        self._send(connection, body)

    def _taken(self, take: Take, error: ColdframeError | None) -> None:
        """A thread is through: nothing is written to the blocks any more."""
        connection, key = take.connection, (take.connection.key, take.request)
        connection.busy -= 1
        take.running, take.error = False, error
        if connection.gone:
            self._takes.pop(key, None)
            self._kv.gone(connection)
            return
        if error is not None or take.abandoned:
            self._kv.let_go(connection.key, take.request)
        if take.abandoned:
            self._takes.pop(key, None)
            return
        self._send(connection, {"type": "fetched", "request": take.request})

    def _is_written(self, connection: Connection, request: str) -> bool:
        """Whether blocks that a worker lets go of are still written to; they go when that ends."""
        take = self._takes.get((connection.key, request))
        if take is None:
            return False
        take.abandon()
        if take.running:
            return True
        del self._takes[connection.key, request]
        return False

    @property
    def _arena(self) -> Arena:
        arena = self._kv.arena
        if arena is None:
            raise TransferRefused("there is no KV yet")
        return arena


def _holder(token: str) -> str:
    """What the ledger calls whoever keeps the blocks of an offer."""
    return f"offer-{token}"


def _bound(host: str, port: int, where: str) -> socket.socket:
    from coldframe.loader.peers.listener import listen

    try:
        return listen(host, port)
    except PlatformError as error:
        raise PlatformError(
            "KV cannot be given at this address", where=where, got=error.got, hint=error.hint
        ) from None


def _reachable(host: str) -> str:
    """The address by which others reach a listener.

    Raises:
        PlatformError: It listens at all of them, and none can be told from the others.
    """
    if host not in ("0.0.0.0", "::"):
        return host
    pod = os.environ.get("POD_IP")
    if pod:
        return pod
    family, far = (
        (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((far, 9))  # nothing is sent: it asks which way that would be
            return str(sock.getsockname()[0])
        except OSError:
            raise PlatformError(
                "it cannot be told by which address others reach this machine",
                where=host,
                hint="Name it with --kv-advertise, or set POD_IP.",
            ) from None


def _no_address(text: str) -> PlatformError:
    return PlatformError("this is no address to give KV at", got=repr(text), expected="HOST:PORT")
