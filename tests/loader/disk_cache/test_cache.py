from __future__ import annotations

import errno
import filecmp
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.loader.arena import Reservation, Segment
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.checkpoints.seal import SEAL_NAME, Seal
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.checkpoints.verify import VerifiedSource
from coldframe.loader.devices.cpu import HostLanding
from coldframe.loader.disk_cache import writer as cache_writer
from coldframe.loader.disk_cache.cache import Cache, Entry
from coldframe.loader.disk_cache.writer import CacheWriter
from coldframe.loader.errors import (
    ColdframeError,
    PlatformError,
    SourceCorrupt,
    SourceUnreachable,
)
from coldframe.loader.loads.placing import Placer
from coldframe.loader.loads.stream import Stream
from coldframe.loader.memory_service.board import Board
from coldframe.loader.sources.caching import CachingSource
from coldframe.loader.sources.direct import open_direct
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from coldframe.loader.timeline import Recorder
from tests.loader.weights import layered, reference, shard_files
from tests.support import no_threads_left, unavailable

GB = 1 << 30
URI = "s3://bucket/model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    fds = len(os.listdir("/proc/self/fd"))
    with no_threads_left():
        yield Cache(str(tmp_path / "cache"), GB)
    assert len(os.listdir("/proc/self/fd")) == fds


def remote(root: Path, version: str = "v1", uri: str = URI) -> Checkpoint:
    """The checkpoint of a directory as it would be opened over a network."""
    local = Checkpoint.open(root)
    shards = [
        replace(shard, uri=f"{uri}/{shard.name}", version=f'"{version}-{shard.name}"')
        for shard in local.shards
    ]
    return replace(local, path=uri, shards=tuple(shards))


def small(root: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in root.iterdir()
        if path.suffix == ".json" and path.name != SEAL_NAME
    }


class Reader:
    """Reads from a directory, and remembers what."""

    def __init__(self, root: Path) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._root = root

    def __call__(self, shard: int, offset: int, into: memoryview) -> None:
        self.asked.append((shard, offset, len(into)))
        with open(shard_files(self._root)[shard], "rb") as file:
            file.seek(offset)
            assert file.readinto(into) == len(into)


def add(cache: Cache, root: Path, checkpoint: Checkpoint | None = None) -> None:
    """An entry for a checkpoint of which nothing was loaded."""
    writer = cache.begin(checkpoint or remote(root))
    assert writer is not None, cache.why
    assert writer.complete(Reader(root), small(root)), writer.why


def visible(cache: Cache) -> list[Path]:
    return sorted(path for path in Path(cache.path).iterdir() if "-" not in path.name)


def at_work(cache: Cache) -> list[Path]:
    return sorted(path for path in Path(cache.path).iterdir() if "-" in path.name)


def assert_sound(entry: Path) -> None:
    """Every byte of an entry is what its seal says."""
    origin = DirectoryOrigin(str(entry))
    checkpoint = Checkpoint.open(origin)
    source = FileSource(checkpoint.shards)
    try:
        assert seal_checkpoint(checkpoint, origin, source) == Seal.read(origin)
    finally:
        source.close()


class Arena:
    """Memory that a plan is loaded into."""

    def __init__(self, plan: Plan) -> None:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, plan.arena_bytes)
        self.reservation = Reservation(plan.arena_bytes)
        self.reservation.attach([Segment(fd, 0, plan.arena_bytes, 0, True)])
        os.close(fd)

    def view(self) -> memoryview:
        return self.reservation.view()


