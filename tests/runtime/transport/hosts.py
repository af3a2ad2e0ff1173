"""Two hosts on one machine: network namespaces with a link between them, gone behind the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import unavailable

_ASK = """
import json, sys, urllib.request
url, body, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
data = body.encode() if body else None
request = urllib.request.Request(url, data, {"content-type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print(0, error)
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    device: str

    @property
    def under(self) -> list[str]:
        """What a command is run by to be on this host."""
        return ["ip", "netns", "exec", self.name]

    def start(self, url: str, body: Any = None, seconds: float = 120.0) -> subprocess.Popen[str]:
        """A client on this host that asks once; see `answer`."""
        text = "" if body is None else json.dumps(body)
        return subprocess.Popen(
            [*self.under, sys.executable, "-c", _ASK, url, text, str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, url: str, body: Any = None, seconds: float = 120.0) -> tuple[int, str]:
        return answer(self.start(url, body, seconds))

    def add(self, address: str) -> None:
        """It has one more address."""
        _ip("-n", self.name, "address", "add", f"{address}/24", "dev", self.device)

    @property
    def received(self) -> int:
        """Bytes that have come over its link so far."""
        command = ["ip", "-n", self.name, "-s", "-j", "link", "show", "dev", self.device]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return int(json.loads(told.stdout)[0]["stats64"]["rx"]["bytes"])

    def unplug(self) -> None:
        """Its link is down from now on."""
        _ip("-n", self.name, "link", "set", self.device, "down")


def answer(client: subprocess.Popen[str]) -> tuple[int, str]:
    """What a client has got: the status, 0 where there was no answer, and the body."""
    out, _ = client.communicate(timeout=180)
    status, _, body = out.partition(" ")
    return int(status), body


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, and nobody else."""
    if shutil.which("ip") is None:
        unavailable("there is no ip: apt-get install iproute2")
    tag = os.urandom(3).hex()
    hosts = tuple(
        Host(f"cf-{tag}-{side}", f"10.79.3.{number}", f"cf{tag}{side}")
        for number, side in ((1, "a"), (2, "b"))
    )
    made: list[str] = []
    try:
        for host in hosts:
            try:
                _ip("netns", "add", host.name)
            except RuntimeError as error:
                unavailable(f"network namespaces cannot be made here: {error}")
            made.append(host.name)
        first, second = hosts
        pair = ("type", "veth", "peer", "name", second.device, "netns", second.name)
        _ip("-n", first.name, "link", "add", first.device, *pair)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                _ip("-n", host.name, "link", "set", device, "up")
        yield first, second
    finally:
        for name in made:
            _ip("netns", "delete", name)


@contextmanager
def names(host: Host, records: Path) -> Iterator[None]:
    """What is started on the host meanwhile knows the names that a file has, and no others.

    Args:
        host: One of `two_hosts`.
        records: Lines `NAME ADDRESS`, read anew for each question.
    """
    # What `ip netns exec` puts in the place of the files in /etc.
    own = Path("/etc/netns") / host.name
    own.mkdir(parents=True)
    (own / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1\n")
    (own / "nsswitch.conf").write_text("hosts: files dns\n")
    program = Path(__file__).with_name("name_server.py")
    try:
        with subprocess.Popen(
            [*host.under, sys.executable, str(program), str(records)], stdout=subprocess.PIPE
        ) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n"
                yield
            finally:
                server.kill()
    finally:
        shutil.rmtree(own)
        with suppress(OSError):  # others have some there
            own.parent.rmdir()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
