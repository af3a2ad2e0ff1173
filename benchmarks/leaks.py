"""What a server holds: KV blocks, descriptors, processes and memory, to be compared with later."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from coldframe.benchmarks.http_client import Connection, knock
from coldframe.benchmarks.servers import Server

__all__ = ["Holdings", "holdings"]

_WAIT_S = 30.0
_BLOCKS = re.compile(r'^coldframe_kv_blocks\{model="[^"]*",state="(\w+)"\} (\S+)$', re.MULTILINE)
_MOST_MB = 16.0
"""So much more memory may a process have after thousands of requests: its allocator's pools."""
_MOST_DESCRIPTORS = 2


@dataclass(frozen=True, slots=True)
class Holdings:
    """What was held at a moment at which no request was open.

    Args:
        blocks: KV blocks that belong to requests.
        processes: Of the server, all of them.
        front_descriptors: Open in the process that outlives all others.
        front_mb: Its own memory (USS).
        gateway_mb: The gateway's.
    """

    blocks: int
    processes: int
    front_descriptors: int
    front_mb: float
    gateway_mb: float

    def compared(self, later: Holdings) -> Iterator[tuple[str, str, float, float, float]]:
        """By kind: name, unit, how much more is none, and the two values."""
        yield "KV blocks in use", "blocks", 0, self.blocks, later.blocks
        yield "processes", "processes", 0, self.processes, later.processes
        yield (
            "the front's descriptors",
            "descriptors",
            _MOST_DESCRIPTORS,
            self.front_descriptors,
            later.front_descriptors,
        )
        yield "the front's memory", "MB", _MOST_MB, self.front_mb, later.front_mb
        yield "the gateway's memory", "MB", _MOST_MB, self.gateway_mb, later.gateway_mb

    def no_more_than(self, before: Holdings) -> bool:
        """Whether nothing has been added since."""
        return all(now - was <= most for _, _, most, was, now in before.compared(self))


def holdings(server: Server) -> Holdings:
    """What a server that nobody asks holds: its KV blocks as long as it is warm, the rest at zero.

    Args:
        server: It was asked just now, and rests after some seconds.
    """
    front = psutil.Process(server.pid)
    sock = knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9))
    used, deadline = -1, time.monotonic() + _WAIT_S
    with Connection(sock, _WAIT_S) as connection:
        while time.monotonic() < deadline:
            found = dict(_BLOCKS.findall(connection.get("/metrics").body.decode()))
            if float(found["used"]) + float(found["free"]) > 0:
                used = int(float(found["used"]))
            if json.loads(connection.get("/startup").body)["state"] == "zero":
                break
            time.sleep(0.1)
        descriptors = front.num_fds()
    children = [child for child in front.children(recursive=True) if _command(child)]
    gateway = [child for child in children if "gateway.process" in _command(child)]
    return Holdings(
        used,
        len(children),
        descriptors,
        front.memory_full_info().uss / 1e6,
        sum(child.memory_full_info().uss for child in gateway) / 1e6,
    )


def _command(process: psutil.Process) -> str:
    """What a process runs; nothing where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
