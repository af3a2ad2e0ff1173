"""How code inside a vLLM process gets at coldframe's memory: one connection, shared by all of it.

The loader and the connector of one process are made by vLLM, apart from one another, and must
nevertheless have one `MemoryClient`: the arena is mapped once, and KV is claimed over the
connection whose death the ledger hears. So this is the one place of the package that holds
something for the process. Where nobody has provided a connection, it is made on first use:

    memory_service   to a service that runs already
    source           to a service of this process' own, which ends with it
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from coldframe.loader.checkpoints.plan import Layout
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.checkpoints.slices import WHOLE, Rank
from coldframe.loader.devices import open_device
from coldframe.loader.errors import (
    ColdframeError,
    MemoryServiceGone,
    ReplicaError,
    RequestError,
    SourceNotFound,
)
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.process import remove_run_dir
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.integrations.vllm.load_settings import LoadSettings

__all__ = ["OwnMemory", "attach", "attach_late", "expect", "own_memory", "provide", "release"]

_MOSTLY = 0.9
"""The share of files in the page cache from which on they are mapped: `load.Load`'s."""
_LISTENING_S = 30.0
"""How long a memory service's interpreter may take to start, in seconds."""
_ENDING_S = 10.0
"""How long it may take to end when it is told to, in seconds."""
_LOOK_S = 0.01


class OwnMemory:
    """A memory service that this process has started for itself, for weights alone.

    It ends with this object's connection, so at the latest with this process.

    Args:
        options: What it loads.

    Raises:
        PlatformError: It cannot be started.
        ReplicaError: It died on its start.
    """

    def __init__(self, options: LoadOptions) -> None:
        from coldframe.runtime.start.early import MemoryProcess

        self._process = MemoryProcess()
        self._owner = Channel(self._process.socket)
        self._said: Message | None = None
        self._ended = threading.Event()
        self._listening = threading.Event()
        self._gone = False
        self.path = os.path.join(self._process.run_dir, "memory.sock")
        self._owner.send({"type": "load", **options.to_wire()})
        # All that it says must be read, or it would wait for us.
        self._reader = threading.Thread(target=self._read, name="own-memory", daemon=True)
        self._reader.start()
        if not self._listening.wait(_LISTENING_S) or self._gone:
            self.close()
            raise ReplicaError("the memory service did not start", where=self.path)

    @property
    def pid(self) -> int:
        return self._process.child.pid

    def report(self, timeout_s: float) -> dict[str, object]:
        """What it says of the load, once that has ended: `mode`, `why`, `verified`, `spans`.

        Empty where that takes longer.
        """
        self._ended.wait(timeout_s)
        said = self._said
        return {} if said is None else said.body

    def close(self) -> None:
        """Ends it, and waits until it has; it is killed where it does not end by itself."""
        self._owner.hang_up()
        late = time.monotonic() + _ENDING_S
        while self._process.child.poll() is None and time.monotonic() < late:
            time.sleep(_LOOK_S)
        self._process.child.kill()
        self._reader.join()
        self._owner.close()
        remove_run_dir(self._process.run_dir)  # killed, it could not
        os.close(self._process.lock)

    def _read(self) -> None:
        try:
            while (message := self._owner.recv()) is not None:
                for fd in message.fds:
                    os.close(fd)
                if message.kind == "listening":
                    self._listening.set()
                elif message.kind in ("loaded", "failed"):
                    self._said = message
                    self._ended.set()
        except (ColdframeError, OSError):
            pass
        self._gone = True
        self._ended.set()
        self._listening.set()


_provided: MemoryClient | None = None
_expected = False
_made: dict[object, tuple[MemoryClient, OwnMemory | None]] = {}
_lock = threading.Lock()


def provide(client: MemoryClient) -> None:
    """From now on this process' loader and connector use this connection, whatever they are told.

    Args:
        client: Remains its maker's to close, when nothing of vLLM's runs any more.
    """
    global _provided
    _provided = client


def expect() -> None:
    """Somebody will `provide` a connection, before anything is asked of one."""
    global _expected
    _expected = True


