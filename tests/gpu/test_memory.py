"""A GPU's memory as it is shared: what lies in it, who may write, who sees what others wrote."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.arena import Segment
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.wire import Channel
from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import options
from tests.runtime.helpers import ask, finish, prompt_of, wait_for

Make = Callable[..., Path]

CHILD = """
import ctypes, sys
from coldframe.loader.arena import Segment
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.vmm import DeviceReservation
ordinal, fd, length, base = map(int, sys.argv[1:])
context = Context(Driver.open(), ordinal)
context.bind()
reservation = DeviceReservation(context, length, base or None)
reservation.attach([Segment(fd, 0, length, 0, True)])
stream, data = context.driver.stream(), ctypes.create_string_buffer(64)
context.driver.copy_out(ctypes.addressof(data), reservation.address, 32, stream)
context.driver.synchronize(stream)
data[32:64] = data[0:32][::-1]
context.driver.copy_in(reservation.address + 32, ctypes.addressof(data) + 32, 32, stream)
context.driver.synchronize(stream)
print(hex(reservation.address), data[0:32].hex())
"""


def fetched(context: Context, address: int, nbytes: int) -> bytes:
    """Bytes of the GPU's memory."""
    context.bind()
    data, stream = ctypes.create_string_buffer(nbytes), context.driver.stream()
    context.driver.copy_out(ctypes.addressof(data), address, nbytes, stream)
    context.driver.synchronize(stream)
    context.driver.destroy_stream(stream)
    return data.raw


def put(context: Context, address: int, data: bytes) -> None:
    context.bind()
    source, stream = ctypes.create_string_buffer(data, len(data)), context.driver.stream()
    context.driver.copy_in(address, ctypes.addressof(source), len(data), stream)
    context.driver.synchronize(stream)
    context.driver.destroy_stream(stream)


def test_weights_are_those_of_the_files(
    demo_model: Make, runs: Path, device: str, gpu: CudaDevice
) -> None:
    from safetensors.torch import load_file

    model = demo_model("qwen3", "bfloat16")
    with Replica(options(model, runs, device)) as replica:
        finish(replica, ask(replica, prompt_of(7), 2))
        wait_for(replica, lambda: replica.loaded)
        channel = Channel.connect(os.path.join(replica.run_dir, "memory.sock"))
        client = MemoryClient(channel, "test", device=gpu)
        try:
            plan, weights, _ = client.wait_arenas()
            for stage in plan.stages:
                client.wait_stage(stage.index)
            seen = 0
            for file in sorted(model.glob("*.safetensors")):
                for name, tensor in load_file(file).items():
                    place = plan.placements[name]
                    there = fetched(gpu.context, weights.address + place.arena_offset, place.nbytes)
                    assert there == ctypes.string_at(tensor.data_ptr(), place.nbytes), name
                    seen += 1
            assert seen == len(plan.placements)
        finally:
            client.close()


def test_two_processes_share_an_arena_that_grows(gpu: CudaDevice) -> None:
    context = gpu.context
    arena = DeviceArena(context, 8 * context.granularity, writable=True)
    try:
        for step in range(3):
            segment = arena.grow(context.granularity)
            written = os.urandom(32)
            put(context, arena.address + segment.offset, written)
            arguments = (context.ordinal, segment.fd, segment.length, 0)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *map(str, arguments)],
                pass_fds=(segment.fd,),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.split()[1] == written.hex(), f"step {step}"
            both = fetched(context, arena.address + segment.offset, 64)
            assert both == written + written[::-1]
        assert arena.grown == 3 * context.granularity
    finally:
        arena.close()


def test_new_memory_can_be_zeroed_and_given_back(gpu: CudaDevice) -> None:
    """Others' memory may come free meanwhile, of a process that has just ended."""
    context = gpu.context
    before = context.available()
    size = min(1 << 30, before // 4 // context.granularity * context.granularity)
    for _ in range(3):
        arena = DeviceArena(context, size, writable=True, zeroed=True)
        arena.grow(size)
        assert fetched(context, arena.address, 1 << 20) == bytes(1 << 20)
        put(context, arena.address, os.urandom(1 << 20))
        assert context.available() <= before - size // 2
        arena.close()
    assert context.available() >= before - size // 2


def test_addresses_stay_when_memory_is_let_go(gpu: CudaDevice) -> None:
    context = gpu.context
    arena = DeviceArena(context, context.granularity, writable=False)
    try:
        segment = arena.grow(arena.size)
        put(context, arena.address, b"here")
        other = DeviceReservation(context, arena.size)
        try:
            address = other.address
            for _ in range(2):
                other.attach([Segment(segment.fd, 0, segment.length, 0, False)])
                assert fetched(context, address, 4) == b"here"
                other.detach()
            assert other.address == address
        finally:
            other.close()
    finally:
        arena.close()


def test_what_is_mapped_for_reading_cannot_be_written(gpu: CudaDevice) -> None:
    command = [
        *(sys.executable, "-m", "coldframe.benchmarks.gpu.questions"),
        *("coldframe.benchmarks.gpu.questions", "read_only_kernel", gpu.name),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    if "does not map" in answer:
        pytest.skip(answer)
    assert answer.startswith("refused")
