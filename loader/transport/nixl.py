"""Blocks by NIXL: over whatever UCX finds between two hosts, such as InfiniBand, or TCP.

Sender and receiver meet over the sender's listener, as for TCP (`giver`): there the receiver shows
token and secret, learns of the sender's agent and where its blocks are, has them kept for as long
as it reads, and says when it is through. What is read goes past all that, by UCX's own means: it is
neither authenticated nor held against anything, and whoever has an agent's metadata can read all of
the arena that it has registered. It is for fabrics that are trusted.

The wheels' bindings are used as they are: their Python API imports torch, which is not for here.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import ColdframeError, TransferBroken, TransferRefused
from coldframe.loader.kv.runs import portions, stretches_of
from coldframe.loader.packages import add_site_packages
from coldframe.loader.transport.asking import ask, call, refusal_of
from coldframe.loader.transport.base import Transfer, Watch, Way

__all__ = ["NixlAgent", "NixlTaker", "nixl_package"]

_PACKAGES = ("nixl_cu13", "nixl_cu12")
_BACKEND = "UCX"
_MOST_METADATA = 768 << 10
_LEAST_WAIT_S = 20e-6
_MOST_WAIT_S = 1e-3
_ABORT_S = 30.0
_GRACE_S = 1.0
"""For a read that nobody waits for to end by itself: most are through long before."""
_PORTION = 8 << 20
_PORTION_S = 20.0
"""What is read at once, and how long that may take: a sender that stands still says nothing. So
little that several reads beside one another, over a link of 1 Gbit/s, end within the grace."""


def nixl_package() -> str | None:
    """The installed package that has NIXL's bindings; None where there is none."""
    add_site_packages()
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            return name
    return None


