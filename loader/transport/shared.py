"""Blocks from a memory service of this machine: its arena is mapped, and copied from.

It is asked on the socket that its own workers use, in a directory that is its user's alone, so that
whoever can ask could read its arena anyway; the token says what of it is meant. On a GPU the copy
is the device's own, as between two devices of one replica (`beside`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from coldframe.loader.arena import Segment
from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import ColdframeError, ReplicaError, TransferBroken, TransferRefused
from coldframe.loader.kv.runs import Run
from coldframe.loader.transport.base import Ticket, Way, host_id
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

    def take(
        self,
        ticket: Ticket,
        way: Way,
        runs: Sequence[Run],
        arena: Arena,
        device: Device,
        watch: Callable[[Callable[[], None]], None],
    ) -> None:
        try:
            channel = Channel.connect(way.address)
        except ReplicaError as error:
            raise TransferBroken("the sender is gone", where=way.address, got=error.got) from None
        try:
            watch(channel.hang_up)
            channel.send({"type": "lend", "token": ticket.token})
            blocks, size, segments = self._lent(channel, way)
            try:
                if runs and len(blocks) < max(there + count for _, there, count in runs):
                    raise TransferRefused("the sender has fewer blocks", got=len(blocks))
                self._copy(blocks, size, segments, ticket, runs, arena, device)
            finally:
                for segment in segments:
                    os.close(segment.fd)
            channel.send({"type": "lent_back"})
        except ReplicaError as error:
            raise TransferBroken("the sender is gone", where=way.address, got=error.got) from None
        finally:
            channel.close()

    def _lent(self, channel: Channel, way: Way) -> tuple[list[int], int, list[Segment]]:
        segments: list[Segment] = []
        try:
            while True:
                body, fds = self._hear(channel, way)
                for fd, data in zip(fds, body.get("segments", ()), strict=True):
                    segments.append(Segment.from_wire(fd, data))
                if "error" in body:
                    raise ColdframeError.from_wire(body["error"])
                if body["last"]:
                    return body["blocks"], body["size"], segments
        except BaseException:
            for segment in segments:
                os.close(segment.fd)
            raise

    def _hear(self, channel: Channel, way: Way) -> Message:
        try:
            message = channel.recv(_ANSWER_S)
        except TimeoutError:
            raise TransferBroken("the sender does not answer", where=way.address) from None
        if message is None:
            raise TransferBroken("the sender is gone", where=way.address)
        return message

    @staticmethod
    def _copy(
        blocks: list[int],
        size: int,
        segments: list[Segment],
        ticket: Ticket,
        runs: Sequence[Run],
        arena: Arena,
        device: Device,
    ) -> None:
        mapping = device.mapping(size)
        try:
            mapping.attach(segments)
            arena.take(mapping, stretches_of(runs, blocks, ticket.block_bytes))
        finally:
            mapping.close()


def kind_of(device: Device) -> str:
    """What kind of device it is: one reads the memory of another of its kind."""
    return device.name.partition(":")[0]


def stretches_of(
    runs: Sequence[Run], blocks: Sequence[int], block_bytes: int
) -> list[tuple[int, int, int]]:
    """Where bytes go, where they come from and how many, neighbours on both sides as one.

    Args:
        runs: Blocks here, and their places among those there.
        blocks: Those there, in order.
        block_bytes: Of one.
    """
    found: list[tuple[int, int, int]] = []
    for here, there, count in runs:
        for step in range(count):
            to, source = (here + step) * block_bytes, blocks[there + step] * block_bytes
            if found:
                last_to, last_source, length = found[-1]
                if (last_to + length, last_source + length) == (to, source):
                    found[-1] = (last_to, last_source, length + block_bytes)
                    continue
            found.append((to, source, block_bytes))
    return found
