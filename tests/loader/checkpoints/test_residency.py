from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.residency import _by_cachestat, _by_mincore, cached_bytes
from tests.loader.weights import evict
from tests.support import unavailable

PAGES = 100


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file of a hundred pages and one byte."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE + 1))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    yield path, fd
    os.close(fd)


def whole(fd: int) -> int:
    return cached_bytes(fd, 0, os.fstat(fd).st_size)


def both(fd: int, size: int) -> int:
    """The pages that are cached, if the two ways to ask agree."""
    pages = _by_mincore(fd, 0, size)
    assert _by_cachestat(fd, 0, size) in (None, pages)
    return pages


def test_what_was_written_is_cached(file: tuple[Path, int]) -> None:
    path, fd = file
    assert whole(fd) == path.stat().st_size
    assert both(fd, path.stat().st_size) == PAGES + 1


def test_what_was_evicted_is_not_until_it_is_read(file: tuple[Path, int]) -> None:
    path, fd = file
    size = path.stat().st_size
    evict(path)
    assert whole(fd) < size
    assert both(fd, size) == 0
    path.read_bytes()
    assert whole(fd) == size
    assert both(fd, size) == PAGES + 1


def test_a_part_is_not_the_whole(file: tuple[Path, int]) -> None:
    path, fd = file
    size = path.stat().st_size
    evict(path)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(fd, 10, 50 * mmap.PAGESIZE)
    assert 0 < whole(fd) < size
    assert both(fd, size) == 1


def test_a_stretch_that_begins_and_ends_within_pages(file: tuple[Path, int]) -> None:
    path, fd = file
    evict(path)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(fd, 2 * mmap.PAGESIZE, 50 * mmap.PAGESIZE)
    start, length = 50 * mmap.PAGESIZE + 100, mmap.PAGESIZE
    assert cached_bytes(fd, start, length) == length
    assert _by_mincore(fd, 50 * mmap.PAGESIZE, 2 * mmap.PAGESIZE) == 2
    assert cached_bytes(fd, 70 * mmap.PAGESIZE + 100, length) == 0
    assert 0 < cached_bytes(fd, start, 4 * mmap.PAGESIZE) < 4 * mmap.PAGESIZE


def test_asking_does_not_bring_it_in(file: tuple[Path, int]) -> None:
    path, fd = file
    evict(path)
    for _ in range(3):
        assert both(fd, path.stat().st_size) == 0


def test_an_empty_file_has_nothing_to_cache(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    assert whole(fd) == 0
    os.close(fd)


def test_what_cannot_be_mapped_is_not_cached() -> None:
    reader, writer = os.pipe()
    assert _by_mincore(reader, 0, mmap.PAGESIZE) == 0
    os.close(reader)
    os.close(writer)


def test_a_file_larger_than_the_memory_can_be_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 36)
    fd = os.open(path, os.O_RDONLY)
    assert whole(fd) == 0
    assert _by_mincore(fd, 0, 1 << 36) == 0
    os.close(fd)


def test_files_of_a_container_are_looked_at_through_its_overlay(tmp_path: Path) -> None:
    image, upper, work, root = (tmp_path / name for name in ("image", "upper", "work", "root"))
    for folder in (image, upper, work, root):
        folder.mkdir()
    (image / "weights").write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    layers = f"lowerdir={image},upperdir={upper},workdir={work}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(root)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        unavailable("an overlay cannot be mounted here")
    try:
        evict(image / "weights")
        fd = os.open(root / "weights", os.O_RDONLY)
        assert whole(fd) == 0
        assert os.pread(fd, PAGES * mmap.PAGESIZE, 0)
        assert whole(fd) == PAGES * mmap.PAGESIZE
        os.close(fd)
    finally:
        subprocess.run(["umount", root], check=True)
