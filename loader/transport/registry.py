"""The ways of taking KV that there are here, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coldframe.loader.devices.base import Device
from coldframe.loader.errors import RequestError
from coldframe.loader.transport.base import TRANSPORTS, Taker

if TYPE_CHECKING:
    from coldframe.loader.transport.nixl import NixlAgent

__all__ = ["check_names", "open_takers"]


def check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Names of transports, in the order in which they are tried.

    Raises:
        RequestError: One of them is none.
    """
    unknown = [name for name in names if name not in TRANSPORTS]
    if unknown:
        raise RequestError(
            "there is no such way for KV",
            where=where,
            expected=", ".join(TRANSPORTS),
            got=", ".join(map(repr, unknown)),
        )
    return tuple(name for name in TRANSPORTS if name in names)


def open_takers(
    names: Sequence[str],
    device: Device,
    secret: bytes | None,
    agent: NixlAgent | None,
    *,
    keyed: bool,
) -> dict[str, Taker]:
    """Those that are to be used.

    Args:
        names: Of `TRANSPORTS`.
        device: Where blocks are to go.
        secret: For those that ask another host.
        agent: Of this process, for NIXL.
        keyed: Whether blocks from there are held against a hash of theirs.
    """
    found: dict[str, Taker] = {}
    if "shared" in names:
        from coldframe.loader.transport.shared import SharedTaker

        found["shared"] = SharedTaker(device)
    if "tcp" in names:
        from coldframe.loader.transport.tcp import TcpTaker

        found["tcp"] = TcpTaker(secret, keyed=keyed)
    if agent is not None:
        from coldframe.loader.transport.nixl import NixlTaker

        found["nixl"] = NixlTaker(secret, agent)
    return found
