"""Other processes' contexts frozen and thawed, on emulated GPUs: real processes, every error."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import (
    AnotherDevice,
    ContextPoisoned,
    DeviceError,
    DeviceFull,
    NoCheckpoint,
    ReplicaError,
)
from coldframe.snapshot import cuda
from coldframe.snapshot.cuda import Checkpoints, Frozen
from tests.loader.devices import emulated_checkpoint as states
from tests.loader.devices.emulator import GRANULARITY, Emulator
from tests.snapshot.target import Target, target

MIB = 1 << 20
CONTEXT = 300 * MIB


class Helper:
    """What a test looks at: the helper's driver, and what it freezes with."""

    def __init__(self, ledger: Path, kernel_gpus: Path, devices: int = 1) -> None:
        self.emulator = Emulator(devices=devices, context_bytes=CONTEXT, ledger=str(ledger))
        self.context = Context(Driver.open(self.emulator), 0)
        self.checkpoints = Checkpoints(self.context, str(kernel_gpus))
        self.emulated = {"context_bytes": CONTEXT, "ledger": str(ledger)}


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Helper]:
    monkeypatch.setattr(cuda, "CONTEXT_BYTES", CONTEXT)  # which is known here
    helper = Helper(tmp_path / "ledger", tmp_path / "gpus")
    before = len(os.listdir("/proc/self/fd"))
    yield helper
    helper.checkpoints.close()
    assert len(os.listdir("/proc/self/fd")) == before
    helper.context.close()
    assert helper.emulator.left() == []
    helper.emulator.close()


@pytest.fixture
def other(helper: Helper) -> Iterator[Target]:
    with target(**helper.emulated) as other:
        yield other


def state(other: Target) -> int:
    record = states.peek(other.pid)
    assert record is not None
    return record.state


def test_a_frozen_context_takes_nothing_and_comes_back(helper: Helper, other: Target) -> None:
    free = helper.context.available()
    for _ in range(3):
        frozen = helper.checkpoints.freeze(other.pid, 5)
        assert frozen.bytes == CONTEXT
        assert list(frozen.uuids.values()) == ["Emulated GPU 0"]
        assert helper.context.available() == free + CONTEXT
        assert state(other) == states.CHECKPOINTED
        other.tell("call")  # which waits
        assert not select.select([other.control], [], [], 0.02)[0]
        assert helper.checkpoints.thaw(other.pid, frozen) >= 0
        assert other.answer() == "call"
        assert helper.context.available() == free
        assert state(other) == states.RUNNING


def test_memory_of_others_must_have_been_let_go(helper: Helper, other: Target) -> None:
    other.ask("map")
    with pytest.raises(DeviceError, match="NOT_SUPPORTED") as caught:
        helper.checkpoints.freeze(other.pid, 5)
    assert type(caught.value) is DeviceError
    assert state(other) == states.RUNNING
    other.ask("unmap")
    helper.checkpoints.thaw(other.pid, helper.checkpoints.freeze(other.pid, 5))
    assert other.ask("call") == "call"


def test_memory_of_its_own_goes_with_the_context(helper: Helper, other: Target) -> None:
    other.ask("map own")
    frozen = helper.checkpoints.freeze(other.pid, 5)
    assert frozen.bytes == CONTEXT + GRANULARITY
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("unmap") == "unmap"


@contextmanager
def meanwhile(helper: Helper, event: Callable[[], object]) -> Iterator[None]:
    """Something happens on the GPU while a context leaves it."""
    really = helper.emulator.cuCheckpointProcessCheckpoint

    def checkpoint(pid: int, args: object) -> object:
        event()
        return really(pid, args)

    helper.emulator.cuCheckpointProcessCheckpoint = checkpoint
    try:
        yield
    finally:
        helper.emulator.cuCheckpointProcessCheckpoint = really


