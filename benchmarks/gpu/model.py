"""A checkpoint of a real model's shape, made in seconds: its bytes count, not what it says.

Each tensor is cut from one block of small random numbers, so that making 16 GB costs no more than
writing them. Nothing overflows, and every start of it answers the
same tokens. Where it goes is the first place with room for it that is fast enough: a disk, whose
files can be evicted from the page cache, else a tmpfs, where they cannot.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.machine import FINGERPRINT
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.cgroup import memory_available
from coldframe.runtime.checkpoints import demo_tokenizer
from coldframe.runtime.checkpoints.demo_weights import DemoModel, Size
from coldframe.runtime.checkpoints.safetensors_writer import TensorEntry, write_safetensors

__all__ = ["DIRECTORY", "MODEL", "SHAPES", "Shape", "choose", "measure", "write_shape"]

MODEL = "the model's directory"
DIRECTORY = "the directory that goes with the run"

_SLACK = 1 << 20
_ONE = b"\x80\x3f"
_STD = 0.02
_TRIAL = 256 << 20
_SLOW = 0.8e9
"""Bytes per second that a disk must take at least; a slower one would use up the budget."""
_TOKENIZER = 32_000
_WRITERS = 8
_BESIDE = 1 << 30
"""Bytes of the GPU's memory for contexts, kernels and KV."""


@dataclass(frozen=True, slots=True)
class Shape(DemoModel):
    """A model by its numbers, with weights that mean nothing.

    Args:
        numbers: Its shape.
    """

    numbers: Size | None = None

    @property
    def shape(self) -> Size:
        assert self.numbers is not None
        return self.numbers


SHAPES = {
    "8B": Size(128256, 4096, 32, 14336, 32, 8, 128, 8192, 0, 8, False),
    "1B": Size(128256, 2048, 16, 8192, 32, 8, 64, 8192, 0, 4, True),
    "tiny": Size(1024, 128, 4, 352, 4, 2, 32, 1024, 0, 2, False),
}
"""Llama 3's and Llama 3.2's numbers, the largest first; the last is for tests without a GPU."""


def shape_of(name: str) -> Shape:
    return Shape(name, "llama", numbers=SHAPES[name])


def measure(report: Report, setting: Setting) -> None:
    """Makes the checkpoint that is loaded and started by the parts after this one."""
    wanted = [setting.shape] if setting.shape else [name for name in SHAPES if name != "tiny"]
    room = report.earlier.need(FINGERPRINT)["gpu_memory_free"]
    name, place, notes = choose(wanted, Path(setting.scratch), memory_available(), room)
    for what, reason in notes.items():
        report.left_out(what, reason)
    path = Path(tempfile.mkdtemp(prefix="cf-gpu-model-", dir=place))
    # Known before it is written, so that whoever clears up after a part that was killed finds it.
    report.keep(DIRECTORY, str(path))
    shape = shape_of(name)
    seconds = write_shape(path, shape)
    report.answer("shape", name)
    report.answer("parameters", shape.parameters())
    report.answer("bytes", shape.nbytes())
    report.answer("file system", _file_system(path))
    report.figure(Row("written", [shape.nbytes() / 1e9 / seconds], "GB/s"))
    report.keep(MODEL, str(path))


