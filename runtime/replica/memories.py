"""The memory services of a replica, as its front has them: told, heard and watched as if one.

There is one for each device. The first loads the weights; each other one takes them from it, stage
by stage, and the KV of a request when a worker of its device goes on with that. So what is said of
the load is the first one's, what is in use is the sum, and the end of one is the end of all.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from coldframe.loader.errors import ColdframeError, MemoryServiceGone, ReplicaError
from coldframe.loader.kv.tally import StoreUsage
from coldframe.loader.memory_service.board import BoardView
from coldframe.loader.transport.usage import TakeUsage
from coldframe.loader.wire import Message
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.launch import Launch, Memory
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.replica.resting import Resting, RestingTogether
from coldframe.runtime.replica.sizing import KvSize, ModelFacts
from coldframe.runtime.replica.workforce import ending
from coldframe.runtime.worker.prefix import kv_format

__all__ = ["Memories", "Owner", "USAGE"]

USAGE = (
    *("kv_used", "kv_cached", "kv_total", "kv_reused", "bytes_done"),
    *StoreUsage.names(),
    *TakeUsage.names(),
)

_END_S = 3.0
"""For how long a memory service that has left a worker is given to end."""
_SILENCE_S = 30.0
"""How long a memory service may leave a question unanswered, in seconds: its loop does nothing
that takes long, and the workers wait for it."""
_SEND_TIMEOUT_S = 10
_OF_THE_LOAD = ("mode", "why", "verified", "peers_at", "processor_s")
_OF_THE_PLAN = ("mode", "weights_bytes", "fingerprint")
_CONTEXT_ANSWERS = {"probe": "probed", "checkpoint": "checkpointed", "restore": "restored"}


class Owner(Protocol):
    """What the memory services' replica wants to hear."""

    @property
    def error(self) -> ColdframeError | None:
        """Why it cannot go on, where that is so."""
        ...

    def fail(self, error: ColdframeError) -> None:
        """The replica cannot go on as it is."""
        ...

    def add_spans(self, wire: list[list[Any]]) -> None: ...

    def memory_listens(self) -> None:
        """Workers can be connected to one more of them."""
        ...

    def memory_has_files(self, path: str, tensors: list[list[Any]] | None) -> None:
        """The model's files are in a directory, or all but the weights, whose `tensors` these are:
        name, dtype and shape of each."""
        ...

    def memory_is_loaded(self) -> None:
        """All weights are on all devices, or somewhere else than before."""
        ...

    def memory_has_keys(self, stored: list[str], removed: list[str]) -> None:
        """These blocks of KV can be found by their keys from now on, and those no more."""
        ...

    def memory_died(self, why: str) -> None:
        """One of them is dead."""
        ...

    def memory_offered(self, request: str, ticket: dict[str, Any] | None) -> None:
        """The KV of a request is kept for whoever has the ticket; or it is not there any more."""
        ...

    def memory_offer_over(self, request: str, *, taken: bool) -> None:
        """It is kept no longer."""
        ...


class _Link:
    """One memory service, and what it has said last of itself."""

    def __init__(self, memory: Memory, resting: Resting, heard: float) -> None:
        self.memory = memory
        self.fd = memory.channel.fileno()
        self.resting = resting
        self.heard = heard
        self.listening = False
        self.loaded = False
        self.gpu: dict[str, Any] | None = None
        self.kv_bytes: int | None = None
        self.usage: dict[str, int] | None = None
        """What it said is in use, until the others have said so, too."""