def attach_late(extra: Mapping[str, object], *, device: str = "cpu") -> Callable[[], MemoryClient]:
    """What gives this process' connection; made now, unless one is only expected.

    Args:
        extra: As `attach` has it.
        device: Likewise.

    Raises:
        ColdframeError: As `attach`, which is also what the function raises that is given.
    """
    if not _expected:
        client = attach(extra, device=device)
        return lambda: client
    return cache(lambda: attach(extra, device=device))


def attach(
    extra: Mapping[str, object],
    *,
    model: str | None = None,
    rank: Rank = WHOLE,
    device: str = "cpu",
) -> MemoryClient:
    """This process' connection to coldframe's memory, made where there is none.

    Args:
        extra: A plug-in's settings: `memory_service` or `source` with the options of a load. Keys
            that are neither are left to whoever asks.
        model: What to load where neither is there; None where only a connection that somebody else
            has made, or will make for the same thing, is of use.
        rank: Whose slices a service of our own is to load.
        device: Where its arena is to be.

    Returns:
        It is everybody's: not to be closed, and nothing more may be read into its `on_event`.

    Raises:
        RequestError: The settings cannot be, or do not say where the memory is.
        SourceNotFound: There is no memory service at that socket.
        PlatformError: No memory service can be started.
    """
    return _attached(extra, model, rank, device)[0]


def own_memory(client: MemoryClient) -> OwnMemory | None:
    """The service behind a connection, where this process has started it."""
    return next((memory for made, memory in _made.values() if made is client), None)


def release(client: MemoryClient) -> None:
    """Ends a connection that was made here, and the service behind it where that is our own.

    Nothing of this process may look at the arena any more.
    """
    with _lock:
        keys = [key for key, (made, _) in _made.items() if made is client]
        ended = [_made.pop(key)[1] for key in keys]
    # Beside the lock: that may take seconds, and others attach to other memory meanwhile.
    for memory in ended:
        client.close()
        if memory is not None:
            memory.close()


def _attached(
    extra: Mapping[str, object], model: str | None, rank: Rank, device: str
) -> tuple[MemoryClient, OwnMemory | None]:
    settings = LoadSettings.parse(extra, others=True)
    if _provided is not None:
        return _provided, None
    with _lock:
        if settings.memory_service is not None:
            key: object = settings.memory_service
        elif settings.source is not None or model is not None:
            options = settings.load_options(model or "", rank, device)
            key = replace(options, peer_token=None)
        elif len(_made) == 1:
            return next(iter(_made.values()))
        else:
            raise RequestError(
                "nothing says where coldframe's memory is",
                where="kv_connector_extra_config or model_loader_extra_config",
                expected="memory_service or source",
                got=", ".join(extra) or "nothing",
                hint="Name a memory service's socket, or a place to load from.",
            )
        if key not in _made:
            memory = None if settings.memory_service is not None else OwnMemory(_fitting(options))
            try:
                client = _connect(memory.path if memory else str(settings.memory_service), device)
            except BaseException:
                if memory is not None:
                    memory.close()
                raise
            _made[key] = client, memory
        client, memory = _made[key]
    if isinstance(client.error, MemoryServiceGone):
        raise client.error
    return client, memory


def _fitting(options: LoadOptions) -> LoadOptions:
    """The same, laid out so that vLLM finds most of its parameters in one piece.

    Files in the page cache are mapped where they lie, which is faster still; what is streamed can
    as well be put where vLLM wants it.
    """
    location = parse_location(options.model)
    if options.layout is not None or options.sources or not isinstance(location, Directory):
        return options
    size = cached = 0
    for path in Path(location.path).glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                size, cached = size + length, cached + cached_bytes(file.fileno(), 0, length)
        except OSError:
            return options  # whoever loads it says what is wrong
    streamed = options.copy or options.throttle is not None or cached < _MOSTLY * size
    return replace(options, layout=Layout.ALIGNED) if streamed else options


def _connect(path: str, device: str) -> MemoryClient:
    try:
        channel = Channel.connect(path)
    except ReplicaError as error:
        raise SourceNotFound(
            "no memory service answers there",
            where=path,
            expected="the socket of a coldframe replica that runs",
            got=error.got,
            hint="Start the replica first, or name a `source` to load from.",
        ) from error
    try:
        return MemoryClient(channel, f"vllm-{os.getpid()}", device=open_device(device))
    except BaseException:
        channel.close()
        raise
