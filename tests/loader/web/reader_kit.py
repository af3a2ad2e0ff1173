"""What the tests of the range reader share: a file that is served, and an eye on what is left."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from coldframe.loader.sources.location import Http, parse_location
from coldframe.loader.web.http import HttpAddress
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.ranges import Opening, RangeReader

__all__ = ["FAST", "SHORT", "nothing_left", "open_files", "reader_of", "read_range", "write_random"]

FAST = Limits(patience_s=10.0, stall_s=0.5, connect_s=5.0, backoff_s=0.01, hedges=0)
"""Failures are noticed soon, and borne for long."""

SHORT = replace(FAST, patience_s=0.5)
"""For what fails in the end."""


def write_random(path: Path, size: int, seed: int = 0) -> bytes:
    content = random.Random(seed).randbytes(size)
    path.write_bytes(content)
    return content


@contextmanager
def reader_of(url: str, limits: Limits = FAST, **more: Any) -> Iterator[RangeReader]:
    """A reader of what lies below a URL."""
    location = parse_location(url)
    assert isinstance(location, Http)
    reader = RangeReader(HttpAddress(location), limits=limits, **more)
    try:
        yield reader
    finally:
        reader.close()


def read_range(
    reader: RangeReader, opening: Opening, offset: int, length: int, name: str = "file"
) -> bytes:
    """A range, into buffers that are cut at odd places."""
    content = bytearray(length)
    view = memoryview(content)
    cuts = [0, min(1, length), min(4097, length), length]
    parts = [view[a:b] for a, b in pairwise(cuts)]
    reader.read_into(name, opening.version, opening.size, offset, parts)
    return bytes(content)


def open_files() -> set[str]:
    """Sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """Afterwards there is no thread and no socket that was not there before."""
    threads, files = set(threading.enumerate()), open_files()
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) - threads == set()
    assert open_files() - files == set()