def choose(
    names: list[str], scratch: Path, memory: int, device: int, shm: Path = Path("/dev/shm")
) -> tuple[str, Path, dict[str, str]]:
    """Which shape there is room for, and where.

    Args:
        names: Shapes, the best first.
        scratch: A directory on the disk that is tried first.
        memory: Bytes of memory that are free: a tmpfs may promise more than there is.
        device: Bytes of the GPU's that are free.
        shm: A tmpfs.

    Returns:
        The shape's name, the directory, and what was not possible with its reason.

    Raises:
        LeftOut: There is room for none.
    """
    notes: dict[str, str] = {}
    rate = _write_rate(scratch)
    for name in names:
        nbytes = shape_of(name).nbytes()
        if device < nbytes + nbytes // 4 + _BESIDE:
            notes[name] = f"{device / 1e9:.1f} GB of the GPU's memory are free"
            continue
        wanted = nbytes + nbytes // 20 + (64 << 20)
        free = shutil.disk_usage(scratch).free
        if free < wanted:
            notes[f"{name} on {scratch}"] = f"{free / 1e9:.1f} GB are free there"
        elif rate < _SLOW and nbytes > (1 << 30):
            notes[f"{name} on {scratch}"] = f"it takes {rate / 1e9:.2f} GB/s only"
        else:
            return name, scratch, notes
        # Twice: the page cache's copy is the file itself, and locked buffers come beside it.
        room = min(shutil.disk_usage(shm).free if shm.is_dir() else 0, memory // 2)
        if room >= wanted:
            return name, shm, notes
        notes[f"{name} on {shm}"] = f"there is room for {room / 1e9:.1f} GB"
    raise LeftOut("there is room for no model: " + "; ".join(f"{k}: {v}" for k, v in notes.items()))


def _write_rate(place: Path) -> float:
    """Bytes per second that a directory's disk takes, until they are on it."""
    size = min(_TRIAL, shutil.disk_usage(place).free // 4)
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        started = time.perf_counter()
        for _ in range(max(1, size >> 20)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(1, size >> 20) * (1 << 20) / (time.perf_counter() - started)


def _file_system(path: Path) -> str:
    """What kind of file system a directory is on."""
    found, length = "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        inside = path == Path(place) or Path(place) in path.parents
        if inside and len(place) > length:
            found, length = kind, len(place)
    return found


def write_shape(directory: Path, shape: Shape) -> float:
    """Writes a checkpoint with weights that mean nothing; returns the seconds that it took.

    Args:
        directory: An empty one.
        shape: Its numbers.
    """
    started = time.perf_counter()
    block = _block(max(entry.nbytes for entry in shape.tensors()) + _SLACK)
    shards = shape.shards()
    where: dict[str, str] = {}

    def write(number: int) -> None:
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        entries = shards[number]
        where.update((entry.name, name) for entry in entries)
        write_safetensors(directory / name, entries, _values(entries, block), {"format": "pt"})
        # What is still to be written when a cold start is measured would be measured with it.
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, range(len(shards))))
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": shape.nbytes()}, "weight_map": where},
    )
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    _write_json(directory / "config.json", shape.config() | special)
    _write_json(directory / "generation_config.json", special)
    vocab = min(_TOKENIZER, shape.shape.vocab)
    demo_tokenizer.train(directory / "tokenizer.json", vocab, add_bos=True)
    _write_json(
        directory / "tokenizer_config.json",
        demo_tokenizer.tokenizer_config(shape.shape.context, add_bos=True),
    )
    return time.perf_counter() - started


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _block(nbytes: int) -> memoryview:
    """So many bytes of bfloat16 numbers, uniform, as widely spread as a trained model's."""
    generator, width = random.Random(0), _STD * 12**0.5
    # The upper half of a float32 is a bfloat16. A million different ones will do.
    some = min(nbytes // 2, 1 << 20)
    raw = struct.pack(f"<{some}f", *((generator.random() - 0.5) * width for _ in range(some)))
    halves = bytearray(2 * some)
    halves[0::2], halves[1::2] = raw[2::4], raw[3::4]
    memory = mmap.mmap(-1, nbytes)
    for at in range(0, nbytes, len(halves)):
        memory[at : at + len(halves)] = bytes(halves[: nbytes - at])
    return memoryview(memory)


def _values(entries: list[TensorEntry], block: memoryview) -> Iterator[memoryview]:
    """Each tensor begins elsewhere in the block, so that hardly two are the same."""
    for entry in entries:
        if "norm" in entry.name:
            yield memoryview(_ONE * (entry.nbytes // len(_ONE)))
        else:
            begin = zlib.crc32(entry.name.encode()) % _SLACK // 2 * 2
            yield block[begin : begin + entry.nbytes]
