"""Where peers are to be found: a list, a name that stands for all of them, or a file.

What is found are addresses and no more. Whether anybody is there, and what they have, they are
asked themselves, each time anew.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Protocol
from urllib.parse import unquote

from coldframe.loader.errors import RequestError, SourceError, SourceNotFound, SourceUnreachable
from coldframe.loader.sources.location import Peer, parse_location

__all__ = [
    "DIRECTORY_FORMS",
    "AwaitedPeers",
    "GivenPeers",
    "JointPeers",
    "ListedPeers",
    "NamedPeers",
    "PeerDirectory",
    "check_peers",
    "open_directory",
    "open_place",
    "parse_peer",
]

DIRECTORY_FORMS = (
    "dns://NAME:PORT (all addresses of a name), file:///PATH (HOST:PORT lines), or "
    "awaited://SECONDS/PATH (such a file that somebody is about to write)"
)
_MOST_BYTES = 1 << 20
_MOST_SHOWN = 80
# A name that there is not, or without an address; anything else may be over in a moment.
_NOBODY = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_MOST_WAIT_S = 3600.0
_LOOK_S = 0.01


class PeerDirectory(Protocol):
    """Knows where peers may be. Safe for several threads."""

    @property
    def waits_s(self) -> float:
        """How long it may take before it answers, by its own doing."""
        ...

    def peers(self) -> Sequence[Peer]:
        """All that it knows of now; this node may be among them.

        Raises:
            SourceNotFound: There is nobody, as far as can be told.
            SourceError: It cannot tell.
        """
        ...


class GivenPeers:
    """A list that does not change.

    Args:
        peers: The peers.
    """

    waits_s = 0.0

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._peers = tuple(peers)

    def peers(self) -> Sequence[Peer]:
        return self._peers


class NamedPeers:
    """All addresses of a name, such as that of a headless service of Kubernetes.

    Args:
        name: The name.
        port: Where each of them serves peers.
    """

    waits_s = 0.0

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port

    def peers(self) -> Sequence[Peer]:
        try:
            found = socket.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            # As the name of a headless service is that has no pod that is ready.
            nobody = isinstance(error, socket.gaierror) and error.errno in _NOBODY
            kind = SourceNotFound if nobody else SourceUnreachable
            raise kind(
                "the name of the peers says nothing", where=f"dns://{self._name}", got=why
            ) from None
        return tuple(dict.fromkeys(Peer(str(one[4][0]), self._port) for one in found))


class ListedPeers:
    """The lines of a file, which somebody else keeps right: `HOST:PORT`, and `#` before remarks.

    Args:
        path: The file. Without it there are none.
    """

    waits_s = 0.0

    def __init__(self, path: str) -> None:
        self._path = path

    def peers(self) -> Sequence[Peer]:
        try:
            with open(self._path, encoding="utf-8") as file:
                text = file.read(_MOST_BYTES)
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(
                "the list of peers cannot be read", where=self._path, got=error
            ) from None
        found: dict[Peer, None] = {}
        for line in text.splitlines():
            if not (address := line.partition("#")[0].strip()):
                continue
            try:
                found[parse_peer(address)] = None
            except RequestError as error:
                raise SourceError(
                    error.what,
                    where=self._path,
                    expected="HOST:PORT",
                    got=repr(address[:_MOST_SHOWN]),
                ) from None
        return tuple(found)


class AwaitedPeers:
    """The lines of a file that somebody is about to write: who asks before it is there waits.

    That is for a program beside the node that has only just been started. What it finds out later
    it writes into the same file.

    Args:
        path: The file. It has to appear as a whole, by a rename.
        seconds: How long it is waited for, from now on.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self._seconds = seconds
        self._path = path
        self._until = time.monotonic() + seconds
        self._listed = ListedPeers(path)

    @property
    def waits_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def peers(self) -> Sequence[Peer]:
        while not os.path.exists(self._path):
            if time.monotonic() >= self._until:
                raise SourceUnreachable(
                    "nobody has said in time where peers are",
                    where=self._path,
                    expected=f"a list within {self._seconds:g} s",
                )
            time.sleep(_LOOK_S)
        return self._listed.peers()


class JointPeers:
    """Several directories as one. One that cannot tell is left out, unless all of them are.

    Args:
        directories: At least one.
    """

    def __init__(self, directories: Sequence[PeerDirectory]) -> None:
        self._directories = tuple(directories)

    @property
    def waits_s(self) -> float:
        return max((each.waits_s for each in self._directories), default=0.0)

    def peers(self) -> Sequence[Peer]:
        found: dict[Peer, None] = {}
        error: SourceError | None = None
        for directory in self._directories:
            try:
                found |= dict.fromkeys(directory.peers())
            except SourceError as failure:
                error = failure
        if not found and error is not None:
            raise error
        return tuple(found)


def parse_peer(text: str) -> Peer:
    """A peer as `HOST:PORT` or `peer://HOST:PORT`.

    Raises:
        RequestError: It is neither.
    """
    place = parse_location(text if text.startswith("peer://") else f"peer://{text}")
    assert isinstance(place, Peer)
    return place


def open_directory(peers: Iterable[str], places: Iterable[str]) -> PeerDirectory:
    """The directory that flags stand for.

    Args:
        peers: `HOST:PORT` of each.
        places: As `DIRECTORY_FORMS` has them.

    Raises:
        RequestError: One of them is none.
    """
    given = [parse_peer(peer) for peer in peers]
    found: list[PeerDirectory] = [GivenPeers(given)] if given else []
    found += [open_place(place) for place in places]
    return found[0] if len(found) == 1 else JointPeers(found)


def check_peers(peers: Iterable[str], places: Iterable[str]) -> None:
    """Makes sure that they can be meant.

    Raises:
        RequestError: One of them is nothing that could be a peer, or a directory of peers.
    """
    open_directory(peers, places)


def open_place(text: str) -> PeerDirectory:
    """The directory that one place is.

    Args:
        text: As `DIRECTORY_FORMS` has it.

    Raises:
        RequestError: It is none.
    """
    scheme, _, rest = text.partition("://")
    if scheme == "dns":
        name, colon, port = rest.rstrip("/").rpartition(":")
        if name and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
            return NamedPeers(name, int(port))
    if scheme == "awaited":
        seconds, slash, path = rest.partition("/")
        wait_s, file = _seconds(seconds), _file(f"{slash}{path}")
        if wait_s is not None and file is not None:
            return AwaitedPeers(file, wait_s)
    if scheme == "file" and (file := _file(rest)) is not None:
        return ListedPeers(file)
    raise RequestError(
        "peers cannot be found there",
        where="--peers-from",
        expected=DIRECTORY_FORMS,
        got=text,
        hint="Give a list of addresses with --peers, or one of these.",
    )


def _file(text: str) -> str | None:
    """The file that a URI's path names; None where it cannot name one."""
    path = unquote(text)
    named = text.startswith("/") and os.path.basename(text) and "\0" not in path
    return path if named else None


def _seconds(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) and 0 <= found <= _MOST_WAIT_S else None
