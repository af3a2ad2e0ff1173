from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    PlatformError,
    RequestError,
    SourceChanged,
    SourceCorrupt,
    SourceError,
    SourceNotFound,
    SourceUnreachable,
)
from coldframe.loader.loads.chain import ChainSource, Opened, first_that_opens
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.sources.base import Origin, Source
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from coldframe.loader.sources.opening import origins_of
from tests.loader.loads.test_load import Watched
from tests.loader.weights import layered, reference, shard_files


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    fds = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == fds


def places(*paths: Path) -> Iterator[Callable[[], Origin]]:
    return origins_of([str(path) for path in paths])


def test_the_first_sound_place_is_taken_and_none_behind_it_is_touched(tmp_path: Path) -> None:
    model = layered(tmp_path / "m")
    broken = layered(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    failures: list[ColdframeError] = []
    made: list[Path] = []

    def make(path: Path) -> Callable[[], Origin]:
        def origin() -> Origin:
            made.append(path)
            return DirectoryOrigin(str(path))

        return origin

    paths = [tmp_path / "none", broken, model, tmp_path / "never"]
    opened = first_that_opens(iter([make(path) for path in paths]), failures)
    assert opened.checkpoint.path == opened.origin.path == str(model)
    assert [type(error) for error in failures] == [SourceNotFound, CheckpointError]
    assert made == paths[:3]


def test_where_no_place_has_it_the_last_error_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound) as caught:
        first_that_opens(places(tmp_path / "one", tmp_path / "two"), [])
    assert caught.value.where == str(tmp_path / "two")
    assert "Tried before it" in str(caught.value)
    assert str(tmp_path / "one") in str(caught.value)


