"""Processes that are frozen for a question's sake: each has something on a GPU, and looks again.

A target is a generator. It says what it has, and is frozen and thawed then, or written to files
and made again; going on, it says whether what it had is still there and works. Its control socket
is descriptor 3, so that it can be dumped as a worker is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

from coldframe.benchmarks.gpu.questions import up
from coldframe.loader.arena import HUGE_PAGE, KV_BASE, SCRATCH_BASE, WEIGHTS_BASE, Segment, round_up
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.wire import Channel

__all__ = ["CODE", "PIECE", "TARGETS", "Target", "heard", "main", "order", "put_word"]

PIECE = 4 << 20
CODE = "from coldframe.benchmarks.gpu.targets import main; main()"

_SAYS_S = 60.0
_SCRATCH = 64 << 30
"""Addresses that a worker reserves for what it computes in, in bytes."""
_WORD = b"here"


class Target:
    """A target as a child of this process.

    Args:
        kind: Which, of `TARGETS`.
        ordinal: The GPU.
        fds: Descriptors that it gets.
    """

    def __init__(self, kind: str, ordinal: int, fds: tuple[int, ...] = ()) -> None:
        self.channel, theirs = Channel.pair()
        self._child: Child = spawn_python(CODE, [], theirs.fileno(), dict(os.environ))
        theirs.close()
        self.channel.send(order(kind, ordinal), fds)
        try:
            self.told = heard(self.channel)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def go_on(self) -> str:
        """Has it look again: what it finds."""
        self.channel.send({"type": "go"})
        return heard(self.channel)

    def close(self) -> None:
        self._child.kill()
        self.channel.close()


def order(kind: str, ordinal: int, *, roomy: bool = False) -> dict[str, Any]:
    """The message that a target begins with; descriptors go beside it.

    Args:
        kind: Which, of `TARGETS`.
        ordinal: The GPU.
        roomy: Whether it reserves as many addresses as a worker.
    """
    return {"type": "order", "kind": kind, "ordinal": ordinal, "roomy": roomy}


def heard(channel: Channel) -> str:
    """What a target says.

    Raises:
        ColdframeError: It has nothing to be frozen with.
        RuntimeError: It has ended, or is silent.
    """
    try:
        message = channel.recv(_SAYS_S)
    except TimeoutError:
        raise RuntimeError("the process says nothing") from None
    if message is None:
        raise RuntimeError("the process has ended")
    if message.kind == "failed":
        raise ColdframeError.from_wire(message.body["error"])
    return str(message.body["told"])


def main() -> None:
    """A target's entry."""
    control = Channel.from_fd(3)
    wanted = control.recv()
    if wanted is None:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    kind, ordinal = wanted.body["kind"], wanted.body["ordinal"]
    steps = TARGETS[kind](ordinal, list(wanted.fds))
    # As a worker says it at its freeze point.
    gpu, word = None if kind == "plain" else {"ordinal": ordinal}, "frozen"
    reserved: list[DeviceReservation] = []
    while True:
        error: ColdframeError | None = None
        try:
            told = next(steps)
            if wanted.body["roomy"] and word == "frozen":
                reserved += _reserve(ordinal)
                told += f"; {sum(place.size for place in reserved) >> 30} GiB of addresses reserved"
        except Exception as failure:  # noqa: BLE001 - what it cannot do any more is its answer
            told = f"{type(failure).__name__}: {failure}".splitlines()[0]
            error = PlatformError("a process has nothing to be frozen with", where=kind, got=told)
        if error is not None and word == "frozen":
            control.send({"type": "failed", "error": error.to_wire()})
        else:
            control.send({"type": word, "gpu": gpu, "told": told})
        word = "found"
        if control.recv() is None:
            # Not through what torch and the driver do at exit: a lost context may hang there.
            os._exit(0)