class NixlAgent:
    """This process's agent; for several threads. What it takes is loaded when it is first used.

    Args:
        arena: Tells where blocks are.
        device: On which device that is.
        patience_s: How long a portion of it (8 MiB) may take.
    """

    def __init__(
        self,
        arena: Callable[[], Arena],
        device: Callable[[], Device],
        patience_s: float = _PORTION_S,
    ) -> None:
        self._arena = arena
        self._device = device
        self._patience_s = patience_s
        self._lock = threading.Condition()
        self._bindings: Any = None
        self._agent: Any = None
        self._backend: Any = None
        self._closed = False
        self._registered = 0
        """Bytes of the arena, from its start."""
        self._known: dict[str, int] = {}
        """Other agents, and how many transfers are under way with each."""
        self._reading = 0
        self._retiring = False
        """A read could not be ended: all end, and the agent with them."""

    def close(self) -> None:
        """Ends it, and its thread: nobody is in a `read`, and nobody reads the arena behind this.

        What others still ask for is answered by that thread, out of memory that would not be there
        any more: UCX, where it goes by messages, does not look before it reads.
        """
        with self._lock:
            self._closed = True
            self._known.clear()
            self._backend = self._agent = None  # the last references to either

    def offer(self) -> dict[str, Any]:
        """What another agent has to know to read the arena, as JSON values.

        Raises:
            TransferBroken: There is no NIXL here, or it cannot be used; other ways may lead there.
        """
        with self._lock:
            self._lock.wait_for(lambda: not self._retiring)
            self._start()
            metadata = self._agent.getLocalMD()
            address = self._arena().address
        return {
            "metadata": base64.b64encode(metadata).decode(),
            "address": address,
            **self._place(),
        }

    def read(
        self,
        told: dict[str, Any],
        stretches: Sequence[tuple[int, int, int]],
        may_go_on: Callable[[], bool],
    ) -> None:
        """Copies bytes out of another agent's arena; returns when they are there.

        Args:
            told: What that agent has said by `offer`.
            stretches: Where to, where from and how many: offsets in both arenas.
            may_go_on: Whether the other one still keeps them.

        Raises:
            TransferBroken: They could not be had, or there is no NIXL here, or what was told is
                nothing.
        """
        metadata = base64.b64decode(str(told["metadata"]), validate=True)
        far, kind, number = int(told["address"]), str(told["kind"]), int(told["number"])
        if len(metadata) > _MOST_METADATA or kind not in ("cpu", "cuda"):
            raise TransferBroken("a NIXL agent says nothing that can be understood", got=kind)
        try:
            with self._lock:
                self._lock.wait_for(lambda: not self._retiring)
                self._start()
                name = self._meet(metadata)
                self._reading += 1
            try:
                for portion in portions(stretches, _PORTION):
                    self._read(name, far, (kind, number), portion, may_go_on)
            finally:
                with self._lock:
                    try:
                        self._part(name)
                    finally:
                        self._leave()
        except ColdframeError:
            raise
        except Exception as error:  # noqa: BLE001 - the bindings have a class for each of UCX's
            raise TransferBroken("NIXL could not bring it", got=repr(error)) from None

    def _read(
        self,
        name: str,
        far: int,
        place: tuple[str, int],
        stretches: Sequence[tuple[int, int, int]],
        may_go_on: Callable[[], bool],
    ) -> None:
        bindings, near = self._bindings, self._arena().address
        own = self._place()
        here = self._list(own["kind"])(
            [(near + to, length, own["number"]) for to, _, length in stretches]
        )
        there = self._list(place[0])(
            [(far + source, length, place[1]) for _, source, length in stretches]
        )
        handle = self._agent.createXferReq(
            bindings.NIXL_READ, here, there, name, "", [self._backend]
        )
        try:
            status, wait_s = self._agent.postXferReq(handle, ""), _LEAST_WAIT_S
            deadline = time.monotonic() + self._patience_s
            broken: TransferBroken | None = None
            while status == bindings.NIXL_IN_PROG and not self._retiring:
                moment = time.monotonic()
                if broken is not None and moment > deadline:
                    self._retiring = True
                elif broken is None:
                    if not may_go_on():
                        broken = TransferBroken("the sender is gone")
                    elif moment > deadline:
                        limit = f"{self._patience_s:g} s"
                        broken = TransferBroken("the sender takes too long", got=limit)
                    if broken is not None:
                        deadline = moment + _GRACE_S
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _MOST_WAIT_S)
                status = self._status(handle)
            if broken is not None:
                raise broken
            if status == bindings.NIXL_SUCCESS:
                return
            if self._retiring:
                raise TransferBroken("NIXL is started anew here: another read had no end")
            raise TransferBroken("NIXL could not bring it", got=status)
        finally:
            self._release(handle)

    def _status(self, handle: Any) -> Any:
        """How far a read is that is under way."""
        try:
            return self._agent.getXferStatus(handle)
        except self._bindings.nixlRemoteDisconnectError:
            raise  # who is gone writes nothing any more
        except Exception:
            self._retiring = True  # one part of it has failed, and others may be under way
            raise

    def _leave(self) -> None:
        """One reads less. Where a read could not be ended it returns once nothing can be written.

        A read that was given up is none that has ended: NIXL lets go of it, and what the sender
        answers in the end is written all the same. Only without the agent it is not.
        """
        self._reading -= 1
        if self._retiring and not self._reading:
            self._backend = self._agent = None
            self._registered = 0
            self._known.clear()
            self._retiring = False
            self._lock.notify_all()
        self._lock.wait_for(lambda: not self._retiring)

    def _release(self, handle: Any) -> None:
        """Lets go of a transfer; one that cannot be let go of goes with the agent."""
        deadline = time.monotonic() + _ABORT_S
        while True:
            try:
                self._agent.releaseXferReq(handle)
            except Exception:  # noqa: BLE001 - it is under way still, of no type that is told
                if self._retiring or time.monotonic() > deadline:
                    self._retiring = True
                    return
                time.sleep(_MOST_WAIT_S)
            else:
                return

    def _list(self, kind: str) -> Callable[[list[tuple[int, int, int]]], Any]:
        bindings = self._bindings
        segment = bindings.DRAM_SEG if kind == "cpu" else bindings.VRAM_SEG
        return lambda found: bindings.nixlXferDList(segment, found)

    def _place(self) -> dict[str, Any]:
        kind, _, number = self._device().name.partition(":")
        return {"kind": kind, "number": int(number or 0)}

    def _start(self) -> None:
        """Loads NIXL, and registers what has memory of the arena."""
        if self._closed:
            raise TransferBroken("this replica is ending")
        try:
            if self._agent is None:
                self._load()
            self._register()
        except ColdframeError:
            raise
        except Exception as error:  # noqa: BLE001 - the bindings have a class for each of UCX's
            raise TransferBroken("NIXL cannot be used here", got=repr(error)) from None

    def _load(self) -> None:
        package = nixl_package()
        if package is None:
            raise TransferBroken(
                "there is no NIXL here", hint="Install it: pip install 'coldframe[nixl]'."
            )
        self._bindings = bindings = importlib.import_module(f"{package}._bindings")
        config = bindings.nixlAgentConfig(True, False, 0, bindings.NIXL_THREAD_SYNC_STRICT)
        agent = bindings.nixlAgent(f"coldframe-{os.urandom(8).hex()}", config)
        self._backend = agent.createBackend(_BACKEND, {})
        self._agent = agent

    def _register(self) -> None:
        arena, place = self._arena(), self._place()
        grown = arena.grown
        if grown == self._registered:
            return
        bindings = self._bindings
        segment = bindings.DRAM_SEG if place["kind"] == "cpu" else bindings.VRAM_SEG
        start = self._registered if grown > self._registered else 0
        added = (arena.address + start, grown - start, place["number"], "")
        self._agent.registerMem(bindings.nixlRegDList(segment, [added]), [self._backend])
        self._registered = grown

    def _meet(self, metadata: bytes) -> str:
        found = self._agent.loadRemoteMD(metadata)
        name = found.decode() if isinstance(found, bytes) else str(found)
        self._known[name] = self._known.get(name, 0) + 1
        return name

    def _part(self, name: str) -> None:
        """What is known of another agent may be of one that has ended by the next time."""
        self._known[name] -= 1
        if not self._known[name]:
            del self._known[name]
            self._agent.invalidateRemoteMD(name)


class NixlTaker:
    """See `Taker`.

    Args:
        secret: That senders know, too; None where there is none.
        agent: This process's.
    """

    def __init__(self, secret: bytes | None, agent: NixlAgent) -> None:
        self._secret = secret
        self._agent = agent

    def close(self) -> None:
        """The agent ends with the process."""

    def refusal(self, way: Way) -> str | None:
        refused = refusal_of(way, self._secret)
        if refused is None and nixl_package() is None:
            return "it is not installed here"
        return refused

    def take(self, transfer: Transfer, way: Way, watch: Watch) -> None:
        ticket = transfer.ticket
        sender = call(way.address, self._secret)
        try:
            watch(sender.hang_up)
            told = ask(sender, {"do": "lend", "token": ticket.token})
            blocks = told["blocks"]
            if not isinstance(blocks, list) or len(blocks) != ticket.blocks:
                raise TransferRefused("the sender lends other blocks than those of the ticket")
            stretches = stretches_of(transfer.runs, blocks, ticket.block_bytes)
            if stretches:
                self._agent.read(told, stretches, lambda: not sender.has_ended())
            ask(sender, {"do": "taken", "token": ticket.token})
        finally:
            sender.close()
