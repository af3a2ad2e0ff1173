"""What a replica listens at: ports, and sockets in the file system."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import psutil

from tests.runtime.serving import Server

__all__ = ["paths", "ports"]

_ACCEPTS = 1 << 16  # __SO_ACCEPTCON, linux/net.h


def ports(server: Server) -> set[tuple[str, tuple[str, int]]]:
    """Who of a replica listens at which address and port: TCP, and UDP at all.

    A socket that a process has inherited counts for the one that made it: the front's.
    """
    named = {process.pid: "memory" for process in server.memory_services()}
    named[server.gateway().pid] = "gateway"
    named |= {process.pid: "peers" for process in server.peer_finders()}
    found: dict[tuple[str, int], str] = {}
    for process in _family(server):
        who = "front" if process.pid == server.process.pid else named.get(process.pid, "another")
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:  # it has just ended
            continue
        for each in connections:
            if each.status == psutil.CONN_LISTEN or each.type is socket.SOCK_DGRAM:
                found.setdefault((each.laddr.ip, each.laddr.port), who)
    return {(who, place) for place, who in found.items()}


def paths(server: Server) -> set[Path]:
    """Of the Unix sockets that its processes listen at."""
    # A line: address, references, protocol, flags, type, state, inode, path.
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    accept = {line[6]: line[7] for line in lines if len(line) == 8 and int(line[3], 16) & _ACCEPTS}
    inodes = {
        link.removeprefix("socket:[").rstrip("]")
        for process in _family(server)
        for link in _links(process.pid)
    }
    return {Path(path) for inode, path in accept.items() if inode in inodes}


def _family(server: Server) -> list[psutil.Process]:
    """The front first."""
    front = psutil.Process(server.process.pid)
    return [front, *front.children(recursive=True)]


def _links(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # the process has just ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was just closed
                found.append(str(entry.readlink()))
    return found