def load(root: Path, writer: CacheWriter, *, arena: bool = True, chunk: int = 1 << 20) -> Arena:
    """Streams a model as a load does, with a cache beside it."""
    plan = Plan.build(Checkpoint.open(root))
    memory = Arena(plan)
    inner = FileSource(Checkpoint.open(root).shards)
    kept = memory.view if arena else lambda: None
    source = CachingSource(inner, writer, kept)
    ended: list[ColdframeError | None] = []
    end = threading.Event()

    def on_end(error: ColdframeError | None) -> None:
        ended.append(error)
        end.set()

    board = Board([stage.nbytes for stage in plan.stages])
    stream = Stream(
        plan,
        HostLanding(Placer(source, memory.view())).fetch,
        board,
        finish=source.finish,
        on_stage=lambda stage: None,
        on_end=on_end,
        recorder=Recorder("test"),
        threads=3,
        chunk=chunk,
    )
    stream.start()
    assert end.wait(20)
    assert ended == [None]
    stream.cancel()
    source.close()
    board.close()
    return memory


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("chunk", [1 << 12, 1 << 20])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_entry_is_the_model(
    tmp_path: Path, cache: Cache, arena: bool, chunk: int, shards: int
) -> None:
    model = layered(tmp_path / "other", nbytes=1_300_000, shards=shards)
    writer = cache.begin(remote(model))
    assert writer is not None
    memory = load(model, writer, arena=arena, chunk=chunk)
    read = Reader(model)
    assert writer.complete(read, small(model)), writer.why
    memory.reservation.close()

    entry = cache.find(remote(model))
    assert entry is not None
    there = Path(entry.path)
    names = [path.name for path in shard_files(model)] + list(small(model))
    assert filecmp.cmpfiles(model, there, names, shallow=False) == (names, [], [])
    assert reference(there) == reference(model)
    assert_sound(there)
    if arena:  # then only headers were read again
        offsets = [shard.data_offset for shard in remote(model).shards]
        assert read.asked == [(index, 0, length) for index, length in enumerate(offsets)]
    entry.close()


def test_what_was_not_loaded_is_read_in_the_end(model: Path, cache: Cache) -> None:
    checkpoint = remote(model)
    writer = cache.begin(checkpoint)
    assert writer is not None
    tensor = checkpoint.tensors["model.layers.1.mlp.weight"]
    data = memoryview(bytearray(reference(model)[tensor.name]))
    writer.put(tensor.shard, tensor.offset, [data[:5], data[5:]])
    read = Reader(model)
    assert writer.complete(read, small(model))
    (entry,) = visible(cache)
    assert reference(entry) == reference(model)
    read_bytes = sum(length for _, _, length in read.asked)
    assert read_bytes == sum(shard.size for shard in checkpoint.shards) - tensor.nbytes


def test_copies_are_bounded(model: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_writer, "_MOST_COPIED", 10_000)
    writer = cache.begin(remote(model))
    assert writer is not None
    memory = load(model, writer, arena=False)
    read = Reader(model)
    assert writer.complete(read, small(model))
    memory.reservation.close()
    assert len(read.asked) > len(shard_files(model))
    assert_sound(visible(cache)[0])


def test_the_page_cache_stays_as_it_is(tmp_path: Path, cache: Cache) -> None:
    model = layered(tmp_path / "other", nbytes=4_000_000)
    probe = open_direct(str(shard_files(model)[0]))
    if probe is None:
        unavailable("no O_DIRECT here")
    os.close(probe)
    writer = cache.begin(remote(model))
    assert writer is not None
    memory = load(model, writer)
    assert writer.complete(Reader(model), small(model))
    memory.reservation.close()
    for path in shard_files(visible(cache)[0]):
        with open(path, "rb") as file:
            assert cached_bytes(file.fileno(), 0, path.stat().st_size) < path.stat().st_size / 4


def test_another_content_is_another_entry(model: Path, cache: Cache) -> None:
    add(cache, model)
    assert cache.find(remote(model, "v2")) is None
    add(cache, model, remote(model, "v2"))
    assert len(visible(cache)) == 2
    assert cache.begin(remote(model)) is None
    assert cache.why == "it is in the cache already"


def test_the_same_content_from_elsewhere_is_the_same_entry(model: Path, cache: Cache) -> None:
    add(cache, model)
    entry = cache.find(remote(model, uri="https://mirror/model"))
    assert entry is not None
    assert entry.path == str(visible(cache)[0])
    entry.close()


