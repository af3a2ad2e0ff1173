from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.loader.kv.disk import KvDisk, is_key, prepare_directory
from coldframe.loader.kv.file import HEADER_BYTES
from tests.support import unavailable

BLOCK = 5000
_MNT_DETACH = 2
NOW = 1_700_000_000_000_000_000


def key(number: int) -> str:
    return blake2b(str(number).encode(), digest_size=32).hexdigest()


def block(number: int) -> memoryview:
    return memoryview(bytearray(key(number).encode() * (BLOCK // 64 + 1))[:BLOCK])


@contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    place.mkdir()
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=4m,mode=0700"):
        unavailable(f"no file system can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        libc.umount2(bytes(place), _MNT_DETACH)


@pytest.fixture
def disk(tmp_path: Path) -> KvDisk:
    return KvDisk(str(tmp_path / "kv"), "model", 1 << 30)


def path_of(disk: KvDisk, number: int) -> Path:
    (found,) = Path(disk.root).glob(f"*/*/{key(number)}")
    return found


def read(disk: KvDisk, number: int) -> memoryview | bool | None:
    into = memoryview(bytearray(BLOCK))
    found = disk.read(key(number), into, NOW)
    return into if found else found


def files(disk: KvDisk) -> set[str]:
    return {path.name for path in Path(disk.root).rglob("*") if path.is_file()}


def test_what_was_written_is_read(disk: KvDisk) -> None:
    assert read(disk, 1) is False
    assert not disk.touch(key(1), BLOCK, NOW)
    disk.write(key(1), block(1), NOW)
    assert read(disk, 1) == block(1)
    assert read(disk, 2) is False
    assert disk.touch(key(1), BLOCK, NOW)
    assert not disk.touch(key(1), BLOCK + 1, NOW)
    disk.write(key(1), block(1), NOW)  # again, as by two replicas at once
    assert read(disk, 1) == block(1)


def test_another_model_or_format_has_blocks_of_its_own(disk: KvDisk) -> None:
    disk.write(key(1), block(1), NOW)
    assert read(KvDisk(disk.root, "another", 1 << 30), 1) is False
    assert read(KvDisk(disk.root, "model", 1 << 30), 1) == block(1)


def test_nobody_else_may_read_it(disk: KvDisk) -> None:
    before = os.umask(0)
    try:
        disk.write(key(1), block(1), NOW)
    finally:
        os.umask(before)
    found = path_of(disk, 1)
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    for folder in (found.parent, found.parent.parent, Path(disk.root)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def cut(path: Path) -> None:
    os.truncate(path, HEADER_BYTES + BLOCK - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def altered_block(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def altered_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


def another_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4] += 1
    path.write_bytes(data)


def something_else(path: Path) -> None:
    path.write_bytes(b"\0" * (HEADER_BYTES + BLOCK))


def another_block(path: Path) -> None:
    other = KvDisk(str(path.parent / "other"), "model", 1 << 30)
    other.write(key(2), block(2), NOW)
    path_of(other, 2).rename(path)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        empty,
        longer,
        altered_block,
        altered_header,
        another_version,
        something_else,
        another_block,
    ],
)
def test_a_file_that_is_not_the_block_is_deleted(
    disk: KvDisk, damage: Callable[[Path], None]
) -> None:
    disk.write(key(1), block(1), NOW)
    path = path_of(disk, 1)
    damage(path)
    assert read(disk, 1) is None
    assert not path.exists()
    assert read(disk, 1) is False
    disk.write(key(1), block(1), NOW)
    assert read(disk, 1) == block(1)


def test_what_is_no_file_is_neither_waited_for_nor_followed(disk: KvDisk, tmp_path: Path) -> None:
    disk.write(key(1), block(1), NOW)
    path = path_of(disk, 1)
    path.unlink()
    os.mkfifo(path)
    assert read(disk, 1) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"x" * (HEADER_BYTES + BLOCK))
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        read(disk, 1)
    assert elsewhere.exists()
    path.unlink()
    path.mkdir()
    assert read(disk, 1) is None


@pytest.mark.parametrize("how", ["owner", "mode", "link"])
def test_a_folder_that_others_may_write_to_is_not_used(disk: KvDisk, how: str) -> None:
    if os.getuid():
        unavailable("only root can give a folder away")
    disk.write(key(1), block(1), NOW)
    folder = path_of(disk, 1).parent.parent
    if how == "owner":
        os.chown(folder, 65532, 65532)
    elif how == "mode":
        folder.chmod(0o777)
    else:
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to(folder.with_name("elsewhere"))
    another = KvDisk(disk.root, "model", 1 << 30)
    for use in (
        lambda: another.read(key(1), block(2), NOW),
        lambda: another.touch(key(1), BLOCK, NOW),
    ):
        with pytest.raises(PermissionError, match="others may write"):
            use()


def test_only_a_hash_in_hexadecimal_is_a_key() -> None:
    assert is_key(key(1))
    for text in ("", "ab", key(1).upper(), key(1)[:-1], key(1) + "\n", "../" + key(1)[3:]):
        assert not is_key(text)


def test_what_was_used_longest_ago_goes_and_never_before_what_continues_it(
    tmp_path: Path,
) -> None:
    size = HEADER_BYTES + BLOCK
    disk = KvDisk(str(tmp_path / "kv"), "model", 8 * size)
    other = KvDisk(str(tmp_path / "kv"), "another", 8 * size)
    other.write(key(100), block(100), NOW - 100)
    for place in range(6):  # a chain, the first of it the youngest
        disk.write(key(place), block(place), NOW - place)
    disk.sweep()
    assert (disk.nbytes, len(files(disk))) == (7 * size, 7)
    assert not disk.may_sweep
    assert read(disk, 0) == block(0)
    other.write(key(101), block(101), NOW + 1)
    other.sweep()
    assert files(disk) == {key(number) for number in (101, 0, 1, 2, 3, 4, 5)}
    for number in (102, 103, 104):
        disk.write(key(number), block(number), NOW + number)
    assert disk.must_sweep
    disk.sweep()
    assert files(disk) == {key(number) for number in (102, 103, 104, 101, 0, 1, 2)}


@pytest.mark.heavy
def test_a_small_disk_is_never_full(tmp_path: Path) -> None:
    data = memoryview(bytearray((64 << 10) - HEADER_BYTES))
    with mounted(tmp_path / "small") as place:
        disk = KvDisk(str(place), "model", 1 << 40)
        for number in range(200):  # three times what there is room for
            if disk.may_sweep:
                disk.sweep()
            disk.write(key(number), data, NOW + number)
        assert disk.read(key(199), memoryview(bytearray(len(data))), NOW)
        assert not disk.read(key(0), memoryview(bytearray(len(data))), NOW)
        assert disk.nbytes > 2 << 20


def test_a_sweep_gives_way(tmp_path: Path) -> None:
    disk = KvDisk(str(tmp_path / "kv"), "model", 1)
    disk.write(key(1), block(1), NOW)
    disk.sweep(lambda: True)
    assert files(disk) == {key(1)}
    disk.sweep()
    assert files(disk) == set()


def test_what_the_dead_have_left_is_swept_away_and_what_is_not_ours_stays(disk: KvDisk) -> None:
    disk.write(key(1), block(1), NOW)
    folder = path_of(disk, 1).parent
    script = """
import os, sys
os.chdir(sys.argv[1])
os.open("dead-1.new", os.O_WRONLY | os.O_CREAT)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script, folder], check=False)
    (folder / "notes").write_text("mine")
    (Path(disk.root) / "README").write_text("mine")
    disk.sweep()
    assert (folder / "dead-1.new").exists()  # somebody may be at it
    disk.forgotten_s = -1.0
    disk.sweep()
    assert files(disk) == {key(1), "notes", "README"}


def test_several_write_read_and_sweep_at_once(tmp_path: Path) -> None:
    size = HEADER_BYTES + BLOCK
    errors: list[BaseException] = []
    found = itertools.count()

    def work(name: int) -> None:
        disk = KvDisk(str(tmp_path / "kv"), "model", 20 * size)
        try:
            for turn in range(30):
                number = (turn * 7 + name) % 40
                got = read(disk, number)
                assert got is False or got == block(number)
                if got is not False:
                    next(found)
                disk.write(key(number), block(number), NOW + turn)
                if disk.must_sweep:
                    disk.sweep()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    disk = KvDisk(str(tmp_path / "kv"), "model", 20 * size)
    disk.sweep()
    assert disk.nbytes <= 20 * size
    assert next(found) > 0


@pytest.mark.parametrize("kind", ["file", "under a file"])
def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "there"
    place.write_text("x")
    with pytest.raises(PlatformError, match="--kv-store") as caught:
        prepare_directory(str(place if kind == "file" else place / "kv"))
    assert caught.value.where is not None
    assert str(place) in caught.value.where


def test_a_directory_is_made_for_one_user(tmp_path: Path) -> None:
    place = tmp_path / "kv"
    prepare_directory(str(place))
    prepare_directory(str(place))
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert list(place.iterdir()) == []


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid():
        unavailable("only root can become another user")
    place = tmp_path / "kv"
    prepare_directory(str(place))
    script = """
import os, sys
from coldframe.loader.errors import PlatformError
from coldframe.loader.kv.disk import prepare_directory
os.setresuid(65532, 65532, 65532)
try:
    prepare_directory(sys.argv[1])
except PlatformError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, place], capture_output=True, text=True, check=True
    )
    assert "cannot be used" in done.stdout
