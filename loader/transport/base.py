"""What a replica says of KV that another one may take: the ticket, and the ways that lead to it.

    sender    its memory service keeps the blocks of a request under a token (`offer`)
    ticket    goes to the receiver by whatever means: a message, Dynamo's `kv_transfer_params`
    receiver  its memory service takes the first way of the ticket that it can, and copies the
              blocks into blocks of its own (`bring`), then says so, which ends the offer

An offer also ends when its time is over, when it is withdrawn, or when its sender dies. Who comes
later gets a `TransferError`, and the request is computed again: KV is never needed, only missed.

    shared  the sender's memory service is on this machine: its arena is mapped, and copied from
    tcp     its listener can be reached: blocks come over as many sockets as pay
    nixl    both have a NIXL agent: blocks are read by it, over whatever it can use

A ticket is written by a stranger as far as the receiver is concerned. It is looked at strictly, and
says nothing that the receiver would not hold against what it knows itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from coldframe.loader.errors import TransferRefused

# The front knows tickets, and no device.
if TYPE_CHECKING:
    from coldframe.loader.devices.base import Arena, Device
    from coldframe.loader.kv.runs import Run

__all__ = [
    "DEFAULT_WAYS",
    "TRANSPORTS",
    "Taker",
    "Ticket",
    "Transfer",
    "Watch",
    "Way",
    "host_id",
    "new_token",
    "parse_address",
]

TRANSPORTS = ("shared", "nixl", "tcp")
"""By name, the way that costs least first."""
DEFAULT_WAYS = ("shared", "tcp")
"""What is gone where nothing is said: NIXL is for those who have it, and a fabric for it."""
VERSION = 1
_MOST_BLOCKS = 1 << 20
_MOST_BLOCK_BYTES = 1 << 30
_MOST_TTL_S = 3600.0
_TOKEN_BYTES = 16
_TEXT = 512


@dataclass(frozen=True, slots=True)
class Way:
    """How blocks can be reached.

    Args:
        transport: Of `TRANSPORTS`.
        address: `HOST:PORT`, or the path of a socket.
        host: See `host_id`; of `shared` alone, as
        device: what kind of device has the blocks.
    """

    transport: str
    address: str = ""
    host: str = ""
    device: str = ""

    def to_wire(self) -> dict[str, Any]:
        return {
            "transport": self.transport,
            "address": self.address,
            "host": self.host,
            "device": self.device,
        }

    @classmethod
    def from_wire(cls, data: Any) -> Way:
        fields = _object(data, "ways")
        names = ("transport", "address", "host", "device")
        return cls(*(_text(fields, name) for name in names))


@dataclass(frozen=True, slots=True)
class Ticket:
    """KV that may be taken, once.

    Args:
        token: Whoever has it may take the KV; nobody can guess it.
        request: What the sender calls the request.
        fingerprint: Of the checkpoint whose weights made the KV.
        kv_format: Layout, dtype and tokens of a block.
        block_bytes: Of one block, `[layer][2][token][kv_head][head_dim]`.
        blocks: How many there are, from the request's first token on.
        kv_tokens: Tokens whose keys and values are in them.
        ttl_s: For how long the sender keeps them from when it wrote this, in seconds.
        ways: How they can be reached.
    """

    token: str
    request: str
    fingerprint: str
    kv_format: str
    block_bytes: int
    blocks: int
    kv_tokens: int
    ttl_s: float
    ways: tuple[Way, ...]

    def to_wire(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "version": VERSION,
            "token": self.token,
            "request": self.request,
            "fingerprint": self.fingerprint,
            "kv_format": self.kv_format,
            "block_bytes": self.block_bytes,
            "blocks": self.blocks,
            "kv_tokens": self.kv_tokens,
            "ttl_s": self.ttl_s,
            "ways": [way.to_wire() for way in self.ways],
        }

    @classmethod
    def from_wire(cls, data: Any) -> Ticket:
        """A ticket that came from elsewhere.

        Raises:
            TransferRefused: It is none, or one of another version.
        """
        fields = _object(data, "ticket")
        if fields.get("version") != VERSION:
            raise TransferRefused(
                "a ticket of another version",
                expected=VERSION,
                got=fields.get("version"),
                hint="Run one version of coldframe on both sides.",
            )
        token, ways, ttl_s = fields.get("token"), fields.get("ways"), fields.get("ttl_s")
        if not isinstance(token, str) or not is_token(token):
            raise _no_ticket("token", "as many hex digits as a token has")
        if not isinstance(ways, list) or len(ways) > len(TRANSPORTS):
            raise _no_ticket("ways", "a list of ways")
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float):
            raise _no_ticket("ttl_s", "seconds")
        if not 0 < ttl_s <= _MOST_TTL_S:
            raise _no_ticket("ttl_s", f"more than 0, at most {_MOST_TTL_S:g}")
        return cls(
            token,
            _text(fields, "request"),
            _text(fields, "fingerprint"),
            _text(fields, "kv_format"),
            _count(fields, "block_bytes", _MOST_BLOCK_BYTES),
            _count(fields, "blocks", _MOST_BLOCKS),
            _count(fields, "kv_tokens", _MOST_BLOCKS << 12),
            float(ttl_s),
            tuple(Way.from_wire(way) for way in ways),
        )


@dataclass(frozen=True, slots=True)
class Transfer:
    """The KV of one request that is to be brought here.

    Args:
        ticket: For it.
        runs: Which of the ticket's blocks, and where to.
        arena: Of the receiver.
        device: Where that is.
    """

    ticket: Ticket
    runs: Sequence[Run]
    arena: Arena
    device: Device

    @property
    def nbytes(self) -> int:
        """Bytes that are to come."""
        return self.ticket.block_bytes * sum(count for _, _, count in self.runs)


Watch = Callable[[Callable[[], None]], None]
"""Given what breaks off whatever waits for the sender; any thread may call that."""


class Taker(Protocol):
    """One way of taking KV, on the receiver's side. For several threads."""

    def refusal(self, way: Way) -> str | None:
        """Why this way cannot be gone from here; None where it looks as if it could."""
        ...

    def take(self, transfer: Transfer, way: Way, watch: Watch) -> None:
        """Copies blocks into an arena; returns when they are there and the sender knows it.

        Args:
            transfer: What is to be brought.
            way: Of those of the ticket.
            watch: See `Watch`.

        Raises:
            TransferError: They could not be had. Nothing is written to the arena any more.
        """
        ...

    def close(self) -> None:
        """Lets go of what is kept for the next request. Nobody is in a `take`."""
        ...


def parse_address(text: str) -> tuple[str, int] | None:
    """`HOST:PORT` or `[HOST]:PORT`; None where it is neither."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not colon or not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        return None
    return host, int(port)


def new_token() -> str:
    return os.urandom(_TOKEN_BYTES).hex()


def is_token(text: str) -> bool:
    return len(text) == 2 * _TOKEN_BYTES and all(sign in "0123456789abcdef" for sign in text)


def host_id() -> str:
    """What tells this machine, since it was booted, from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # then nobody is on the same one
        return ""


def _object(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise _no_ticket(where, "an object")
    return data


def _text(fields: Mapping[str, Any], name: str) -> str:
    found = fields.get(name, "")
    if not isinstance(found, str) or len(found) > _TEXT:
        raise _no_ticket(name, f"text of at most {_TEXT} letters")
    return found


def _count(fields: Mapping[str, Any], name: str, most: int) -> int:
    found = fields.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= most:
        raise _no_ticket(name, f"a number from 0 to {most}")
    return found


def _no_ticket(where: str, expected: str) -> TransferRefused:
    return TransferRefused("this is no ticket for KV", where=where, expected=expected)
