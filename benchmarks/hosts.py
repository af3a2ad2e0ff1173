"""Hosts on one machine: network namespaces around a switch, each behind a link of a given rate.

    host 0 --- link --- switch --- link --- host 1
                          |
                        here: whoever asks the hosts how they are, by a link without a limit

A link has its rate in each direction, by a token bucket (tc-tbf) at both of its ends. The
namespaces have no names: each is held by a process, and goes with it, whatever happens to us.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coldframe.benchmarks.interruption import end, guarded, unbroken
from coldframe.loader.errors import PlatformError

__all__ = ["Host", "Network", "Traffic", "hosts"]

_TOOLS = ("ip", "tc", "nsenter", "unshare")
_NET = "10.77.0"
_BITS = 24
_FIRST = 10
_SWITCH = 254
_BURST_S = 0.004
_LEAST_BURST = 128 << 10
"""More than the 64 KiB that a sender hands down as one packet."""
_LATENCY = "50ms"
_CLONE_NEWNET = 0x40000000
_COMMAND_S = 20.0


class Traffic(NamedTuple):
    """Bytes over a link, with all that they are wrapped in.

    Attributes:
        received: By the host.
        sent: By the host.
    """

    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class Host:
    """A host.

    Attributes:
        address: Its own on the switch.
        pid: The process that holds its namespace.
    """

    address: str
    pid: int

    def traffic(self) -> Traffic:
        """What has gone over its link so far."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == "eth0":
                fields = counts.split()
                return Traffic(int(fields[0]), int(fields[8]))
        raise PlatformError("a host has lost its link", where=self.address)

    def command(self, *command: str) -> list[str]:
        """The same command, run on it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *command]


class Network:
    """Hosts, and a place from where they can be asked.

    Args:
        hosts: The hosts.
        switch: The process that holds the switch's namespace.
        rate: Of each link in each direction, in bytes per second.
    """

    def __init__(self, hosts: list[Host], switch: int, rate: float) -> None:
        self.hosts = hosts
        self.rate = rate
        self._switch = switch

    def connect(self, address: str, port: int, timeout_s: float) -> socket.socket:
        """A connection from the switch to a host.

        Raises:
            OSError: There is none.
        """
        found: list[socket.socket | OSError] = []

        def connect() -> None:
            # A namespace is a thread's own, and a socket's for good.
            try:
                _enter(self._switch)
                found.append(socket.create_connection((address, port), timeout_s))
            except OSError as error:
                found.append(error)

        thread = threading.Thread(target=connect, name="switch")
        thread.start()
        thread.join()
        (one,) = found
        if isinstance(one, OSError):
            raise one
        return one


@contextmanager
def hosts(count: int, rate: float) -> Iterator[Network]:
    """Hosts while the context lasts.

    Args:
        count: How many.
        rate: Of each one's link in each direction, in bytes per second.

    Raises:
        PlatformError: There can be none here.
    """
    _check_tools()
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace())
        _in(switch, "ip", "link", "add", "switch", "type", "bridge")
        _in(switch, "ip", "address", "add", f"{_NET}.{_SWITCH}/{_BITS}", "dev", "switch")
        _in(switch, "ip", "link", "set", "switch", "up")
        found = []
        for number in range(count):
            holder = stack.enter_context(_namespace())
            host = Host(f"{_NET}.{_FIRST + number}", holder)
            port = f"port{number}"
            pair = ("peer", "name", "eth0", "netns", str(holder))
            _in(switch, "ip", "link", "add", port, "type", "veth", *pair)
            _in(switch, "ip", "link", "set", port, "master", "switch", "up")
            _in(holder, "ip", "link", "set", "lo", "up")
            _in(holder, "ip", "address", "add", f"{host.address}/{_BITS}", "dev", "eth0")
            _in(holder, "ip", "link", "set", "eth0", "up")
            _limit(switch, port, rate)
            _limit(holder, "eth0", rate)
            found.append(host)
        yield Network(found, switch, rate)


def _limit(holder: int, device: str, rate: float) -> None:
    burst = max(_LEAST_BURST, int(rate * _BURST_S))
    bucket = ("rate", f"{int(8 * rate)}bit", "burst", str(burst), "latency", _LATENCY)
    _in(holder, "tc", "qdisc", "add", "dev", device, "root", "tbf", *bucket)


@contextmanager
def _namespace() -> Iterator[int]:
    """A process that holds a network namespace; its id."""
    holder: subprocess.Popen[str] | None = None
    with guarded() as watch:
        try:
            with unbroken():
                holder = subprocess.Popen(
                    ["unshare", "--net", "sh", "-c", "echo up; exec sleep infinity"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                watch(holder.pid)
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline() != "up\n":
                raise _unavailable("unshare --net", holder.stderr.read().strip())
            yield holder.pid
        finally:
            if holder is not None:
                end(holder, group=False, grace_s=0.0)
                for pipe in (holder.stdout, holder.stderr):
                    if pipe is not None:
                        pipe.close()


def _in(holder: int, *command: str) -> None:
    entering = ["nsenter", f"--net=/proc/{holder}/ns/net", "--", *command]
    done = subprocess.run(entering, capture_output=True, text=True, check=False, timeout=_COMMAND_S)
    if done.returncode:
        raise _unavailable(" ".join(command), done.stderr.strip())


def _enter(holder: int) -> None:
    fd = os.open(Path(f"/proc/{holder}/ns/net"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The standard library has it from Python 3.12 on.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


def _check_tools() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise PlatformError(
            "hosts on one machine need tools that are not here",
            where=", ".join(missing),
            hint="Install iproute2 and util-linux (make system does).",
        )


def _unavailable(where: str, got: str) -> PlatformError:
    return PlatformError(
        "there can be no network namespaces with limited links here",
        where=where,
        got=got or "it failed",
        hint="Run as root, with CAP_NET_ADMIN and CAP_SYS_ADMIN, and a kernel with veth, bridge "
        "and sch_tbf.",
    )
