from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.errors import ColdframeError, ImageDamaged, PlatformError, SnapshotError
from coldframe.snapshot import lz4_codec
from coldframe.snapshot.directory import DirectoryBackend
from coldframe.snapshot.image_files import PIECE_BYTES
from coldframe.snapshot.manifest import Manifest, Oracle
from coldframe.snapshot.store import Store, open_store
from tests.snapshot.creator import create
from tests.snapshot.images import draft, same_files, write_image
from tests.support import importable, unavailable


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("written") / "image")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    path = tmp_path / "into"
    path.mkdir()
    return path


def objects_in(root: Path) -> set[str]:
    return {path.name for path in (root / "objects").iterdir()}


def whole(root: Path) -> bool:
    """That a store holds what its manifests name, and nothing else."""
    found, skipped = open_store(str(root)).manifests()
    named = {item.digest for manifest in found for item in manifest.objects}
    names = {f"{manifest.id}.json" for manifest in found}
    return (
        not skipped
        and objects_in(root) == named
        and {path.name for path in (root / "manifests").iterdir()} == names
    )


# In and out


@pytest.mark.parametrize("compress", ["auto", "lz4", "none"])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_comes_back_as_it_was(
    image: Path, root: Path, into: Path, compress: str, threads: int
) -> None:
    store = open_store(str(root))
    manifest = store.put(image, draft(), compress=compress)
    assert open_store(str(root)).manifests() == ([manifest], [])
    store.fetch(manifest, into, threads=threads)
    assert same_files(image, into)
    assert {stat.S_IMODE(path.stat().st_mode) for path in into.iterdir()} == {0o600}
    assert whole(root)
    smaller = manifest.stored_bytes < manifest.image_bytes * 0.75
    assert smaller == (compress != "none")


def test_objects_are_what_their_names_say(image: Path, root: Path) -> None:
    manifest = open_store(str(root)).put(image, draft())
    assert len(manifest.objects) == 4  # three large files, and all the small ones together
    for item in manifest.objects:
        content = (root / "objects" / item.digest).read_bytes()
        assert hashlib.sha256(content).hexdigest() == item.digest
        at, plain = 0, b""
        for nbytes, digest in item.pieces:
            piece = content[at : at + nbytes]
            assert hashlib.sha256(piece).hexdigest() == digest
            plain += lz4.block.decompress(piece, uncompressed_size=PIECE_BYTES)
            at += nbytes
        assert (at, len(plain)) == (len(content), item.size)


