"""Whether contexts can be taken off a GPU and brought back, of what, and how long that takes.

Asked of the driver step by step, with nothing around it (see `questions`). The process that is
asked is the helper; what is frozen is one of `targets`, a child of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.questions import up
from coldframe.benchmarks.gpu.targets import PIECE, Target, put_word
from coldframe.loader.devices.checkpoint_calls import CheckpointCalls, ProcessState
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import ColdframeError, NoCheckpoint
from coldframe.snapshot.left_open import left_open

__all__ = [
    "able",
    "checkpoint_by_a_fresh_helper",
    "checkpoint_graph",
    "checkpoint_mapped",
    "checkpoint_pairs",
    "checkpoint_pinned",
    "checkpoint_private",
    "checkpoint_torch",
    "checkpoint_twice",
    "checkpoint_unmapped",
    "checkpoints",
    "thawed",
]

_LOCK_S = 5.0


def checkpoints(ordinal: int) -> str:
    """Whether the driver has the calls.

    Raises:
        NoCheckpoint: It has not.
    """
    able(up(ordinal).driver)
    return "there are calls for it"


def checkpoint_torch(ordinal: int) -> dict[str, Any]:
    return _there_and_back(up(ordinal), "torch")


def checkpoint_twice(ordinal: int) -> dict[str, Any]:
    """What the second time takes, as of a replica that rests again and again."""
    context = up(ordinal)
    calls = able(context.driver)
    found: dict[str, Any] = {}
    with closing(Target("torch", ordinal)) as target:
        for which in ("first", "second"):
            if not _steps(found, calls, target, context, which=f"{which} "):
                break
            found[f"behind the {which}"] = target.go_on()
    return found


def checkpoint_private(ordinal: int) -> dict[str, Any]:
    return _there_and_back(up(ordinal), "private")


def checkpoint_pinned(ordinal: int) -> dict[str, Any]:
    return _there_and_back(up(ordinal), "pinned")


def checkpoint_graph(ordinal: int) -> dict[str, Any]:
    return _there_and_back(up(ordinal), "graph")


def checkpoint_pairs(ordinal: int) -> dict[str, Any]:
    """The same GPUs, each named as its own successor."""
    context = up(ordinal)
    calls = able(context.driver)
    if not calls.can_move:
        raise NoCheckpoint("these cuda-bindings have no pairs of GPUs")
    ours = [calls.uuid(number) for number in range(context.driver.device_count())]
    return _there_and_back(context, "private", pairs={uuid: uuid for uuid in ours})


def checkpoint_unmapped(ordinal: int) -> dict[str, Any]:
    return _of_imported(ordinal, "imported")


def checkpoint_mapped(ordinal: int) -> dict[str, Any]:
    return _of_imported(ordinal, "imported mapped")


def checkpoint_by_a_fresh_helper(ordinal: int) -> dict[str, Any]:
    """By a process that has called nothing of the driver before: what a resident one is worth."""
    with closing(Target("torch", ordinal)) as target:
        started = time.perf_counter()
        driver = Driver.open()
        found: dict[str, Any] = {"bindings and cuInit": _seconds(started)}
        calls = able(driver)
        if _steps(found, calls, target, None):
            found["behind it"] = target.go_on()
        return found


def able(driver: Driver) -> CheckpointCalls:
    """The calls.

    Raises:
        NoCheckpoint: Bindings or driver have not all of them.
    """
    calls = CheckpointCalls(driver)
    why = calls.supported()
    if why is not None:
        raise NoCheckpoint("contexts cannot be checkpointed", got=why)
    return calls


def _of_imported(ordinal: int, kind: str) -> dict[str, Any]:
    """Of a process that has had, or has, memory of this one."""
    context = up(ordinal)
    arena = DeviceArena(context, PIECE, writable=True)
    fd = arena.grow(arena.size).fd
    put_word(context, arena.address)
    return _there_and_back(context, kind, fds=(fd,))


def _there_and_back(
    context: Context,
    kind: str,
    fds: tuple[int, ...] = (),
    pairs: dict[str, str] | None = None,
) -> dict[str, Any]:
    calls = able(context.driver)
    with closing(Target(kind, context.ordinal, fds)) as target:
        found: dict[str, Any] = {"before": target.told}
        if _steps(found, calls, target, context, pairs=pairs):
            found["behind it"] = target.go_on()
        return found


def _steps(
    found: dict[str, Any],
    calls: CheckpointCalls,
    target: Target,
    context: Context | None,
    *,
    pairs: dict[str, str] | None = None,
    which: str = "",
) -> bool:
    """Freezes and thaws a process, and notes how; whether it runs again."""
    free = None if context is None else context.available()
    resident = _resident(target.pid)
    if not _step(found, f"{which}lock", lambda: calls.lock(target.pid, _LOCK_S)):
        return False
    if not _step(found, f"{which}checkpoint", lambda: calls.checkpoint(target.pid)):
        # What is refused should go on as if nothing had been.
        found[f"{which}state then"] = calls.state(target.pid).value
        return _step(found, f"{which}unlock", lambda: calls.unlock(target.pid))
    if context is not None and free is not None:
        found[f"{which}MiB freed on the GPU"] = context.available() - free >> 20
    found[f"{which}MiB more in host memory"] = _resident(target.pid) - resident >> 20
    found[f"{which}left open of /dev/nvidia*"] = ", ".join(left_open(target.pid)) or "nothing"
    return thawed(found, calls, target.pid, pairs, which)


def thawed(
    found: dict[str, Any],
    calls: CheckpointCalls,
    pid: int,
    pairs: dict[str, str] | None = None,
    which: str = "",
) -> bool:
    """Brings a process's context back, and notes how; whether it runs again."""
    state = calls.state(pid)
    if state is not ProcessState.CHECKPOINTED:
        found[f"{which}state then"] = state.value
    if not _step(found, f"{which}restore", lambda: calls.restore(pid, pairs)):
        found[f"{which}state then"] = calls.state(pid).value
        return False
    return _step(found, f"{which}unlock", lambda: calls.unlock(pid))


def _step(found: dict[str, Any], name: str, call: Callable[[], None]) -> bool:
    started = time.perf_counter()
    try:
        call()
    except ColdframeError as error:
        found[name] = f"refused: {error.got or error.what}"
        return False
    found[name] = _seconds(started)
    return True


def _resident(pid: int) -> int:
    """Bytes of the host's memory that a process has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def _seconds(started: float) -> str:
    return f"{time.perf_counter() - started:.3f} s"
