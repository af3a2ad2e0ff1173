"""Tensors over memory that is mapped by others: the right bytes, nothing copied, nothing freed."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coldframe.loader.arena import PAGE, Reservation, Segment
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.errors import DeviceError, NoDevice
from coldframe.runtime.worker import tensors
from coldframe.runtime.worker.tensors import tensor_over, tensors_of
from tests.snapshot.frozen import ROOT

CPU = (1, 0)


@pytest.fixture
def memory() -> Iterator[Reservation]:
    """Four pages of shared memory that count up."""
    reservation = mapped(4 * PAGE, writable=True)
    reservation.view()[:] = bytes(range(256)) * (4 * PAGE // 256)
    yield reservation
    reservation.close()


def mapped(size: int, *, writable: bool, data: bytes = b"") -> Reservation:
    fd = os.memfd_create("tensors")
    os.ftruncate(fd, size)
    os.pwrite(fd, data, 0)
    reservation = Reservation(size)
    reservation.attach([Segment(fd, 0, size, 0, writable)])
    os.close(fd)
    return reservation


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is given to the deleter of the tensors that are made, instead of to free."""
    real, given = tensors._libc(), list[int]()
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(given.append)

    class Recorded:
        malloc = real.malloc
        free = deleter

    monkeypatch.setattr(tensors, "_libc", Recorded)
    return given


@pytest.mark.parametrize("layout", ["file", "aligned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_what_safetensors_reads(
    demo_model: Callable[..., Path], layout: str, dtype: str
) -> None:
    model = demo_model("qwen2", dtype)
    expected: dict[str, torch.Tensor] = {}
    for path in model.glob("*.safetensors"):
        expected |= load_file(path)
    plan = Plan.build(Checkpoint.open(model), layout=layout)
    data = bytearray(plan.arena_bytes)
    for p in plan.placements.values():
        raw = expected[p.name].contiguous().view(torch.uint8).flatten()
        data[p.arena_offset : p.arena_offset + p.nbytes] = raw.numpy().tobytes()
    reservation = mapped(plan.arena_bytes, writable=False, data=bytes(data))
    found = tensors_of(plan, reservation)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
        placed = plan.placements[name].arena_offset
        assert tensor.data_ptr() == reservation.address + placed
        assert tensor.untyped_storage().nbytes() == plan.arena_bytes
    del found, tensor
    reservation.close()


def test_it_is_the_memory_itself(memory: Reservation) -> None:
    tensor = tensor_over(memory.address + 3, 1000, memory.dlpack_device)
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.uint8, (1000,), "cpu")
    assert (tensor.data_ptr(), tensor.stride()) == (memory.address + 3, (1,))
    assert tensor.tolist() == list(memory.view(3, 1000))
    tensor[5] = 77
    assert memory.view()[8] == 77
    memory.view()[9] = 78
    assert tensor[6] == 78


def test_memory_that_may_only_be_read_is_only_read() -> None:
    reservation = mapped(PAGE, writable=False, data=b"\1\2\3\4")
    tensor = tensor_over(reservation.address, PAGE, CPU)
    assert tensor[:4].view(torch.int32).item() == 0x04030201
    assert int(tensor.sum()) == 10
    del tensor
    reservation.close()


def test_addresses_without_memory_behind_them_can_be_had() -> None:
    """KV is reserved in full and mapped as it grows."""
    reservation = Reservation(4 * PAGE)
    tensor = tensor_over(reservation.address, 4 * PAGE, CPU)
    later = mapped(PAGE, writable=True, data=b"\7")
    fd = os.memfd_create("later")
    os.ftruncate(fd, PAGE)
    os.pwrite(fd, b"\7", 0)
    reservation.attach([Segment(fd, 0, PAGE, 2 * PAGE, True)])
    os.close(fd)
    assert tensor[2 * PAGE] == 7
    del tensor
    later.close()
    reservation.close()


@pytest.mark.parametrize("address", [0, 4096])
def test_no_bytes_are_a_tensor_too(address: int) -> None:
    tensor = tensor_over(address, 0, CPU)
    assert tensor.shape == (0,)
    assert tensor.view(torch.bfloat16).shape == (0,)
    assert tensor.clone().tolist() == []


def test_what_describes_it_goes_with_its_last_view(memory: Reservation, freed: list[int]) -> None:
    tensor = tensor_over(memory.address, memory.size, CPU)
    view = tensor[10:20].view(2, 5)
    del tensor
    gc.collect()
    assert freed == []
    assert view.tolist() == [list(range(10, 15)), list(range(15, 20))]
    del view
    assert len(freed) == 1
    assert memory.view()[10] == 10  # the memory is nobody's to free


def test_what_torch_does_not_take_is_given_back(memory: Reservation, freed: list[int]) -> None:
    with pytest.raises(DeviceError, match=r"does not take memory.*device_type: 77"):
        tensor_over(memory.address, 100, (77, 0))
    gc.collect()
    assert len(freed) == 1


def test_the_last_view_may_go_in_any_thread(memory: Reservation, freed: list[int]) -> None:
    held = [tensor_over(memory.address, memory.size, CPU)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(freed) == 1


def test_a_gpu_that_torch_cannot_use(memory: Reservation) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch can use one")
    with pytest.raises(NoDevice, match=r"torch cannot use the GPU, in cuda:3.*got torch "):
        tensor_over(memory.address, 100, (2, 3))


@pytest.mark.heavy
def test_a_process_ends_while_there_are_tensors() -> None:
    """In the interpreter's last moments, too, and while its memory is unmapped already."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from coldframe.loader.arena import Reservation
from coldframe.runtime.worker.tensors import tensor_over
reservation = Reservation(1 << 20)
kept = [tensor_over(reservation.address, 1 << 20, (1, 0)) for _ in range(100)]
views = [tensor[:100].view(10, 10) for tensor in kept]
class Last:
    def __del__(self, views=views): views.clear()
last = Last()
reservation.close()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