class Memories:
    """All memory services of one start of a replica.

    Args:
        launch: Has started them.
        loop: Gets their sockets.
        clock: Monotonic seconds.
        facts: Gets what they say of the load; see `Replica.facts`.
        owner: The replica.
        warn: Told why weights cannot leave a device.

    Attributes:
        board: How far the load from outside is; the other devices are a stage behind at most.
        usage: What was in use when they were all asked last.
        resting: Whether the weights are on their devices.
    """

    def __init__(
        self,
        launch: Launch,
        loop: Loop,
        clock: Callable[[], float],
        facts: dict[str, Any],
        owner: Owner,
        warn: Callable[[str], None],
    ) -> None:
        self.board: BoardView | None = None
        self.usage: dict[str, int] = {}
        self._loop = loop
        self._clock = clock
        self._facts = facts
        self._owner = owner
        self._warn = warn
        self._closed = False
        self._path: str | None = None
        self._tensors: list[list[Any]] | None = None
        self._links: list[_Link] = []
        self._orders: dict[tuple[str, str], Callable[[dict[str, Any]], None]] = {}
        """Who waits for which answer about whose context."""
        for memory in launch.memories:
            self._add(memory)
        self._first = self._links[0]
        self.resting = RestingTogether([link.resting for link in self._links])

    def _add(self, memory: Memory) -> None:
        resting = Resting(
            lambda message: self._send(link, message), self._owner.fail, self._clock, self._warn
        )
        link = _Link(memory, resting, self._clock())
        memory.channel.set_send_timeout(_SEND_TIMEOUT_S)
        self._links.append(link)
        self._loop.watch(link.fd, lambda: self._on_readable(link))

    def forget(self) -> None:
        """Hears no more of them."""
        if self._closed:
            return
        self._closed = True
        for link in self._links:
            self._loop.unwatch(link.fd)  # by its number: it may be closed already

    def close(self) -> None:
        """Likewise, and lets go of what they have shared."""
        self.forget()
        board, self.board = self.board, None
        if board is not None:
            board.close()

    # -- what is known of them -------------------------------------------------------------------

    @property
    def pids(self) -> dict[str, int]:
        """The processes by name."""
        return {link.memory.name: link.memory.child.pid for link in self._links}

    @property
    def listening(self) -> list[str]:
        """The names of those that workers can be connected to."""
        return [link.memory.name for link in self._links if link.listening]

    @property
    def all_listen(self) -> bool:
        """Whether workers can be connected to each of them."""
        return all(link.listening for link in self._links)

    @property
    def loaded(self) -> bool:
        """Whether all weights are on all devices."""
        return all(link.loaded for link in self._links)

    @property
    def kv_bytes(self) -> int | None:
        """What KV takes of the device where it takes most; None before that is known of all."""
        sizes = [link.kv_bytes for link in self._links if link.kv_bytes is not None]
        return max(sizes) if len(sizes) == len(self._links) else None

    # -- orders ----------------------------------------------------------------------------------

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message to all of them."""
        for link in self._links:
            self._send(link, message)

    def _send(self, link: _Link, message: Mapping[str, Any]) -> None:
        try:
            link.memory.channel.send(dict(message))
        except ReplicaError:
            # Dead, or as good as that: it does not read. Its end is read from the socket, with the
            # reason before it.
            link.memory.child.kill()

    def size_kv(self, model: ModelFacts, options: ReplicaOptions) -> None:
        """Tells each of them how much KV there is to be on its device.

        Raises:
            DeviceError: There is not so much memory.
        """
        sizes = [KvSize.of(model.spec, options, link.memory.device) for link in self._links]
        for link, size in zip(self._links, sizes, strict=True):
            order = {
                "type": "kv",
                "block_bytes": size.block_bytes,
                "blocks": size.blocks,
                "lease_s": options.lease_s,
                # What is kept is that of prompts, and the first one's workers ask for it.
                "store": _kv_store(model, options) if link is self._first else None,
            }
            if size.blocks is not None:
                link.kv_bytes = size.block_bytes * size.blocks
            if size.room is not None:
                order["room"] = size.room.to_wire()
            self._send(link, order)

    def order(
        self, device: str, message: Mapping[str, Any], done: Callable[[dict[str, Any]], None]
    ) -> None:
        """Has one of them move a process's context; see `loader.memory_service.contextdesk`.

        Args:
            device: That of the process.
            message: `probe`, `checkpoint` or `restore`, with the `name` that its answer is known
                by.
            done: Given the answer. Never where the memory service dies meanwhile.
        """
        link = next(link for link in self._links if link.memory.device == device)
        self._orders[_CONTEXT_ANSWERS[message["type"]], message["name"]] = done
        self._send(link, message)

    def offer(self, device: str, message: Mapping[str, Any]) -> None:
        """Has one of them keep the KV of a request for another replica.

        The owner hears of what comes of it (`memory_offered`, `memory_offer_over`).

        Args:
            device: That of the KV.
            message: See `TransferDesk.on_offer`.
        """
        link = next(link for link in self._links if link.memory.device == device)
        self._send(link, {"type": "offer", **message})

    def has_left(self, device: str) -> bool:
        """Whether the weights have left a device."""
        return any(link.resting.left for link in self._links if link.memory.device == device)

    def ask_usage(self) -> None:
        """Asks all of them what is in use; a new `usage` is there when all have answered."""
        self.send({"type": "usage"})

    def watch_keys(self) -> None:
        """Has the first one tell which blocks of KV can be found."""
        self._send(self._first, {"type": "watch"})

    def watch(self) -> None:
        """Ends one that hangs; to be called about once a second."""
        if self._closed:
            return
        for link in self._links:
            if self._clock() - link.heard > _SILENCE_S:
                link.memory.child.kill()
                self._died(link, f"it did not answer for {_SILENCE_S:g} s")
                return
        self.ask_usage()  # a scrape does not wait for it, either

    def hear_end(self, first: bool = False) -> None:
        """Waits a moment for the end of one of them, and does what then has to be done.

        Args:
            first: Whether it is that of the first one.
        """
        links = self._links[:1] if first else self._links
        deadline = time.monotonic() + _END_S
        with selectors.DefaultSelector() as readable:
            for link in links:
                readable.register(link.fd, selectors.EVENT_READ, link)
            while not self._closed and self._owner.error is None:
                found = readable.select(max(0.0, deadline - time.monotonic()))
                if not found:
                    return
                for key, _ in found:
                    if not self._closed:
                        self._on_readable(key.data)

    # -- what they say ---------------------------------------------------------------------------

    def _on_readable(self, link: _Link) -> None:
        messages, ended = link.memory.channel.receive_ready()
        link.heard = self._clock()
        for message in messages:
            if self._closed:
                return  # what it said led to a start with others
            self._hear(link, message)
        if ended and not self._closed:
            self._died(link, ending(link.memory.child.kill()))

    def _hear(self, link: _Link, message: Message) -> None:
        body, first = message.body, link is self._first
        match message.kind:
            case "listening":
                link.listening = True
                self._owner.memory_listens()
            case "device":
                link.gpu = {name: body[name] for name in ("name", "total", "free")}
                gpus = [link.gpu for link in self._links if link.gpu is not None]
                if len(gpus) == len(self._links):
                    self._facts["gpu"] = min(gpus, key=lambda gpu: gpu["total"])
            case "sized":
                link.kv_bytes = body["block_bytes"] * body["blocks"]
            case "parked" | "woken" as kind:
                self._add_spans(link, body["spans"])
                link.resting.heard(kind, body)
            case "probed" | "checkpointed" | "restored" as kind:
                self._add_spans(link, body["spans"])
                done = self._orders.pop((kind, body["name"]), None)
                if done is not None:
                    done(body)
            case "offered":
                self._owner.memory_offered(body["request"], body["ticket"])
            case "offer_over":
                self._owner.memory_offer_over(body["request"], taken=body["taken"])
            case "gives_at":
                self._facts["gives_at"] = body["address"]
            case "usage":
                # Who takes no KV from elsewhere says nothing of that.
                link.usage = {name: body.get(name, 0) for name in USAGE}
                self._add_up()
            case "loaded":
                self._add_spans(link, body["spans"])
                link.loaded = True
                if first:
                    self._facts |= {name: body[name] for name in _OF_THE_LOAD}
                self._owner.memory_is_loaded()
            case "failed":
                self._add_spans(link, body["spans"])
                self._failed(link, ColdframeError.from_wire(body["error"]))
            case _ if first:
                self._hear_of_load(message)
            case "plan":
                BoardView(message.fds[0]).close()

    def _hear_of_load(self, message: Message) -> None:
        body = message.body
        match message.kind:
            case "files":
                self._path = body["path"]
                if body["local"]:
                    self._owner.memory_has_files(body["path"], None)
                elif self._tensors is not None:
                    self._owner.memory_has_files(body["path"], self._tensors)
            case "plan":
                self.board = BoardView(message.fds[0])
                self._facts |= {name: body[name] for name in _OF_THE_PLAN}
                self._tensors = body.get("tensors")
                if self._tensors is not None and self._path is not None:
                    self._owner.memory_has_files(self._path, self._tensors)
            case "moved":
                self._add_spans(self._first, body["spans"])
                self._facts |= {name: body[name] for name in _OF_THE_LOAD}
                self._owner.memory_is_loaded()
            case "kv_keys":
                self._owner.memory_has_keys(body["stored"], body["removed"])
            case "kept":
                self._facts |= {"kept": True, "kept_why_not": body["why"]}

    def _add_up(self) -> None:
        """Adds up what is in use, once all have said it."""
        told = [link.usage for link in self._links if link.usage is not None]
        if len(told) < len(self._links):
            return
        self.usage = {name: sum(usage[name] for usage in told) for name in USAGE}
        # What was copied from one device to the next was not loaded a second time.
        self.usage["bytes_done"] = told[0]["bytes_done"]
        for link in self._links:
            link.usage = None

    def _failed(self, link: _Link, error: ColdframeError) -> None:
        if link is not self._first and isinstance(error, MemoryServiceGone):
            # It lost the first one, whose own end tells why.
            self.hear_end(first=True)
        if not self._closed:
            self._owner.fail(error)

    def _died(self, link: _Link, why: str) -> None:
        self._owner.memory_died(why if link is self._first else f"{link.memory.device}: {why}")

    def _add_spans(self, link: _Link, wire: list[list[Any]]) -> None:
        if link is not self._first:  # it does not know that it is not the only one
            wire = [[name, link.memory.name, *rest] for name, _, *rest in wire]
        self._owner.add_spans(wire)


def _kv_store(model: ModelFacts, options: ReplicaOptions) -> dict[str, Any] | None:
    """What a memory service is told of where KV is kept, if anywhere."""
    store = options.kv_store
    if store is None or not options.prefix_cache:
        return None
    return replace(store, kv_format=kv_format(model.spec.dtype)).to_wire()