def test_without_versions_there_is_no_cache(model: Path, cache: Cache) -> None:
    checkpoint = remote(model)
    blank = replace(
        checkpoint, shards=tuple(replace(shard, version="") for shard in checkpoint.shards)
    )
    assert cache.find(blank) is None
    assert cache.begin(blank) is None
    assert cache.why == "its origin does not tell versions of a file apart"


def path_and_close(entry: Entry | None) -> str:
    assert entry is not None
    entry.close()
    return entry.path


def test_a_place_that_cannot_be_reached_has_what_it_last_had(model: Path, cache: Cache) -> None:
    assert cache.find_uri(URI) is None
    add(cache, model, remote(model, "v1"))
    first = path_and_close(cache.find_uri(URI))
    add(cache, model, remote(model, "v2"))
    assert path_and_close(cache.find_uri(URI)) != first
    path_and_close(cache.find(remote(model, "v1", "https://mirror/model")))
    assert path_and_close(cache.find_uri("https://mirror/model")) == first
    assert path_and_close(cache.find_uri(URI)) != first
    path_and_close(cache.find(remote(model, "v1")))  # the origin went back
    assert path_and_close(cache.find_uri(URI)) == first
    assert cache.find_uri("s3://bucket/other") is None


def test_what_was_not_used_for_longest_goes_first(model: Path, cache: Cache) -> None:
    cache.size = 3 * sum(path.stat().st_size for path in model.iterdir())
    for version in "ab":
        add(cache, model, remote(model, version))
    path_and_close(cache.find(remote(model, "a")))
    add(cache, model, remote(model, "c"))
    assert cache.find(remote(model, "b")) is None
    kept = [cache.find(remote(model, version)) for version in "ac"]
    # Both are in use now, so there is room for none besides.
    assert cache.begin(remote(model, "d")) is None
    assert cache.why is not None
    assert "in use" in cache.why
    for entry in kept:
        path_and_close(entry)
    add(cache, model, remote(model, "d"))
    assert len(visible(cache)) == 2
    assert at_work(cache) == []


def test_a_model_may_be_too_large(model: Path, cache: Cache) -> None:
    cache.size = 1000
    assert cache.begin(remote(model)) is None
    assert cache.why is not None
    assert "larger than the cache" in cache.why


def test_small_files_count(model: Path, cache: Cache) -> None:
    cache.size = sum(path.stat().st_size for path in shard_files(model)) + 1000
    writer = cache.begin(remote(model))
    assert writer is not None
    large = {**small(model), "tokenizer.json": bytes(2000)}
    assert not writer.complete(Reader(model), large)
    assert os.listdir(cache.path) == []


def test_a_disk_without_room(model: Path, cache: Cache) -> None:
    cache.size = 1 << 60
    sound = remote(model)
    shards = tuple(replace(shard, size=1 << 50) for shard in sound.shards)
    assert cache.begin(replace(sound, shards=shards)) is None
    assert cache.why is not None
    assert "its disk has" in cache.why
    assert os.listdir(cache.path) == []


