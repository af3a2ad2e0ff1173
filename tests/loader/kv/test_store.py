from __future__ import annotations

import ctypes
import os
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.kv.store import KvStore
from coldframe.loader.memory import HostMemory
from tests.loader.kv.test_disk import key, mounted

_MS_RDONLY, _MS_REMOUNT = 1, 32
BLOCK = 4096
BLOCKS = 16


def content(number: int) -> bytes:
    return bytes([number % 251 + 1]) * BLOCK


class Arena:
    """Memory for blocks, and a store beside it."""

    def __init__(self, options: KvStoreOptions) -> None:
        self.memory = memoryview(bytearray(BLOCK * BLOCKS))
        self.store = KvStore(options, HostMemory(self.memory), BLOCK)
        self.store.open_disk("model")

    def __setitem__(self, place: int, data: bytes) -> None:
        self.memory[place * BLOCK : (place + 1) * BLOCK] = data

    def __getitem__(self, place: int) -> bytes:
        return bytes(self.memory[place * BLOCK : (place + 1) * BLOCK])

    def publish(self, *numbers: int) -> None:
        """Computes blocks, each in the place of its number."""
        for number in numbers:
            self[number] = content(number)
        self.store.published([(key(number), number) for number in numbers])

    def forget(self, *numbers: int) -> None:
        """Blocks are used for something else."""
        self.store.forgotten([(key(number), number) for number in numbers])
        for number in numbers:
            self[number] = b"\xff" * BLOCK

    def fetch(self, numbers: list[int], places: list[int], forgotten: list[int] = []) -> int:  # noqa: B006
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        named = [(key(number), number) for number in forgotten]
        self.store.fetch(named, [key(number) for number in numbers], places, done.put)
        return done.get(timeout=30)

    def written(self, count: int) -> None:
        until(lambda: self.store.usage().disk_stored == count)


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@contextmanager
def arena(directory: Path | None, memory: int = 0, **more: int) -> Iterator[Arena]:
    place = None if directory is None else str(directory)
    made = Arena(KvStoreOptions(place, memory=memory * BLOCK, **more))
    before = threading.active_count()
    try:
        yield made
    finally:
        made.store.close(5)
        until(lambda: threading.active_count() <= before)


def test_what_was_published_is_there_for_the_next(tmp_path: Path) -> None:
    with arena(tmp_path) as first:
        first.store.may_write()
        first.publish(0, 1, 2)
        first.written(3)
    with arena(tmp_path) as second:
        assert second.fetch([0, 1, 2, 3], [7, 6, 5, 4]) == 3
        assert [second[place] for place in (7, 6, 5)] == [content(number) for number in (0, 1, 2)]
        usage = second.store.usage()
        assert (usage.disk_loaded, usage.corrupt, usage.unreadable) == (3, 0, 0)
        assert second.fetch([], []) == 0


