"""Blocks from a memory service of this machine: its arena is mapped, and copied from.

It is asked on the socket that its own workers use, in a directory that is its user's alone, so that
whoever can ask could read its arena anyway; the token says what of it is meant. On a GPU the copy
is the device's own, as between two devices of one replica (`beside`).
"""

from __future__ import annotations

import os
import stat

from coldframe.loader.arena import Segment
from coldframe.loader.devices.base import Device, kind_of
from coldframe.loader.errors import ColdframeError, ReplicaError, TransferBroken, TransferRefused
from coldframe.loader.kv.runs import stretches_of
from coldframe.loader.transport.base import Transfer, Watch, Way, host_id
from coldframe.loader.wire import Channel, Message

__all__ = ["SharedTaker"]

_ANSWER_S = 10.0


class SharedTaker:
    """See `Taker`.

    Args:
        device: Where blocks are to go.
    """

    def __init__(self, device: Device) -> None:
        self._kind = kind_of(device)
        self._host = host_id()

    def close(self) -> None:
        """Nothing is kept."""

    def refusal(self, way: Way) -> str | None:
        if not self._host or way.host != self._host:
            return "the sender is on another machine"
        if way.device != self._kind:
            return f"the sender's KV is on {way.device or 'no device'}, not on {self._kind}"
        try:
            found = os.stat(way.address)
        except (OSError, ValueError):
            return "the sender's socket is out of reach from here"
        # A ticket says where to knock: at nobody's but a memory service's of this user.
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            return "what the sender calls its socket is none of this user's"
        return None

    def take(self, transfer: Transfer, way: Way, watch: Watch) -> None:
        runs = transfer.runs
        try:
            channel = Channel.connect(way.address)
        except ReplicaError as error:
            raise _gone(way, error) from None
        try:
            watch(channel.hang_up)
            channel.send({"type": "lend", "token": transfer.ticket.token})
            lent = _lent(channel, way)
            try:
                if runs and len(lent.blocks) < max(there + count for _, there, count in runs):
                    raise TransferRefused("the sender has fewer blocks", got=len(lent.blocks))
                lent.copy(transfer)
            finally:
                lent.close()
            channel.send({"type": "lent_back"})
        except ReplicaError as error:
            raise _gone(way, error) from None
        finally:
            channel.close()


class _Lent:
    """What the sender has lent: the segments of its arena, and which of its blocks are meant."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._size = 0
        self._segments: list[Segment] = []

    def take(self, message: Message) -> bool:
        """Takes a message of it; whether that was the last.

        Raises:
            ColdframeError: What the sender says instead.
        """
        body, fds = message
        for fd, data in zip(fds, body.get("segments", ()), strict=True):
            self._segments.append(Segment.from_wire(fd, data))
        if "error" in body:
            raise ColdframeError.from_wire(body["error"])
        if body["last"]:
            self.blocks, self._size = body["blocks"], body["size"]
        return bool(body["last"])

    def copy(self, transfer: Transfer) -> None:
        """Brings what is wanted of it to where that is to go."""
        mapping = transfer.device.mapping(self._size)
        try:
            mapping.attach(self._segments)
            block_bytes = transfer.ticket.block_bytes
            transfer.arena.take(mapping, stretches_of(transfer.runs, self.blocks, block_bytes))
        finally:
            mapping.close()

    def close(self) -> None:
        for segment in self._segments:
            os.close(segment.fd)


def _lent(channel: Channel, way: Way) -> _Lent:
    lent = _Lent()
    try:
        last = False
        while not last:
            try:
                message = channel.recv(_ANSWER_S)
            except TimeoutError:
                raise TransferBroken("the sender does not answer", where=way.address) from None
            if message is None:
                raise TransferBroken("the sender is gone", where=way.address)
            last = lent.take(message)
    except BaseException:
        lent.close()
        raise
    return lent


def _gone(way: Way, error: ReplicaError) -> TransferBroken:
    return TransferBroken("the sender is gone", where=way.address, got=error.got)
