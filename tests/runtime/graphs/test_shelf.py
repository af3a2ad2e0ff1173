"""The front's part in keeping steps: what a worker sends is written, if it is what it should be."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Message
from coldframe.runtime.graphs import shelf as graph_shelf
from coldframe.runtime.graphs.shelf import GraphShelf, Trial
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.snapshot.graph_file import encode
from coldframe.snapshot.graph_store import GraphStore, name_of
from tests.snapshot.test_graph_file import HERE, archive


def sent(raw: bytes, name: str | None = None) -> Message:
    fd = os.memfd_create("graphs", os.MFD_CLOEXEC)
    os.write(fd, raw)
    return Message({"type": "graphs", "name": name_of(HERE) if name is None else name}, (fd,))


def written(shelf: GraphShelf, message: Message) -> None:
    """Waits until what was sent is written, or is not; either way its descriptor is closed."""
    (fd,) = message.fds
    inode = os.fstat(fd).st_ino
    shelf.take(message)
    for thread in threading.enumerate():
        if thread.name == "graphs":
            thread.join(10)
    with pytest.raises(OSError, match="Bad file descriptor"):
        assert os.fstat(fd).st_ino == inode


def test_what_a_worker_sends_is_there_for_the_next(tmp_path: Path) -> None:
    store, recorder = tmp_path / "deep" / "store", Recorder("front")
    shelf = GraphShelf(SnapshotOptions("auto", str(store), create=True), recorder)
    assert shelf.root == str(store / "graphs")
    written(shelf, sent(encode(archive())))
    assert GraphStore(str(shelf.root)).read(HERE) == archive()
    assert store.stat().st_mode & 0o777 == 0o700
    assert recorder.drain() == []


@pytest.mark.parametrize(
    ("raw", "name", "why"),
    [
        (b"rubbish", None, "damaged"),
        (encode(archive())[:-1], None, "damaged"),
        (encode(archive()), "../../etc/cron.d/x", "no name of an archive"),
    ],
)
def test_what_is_no_archive_is_not_written(
    tmp_path: Path, raw: bytes, name: str | None, why: str
) -> None:
    recorder = Recorder("front")
    shelf = GraphShelf(SnapshotOptions("auto", str(tmp_path / "store"), create=True), recorder)
    written(shelf, sent(raw, name))
    (span,) = recorder.drain()
    assert why in str(span.note)
    assert list(tmp_path.iterdir()) == []


def test_too_much_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_shelf, "_MOST_BYTES", 100)
    recorder = Recorder("front")
    shelf = GraphShelf(SnapshotOptions("auto", str(tmp_path), create=True), recorder)
    written(shelf, sent(encode(archive())))
    (span,) = recorder.drain()
    assert "too large, expected at most 100 bytes" in str(span.note)


@pytest.mark.parametrize(
    "options",
    [SnapshotOptions("off", "STORE", create=True), SnapshotOptions("auto", "STORE", create=False)],
)
def test_who_wants_nothing_kept_has_nothing_written(
    tmp_path: Path, options: SnapshotOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shelf = GraphShelf(options, Recorder("front"))
    written(shelf, sent(encode(archive())))
    assert list(tmp_path.iterdir()) == []
    assert (shelf.root is None) == (options.mode == "off")


def test_a_bucket_has_no_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for store in ("", "s3://bucket/prefix"):
        shelf = GraphShelf(SnapshotOptions("auto", store), Recorder("front"))
        assert shelf.root == str(tmp_path / "coldframe" / "snapshots" / "graphs")


def test_a_message_without_its_bytes_is_passed_over(tmp_path: Path) -> None:
    shelf = GraphShelf(SnapshotOptions("auto", str(tmp_path), create=True), Recorder("front"))
    shelf.take(Message({"type": "graphs", "name": name_of(HERE)}, ()))
    two = [*sent(b"").fds, *sent(b"").fds]
    shelf.take(Message({"type": "graphs", "name": name_of(HERE)}, tuple(two)))
    for fd in two:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def trying(what: str, name: str = name_of(HERE)) -> Trial | None:
    return Trial.of(Message({"type": "trying", "what": what, "archive": name}, ()))


@pytest.mark.parametrize("create", [True, False])
def test_behind_a_worker_that_its_step_has_lost_the_archive_is_not_read(
    tmp_path: Path, create: bool
) -> None:
    recorder, root = Recorder("front"), str(tmp_path / "graphs")
    GraphStore(root).write(archive())
    shelf = GraphShelf(SnapshotOptions("auto", str(tmp_path), create=create), recorder)
    assert shelf.root == root
    trial = trying("rebuilt")
    assert trial is not None
    for _ in range(2):  # another may have been at it, too
        shelf.lost("decode-1", trial)
    assert shelf.root is None
    assert os.listdir(root) == ([] if create else [name_of(HERE)])
    options = ReplicaOptions("model")
    assert shelf.options(options) is options
    first, _ = (span.note for span in recorder.drain())
    assert first is not None
    assert first.endswith("its archive is removed" if create else "its archive is left alone")


def test_a_name_that_is_none_removes_nothing(tmp_path: Path) -> None:
    recorder, other = Recorder("front"), tmp_path / "other"
    other.touch()
    (tmp_path / "graphs").mkdir()
    shelf = GraphShelf(SnapshotOptions("auto", str(tmp_path), create=True), recorder)
    trial = trying("rebuilt", "../other")
    assert trial is not None
    shelf.lost("decode-1", trial)
    assert other.exists()
    (span,) = recorder.drain()
    assert "no name of an archive" in (span.note or "")


def test_behind_a_worker_that_its_own_step_has_lost_none_is_replayed(tmp_path: Path) -> None:
    shelf = GraphShelf(SnapshotOptions("auto", str(tmp_path), create=True), Recorder("front"))
    trial = trying("captured")
    assert trial == Trial(None)
    assert trying("") is None
    shelf.lost("decode-1", trial)
    assert shelf.options(ReplicaOptions("model")) == ReplicaOptions("model", graphs=False)
    assert shelf.root is not None