def test_nothing_is_written_before_the_weights_are_in_and_all_at_the_end(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.publish(*range(10))
        assert list(tmp_path.iterdir()) == []
        made.store.may_write()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 10


def test_what_comes_of_weights_that_are_not_proven_is_never_written(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.publish(*range(10))
    assert list(tmp_path.iterdir()) == []


def test_a_gap_ends_what_is_fetched(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.store.may_write()
        made.publish(*range(10))
        made.written(10)
        (gap,) = tmp_path.glob(f"*/*/{key(4)}")
        gap.unlink()
        made.forget(*range(10))
        assert made.fetch(list(range(10)), list(range(10))) == 4
        (cut,) = tmp_path.glob(f"*/*/{key(2)}")
        os.truncate(cut, 100)
        assert made.fetch(list(range(10)), list(range(10))) == 2
        assert made.store.usage().corrupt == 1
        assert not cut.exists()
        (odd,) = tmp_path.glob(f"*/*/{key(0)}")
        odd.unlink()
        odd.symlink_to("elsewhere")
        assert made.fetch(list(range(10)), list(range(10))) == 0
        assert made.store.usage().unreadable == 1


def test_what_is_forgotten_before_it_is_written_is_written_all_the_same(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.publish(*range(8))
        assert made.store.saves()
        made.forget(*range(8))
        assert made.store.usage().memory_stored == 8
        assert made.fetch([1, 2], [9, 10]) == 2  # and it can be had meanwhile
        assert (made[9], made[10]) == (content(1), content(2))
        made.store.may_write()
        made.written(8)
        until(lambda: made.store.usage().memory_bytes == 0)
        assert not made.store.saves()
    with arena(tmp_path) as second:
        assert second.fetch(list(range(8)), list(range(8))) == 8
        assert [second[place] for place in range(8)] == [content(number) for number in range(8)]


def test_host_memory_keeps_what_has_left_the_arena() -> None:
    with arena(None, memory=3) as made:
        made.publish(*range(5))
        assert made.store.saves()
        # The end of a chain is forgotten first.
        made.forget(4, 3, 2, 1)
        assert made.fetch([0, 1, 2, 3], [8, 9, 10, 11]) == 0  # the first one is still in the arena
        made.forget(0)
        assert made.fetch([0, 1, 2, 3], [8, 9, 10, 11]) == 3
        assert [made[place] for place in (8, 9, 10)] == [content(number) for number in range(3)]
        usage = made.store.usage()
        assert (usage.memory_loaded, usage.memory_bytes) == (3, 3 * BLOCK)
        assert usage.disk_stored == 0


def test_what_is_forgotten_for_a_request_is_saved_before_its_memory_is_filled(
    tmp_path: Path,
) -> None:
    with arena(tmp_path, memory=8) as made:
        made.store.may_write()
        made.publish(0, 1)
        made.written(2)
        made.publish(2, 3)
        made.store.forgotten([(key(0), 0), (key(1), 1)])
        assert made.fetch([0, 1], [2, 3], forgotten=[2, 3]) == 2
        assert (made[2], made[3]) == (content(0), content(1))
        assert made.fetch([2, 3], [4, 5]) == 2
        assert (made[4], made[5]) == (content(2), content(3))


def test_a_block_that_was_published_anew_elsewhere_is_not_forgotten(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.publish(0)
        made[5] = content(0)
        made.store.published([(key(0), 5)])
        made.forget(0)  # the old place
        made.store.may_write()
        made.written(1)
    with arena(tmp_path) as second:
        assert second.fetch([0], [3]) == 1
        assert second[3] == content(0)


@pytest.mark.parametrize("memory", [0, 4])
def test_all_that_is_kept_outlives_the_arenas_memory(tmp_path: Path, memory: int) -> None:
    with arena(tmp_path, memory) as made:
        made.store.may_write()
        made.publish(*range(10))
        left = threading.Event()
        order = [(key(number), number) for number in range(9, -1, -1)]
        made.store.leave_arena(order, 20.0, left.set)
        assert left.wait(30)
        made.store.arena_lost()
        for place in range(10):
            made[place] = b"\xff" * BLOCK
        usage = made.store.usage()
        # What was used last is in host memory, as far as there is some.
        assert (usage.disk_stored, usage.memory_bytes) == (10, memory * BLOCK)
        assert made.fetch(list(range(10)), list(range(10))) == 10
        assert [made[place] for place in range(10)] == [content(number) for number in range(10)]
        usage = made.store.usage()
        assert (usage.disk_loaded, usage.memory_loaded) == (10 - memory, memory)


def test_what_is_used_again_after_a_while_is_young_again(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.store.may_write()
        made.publish(0, 1)
        made.written(2)
        (path,) = tmp_path.glob(f"*/*/{key(0)}")
        os.utime(path, (1, 1))
        made.store.used([key(0)])
        assert path.stat().st_mtime == 1  # it was used just now
        made.store.fresh_s = 0.0
        made.store.used([key(0), key(1)])
        until(lambda: path.stat().st_mtime > 1)
        path.unlink()  # and what others have swept away is written again
        made.store.used([key(0)])
        made.written(3)
        assert path.exists()


def test_blocks_used_together_end_in_the_order_in_which_they_are_to_go(tmp_path: Path) -> None:
    with arena(tmp_path) as made:
        made.store.may_write()
        made.publish(0, 1, 2)
        made.written(3)

        def order() -> list[int]:
            times = []
            for number in range(3):
                (path,) = tmp_path.glob(f"*/*/{key(number)}")
                times.append(path.stat().st_mtime_ns)
            return times

        before = order()
        assert before == sorted(before, reverse=True)
        assert made.fetch([0, 1, 2], [4, 5, 6]) == 3
        after = order()
        assert after == sorted(after, reverse=True)
        assert min(after) > max(before)


@contextmanager
def no_larger_files_than(size: int) -> Iterator[None]:
    """No process-wide file may grow beyond it: a write fails then, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writing_that_fails_pauses_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldframe.loader.kv.writer._FIRST_PAUSE_S", 0.05)
    with arena(tmp_path) as made:
        made.store.may_write()
        made.publish(0)
        made.written(1)
        with no_larger_files_than(BLOCK // 2):
            made.publish(*range(1, 6))
            until(lambda: made.store.usage().paused == 1)
            made.forget(*range(6))
            # What there is can be read, and so can what waits.
            assert made.fetch(list(range(6)), list(range(6))) == 6
            assert [made[place] for place in range(6)] == [content(n) for n in range(6)]
            time.sleep(0.2)  # further tries, which fail, too
            assert made.store.usage().pauses == 1
        made.written(6)
        usage = made.store.usage()
        assert (usage.paused, usage.pauses, usage.unwritten) == (0, 1, 0)
        assert not list(tmp_path.rglob("*.new"))
    said = capfd.readouterr().err
    assert said.count("cannot be written") == 1
    assert said.count("is written again") == 1


def mount_anew(place: Path, flags: int) -> None:
    """Changes how a file system is mounted."""
    libc, data = ctypes.CDLL(None, use_errno=True), b"size=4m,mode=0700"
    done = libc.mount(b"tmpfs", bytes(place), b"tmpfs", _MS_REMOUNT | flags, data)
    assert done == 0, os.strerror(ctypes.get_errno())


def test_a_file_system_that_may_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldframe.loader.kv.writer._FIRST_PAUSE_S", 0.05)
    with mounted(tmp_path / "kv") as place, arena(place) as made:
        made.store.may_write()
        made.publish(0, 1, 2)
        made.written(3)
        (damaged,) = place.glob(f"*/*/{key(2)}")
        os.truncate(damaged, 5)
        mount_anew(place, _MS_RDONLY)
        made.publish(3)
        until(lambda: made.store.usage().paused == 1)
        made.forget(0, 1, 2, 3)
        assert made.fetch([0, 1, 2], [4, 5, 6]) == 2
        assert (made[4], made[5]) == (content(0), content(1))
        assert damaged.exists()
        mount_anew(place, 0)
        made.written(4)
        assert made.fetch([0, 1, 2], [4, 5, 6]) == 2
        assert not damaged.exists()


def test_a_disk_that_stays_full_loses_blocks_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    with arena(place) as made:
        made.store.may_write()
        made.publish(*range(4))
        until(lambda: made.store.usage().paused == 1)
        made.forget(*range(4))
        assert made.fetch(list(range(4)), list(range(4))) == 4
    assert place.read_text() == "in the way"


def test_more_than_fits_before_it_can_be_written_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldframe.loader.kv.store._PASSING_BYTES", 0)  # as few as there may be
    with arena(tmp_path) as made:
        made.publish(*range(12))
        made.forget(*range(11, -1, -1))
        usage = made.store.usage()
        assert (usage.memory_stored, usage.unwritten) == (8, 4)
        made.store.may_write()
        made.written(8)
        # Those that were forgotten first are there: later ones found no room.
        assert made.fetch([4, 5, 6, 7, 8, 9, 10, 11], list(range(8))) == 8


def test_the_files_take_no_more_than_they_may(tmp_path: Path) -> None:
    with arena(tmp_path, max_bytes=8 * (BLOCK + 64)) as made:
        made.store.may_write()
        for number in range(14):
            made.publish(number)
            made.written(number + 1)
        until(lambda: made.store.usage().disk_bytes <= 8 * (BLOCK + 64))
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert key(13) in left
        assert key(0) not in left
        assert len(left) <= 8


def test_without_a_name_for_the_weights_nothing_is_kept_on_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    memory = HostMemory(memoryview(bytearray(BLOCK * BLOCKS)))
    store = KvStore(KvStoreOptions(str(tmp_path)), memory, BLOCK)
    store.open_disk(None)
    store.may_write()
    store.published([(key(0), 0)])
    assert not store.saves()
    store.close(1)
    assert list(tmp_path.iterdir()) == []
    assert "seal" in capfd.readouterr().err