def test_memory_that_others_give_back_meanwhile_is_hardly_counted(
    helper: Helper, other: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_MARGIN", 50 * MIB)
    with target(**helper.emulated) as leaves, meanwhile(helper, leaves.kill):
        frozen = helper.checkpoints.freeze(other.pid, 5)
    assert frozen.bytes == CONTEXT + 50 * MIB  # and not two contexts
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("call") == "call"


def test_memory_that_others_take_meanwhile_does_not_hide_what_it_needs(
    helper: Helper, other: Target
) -> None:
    with ExitStack() as stack:
        comes = target(**helper.emulated)
        with meanwhile(helper, lambda: stack.enter_context(comes)):
            frozen = helper.checkpoints.freeze(other.pid, 5, GRANULARITY)
        assert frozen.bytes == CONTEXT + GRANULARITY
        driver = helper.context.driver
        left = helper.context.available() // GRANULARITY * GRANULARITY
        taken = driver.create(0, left - CONTEXT)
        with pytest.raises(DeviceFull):  # which is known before anything is lost
            helper.checkpoints.thaw(other.pid, frozen)
        assert state(other) == states.CHECKPOINTED
        driver.release(taken)
        helper.checkpoints.thaw(other.pid, frozen)
        assert other.ask("call") == "call"


@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NOT_PERMITTED"])
def test_where_nothing_can_be_frozen(helper: Helper, other: Target, code: str) -> None:
    helper.emulator.fail("cuCheckpointProcessLock", code=f"CUDA_ERROR_{code}")
    with pytest.raises(NoCheckpoint, match=code):
        helper.checkpoints.freeze(other.pid, 5)
    assert other.ask("call") == "call"


@pytest.mark.parametrize("call", ["Lock", "Checkpoint", "Restore", "Unlock", "GetState"])
def test_a_driver_without_the_calls_says_which(helper: Helper, other: Target, call: str) -> None:
    assert helper.checkpoints.supported() is None
    helper.emulator.missing = {f"cuCheckpointProcess{call}"}
    assert f"cuCheckpointProcess{call}" in str(helper.checkpoints.supported())
    for attempt in (
        lambda: helper.checkpoints.freeze(other.pid, 5),
        lambda: helper.checkpoints.thaw(other.pid, Frozen(0, {})),
    ):
        with pytest.raises(NoCheckpoint, match=call):
            attempt()
    assert other.ask("call") == "call"


def test_bindings_without_the_calls_say_so(helper: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Emulator, "cuCheckpointProcessLock", None)
    assert helper.checkpoints.supported() == "cuda-bindings have no cuCheckpointProcessLock"


def test_who_does_not_come_to_rest_goes_on(helper: Helper, other: Target) -> None:
    other.ask("busy")
    with pytest.raises(DeviceError, match="NOT_READY"):
        helper.checkpoints.freeze(other.pid, 0.01)
    assert state(other) == states.RUNNING
    other.ask("rest")
    helper.checkpoints.thaw(other.pid, helper.checkpoints.freeze(other.pid, 5))
    assert other.ask("call") == "call"


def test_an_error_behind_the_lock_lets_the_process_go_on(helper: Helper, other: Target) -> None:
    helper.emulator.fail("cuCheckpointProcessCheckpoint", code="CUDA_ERROR_OPERATING_SYSTEM")
    with pytest.raises(DeviceError, match="OPERATING_SYSTEM") as caught:
        helper.checkpoints.freeze(other.pid, 5)
    assert not isinstance(caught.value, ContextPoisoned)
    assert other.ask("call") == "call"


def test_who_cannot_be_let_go_on_is_lost(helper: Helper, other: Target) -> None:
    helper.emulator.fail("cuCheckpointProcessCheckpoint", code="CUDA_ERROR_UNKNOWN")
    helper.emulator.fail("cuCheckpointProcessUnlock", code="CUDA_ERROR_UNKNOWN")
    with pytest.raises(ContextPoisoned, match=r"UNKNOWN.*LOCKED.*Kill"):
        helper.checkpoints.freeze(other.pid, 5)


def test_a_failed_state_is_the_end(helper: Helper, other: Target) -> None:
    states.poke(other.pid, states.FAILED)
    with pytest.raises(ContextPoisoned, match="FAILED"):
        helper.checkpoints.freeze(other.pid, 5)
    with pytest.raises(ContextPoisoned, match="FAILED"):
        helper.checkpoints.thaw(other.pid, Frozen(0, helper.checkpoints.uuids()))


@pytest.mark.parametrize("call", ["Restore", "Unlock", "GetState"])
def test_an_error_on_the_way_back_is_the_end(helper: Helper, other: Target, call: str) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    helper.emulator.fail(f"cuCheckpointProcess{call}", code="CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(ContextPoisoned, match="LAUNCH_FAILED"):
        helper.checkpoints.thaw(other.pid, frozen)


def test_without_room_nothing_is_touched(helper: Helper, other: Target) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    driver = helper.context.driver
    taken = driver.create(0, helper.context.available() // GRANULARITY * GRANULARITY)
    for _ in range(2):
        with pytest.raises(DeviceFull, match=f"{CONTEXT:,}"):
            helper.checkpoints.thaw(other.pid, frozen)
        assert state(other) == states.CHECKPOINTED
    driver.release(taken)
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("call") == "call"


def test_too_little_room_that_only_the_driver_sees_is_the_end(
    helper: Helper, other: Target
) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    driver = helper.context.driver
    taken = driver.create(0, helper.context.available() // GRANULARITY * GRANULARITY)
    with pytest.raises(ContextPoisoned, match=r"OUT_OF_MEMORY.*FAILED"):
        helper.checkpoints.thaw(other.pid, Frozen(0, frozen.uuids))
    driver.release(taken)


def test_what_it_took_may_stay_unknown(helper: Helper, other: Target) -> None:
    helper.emulator.fail("cuMemGetInfo", 2, "CUDA_ERROR_INVALID_VALUE")
    frozen = helper.checkpoints.freeze(other.pid, 5)
    assert (frozen.bytes, state(other)) == (CONTEXT, states.CHECKPOINTED)
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("call") == "call"


def test_those_that_are_gone_are_let_go_of(helper: Helper, other: Target) -> None:
    for _ in range(3):
        with target(**helper.emulated) as brief:
            helper.checkpoints.freeze(brief.pid, 5)
    before = len(os.listdir("/proc/self/fd"))
    helper.checkpoints.thaw(other.pid, helper.checkpoints.freeze(other.pid, 5))
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_without_host_memory_nothing_is_touched(helper: Helper, other: Target) -> None:
    enough = CONTEXT + 10 * MIB + (1 << 30)
    left = iter((enough - 1, enough))
    checkpoints = Checkpoints(helper.context, available=lambda: next(left))
    with pytest.raises(DeviceError, match="host has no memory"):
        checkpoints.freeze(other.pid, 5, 10 * MIB)
    assert other.ask("call") == "call"
    checkpoints.thaw(other.pid, checkpoints.freeze(other.pid, 5, 10 * MIB))
    checkpoints.close()
    assert other.ask("call") == "call"


def test_who_is_gone_is_said_to_be(helper: Helper, other: Target) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    pid = other.pid
    other.kill()
    for attempt in (
        lambda: helper.checkpoints.thaw(pid, frozen),
        lambda: helper.checkpoints.freeze(pid, 5),
    ):
        with pytest.raises(ReplicaError, match="the process is gone"):
            attempt()


def test_a_number_that_is_another_process_now_is_not_touched(
    helper: Helper, other: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    with target(**helper.emulated) as first:
        # The kernel gives a number again when it likes; here the second has it at once.
        pidfd = os.pidfd_open
        monkeypatch.setattr(os, "pidfd_open", lambda pid: pidfd(first.pid))
        frozen = helper.checkpoints.freeze(other.pid, 5)
        first.kill()
        with pytest.raises(ReplicaError, match="the process is gone"):
            helper.checkpoints.thaw(other.pid, frozen)
    assert state(other) == states.CHECKPOINTED


def test_who_has_no_context_is_left_alone(helper: Helper) -> None:
    with pytest.raises(DeviceError, match="INVALID_VALUE") as caught:
        helper.checkpoints.freeze(os.getppid(), 5)
    assert type(caught.value) is DeviceError


def test_a_process_that_goes_on_cannot_be_thawed(helper: Helper, other: Target) -> None:
    with pytest.raises(ContextPoisoned, match="RUNNING"):
        helper.checkpoints.thaw(other.pid, Frozen(0, helper.checkpoints.uuids()))


def test_a_context_moves_to_another_gpu_of_its_kind(helper: Helper, other: Target) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    helper.emulator.uuids = [bytes(range(16))]
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("call") == "call"
    record = states.peek(other.pid)
    assert record is not None
    assert record.uuid == bytes(range(16))


def test_bindings_that_move_nothing(
    helper: Helper, other: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    monkeypatch.setattr(Emulator, "CUcheckpointGpuPair", None, raising=False)
    uuids, helper.emulator.uuids = helper.emulator.uuids, [bytes(range(16))]
    with pytest.raises(AnotherDevice, match="gpuPairs"):
        helper.checkpoints.thaw(other.pid, frozen)
    helper.emulator.uuids = uuids  # where it was, it can be all the same
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("call") == "call"


def test_another_kind_of_gpu_is_refused_untouched(helper: Helper, other: Target) -> None:
    frozen = helper.checkpoints.freeze(other.pid, 5)
    with pytest.raises(AnotherDevice, match="GPU-1"):
        helper.checkpoints.thaw(other.pid, Frozen(frozen.bytes, {"GPU-1": "Another GPU"}))
    helper.checkpoints.thaw(other.pid, frozen)
    assert other.ask("call") == "call"


def test_gpus_that_only_the_kernel_sees_are_named_too(helper: Helper, tmp_path: Path) -> None:
    (own,) = helper.checkpoints.uuids()
    for number, uuid in enumerate((own, "GPU-7")):
        folder = tmp_path / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        text = f"Model: \t\t Other GPU\nIRQ:   \t\t 27\nGPU UUID: \t {uuid}\nBus Type: \t PCIe\n"
        (folder / "information").write_text(text)
    assert helper.checkpoints.uuids() == {own: "Emulated GPU 0", "GPU-7": "Other GPU"}


def test_a_helper_that_dies_leaves_the_process_stopped(
    helper: Helper, other: Target, tmp_path: Path
) -> None:
    """Which is why whoever has such a process kills it with the helper."""
    for call, left in (("Checkpoint", states.LOCKED), ("Restore", states.CHECKPOINTED)):
        child = os.fork()
        if child == 0:
            try:
                helper.emulator.dies_at = (f"cuCheckpointProcess{call}", 1)
                frozen = helper.checkpoints.freeze(other.pid, 5)
                helper.checkpoints.thaw(other.pid, frozen)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert state(other) == left
        states.poke(other.pid, states.RUNNING)


def test_several_are_frozen_one_after_the_other(helper: Helper) -> None:
    with target(**helper.emulated) as one, target(**helper.emulated) as two:
        both = [helper.checkpoints.freeze(each.pid, 5) for each in (one, two)]
        assert [frozen.bytes for frozen in both] == [CONTEXT, CONTEXT]
        for each, frozen in zip((one, two), both, strict=True):
            helper.checkpoints.thaw(each.pid, frozen)
            assert each.ask("call") == "call"
