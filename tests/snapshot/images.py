"""Images for tests: files as CRIU leaves them, and what a manifest says of them."""

from __future__ import annotations

import random
from pathlib import Path

from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Arena, Draft, Process, Reservation
from coldframe.snapshot.model_key import ModelKey

__all__ = ["MACHINE", "MODEL", "draft", "same_files", "write_image"]

MACHINE = Machine(
    arch="x86_64",
    cpu_vendor="GenuineIntel",
    cpu_features=("avx", "avx2", "fma"),
    kernel=(6, 1),
    glibc="glibc 2.36",
    python="3.11.7 cpython-311",
    executable="/usr/bin/python3.11",
    torch="2.13.0+cpu",
    coldframe="0.1.0 0123456789abcdef",
    device="cpu",
    gpu=None,
    driver=None,
    page_size=4096,
)
MODEL = ModelKey(config="a" * 64, generation="b" * 64, tokenizer="c" * 64, tensors="d" * 64)


def draft(name: str = "org/model", *, model: ModelKey = MODEL, machine: Machine = MACHINE) -> Draft:
    arena = Arena(Reservation(0x100000000000, 1 << 40), Reservation(0x200000000000, 1 << 40))
    return Draft(name, model, machine, arena, Process(7, 4711, "4.1.1", False))


def write_image(path: Path, seed: int = 0, mebibytes: int = 5) -> Path:
    """Writes an image: pages that compress in part, a sparse file, small ones, an empty one."""
    source = random.Random(seed)
    path.mkdir()
    pages = bytearray((mebibytes << 20) + 4096)
    for at in range(0, len(pages), 4096):
        pages[at : at + 1024] = source.randbytes(1024)
    (path / "pages-1.img").write_bytes(pages)
    (path / "pages-2.img").write_bytes(source.randbytes(2 << 20))
    with open(path / "sparse.img", "wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"here")
    (path / "empty.img").write_bytes(b"")
    for number in range(20):
        (path / f"core-{number}.img").write_bytes(source.randbytes(source.randrange(1, 5000)))
    (path / "dump.log").write_text("not of the image")
    (path / "stats-dump").write_text("neither")
    return path


def same_files(image: Path, copy: Path) -> bool:
    """Whether a copy has an image's files, and no others."""
    names = {path.name for path in image.iterdir()} - {"dump.log", "stats-dump"}
    return names == {path.name for path in copy.iterdir()} and all(
        (image / name).read_bytes() == (copy / name).read_bytes() for name in names
    )