def test_only_the_owner_may_look(image: Path, root: Path) -> None:
    before = os.umask(0)
    try:
        open_store(str(root)).put(image, draft())
    finally:
        os.umask(before)
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=8), st.booleans(), st.integers(0, 99))
def test_files_of_any_sizes_come_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], plain: bool, seed: int
) -> None:
    source = random.Random(seed)
    base = tmp_path_factory.mktemp("any")
    image, into = base / "image", base / "into"
    image.mkdir()
    into.mkdir()
    for number, size in enumerate(sizes):
        content = source.randbytes(size // 2) + bytes(size - size // 2)
        (image / f"file-{number}.img").write_bytes(content)
    # One of exactly a piece, and one that is a byte longer than two.
    (image / "piece.img").write_bytes(source.randbytes(PIECE_BYTES))
    (image / "pieces.img").write_bytes(source.randbytes(64) * (PIECE_BYTES // 32) + b"!")
    store = open_store(str(base / "store"))
    store.fetch(store.put(image, draft(), compress="none" if plain else "lz4"), into)
    assert same_files(image, into)
    shutil.rmtree(base)


def test_used_in_place_what_is_not_compressed_is_linked(
    image: Path, root: Path, into: Path
) -> None:
    store = open_store(str(root))
    store.direct(store.put(image, draft(), compress="none"), into)
    links = {path.name: Path(os.readlink(path)) for path in into.iterdir() if path.is_symlink()}
    assert links.keys() == {"pages-1.img", "pages-2.img", "sparse.img"}
    assert {path.parent for path in links.values()} == {root / "objects"}
    assert same_files(image, into)


def test_used_unchecked_what_is_compressed_is_unpacked(image: Path, root: Path, into: Path) -> None:
    store = open_store(str(root))
    store.direct(store.put(image, draft()), into)
    assert not any(path.is_symlink() for path in into.iterdir())
    assert same_files(image, into)


def test_without_the_packages_own_function_it_is_unpacked_all_the_same(
    image: Path, root: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    def none(name: str) -> Any:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", none)
    store = open_store(str(root))
    store.fetch(store.put(image, draft()), into)
    assert same_files(image, into)
    garbage, plain = memoryview(bytearray(b"\xff" * 50)), memoryview(bytearray(10))
    assert lz4_codec.unpacker()(garbage, plain) < 0


def test_where_lz4_is_missing_only_who_asks_for_it_is_refused(
    image: Path, root: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lz4"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lz4", None)
    store = open_store(str(root))
    manifest = store.put(image, draft())
    assert {item.codec for item in manifest.objects} == {"raw"}
    store.fetch(manifest, into)
    assert same_files(image, into)
    with pytest.raises(PlatformError, match="compressed images need lz4"):
        store.put(image, draft(), compress="lz4")


def test_the_modules_of_a_restore_import_nothing_slow(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "import coldframe.snapshot.store, coldframe.snapshot.choose, coldframe.snapshot.machine\n"
        "slow = {'asyncio', 'dataclasses', 'http', 'lz4', 'boto3', 'botocore', 'torch', 'numpy',"
        " 'inspect', 'logging', 'concurrent.futures', 'ctypes'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": importable(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (found.stdout, found.stderr) == ("[]\n", "")


# Writing


def test_what_is_there_already_is_not_written_again(image: Path, root: Path) -> None:
    store = open_store(str(root))
    first = store.put(image, draft())
    inodes = {path.name: path.stat().st_ino for path in (root / "objects").iterdir()}
    second = store.put(image, draft())
    assert first.objects == second.objects
    assert first.id != second.id
    assert {path.name: path.stat().st_ino for path in (root / "objects").iterdir()} == inodes
    store.remove(first.id)
    assert whole(root)
    damaged = root / "objects" / second.objects[0].digest
    damaged.write_bytes(bytes(damaged.stat().st_size))
    store.put(image, draft())
    assert hashlib.sha256(damaged.read_bytes()).hexdigest() == damaged.name


def test_an_image_is_tried_before_others_see_it(image: Path, root: Path, into: Path) -> None:
    store = open_store(str(root))

    def finish(manifest: Manifest) -> Manifest:
        assert open_store(str(root)).manifests() == ([], [])
        sent = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
        open_store(str(root)).fetch(sent, into)
        assert open_store(str(root)).prune(max_bytes=0) == []  # it is not what is left over
        return manifest.with_oracle({"prompt_ids": [1], "token_ids": [2], "logprobs": [-0.5]})

    manifest = store.put(image, draft(), finish=finish)
    assert same_files(image, into)
    assert manifest.oracle == Oracle((1,), (2,), (-0.5,))
    assert store.manifests() == ([manifest], [])


@pytest.mark.parametrize("error", [SnapshotError("it answers nonsense"), KeyboardInterrupt()])
def test_an_image_that_fails_is_not_there(image: Path, root: Path, error: BaseException) -> None:
    store = open_store(str(root))
    kept = store.put(write_image(root.parent / "other", seed=1), draft())

    def finish(manifest: Manifest) -> Manifest:
        raise error

    with pytest.raises(type(error)):
        store.put(image, draft(), finish=finish)
    assert store.manifests() == ([kept], [])
    assert whole(root)


def test_the_manifest_of_another_image_is_not_published(image: Path, root: Path) -> None:
    with pytest.raises(SnapshotError, match="another image"):
        open_store(str(root)).put(image, draft(), finish=lambda found: found._replace(created=1.0))
    assert whole(root)


def test_what_is_no_image_is_not_stored(tmp_path: Path, root: Path) -> None:
    store = open_store(str(root))
    cases = {"none": lambda path: None, "empty": lambda path: path.mkdir()}
    cases["link"] = lambda path: (path.mkdir(), (path / "pages.img").symlink_to("/etc/passwd"))
    cases["folder"] = lambda path: (path / "folder").mkdir(parents=True)
    cases["name"] = lambda path: (path.mkdir(), (path / "a b").touch())
    for name, make in cases.items():
        make(tmp_path / name)
        with pytest.raises(SnapshotError):
            store.put(tmp_path / name, draft())
    with pytest.raises(SnapshotError, match="no such compression"):
        store.put(tmp_path, draft(), compress="zip")
    assert not root.exists()


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        unavailable("a tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_leaves_a_whole_store(image: Path, root: Path) -> None:
    with small_disk(root, "5m"):
        store = open_store(str(root))
        kept = store.put(write_image(root.parent / "small", seed=1, mebibytes=1), draft())
        with pytest.raises(SnapshotError) as raised:
            store.put(image, draft(), compress="none")
        assert "No space left on device" in str(raised.value.got)
        assert "bytes free" in str(raised.value.got)
        assert raised.value.expected == f"room for {(5 << 20) + 4096} bytes at most"
        assert store.manifests() == ([kept], [])
        assert whole(root)


def test_no_room_to_copy_to_leaves_nothing(image: Path, root: Path, into: Path) -> None:
    store = open_store(str(root))
    manifest = store.put(image, draft())
    with small_disk(into, "2m"):
        with pytest.raises(SnapshotError, match="written out") as raised:
            store.fetch(manifest, into)
        assert raised.value.expected == f"{manifest.image_bytes} bytes"
        assert list(into.iterdir()) == []
    with pytest.raises(SnapshotError, match="written out"):
        store.fetch(manifest, into / "none")
    (into / "pages-1.img").write_text("of somebody else")
    with pytest.raises(SnapshotError, match="written out"):
        store.fetch(manifest, into)
    assert [path.name for path in into.iterdir()] == ["pages-1.img"]


def test_what_may_not_be_written_is_said(image: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match="cannot be made") as raised:
        open_store(str(tmp_path / "file" / "store")).put(image, draft())
    assert raised.value.got == "Not a directory"


# Several creators, and those that die


def test_two_creators_at_once_both_succeed(image: Path, root: Path, into: Path) -> None:
    creators = [create(root, image, name) for name in ("one", "two")]
    ids = {creator.communicate()[0].split()[-1].decode() for creator in creators}
    assert [creator.returncode for creator in creators] == [0, 0]
    store = open_store(str(root))
    found, _ = store.manifests()
    assert {manifest.id for manifest in found} == ids
    assert len(ids) == 2
    assert whole(root)
    store.fetch(found[0], into)
    assert same_files(image, into)


@pytest.mark.heavy
def test_a_creator_that_is_killed_leaves_a_store_that_works(
    image: Path, root: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    with create(root, image, "first") as creator:
        assert creator.stdout is not None
        creator.stdout.readline()
        began = time.monotonic()
        creator.stdout.readline()
        takes = time.monotonic() - began
    source = random.Random(7)
    survivors, kills = 1, 0
    while kills < 6 or time.monotonic() - started < 2:
        other = write_image(tmp_path / f"image-{kills}", seed=kills + 1)
        with create(root, other, f"killed-{kills}") as creator:
            assert creator.stdout is not None
            creator.stdout.readline()
            time.sleep(source.uniform(0, takes))
            creator.kill()
            survivors += len(creator.stdout.read()) > 0
        kills += 1
        store = open_store(str(root))
        found, skipped = store.manifests()
        assert skipped == []
        assert survivors <= len(found) <= survivors + 1  # killed when it had just published
        survivors = len(found)
        for manifest in found[:1]:
            (tmp_path / f"into-{kills}").mkdir()
            store.fetch(manifest, tmp_path / f"into-{kills}")
    store.put(image, draft("last"))  # whoever writes next clears away what the dead have left
    assert whole(root)


# What is not as it was


def broken(store: Store, manifest: Manifest, into: Path) -> SnapshotError:
    with pytest.raises(SnapshotError) as raised:
        store.fetch(manifest, into)
    assert list(into.iterdir()) == []
    return raised.value


@pytest.mark.parametrize("compress", ["none", "lz4"])
def test_one_flipped_bit_is_found_wherever_it_is(
    image: Path, root: Path, into: Path, compress: str
) -> None:
    store = open_store(str(root))
    manifest = store.put(image, draft(), compress=compress)
    source = random.Random(3)
    for number, item in enumerate(manifest.objects):
        path = root / "objects" / item.digest
        content = path.read_bytes()
        for at in {0, len(content) - 1, source.randrange(len(content))}:
            damaged = bytearray(content)
            damaged[at] ^= 1 << source.randrange(8)
            path.write_bytes(damaged)
            error = broken(store, manifest, into)
            assert error.what == "the image is not what was stored"
            names = [file.name for file in manifest.files if file.object_index == number]
            piece = 0
            while at >= sum(nbytes for nbytes, _ in item.pieces[: piece + 1]):
                piece += 1
            assert names[0] in str(error.where)
            assert str(error.where).endswith(f"piece {piece}")
            assert error.expected == f"sha256 {item.pieces[piece][1]}"
            assert error.got not in (None, item.pieces[piece][1])
        path.write_bytes(content)
    store.fetch(manifest, into)


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_cut_longer_or_missing_is_named(
    image: Path, root: Path, into: Path, number: int
) -> None:
    store = open_store(str(root))
    manifest = store.put(image, draft())
    item = manifest.objects[number]
    path = root / "objects" / item.digest
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        path.write_bytes(changed)
        error = broken(store, manifest, into)
        assert error.expected == f"{item.stored_bytes} bytes"
        assert error.got == f"{len(changed)} bytes"
        assert str(path) in str(error.where)
    path.unlink()
    error = broken(store, manifest, into)
    assert error.what == "a part of the image is missing"
    assert str(path) in str(error.where)
    path.symlink_to(image / "pages-1.img")
    broken(store, manifest, into)
    path.unlink()
    os.mkfifo(path)
    assert broken(store, manifest, into).what == "this is not a regular file"


def test_what_is_no_lz4_is_an_error_though_it_is_signed(
    image: Path, root: Path, into: Path
) -> None:
    store = open_store(str(root))
    manifest = store.put(image, draft(), compress="none")
    item = manifest.objects[0]
    lying = item._replace(codec="lz4")
    error = broken(store, manifest._replace(objects=(lying, *manifest.objects[1:])), into)
    assert error.what == "a piece of the image cannot be unpacked"


def test_manifests_that_cannot_be_used_are_skipped_and_kept(image: Path, root: Path) -> None:
    store = open_store(str(root))
    good, foreign = store.put(image, draft("good")), store.put(image, draft("foreign"))
    folder = root / "manifests"
    content = json.loads((folder / f"{foreign.id}.json").read_text())
    content["version"] = 2
    (folder / f"{foreign.id}.json").write_text(json.dumps(content))
    (folder / f"{'0' * 32}.json").write_text("{")
    (folder / f"{'1' * 32}.json").write_bytes(good.encode())
    (folder / f"{'2' * 32}.json").mkdir()
    (folder / "notes.txt").write_text("of somebody else")
    found, skipped = store.manifests()
    assert found == [good]
    whys = {item.id: item.why for item in skipped}
    assert whys.keys() == {foreign.id, "0" * 32, "1" * 32, "2" * 32}
    assert "version" in whys[foreign.id]
    assert "not JSON" in whys["0" * 32]
    assert good.id in whys["1" * 32]
    (folder / f"{'2' * 32}.json").rmdir()
    store.remove(good.id)
    store.remove("1" * 32)
    # Another version's image is not ours to understand, but neither to break.
    assert {item.digest for item in foreign.objects} <= objects_in(root)
    store.remove(foreign.id)
    assert objects_in(root) == set()
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("path", [".", "objects", "manifests"])
def test_a_store_that_others_may_write_is_not_trusted_without_a_key(
    image: Path, root: Path, path: str
) -> None:
    key = b"0123456789abcdef"
    manifest = open_store(str(root), key=key).put(image, draft())
    (root / path).chmod(0o777)
    with pytest.raises(SnapshotError, match="others could put images there"):
        open_store(str(root)).manifests()
    assert open_store(str(root), key=key).manifests() == ([manifest], [])


KEY = b"0123456789abcdef"


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("path", [".", "objects", "manifests"])
def test_where_others_may_write_is_not_written_nor_used_unchecked(
    image: Path, root: Path, into: Path, path: str, key: bytes | None
) -> None:
    store = open_store(str(root), key=key)
    manifest = store.put(image, draft(), compress="none")
    left = root / "objects" / ("0" * 64)
    left.touch(0o600)
    (root / path).chmod(0o777)
    before = sorted(root.rglob("*"))
    for attempt in (
        lambda: store.direct(manifest, into),
        lambda: store.put(image, draft()),
        lambda: store.remove(manifest.id),
        lambda: store.prune(max_bytes=0),
        store.check_writable,
    ):
        with pytest.raises(SnapshotError, match="others could put images there"):
            attempt()
    assert sorted(root.rglob("*")) == before
    assert list(into.iterdir()) == []
    if key is None:
        with pytest.raises(SnapshotError, match="others could put images there"):
            store.fetch(manifest, into)
    else:
        store.fetch(manifest, into)
        assert same_files(image, into)


def give_away(path: Path) -> None:
    try:
        os.chown(path, os.geteuid() + 1234, -1)
    except PermissionError:
        unavailable("only root can give a file to somebody else")


@pytest.mark.parametrize("path", [".", "objects", "manifests"])
def test_a_store_of_somebody_else_is_not_trusted_without_a_key(
    image: Path, root: Path, into: Path, path: str
) -> None:
    manifest = open_store(str(root), key=KEY).put(image, draft())
    give_away(root / path)
    with pytest.raises(SnapshotError, match="others could put images there"):
        open_store(str(root)).manifests()
    with pytest.raises(SnapshotError, match="others could put images there"):
        open_store(str(root), key=KEY).put(image, draft())
    open_store(str(root), key=KEY).fetch(manifest, into)


@pytest.mark.parametrize("change", [lambda path: path.chmod(0o620), give_away])
def test_files_that_others_could_change_are_not_trusted_without_a_key(
    image: Path, root: Path, into: Path, change: Callable[[Path], None]
) -> None:
    signed, plain = open_store(str(root), key=KEY), open_store(str(root))
    manifest = signed.put(image, draft(), compress="none")
    for item in manifest.objects:
        path = root / "objects" / item.digest
        change(path)
        with pytest.raises(SnapshotError, match="others could put images there"):
            plain.fetch(manifest, into)
        with pytest.raises(SnapshotError, match="others could put images there"):
            signed.direct(manifest, into)
        assert list(into.iterdir()) == []
        os.chown(path, os.geteuid(), -1)
        path.chmod(0o600)
    path = root / "manifests" / f"{manifest.id}.json"
    change(path)
    assert [item.id for item in plain.manifests()[1]] == [manifest.id]
    assert signed.manifests() == ([manifest], [])
    change(root / "objects" / manifest.objects[0].digest)
    signed.fetch(manifest, into)
    again = plain.put(image, draft("again"))  # what others could change is written anew
    shutil.rmtree(into)
    into.mkdir()
    plain.fetch(again, into)


def test_a_path_that_others_can_redirect_is_not_linked_to(image: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    store = open_store(str(tmp_path / "shared" / "store"))
    manifest = store.put(image, draft(), compress="none")
    for mode, linked in ((0o777, False), (0o1777, True), (0o755, True)):
        (tmp_path / "shared").chmod(mode)
        into = tmp_path / f"into-{mode:o}"
        into.mkdir()
        store.direct(manifest, into)
        assert any(path.is_symlink() for path in into.iterdir()) == linked
        assert same_files(image, into)


@pytest.mark.parametrize("path", [".", "objects", "manifests"])
def test_a_symbolic_link_is_no_folder_of_a_store(
    image: Path, root: Path, tmp_path: Path, path: str
) -> None:
    store = open_store(str(root))
    manifest = store.put(image, draft())
    elsewhere = tmp_path / "elsewhere"
    (root / path).rename(elsewhere)
    for name in ("0" * 64, ".writing-1-00", "letter.txt"):
        (elsewhere / name).write_text("of somebody else")
    root.joinpath(path).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    for attempt in (
        store.manifests,
        store.usage,
        store.prune,
        store.check_writable,
        lambda: store.put(image, draft()),
        lambda: store.prune(max_bytes=0),
        lambda: store.remove(manifest.id),
    ):
        with pytest.raises(SnapshotError, match="symbolic link"):
            attempt()
    store.touch(manifest.id)
    assert sorted(elsewhere.rglob("*")) == before


def test_a_store_may_be_reached_through_a_symbolic_link(image: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    manifest = open_store(str(tmp_path / "link" / "store")).put(image, draft())
    assert open_store(str(tmp_path / "real" / "store")).manifests() == ([manifest], [])


def exchange(root: Path, evil: Path) -> None:
    kept = root.with_name("kept")
    root.rename(kept)
    evil.rename(root)


@pytest.fixture
def evil(image: Path, root: Path) -> Path:
    """A store that looks like the one at `root` and has other bytes, and files of its own."""
    good = open_store(str(root)).put(image, draft("good"))
    path = root.with_name("evil")
    shutil.copytree(root, path)
    for item in good.objects:
        name = path / "objects" / item.digest
        name.write_bytes(b"evil" * (item.stored_bytes // 4) + b"!" * (item.stored_bytes % 4))
    open_store(str(path)).put(write_image(root.parent / "other", seed=2), draft("evil"))
    (path / "objects" / ("1" * 64)).write_text("of somebody else")
    return path


def test_what_was_checked_is_what_is_read(
    root: Path, evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fstat = open_store(str(root)), os.fstat
    exchanged = []

    def when_checked(fd: int) -> os.stat_result:
        status = fstat(fd)
        if not exchanged:
            exchanged.append(fd)
            exchange(root, evil)
        return status

    monkeypatch.setattr(os, "fstat", when_checked)
    assert {manifest.name for manifest in store.manifests()[0]} == {"good"}
    assert exchanged
    assert {manifest.name for manifest in store.manifests()[0]} >= {"evil"}


def test_an_image_is_read_from_where_it_was_found(image: Path, root: Path, evil: Path) -> None:
    backend = DirectoryBackend(str(root))
    [manifest], _ = open_store(str(root)).manifests()
    with backend.direct() as reader:
        exchange(root, evil)
        for item in manifest.objects:
            content = bytearray(item.stored_bytes)
            reader.read(item, 0, memoryview(content))
            assert hashlib.sha256(content).hexdigest() == item.digest


def test_an_image_is_written_to_where_it_was_begun(image: Path, root: Path, evil: Path) -> None:
    before: list[Path] = []

    def finish(manifest: Manifest) -> Manifest:
        exchange(root, evil)
        before.extend(sorted(root.rglob("*")))
        return manifest

    made = open_store(str(root)).put(image, draft("made"), finish=finish)
    assert sorted(root.rglob("*")) == before
    found, _ = open_store(str(root.with_name("kept"))).manifests()
    assert made in found


def test_what_was_checked_is_what_is_swept(
    root: Path, evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "objects" / ("2" * 64)).write_text("left over")
    store, flock = open_store(str(root)), fcntl.flock
    before: list[Path] = []

    def when_locked(fd: int, operation: int) -> None:
        if not before:
            exchange(root, evil)
            before.extend(sorted(root.rglob("*")))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", when_locked)
    store.prune()
    assert sorted(root.rglob("*")) == before
    assert whole(root.with_name("kept"))


def test_that_a_store_can_be_written_is_known_beforehand(root: Path, tmp_path: Path) -> None:
    open_store(str(root)).check_writable()
    assert {path.name for path in root.rglob("*")} == {"objects", "manifests"}
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match="cannot be made"):
        open_store(str(tmp_path / "file" / "store")).check_writable()
    with small_disk(tmp_path / "disk", "1m"):
        place = tmp_path / "disk" / "store"
        open_store(str(place)).check_writable()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(SnapshotError, match="cannot be written") as raised:
            open_store(str(place)).check_writable()
        assert raised.value.got == "Read-only file system"


def test_a_store_that_is_not_there_is_empty_and_is_not_made(root: Path) -> None:
    store = open_store(str(root))
    assert store.manifests() == ([], [])
    assert store.prune(max_bytes=0) == []
    assert store.usage() == (0, 0, None)
    store.touch("0" * 32)
    assert not root.exists()


@pytest.mark.parametrize("place", ["", "https://example.com/x", "hf://org/name", "s3://"])
def test_there_are_no_stores_elsewhere(place: str) -> None:
    with pytest.raises(ColdframeError):
        open_store(place)


# Limits


def aged(store: Store, root: Path, manifest: Manifest, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(root / "manifests" / f"{manifest.id}.json", (then, then))


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, root: Path) -> None:
    store = open_store(str(root))
    made = []
    for number in range(4):
        path = write_image(tmp_path / f"image-{number}", seed=number, mebibytes=1)
        made.append(store.put(path, draft(f"{number}")))
        aged(store, root, made[-1], 1000 - number)
    store.touch(made[0].id)
    sizes = [manifest.stored_bytes for manifest in made]
    stored = {item.digest: item.stored_bytes for each in made for item in each.objects}
    assert store.usage()[:2] == (4, sum(stored.values()))
    assert store.prune(max_bytes=10 * sum(sizes), max_age_s=2000) == []
    assert store.prune(max_bytes=sizes[0] + sizes[3]) == [made[2].id, made[1].id]
    assert {manifest.id for manifest in store.manifests()[0]} == {made[0].id, made[3].id}
    assert whole(root)
    assert store.prune(max_age_s=500, keep=frozenset({made[3].id})) == []
    assert store.prune(max_age_s=500) == [made[3].id]
    assert store.prune(max_bytes=0, keep=frozenset({made[0].id})) == []
    assert store.prune(max_bytes=0) == [made[0].id]
    assert objects_in(root) == set()


def test_objects_that_two_images_share_count_once_and_stay_for_the_second(
    image: Path, root: Path, into: Path
) -> None:
    store = open_store(str(root))
    first, second = store.put(image, draft("first")), store.put(image, draft("second"))
    assert store.prune(max_bytes=first.stored_bytes) == []
    aged(store, root, first, 100)
    assert store.prune(max_age_s=50) == [first.id]
    store.fetch(second, into)
    assert same_files(image, into)


def test_left_overs_go_but_not_those_that_somebody_is_writing(image: Path, root: Path) -> None:
    store = open_store(str(root))
    store.put(image, draft())
    for left in (root / "objects" / ("0" * 64), root / "manifests" / ".writing-1-00"):
        left.write_bytes(b"left by somebody who died")

    def finish(manifest: Manifest) -> Manifest:
        # As another creator would that is at work since before.
        (root / "objects" / ("1" * 64)).write_bytes(b"just being written")
        store.prune()
        assert "1" * 64 in objects_in(root)
        return manifest

    store.put(image, draft(), finish=finish)
    assert "0" * 64 not in objects_in(root)
    store.prune()
    assert whole(root)


def test_what_others_keep_there_stays(image: Path, root: Path) -> None:
    store = open_store(str(root))
    store.check_writable()
    foreign = [
        root / "letter.txt",
        root / "objects" / "photo.jpg",
        root / "objects" / ".hidden",
        root / "objects" / ("0" * 63),
        root / "objects" / ("A" * 64),
        root / "objects" / ("0" * 64 + ".txt"),
        root / "objects" / ("0" * 64 + "\n"),
        root / "manifests" / "notes.json",
        root / "manifests" / ("0" * 64),
    ]
    for path in foreign:
        path.write_text("of somebody else")
    (root / "objects" / "folder").mkdir()
    (root / "objects" / ("f" * 64)).mkdir()  # it does not keep the rest from being swept
    manifest = store.put(image, draft())
    assert store.usage()[:2] == (
        1,
        manifest.stored_bytes + (root / "objects").joinpath("f" * 64).stat().st_size,
    )
    with pytest.raises(SnapshotError, match="no such image"):
        store.remove("../manifests/notes")
    store.remove(manifest.id)
    store.put(image, draft())
    store.prune(max_bytes=0)
    left = {path for path in root.rglob("*") if path.is_file()}
    assert left == set(foreign)
    assert {path.name for path in (root / "objects").iterdir() if path.is_dir()} == {
        "folder",
        "f" * 64,
    }


def test_what_is_not_there_cannot_be_removed(image: Path, root: Path) -> None:
    store = open_store(str(root))
    kept = store.put(image, draft())
    with pytest.raises(SnapshotError, match="no such image"):
        store.remove("0" * 32)
    assert store.manifests() == ([kept], [])


def test_hashes_of_a_manifest_that_is_vouched_for_say_enough(
    image: Path, root: Path, into: Path
) -> None:
    """As in a user namespace, where root's store seems to be nobody's."""
    store = open_store(str(root))
    manifest = store.put(image, draft(), compress="none")
    for path in (root, root / "objects", *(root / "objects").iterdir()):
        give_away(path)
    with pytest.raises(SnapshotError, match="others could put images there"):
        store.fetch(manifest, into)
    store.fetch(manifest, into, vouched=True)
    assert same_files(image, into)
    for path in into.iterdir():
        path.unlink()
    largest = max((root / "objects").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ImageDamaged):
        store.fetch(manifest, into, vouched=True)
    assert list(into.iterdir()) == []