def test_a_write_error_ends_the_entry(model: Path, cache: Cache) -> None:
    checkpoint = remote(model)
    first = checkpoint.shards[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        writer = cache.begin(checkpoint)
        assert writer is not None
        writer.put(0, first.data_offset, [memoryview(bytearray(first.size - first.data_offset))])
        assert not writer.complete(Reader(model), small(model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert writer.why == f"the cache cannot be written: {os.strerror(errno.EFBIG)}"
    assert os.listdir(cache.path) == []


def test_what_cannot_be_read_ends_the_entry(model: Path, cache: Cache) -> None:
    writer = cache.begin(remote(model))
    assert writer is not None

    def read(shard: int, offset: int, into: memoryview) -> None:
        raise SourceUnreachable("the bucket is gone")

    assert not writer.complete(read, small(model))
    assert writer.why is not None
    assert "the bucket is gone" in writer.why
    assert os.listdir(cache.path) == []


def test_a_header_that_is_another_now_ends_the_entry(model: Path, cache: Cache) -> None:
    writer = cache.begin(remote(model))
    assert writer is not None
    memory = load(model, writer)

    def read(shard: int, offset: int, into: memoryview) -> None:
        Reader(model)(shard, offset, into)
        at = bytes(into).index(b"weight")
        into[at : at + 6] = b"height"

    assert not writer.complete(read, small(model))
    memory.reservation.close()
    assert os.listdir(cache.path) == []


def test_a_load_that_fails_leaves_nothing(model: Path, cache: Cache) -> None:
    writer = cache.begin(remote(model))
    assert writer is not None
    memory = load(model, writer)
    writer.close()
    memory.reservation.close()
    writer.close()
    assert not writer.complete(Reader(model), small(model))
    assert writer.why == "the load ended before it was complete"
    assert os.listdir(cache.path) == []


def test_close_ends_a_complete_that_goes_on(model: Path, cache: Cache) -> None:
    writer = cache.begin(remote(model))
    assert writer is not None
    reading, go_on = threading.Event(), threading.Event()
    read = Reader(model)

    def slowly(shard: int, offset: int, into: memoryview) -> None:
        reading.set()
        assert go_on.wait(20)
        read(shard, offset, into)

    done: list[bool] = []
    completing = threading.Thread(target=lambda: done.append(writer.complete(slowly, small(model))))
    completing.start()
    assert reading.wait(20)
    closing = threading.Thread(target=writer.close)
    closing.start()
    while not writer._stopped.is_set():
        pass
    go_on.set()
    closing.join()
    completing.join()
    assert done == [False]
    assert os.listdir(cache.path) == []


def sealed(model: Path) -> Seal:
    origin = DirectoryOrigin(str(model))
    checkpoint = Checkpoint.open(origin)
    source = FileSource(checkpoint.shards)
    try:
        seal = seal_checkpoint(checkpoint, origin, source)
    finally:
        source.close()
    seal.write(str(model))
    return seal


def test_the_seal_of_the_origin_is_kept(model: Path, cache: Cache) -> None:
    writer = cache.begin(remote(model), sealed(model))
    assert writer is not None
    assert writer.complete(Reader(model), small(model)), writer.why
    (entry,) = visible(cache)
    assert (entry / SEAL_NAME).read_bytes() == (model / SEAL_NAME).read_bytes()


def test_what_is_not_as_it_was_sealed_is_not_kept(model: Path, cache: Cache) -> None:
    seal = sealed(model)
    checkpoint = remote(model)
    with open(shard_files(model)[1], "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"bad")
    writer = cache.begin(checkpoint, seal)
    assert writer is not None
    assert not writer.complete(Reader(model), small(model))
    assert writer.why is not None
    assert "not what was sealed" in writer.why
    assert os.listdir(cache.path) == []


def test_a_flipped_bit_on_the_disk_is_found_and_discarded(model: Path, cache: Cache) -> None:
    add(cache, model)
    entry, other = cache.find(remote(model)), cache.find(remote(model))
    assert entry is not None
    assert other is not None
    with open(shard_files(Path(entry.path))[0], "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"bad")
    origin = DirectoryOrigin(entry.path)
    checkpoint = Checkpoint.open(origin)
    seal = Seal.read(origin)
    assert seal is not None
    source = VerifiedSource(FileSource(checkpoint.shards), seal, checkpoint)
    first = checkpoint.shards[0]
    data = memoryview(bytearray(first.size - first.data_offset))
    with pytest.raises(SourceCorrupt):
        source.read_into(0, first.data_offset, [data])
    source.close()

    cache.discard(entry)  # though it is in use elsewhere
    assert cache.find(remote(model)) is None
    cache.discard(other)
    add(cache, model)
    assert_sound(visible(cache)[0])
    assert at_work(cache) == []


def test_an_old_handle_does_not_discard_a_new_entry(model: Path, cache: Cache) -> None:
    add(cache, model)
    entry, late = cache.find(remote(model)), cache.find(remote(model))
    assert entry is not None
    assert late is not None
    cache.discard(entry)
    add(cache, model)
    cache.discard(late)
    assert len(visible(cache)) == 1


def test_a_file_of_another_size_is_no_entry(model: Path, cache: Cache) -> None:
    add(cache, model)
    path = shard_files(visible(cache)[0])[0]
    os.truncate(path, 10)
    assert cache.find(remote(model)) is None
    assert visible(cache) == []


def test_one_process_writes_and_the_other_does_not(model: Path, cache: Cache) -> None:
    ours = cache.begin(remote(model))
    assert ours is not None
    theirs = Cache(cache.path, GB)
    assert theirs.begin(remote(model)) is None
    assert theirs.why == "another process is writing it to the cache"
    assert theirs.find(remote(model)) is None
    add(theirs, model, remote(model, "v2"))  # another content has nothing to do with it
    assert ours.complete(Reader(model), small(model))
    path_and_close(theirs.find(remote(model)))


def test_what_others_are_writing_counts(model: Path, cache: Cache) -> None:
    cache.size = sum(path.stat().st_size for path in shard_files(model)) * 3 // 2
    writer = cache.begin(remote(model))
    assert writer is not None
    assert cache.begin(remote(model, "v2")) is None
    writer.close()


def test_it_touches_only_what_is_its_own(model: Path, cache: Cache) -> None:
    precious = Path(cache.path, "new-year")
    precious.mkdir()
    (precious / "photo").write_bytes(b"x")
    Path(cache.path, "old-notes.txt").write_text("x")
    link = Path(cache.path, "0" * 32)
    link.symlink_to(precious)
    cache.size = sum(path.stat().st_size for path in model.iterdir()) * 2
    for version in "abc":
        add(cache, model, remote(model, version))
    assert (precious / "photo").exists()
    assert Path(cache.path, "old-notes.txt").exists()
    assert link.is_symlink()


def test_an_index_is_made_where_there_is_none(model: Path, cache: Cache) -> None:
    writer = cache.begin(remote(model))
    assert writer is not None
    assert writer.complete(Reader(model), {"config.json": (model / "config.json").read_bytes()})
    assert reference(visible(cache)[0]) == reference(model)
    Checkpoint.open(visible(cache)[0])


def test_the_directory_is_private(cache: Cache) -> None:
    assert stat.S_IMODE(os.stat(cache.path).st_mode) == 0o700


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlatformError, match=r"cannot be used.*--cache"):
        Cache(str(tmp_path / "file"), GB)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    code = (
        "import os, sys\n"
        "from coldframe.loader.disk_cache.cache import Cache\n"
        "from coldframe.loader.errors import PlatformError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: Cache(sys.argv[1], 1)\n"
        "except PlatformError as error: sys.exit(0 if 'cannot be used' in str(error) else 2)\n"
        "sys.exit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(shut)], check=False).returncode == 0


_FOREVER = """
import itertools, sys
from pathlib import Path
from coldframe.loader.disk_cache.cache import Cache
from tests.loader.disk_cache.test_cache import Reader, load, remote, small
root = Path(sys.argv[1])
cache = Cache(sys.argv[2], int(sys.argv[3]))
print("ready", flush=True)
for turn in itertools.count(int(sys.argv[4])):
    writer = cache.begin(remote(root, str(turn)))
    memory = load(root, writer)
    assert writer.complete(Reader(root), small(root)), writer.why
    memory.reservation.close()
"""


def test_a_kill_at_any_moment_leaves_nothing_bad(model: Path, cache: Cache) -> None:
    # Room for two: so that there is always one to be removed as well.
    cache.size = sum(path.stat().st_size for path in model.iterdir()) * 5 // 2
    seed = random.Random(7)
    complete = 0
    for turn in range(6):
        args = [str(model), cache.path, str(cache.size), str(1000 * turn)]
        with subprocess.Popen(
            [sys.executable, "-c", _FOREVER, *args],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(seed.uniform(0.03, 0.15))
            process.send_signal(signal.SIGKILL)
        for entry in visible(cache):
            assert_sound(entry)
            assert reference(entry) == reference(model)
        complete += len(visible(cache))
        assert len(visible(cache)) <= 2
    assert complete > 0
    add(cache, model)
    assert at_work(cache) == []
    shutil.rmtree(cache.path)
