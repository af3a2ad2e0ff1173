from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.errors import SourceChanged, SourceDenied, SourceError, SourceNotFound
from coldframe.loader.sources.direct import open_direct
from coldframe.loader.sources.file import FileSource
from tests.loader.weights import evict, layered, shard_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m")


@pytest.fixture
def source(model: Path) -> Iterator[FileSource]:
    fds = len(os.listdir("/proc/self/fd"))
    made = FileSource(Checkpoint.open(model).shards)
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """SIGIO as it comes; unhandled it would end the tests."""
    got: list[int] = []
    before = signal.signal(signal.SIGIO, lambda number, _: got.append(number))
    yield got
    signal.signal(signal.SIGIO, before)


def writer(path: Path) -> subprocess.Popen[bytes]:
    code = "import os, sys; os.close(os.open(sys.argv[1], os.O_WRONLY))"
    return subprocess.Popen([sys.executable, "-S", "-c", code, str(path)])


def wait_for(signals: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not signals:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_reads_are_positional(source: FileSource, model: Path) -> None:
    for shard, path in enumerate(shard_files(model)):
        data = path.read_bytes()
        for offset, length in ((0, len(data)), (1, 1), (4095, 5000), (len(data) - 3, 3), (7, 0)):
            buffer = bytearray(length)
            source.read_into(shard, offset, [memoryview(buffer)])
            assert buffer == data[offset : offset + length]


def test_a_read_beyond_the_end(source: FileSource, model: Path) -> None:
    path = shard_files(model)[1]
    size = path.stat().st_size
    with pytest.raises(SourceChanged, match="ended early") as caught:
        source.read_into(1, size - 10, [memoryview(bytearray(11))])
    error = caught.value
    assert error.where == str(path)
    assert (error.expected, error.got) == (f"{size} bytes, unchanged", f"byte {size}")
    assert error.hint


def test_a_read_that_the_system_refuses(source: FileSource, model: Path) -> None:
    folder = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(folder, source.fds[0], inheritable=False)  # a directory in its place
    os.close(folder)
    with pytest.raises(SourceError, match=r"cannot be read.* at 5.*Is a directory"):
        source.read_into(0, 5, [memoryview(bytearray(1))])


def change(path: Path, what: str) -> None:
    data = path.read_bytes()
    match what:
        case "cut":
            os.truncate(path, len(data) - 1)
        case "grown":
            path.write_bytes(data + b"x")
        case "rewritten":
            with open(path, "r+b") as file:
                file.write(data)
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        case "replaced":
            times = path.stat()
            other = path.with_suffix(".new")
            other.write_bytes(data)
            os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
            other.rename(path)


@pytest.mark.parametrize("what", ["cut", "grown", "rewritten", "replaced"])
def test_a_shard_that_changed_before_it_was_opened(what: str, model: Path) -> None:
    shards = Checkpoint.open(model).shards
    path = shard_files(model)[1]
    fds = len(os.listdir("/proc/self/fd"))
    change(path, what)
    with pytest.raises(SourceChanged) as caught:
        FileSource(shards)
    assert caught.value.where == str(path)
    assert caught.value.expected == f"{shards[1].size} bytes, unchanged"
    if what in ("cut", "grown"):
        assert caught.value.got == f"{path.stat().st_size} bytes"
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("what", ["cut", "grown", "rewritten"])
def test_a_shard_that_changes_while_it_is_open(what: str, source: FileSource, model: Path) -> None:
    source.finish()
    change(shard_files(model)[1], what)
    with pytest.raises(SourceChanged, match="while it was loaded"):
        source.finish()


def test_a_replaced_shard_stays_the_old_one_for_who_has_it_open(
    source: FileSource, model: Path
) -> None:
    path = shard_files(model)[1]
    old = path.read_bytes()
    path.with_suffix(".new").write_bytes(b"new")
    path.with_suffix(".new").rename(path)
    source.finish()
    buffer = bytearray(len(old))
    source.read_into(1, 0, [memoryview(buffer)])
    assert buffer == old


def test_a_shard_that_is_gone(model: Path) -> None:
    shards = Checkpoint.open(model).shards
    path = shard_files(model)[1]
    path.unlink()
    with pytest.raises(SourceNotFound) as caught:
        FileSource(shards)
    assert caught.value.where == str(path)


def test_a_shard_that_may_not_be_read(model: Path) -> None:
    shards = Checkpoint.open(model).shards
    shard_files(model)[1].chmod(0)
    for folder in (model, *model.parents):
        if folder.stat().st_uid == os.geteuid() and folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    dropped = os.geteuid() == 0
    if dropped:
        os.seteuid(65534)
    try:
        with pytest.raises(SourceDenied):
            FileSource(shards)
    finally:
        if dropped:
            os.seteuid(0)


def test_missing_pages_are_brought_in(source: FileSource, model: Path) -> None:
    size = sum(file.stat().st_size for file in shard_files(model))
    assert source.cached_bytes() == size
    evict(shard_files(model)[1])
    assert source.cached_bytes() < size
    source.make_resident(1, 100, 20_000)
    assert cached_bytes(source.fds[1], 100, 20_000) == 20_000
    source.make_resident(1, 0, shard_files(model)[1].stat().st_size)
    assert source.cached_bytes() == size


def test_a_lease_holds_a_writer_back(source: FileSource, model: Path, signals: list[int]) -> None:
    # Taken in a thread that has ended when the writer comes, as that of a load has.
    reasons: list[str | None] = []
    thread = threading.Thread(target=lambda: reasons.append(source.take_lease()))
    thread.start()
    thread.join()
    assert reasons == [None]
    assert not source.lease_is_breaking
    with open(shard_files(model)[1], "rb"):  # readers do not disturb
        assert not source.lease_is_breaking
    child = writer(shard_files(model)[1])
    wait_for(signals)
    assert source.lease_is_breaking
    time.sleep(0.05)
    assert child.poll() is None
    source.end_lease()
    assert child.wait(20) == 0
    assert not source.lease_is_breaking


def test_cutting_by_name_waits_as_well(source: FileSource, model: Path, signals: list[int]) -> None:
    path = shard_files(model)[0]
    size = path.stat().st_size
    assert source.take_lease() is None
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "import os, sys; os.truncate(sys.argv[1], 0)", str(path)]
    )
    wait_for(signals)
    assert path.stat().st_size == size
    source.end_lease()
    assert child.wait(20) == 0
    assert path.stat().st_size == 0