def test_a_place_that_is_none_is_refused_before_any_is_tried(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        origins_of([str(tmp_path), "gopher://hole"])


class Noted:
    """A source that notes what it was asked for, and calls something before each read."""

    readers = chunk = verified = None
    note = "noted"

    def __init__(self, source: FileSource, before: Callable[[int], None]) -> None:
        self.source = source
        self.before = before
        self.reads: list[tuple[int, int, int]] = []

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        self.before(len(self.reads))
        self.source.read_into(shard, offset, parts)
        self.reads.append((shard, offset, sum(map(len, parts))))

    def finish(self) -> None:
        self.source.finish()

    def abort(self) -> None: ...

    def close(self) -> None:
        self.source.close()


@pytest.mark.parametrize("sealed", [False, True])
def test_after_a_fault_in_the_middle_the_next_place_gives_what_is_missing(
    sealed: bool, tmp_path: Path
) -> None:
    first, second = layered(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(first, second)
    noted: list[Noted] = []
    changes: list[tuple[str, ColdframeError]] = []

    def fail(reads: int) -> None:
        if reads == 3:
            if not sealed:
                raise SourceUnreachable("the disk is gone", where=str(first))
            for path in shard_files(first):
                os.truncate(path, 0)

    def open_source(opened: Opened) -> Source:
        noted.append(
            Noted(FileSource(opened.checkpoint.shards), (lambda _: None) if noted else fail)
        )
        return noted[-1]

    opened = Opened(DirectoryOrigin(str(first)), Checkpoint.open(first))
    chain = ChainSource(
        opened,
        places(second),
        open_source,
        lambda uri, error: changes.append((uri, error)),
        sealed=sealed,
    )
    expected = [path.read_bytes() for path in shard_files(second)]
    wanted = [(shard, at, 4000) for shard in (0, 1) for at in (0, 4000, 8000, 12_000)]
    for shard, offset, length in wanted:
        buffer = memoryview(bytearray(length))
        chain.read_into(shard, offset, [buffer])
        assert buffer == expected[shard][offset : offset + length]
    chain.finish()
    assert noted[0].reads == wanted[:3]
    assert noted[1].reads == wanted[3:]
    ((uri, error),) = changes
    assert uri == str(second)
    assert isinstance(error, SourceChanged if sealed else SourceUnreachable)
    chain.close()


def test_what_changed_unsealed_while_it_was_read_is_not_mixed_with_another_place(
    tmp_path: Path,
) -> None:
    first, second = layered(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(first, second)
    opened = Opened(DirectoryOrigin(str(first)), Checkpoint.open(first))
    chain = ChainSource(
        opened,
        places(second),
        lambda found: FileSource(found.checkpoint.shards),
        lambda uri, error: pytest.fail("nothing goes on"),
        sealed=False,
    )
    chain.read_into(0, 0, [memoryview(bytearray(10))])
    os.truncate(shard_files(first)[0], 100)
    with pytest.raises(SourceChanged):
        chain.read_into(0, 4000, [memoryview(bytearray(10))])
    with pytest.raises(SourceChanged):  # nor from a file of it that is as it was
        chain.read_into(1, 0, [memoryview(bytearray(10))])
    chain.close()


def test_another_checkpoint_does_not_step_in(tmp_path: Path) -> None:
    first, second = layered(tmp_path / "one"), layered(tmp_path / "two", nbytes=20_008)
    opened = Opened(DirectoryOrigin(str(first)), Checkpoint.open(first))
    chain = ChainSource(
        opened,
        places(second, tmp_path / "none"),
        lambda found: FileSource(found.checkpoint.shards),
        lambda uri, error: pytest.fail("nothing goes on"),
        sealed=False,
    )
    os.truncate(shard_files(first)[0], 100)
    with pytest.raises(SourceChanged) as caught:
        chain.read_into(0, 4000, [memoryview(bytearray(10))])
    assert caught.value.where == str(shard_files(first)[0])
    assert "another checkpoint" in str(caught.value)
    assert "no such file" in str(caught.value)
    chain.close()


def test_a_load_takes_the_next_place_and_says_so(tmp_path: Path) -> None:
    model = layered(tmp_path / "m")
    watched = Watched(model, sources=(str(tmp_path / "none"),), copy=True)
    watched.load.run()
    watched.wait()
    assert watched.ends == [None]
    assert watched.tensors() == reference(model)
    assert watched.load.weights.why is not None
    assert str(tmp_path / "none") in watched.load.weights.why
    watched.close()


def test_a_load_from_nowhere(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "m", sources=(str(tmp_path / "none"),))
    with pytest.raises(SourceNotFound):
        watched.load.run()
    watched.load.close()
    assert LoadOptions("m").sources == ()


def test_what_a_place_gave_before_it_failed_is_looked_at_again_at_the_end(tmp_path: Path) -> None:
    first, second = layered(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(first, second)

    def fail(reads: int) -> None:
        if reads == 1:
            raise SourceUnreachable("the disk is gone", where=str(first))

    def open_source(opened: Opened) -> Source:
        source = FileSource(opened.checkpoint.shards)
        return Noted(source, fail) if opened.origin.path == str(first) else source

    opened = Opened(DirectoryOrigin(str(first)), Checkpoint.open(first))
    chain = ChainSource(opened, places(second), open_source, lambda uri, error: None, sealed=False)
    for offset in (4000, 8000):
        chain.read_into(0, offset, [memoryview(bytearray(10))])
    chain.finish()
    with shard_files(first)[0].open("r+b") as file:
        file.write(b"x")
    with pytest.raises(SourceChanged, match="one"):
        chain.finish()
    chain.close()


class Slow:
    """The read at 4000 ends only after another has failed, and brings what nobody wants."""

    readers = chunk = verified = None
    note = ""

    def __init__(self, error: SourceError) -> None:
        self.error = error
        self.under_way = threading.Event()
        self.changed = threading.Event()

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        if offset != 4000:
            raise self.error
        self.under_way.set()
        assert self.changed.wait(10)
        parts[0][:] = bytes(len(parts[0]))

    def finish(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


def test_what_was_on_its_way_from_a_place_that_changed_is_read_again(tmp_path: Path) -> None:
    first, second = layered(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(first, second)
    slow = Slow(SourceChanged("it was written to", where=str(first)))

    def open_source(found: Opened) -> Source:
        if found.origin.path == str(first):
            return slow
        return FileSource(found.checkpoint.shards)

    opened = Opened(DirectoryOrigin(str(first)), Checkpoint.open(first))
    chain = ChainSource(opened, places(second), open_source, lambda uri, error: None, sealed=False)
    early = memoryview(bytearray(1000))
    thread = threading.Thread(target=chain.read_into, args=(0, 4000, [early]))
    thread.start()
    assert slow.under_way.wait(10)
    chain.read_into(0, 8000, [memoryview(bytearray(10))])
    slow.changed.set()
    thread.join()
    assert early == shard_files(second)[0].read_bytes()[4000:5000]
    chain.close()


@pytest.mark.parametrize("kind", [SourceChanged, SourceCorrupt])
def test_whoever_is_heard_of_first_says_what_the_change_was_seen_by(
    kind: type[SourceError], tmp_path: Path
) -> None:
    model = layered(tmp_path / "m")
    slow = Slow(kind("it was written to", where="bytes 8000-8009", got="status 412"))
    opened = Opened(DirectoryOrigin(str(model)), Checkpoint.open(model))
    chain = ChainSource(opened, iter([]), lambda _: slow, lambda uri, error: None, sealed=False)
    heard: list[ColdframeError] = []

    def read(offset: int) -> None:
        try:
            chain.read_into(0, offset, [memoryview(bytearray(10))])
        except ColdframeError as error:
            heard.append(error)

    thread = threading.Thread(target=read, args=(4000,))
    thread.start()
    assert slow.under_way.wait(10)
    read(8000)
    slow.changed.set()
    thread.join()
    # Of two threads that end with this, either may be the one whose error ends the load.
    told = [(type(error), error.what, error.where, error.got) for error in heard]
    assert told == [(kind, "it was written to", "bytes 8000-8009", "status 412")] * 2
    chain.close()


def test_the_end_does_not_wait_for_a_place_that_is_being_opened(tmp_path: Path) -> None:
    model = layered(tmp_path / "m")
    asked, closed = threading.Event(), threading.Event()

    class Silent(DirectoryOrigin):
        def check(self) -> None:
            asked.set()
            if not closed.wait(20):
                pytest.fail("nobody ends it")
            raise SourceUnreachable("it was ended", where=self.path)

        def close(self) -> None:
            closed.set()

    def fail(_: int) -> None:
        raise SourceUnreachable("the disk is gone", where=str(model))

    opened = Opened(DirectoryOrigin(str(model)), Checkpoint.open(model))
    chain = ChainSource(
        opened,
        iter([lambda: Silent(str(model)), lambda: pytest.fail("the load is over")]),
        lambda found: Noted(FileSource(found.checkpoint.shards), fail),
        lambda uri, error: pytest.fail("nothing goes on"),
        sealed=False,
    )
    errors: list[ColdframeError] = []

    def read() -> None:
        try:
            chain.read_into(0, 4000, [memoryview(bytearray(10))])
        except ColdframeError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert asked.wait(10)
    chain.abort()
    thread.join()
    assert [error.what for error in errors] == ["the disk is gone"]
    chain.close()


def test_a_place_that_needs_what_is_not_installed_hides_no_other_error(tmp_path: Path) -> None:
    model = layered(tmp_path / "m")

    def make() -> Origin:
        raise PlatformError("there is no such package")

    def fail(_: int) -> None:
        raise SourceUnreachable("the disk is gone", where=str(model))

    failures: list[ColdframeError] = []
    opened = first_that_opens(iter([make, lambda: DirectoryOrigin(str(model))]), failures)
    assert [type(error) for error in failures] == [PlatformError]
    chain = ChainSource(
        opened,
        iter([make]),
        lambda found: Noted(FileSource(found.checkpoint.shards), fail),
        lambda uri, error: pytest.fail("nothing goes on"),
        sealed=False,
    )
    with pytest.raises(SourceUnreachable, match=r"the disk is gone.*no such package"):
        chain.read_into(0, 4000, [memoryview(bytearray(10))])
    chain.close()