def _reserve(ordinal: int) -> list[DeviceReservation]:
    """Addresses as a worker has them when it is frozen, with nothing behind them.

    For weights and KV, that is as for a model that fills the GPU. Where something is in the way
    they lie elsewhere: a dump takes as long.
    """
    context = up(ordinal)
    _, total = context.memory()
    half = round_up(total * 5 // 8, HUGE_PAGE)
    wanted = ((half, WEIGHTS_BASE), (half, KV_BASE), (_SCRATCH, SCRATCH_BASE))
    return [DeviceReservation(context, size, base) for size, base in wanted]


def _plain(_: int, __: list[int]) -> Iterator[str]:
    """Nothing on a GPU."""
    yield "up"
    yield "it goes on"


def _private(ordinal: int, _: list[int]) -> Iterator[str]:
    """Memory in the way of an arena's that is nobody else's, and a graph that writes to it."""
    context = up(ordinal)
    scratch = DeviceReservation(context, PIECE, WEIGHTS_BASE)
    memory = context.driver.create(ordinal, PIECE, shareable=False)
    scratch.map(0, PIECE, memory, writable=True)
    context.driver.release(memory)
    put_word(context, scratch.address)
    behind = scratch.address + PIECE // 2
    writes = _writing(context, behind)
    writes()
    yield f"at {scratch.address:#x}"
    there = _same(_fetched(context, scratch.address), f"at {scratch.address:#x}")
    put_word(context, behind, bytes(len(_WORD)))
    writes()
    yield f"{there}; {_same(_fetched(context, behind), 'by the graph')}"


def _writing(context: Context, address: int) -> Callable[[], None]:
    """Launches a graph of one node, which writes the word to an address."""
    calls, stream = GraphCalls(context.driver), context.driver.stream()
    graph, node = calls.new_graph(), calls.api.CUDA_MEMSET_NODE_PARAMS()
    node.dst = calls.api.CUdeviceptr(address)
    node.value, node.elementSize = int.from_bytes(_WORD, "little"), len(_WORD)
    node.width, node.height, node.pitch = 1, 1, len(_WORD)
    calls.add_memset(graph, node, calls.context())
    ready = calls.instantiate(graph)

    def launch() -> None:
        calls.launch(ready, stream)
        context.driver.synchronize(stream)

    return launch


def _imported(ordinal: int, fds: list[int]) -> Iterator[str]:
    """Memory of another process, as a worker has weights: let go, and mapped again behind it."""
    context = up(ordinal)
    segment = Segment(fds[0], 0, PIECE, 0, False)
    arena = DeviceReservation(context, PIECE, WEIGHTS_BASE)
    arena.attach([segment])
    arena.detach()
    yield f"at {arena.address:#x}"
    arena.attach([segment])
    word = _same(_fetched(context, arena.address), f"mapped again at {arena.address:#x}")
    # What was never reserved before, as where a clone's arena grows.
    kv = DeviceReservation(context, PIECE, KV_BASE)
    hint = "as wanted" if kv.address == KV_BASE else f"not {KV_BASE:#x}"
    yield f"{word}; a new reservation is at {kv.address:#x}, {hint}"


def _imported_mapped(ordinal: int, fds: list[int]) -> Iterator[str]:
    """The same, held on to."""
    context = up(ordinal)
    arena = DeviceReservation(context, PIECE, WEIGHTS_BASE)
    arena.attach([Segment(fds[0], 0, PIECE, 0, False)])
    yield f"at {arena.address:#x}"
    yield _same(_fetched(context, arena.address), f"at {arena.address:#x}")


def _pinned(ordinal: int, _: list[int]) -> Iterator[str]:
    """Host memory that is locked."""
    context = up(ordinal)
    arena = DeviceReservation(context, PIECE)
    memory = context.driver.create(ordinal, PIECE, shareable=False)
    arena.map(0, PIECE, memory, writable=True)
    context.driver.release(memory)
    host = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(host))
    host[: len(_WORD)] = _WORD
    context.driver.register_host(address, PIECE)
    yield f"{PIECE >> 20} MiB of it"
    stream = context.driver.stream()
    context.driver.copy_in(arena.address, address, PIECE, stream)
    context.driver.synchronize(stream)
    told = _same(_fetched(context, arena.address), "copied from")
    context.driver.unregister_host(address)
    yield f"{told}, and unlocked"


def _torch(ordinal: int, _: list[int]) -> Iterator[str]:
    """What a worker has: torch's context with the libraries behind a linear map."""
    import torch

    device = f"cuda:{ordinal}"
    ones = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    before = float((ones @ ones).sum().item())
    yield f"torch {torch.__version__}, {torch.cuda.memory_reserved(device) >> 20} MiB reserved"
    after = float((ones @ ones).sum().item())
    yield "a kernel works" if after == before else f"wrong: {after} instead of {before}"


def _graph(ordinal: int, _: list[int]) -> Iterator[str]:
    """A captured graph, which is replayed without anything before it."""
    import torch

    device = f"cuda:{ordinal}"
    numbers = torch.arange(4096, device=device, dtype=torch.float32)
    weight = torch.ones(4096, 64, device=device)
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        (numbers @ weight).sum()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        result = (numbers @ weight).sum()
    captured.replay()
    before = float(result.item())
    yield "captured"
    result.zero_()
    captured.replay()
    after = float(result.item())
    yield "it replays" if after == before else f"wrong: {after} instead of {before}"


TARGETS: dict[str, Callable[[int, list[int]], Iterator[str]]] = {
    "plain": _plain,
    "private": _private,
    "imported": _imported,
    "imported mapped": _imported_mapped,
    "pinned": _pinned,
    "torch": _torch,
    "graph": _graph,
}


def put_word(context: Context, address: int, word: bytes = _WORD) -> None:
    """Writes what targets look for to the GPU's memory."""
    source = ctypes.create_string_buffer(word, len(word))
    stream = context.driver.stream()
    context.driver.copy_in(address, ctypes.addressof(source), len(word), stream)
    context.driver.synchronize(stream)


def _fetched(context: Context, address: int) -> bytes:
    stream, back = context.driver.stream(), ctypes.create_string_buffer(len(_WORD))
    context.driver.copy_out(ctypes.addressof(back), address, len(_WORD), stream)
    context.driver.synchronize(stream)
    return back.raw


def _same(found: bytes, where: str) -> str:
    return f"{where}, and read" if found == _WORD else f"wrong: {found!r} {where}"