def test_no_lease_where_one_shard_is_open_for_writing(source: FileSource, model: Path) -> None:
    with open(shard_files(model)[1], "r+b"):
        reason = source.take_lease()
    assert reason == f"{shard_files(model)[1].name} is open for writing elsewhere"
    for fd in source.fds:
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    assert not source.lease_is_breaking


def test_no_lease_where_a_writable_mapping_is_left(source: FileSource, model: Path) -> None:
    with open(shard_files(model)[0], "r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    try:
        assert source.take_lease() == f"{shard_files(model)[0].name} is open for writing elsewhere"
    finally:
        area.close()


def test_closing_ends_the_lease(model: Path, signals: list[int]) -> None:
    source = FileSource(Checkpoint.open(model).shards)
    assert source.take_lease() is None
    child = writer(shard_files(model)[1])
    wait_for(signals)
    source.close()
    assert child.wait(20) == 0


@pytest.fixture
def memory() -> Iterator[memoryview]:
    """A megabyte that begins at a page."""
    area = mmap.mmap(-1, 1 << 20)
    with memoryview(area) as view:
        yield view
    area.close()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 60_000), (0, 4096), (1, 50_000), (4095, 4098), (4096, 8192), (100, 10), (5000, 3000)],
)
def test_direct_reads_bring_the_same_bytes(
    source: FileSource, model: Path, memory: memoryview, offset: int, length: int
) -> None:
    path = shard_files(model)[1]
    data = path.read_bytes()
    assert source.use_direct()
    for shift in (offset % 4096, 0, 8):  # congruent, so direct; and not, so the usual way
        place = memory[shift : shift + length]
        source.read_into(1, offset, [place])
        assert bytes(place) == data[offset : offset + length]
        assert bytes(memory[shift + length : shift + length + 64]) == bytes(64)
        memory[: 1 << 19] = bytes(1 << 19)
    # To the last byte, which is in no whole block.
    place = memory[:][: path.stat().st_size]
    source.read_into(1, 0, [place])
    assert bytes(place) == data


def test_direct_reads_go_past_the_page_cache(
    source: FileSource, model: Path, memory: memoryview
) -> None:
    path = shard_files(model)[1]
    evict(path)
    assert source.use_direct()
    source.read_into(1, 0, [memory[: path.stat().st_size]])
    # Only the ragged end came the usual way.
    assert cached_bytes(source.fds[1], 0, path.stat().st_size) <= 4096


def test_a_file_system_without_direct_reads(tmp_path: Path) -> None:
    # Files of /proc take no O_DIRECT, as a tmpfs did before Linux 6.6.
    assert open_direct("/proc/self/status") is None
    assert open_direct(str(tmp_path / "nothing")) is None


def test_a_shard_that_is_cut_while_it_is_read_directly(
    source: FileSource, model: Path, memory: memoryview
) -> None:
    path = shard_files(model)[1]
    size = path.stat().st_size
    assert source.use_direct()
    os.truncate(path, size - 9000)
    with pytest.raises(SourceChanged, match="ended early"):
        source.read_into(1, 0, [memory[:size]])


def test_a_shard_that_was_replaced_before_it_is_read_directly(
    source: FileSource, model: Path, tmp_path: Path
) -> None:
    path = shard_files(model)[1]
    (tmp_path / "other").write_bytes(path.read_bytes())
    (tmp_path / "other").rename(path)
    with pytest.raises(SourceChanged, match="was modified"):
        source.use_direct()
