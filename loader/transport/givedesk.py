"""The memory service's desk for KV that other replicas take: offers, and who copies from here.

Messages in:  `offer` (from whoever passes a request on), `lend`, `lent_back` (from a memory service
of this machine).
Messages out: `offered`, `offer_over`, `lent`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coldframe.loader.devices.base import Device, kind_of
from coldframe.loader.errors import PlatformError, TransferRefused
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.transport.addresses import address_of, bound, place_of
from coldframe.loader.transport.base import DEFAULT_WAYS, Ticket, Way, host_id, new_token
from coldframe.loader.transport.giver import Giver
from coldframe.loader.transport.offers import Offer, Offers
from coldframe.loader.transport.secret import read_secret

if TYPE_CHECKING:
    from coldframe.loader.transport.nixl import NixlAgent

__all__ = ["GiveDesk"]


class GiveDesk:
    """Gives; all calls come from the service's loop.

    Args:
        reactor: The loop.
        kv: Has the blocks.
        device: Where they are.
        path: Of the socket that memory services of this machine connect to.

    Attributes:
        names: The ways that tickets name, in their order.
    """

    def __init__(
        self, reactor: Reactor, kv: KvDesk, device: Callable[[], Device], path: str
    ) -> None:
        self._reactor = reactor
        self._kv = kv
        self._device = device
        self._path = path
        self.names: Sequence[str] = DEFAULT_WAYS
        self._address = ""
        self._giver: Giver | None = None
        self._offers = Offers(lambda offer: reactor.post(lambda: self._over(offer)))
        self._offered: dict[str, tuple[Offer, Connection]] = {}
        """By token, with who passed the request on."""
        self._lent: dict[str, tuple[Offer, Callable[[], None]]] = {}
        """Who of this machine copies which blocks, by connection."""
        kv.on_released = self._released

    @property
    def listens(self) -> bool:
        """Whether other hosts are given KV."""
        return self._giver is not None

    def listen(self, address: str, advertise: str | None, agent: NixlAgent | None) -> str:
        """Gives KV to other hosts from now on.

        Args:
            address: `HOST:PORT`.
            advertise: See `address_of`.
            agent: Says what NIXL has to know, where it may go that way.

        Returns:
            What tickets say of it.

        Raises:
            PlatformError: It cannot listen there, or there is no secret.
            TransferDenied: The secret is none.
        """
        place_of(address)  # what is wrong with that is said first
        secret = read_secret()
        if secret is None:
            raise PlatformError(
                "KV is given to nobody who does not know a secret, and there is none",
                where=address,
                expected="COLDFRAME_KV_SECRET_FILE",
                hint="Make one with `openssl rand -hex 32`, the same on all hosts.",
            )
        listener = bound(address)
        self._giver = Giver(
            *(listener, secret, self._offers),
            arena=self._kv.existing_arena,
            block_bytes=lambda: self._kv.block_bytes,
            lend=None if agent is None else agent.offer,
        )
        self._address = address_of(listener, advertise)
        return self._address

    def close(self) -> None:
        """Ends what reads the arena, and waits for it."""
        if self._giver is not None:
            self._giver.close()

    def gone(self, connection: Connection) -> None:
        """A connection has ended: what it was lent, or has offered."""
        lent = self._lent.pop(connection.key, None)
        if lent is not None:
            self._offers.end(*lent)
        for offer, offerer in list(self._offered.values()):
            if offerer is connection:
                self._offers.withdraw(offer.token)

    def tick(self) -> None:
        """Ends the offers whose time is over."""
        self._offers.expire()

    # -- offers ----------------------------------------------------------------------------------

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
            self._reactor.send(connection, body)
            return
        offer = Offer(token, request, tuple(blocks[:written]), time.monotonic() + ttl_s)
        size, ways = self._kv.block_bytes, tuple(self._ways())
        ticket = Ticket(
            token, request, fingerprint, kv_format, size, written, kv_tokens, ttl_s, ways
        )
        self._offered[token] = (offer, connection)
        self._offers.add(offer)
        told = {"type": "offered", "request": request, "ticket": ticket.to_wire()}
        self._reactor.send(connection, told)

    def _ways(self) -> list[Way]:
        ways = []
        for name in self.names:
            if name == "shared":
                ways.append(Way(name, self._path, host_id(), kind_of(self._device())))
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
            self._reactor.send(connection, body)

    # -- loans, to memory services of this machine -----------------------------------------------

    def on_lend(self, connection: Connection, token: str) -> None:
        """A memory service of this machine wants to copy."""

        def stop() -> None:
            """It is waited for: what it copies from cannot be taken away from it."""

        try:
            if connection.key in self._lent or "shared" not in self.names:
                raise TransferRefused("KV is not given this way", where=connection.key)
            offer = self._offers.begin(token, stop)
        except TransferRefused as refusal:
            body = {"type": "lent", "error": refusal.to_wire(), "last": True}
            self._reactor.send(connection, body)
            return
        self._lent[connection.key] = (offer, stop)
        arena = self._kv.existing_arena()
        lent = {"blocks": list(offer.blocks), "size": arena.size}
        self._reactor.send_segments(connection, "lent", arena.segments, lent)

    def on_lent_back(self, connection: Connection) -> None:
        """It has copied all of it."""
        offer, stop = self._lent.pop(connection.key)
        self._offers.take(offer.token)
        self._offers.end(offer, stop)


def _holder(token: str) -> str:
    """What the ledger calls whoever keeps the blocks of an offer."""
    return f"offer-{token}"
