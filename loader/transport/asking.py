"""The receiver's side of a sender's listener (`giver`): what all ways that lead over it share."""

from __future__ import annotations

from typing import Any

from coldframe.loader.errors import ColdframeError, TransferBroken
from coldframe.loader.transport.base import Way, parse_address
from coldframe.loader.transport.giver import PURPOSE
from coldframe.loader.transport.handshake import dial
from coldframe.loader.transport.secure import SecureSocket

__all__ = ["ask", "call", "refusal_of"]

_TIMEOUT_S = 10.0


def refusal_of(way: Way, secret: bytes | None) -> str | None:
    """Why a listener cannot be asked from here; None where it looks as if it could."""
    if secret is None:
        return "there is no secret here to show (COLDFRAME_KV_SECRET_FILE)"
    if parse_address(way.address) is None:
        return "its address is none"
    return None


def call(address: str, secret: bytes | None) -> SecureSocket:
    """A connection to a listener that was not refused.

    Raises:
        TransferError: It cannot be had.
    """
    assert secret is not None
    return dial(address, secret, PURPOSE, timeout_s=_TIMEOUT_S)


def ask(sender: SecureSocket, asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to a message.

    Raises:
        TransferBroken: There is none.
        ColdframeError: What the sender says instead.
    """
    sender.send(asked)
    answer = sender.recv()
    if answer is None:
        raise TransferBroken("the sender is gone")
    error = answer.get("error")
    if isinstance(error, dict):
        raise ColdframeError.from_wire(error)
    return answer
