"""An archive's bytes, and the folder that they are kept in."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from array import array
from pathlib import Path

import pytest

from coldframe.loader.errors import ImageDamaged, NoImage, SnapshotError
from coldframe.snapshot import graph_file
from coldframe.snapshot.graph_file import VERSION, GraphArchive, decode, encode
from coldframe.snapshot.graph_fingerprint import GraphFingerprint
from coldframe.snapshot.graph_kernels import KernelIdentity
from coldframe.snapshot.graph_nodes import NODE, Copy, Fill, GraphNodes, Place, Region
from coldframe.snapshot.graph_store import GraphStore, name_of

HERE = GraphFingerprint(
    driver="13000",
    libcuda="build-id:abc",
    gpu="Emulated GPU 0",
    capability="9.0",
    torch="2.11.0",
    cuda="13.0",
    cublas="build-id:def",
    model="f00d",
    regions=(("weights", 4096), ("kv", 8192)),
)


def archive(fingerprint: GraphFingerprint = HERE) -> GraphArchive:
    """A small one, of all that there can be."""
    kernel = KernelIdentity("_Z3mixPh", 3, ((0, 8), (8, 4)), (("NUM_REGS", 24),))
    graph = GraphNodes(
        nodes=NODE.pack(0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0) + NODE.pack(1, 0, *[0] * 9),
        sources=array("I", [0]),
        targets=array("I", [1]),
        ports=b"\x01\x00\x01",
        operations=(
            Fill(Place(0, 16), 32, 7, 1, 8, 2),
            Copy(Place(0, 1), Place(1, 2), tuple(range(15))),
        ),
        words=bytes(range(32)),
        kinds=bytes([255, 255, 1, 0]),
        fixed=False,
    )
    return GraphArchive(
        fingerprint,
        (Region("weights", 0x2000_0000_0000, 4096), Region("kv", 0x3000_0000_0000, 8192)),
        ((kernel, (("MAX_DYNAMIC_SHARED_SIZE_BYTES", 1 << 16),)),),
        ((), (("PRIORITY", b"\x07" + bytes(63)),)),
        {"1x8": graph, "2x8": graph},
        {"4x8": "a node calls a function of this process"},
        (b"cubin",),
        {"scratch": 123},
    )


def resealed(raw: bytes, change: bytes) -> bytes:
    """The same with other content, and the right hash over it."""
    head = struct.Struct("<8sI32s")
    magic, version, _ = head.unpack_from(raw)
    return head.pack(magic, version, hashlib.sha256(change).digest()) + change


def test_what_is_written_is_what_is_read() -> None:
    assert decode(encode(archive()), "here", HERE) == archive()


def test_any_flipped_bit_is_found() -> None:
    raw, chance = encode(archive()), random.Random(7)
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1 << chance.randrange(8)
        with pytest.raises((ImageDamaged, NoImage)) as caught:
            decode(bytes(changed), "here", HERE)
        # The version is the only field that is believed before the hash, and only to refuse it.
        assert isinstance(caught.value, NoImage) == (8 <= at < 12)


def test_any_part_of_it_is_too_little() -> None:
    raw = encode(archive())
    for length in range(len(raw)):
        with pytest.raises(ImageDamaged):
            decode(raw[:length], "here", HERE)
    with pytest.raises(ImageDamaged, match="damaged, in here, expected sha256"):
        decode(raw + b"\0", "here", HERE)


def test_another_version_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encode(archive())
    monkeypatch.setattr(graph_file, "VERSION", VERSION + 1)
    with pytest.raises(NoImage, match=f"another version, in here, expected {VERSION + 1}, got 1"):
        decode(raw, "here", HERE)


@pytest.mark.parametrize("name", GraphFingerprint._fields)
def test_whatever_is_not_as_it_was_is_named_before_anything_is_inflated(name: str) -> None:
    other = (("kv", 1),) if name == "regions" else "another"
    raw = encode(archive())
    (length,) = struct.unpack_from("<I", raw, 44)
    # What follows the fingerprint is rubbish, and nobody comes to see it.
    torn = resealed(raw, raw[44 : 48 + length] + b"rubbish")
    with pytest.raises(NoImage, match=f"were captured with another {name}, in here, expected"):
        decode(torn, "here", HERE._replace(**{name: other}))
    with pytest.raises(ImageDamaged):
        decode(torn, "here", HERE)


def test_what_another_writer_leaves_out_is_an_error_of_ours() -> None:
    raw = encode(archive())
    (length,) = struct.unpack_from("<I", raw, 44)
    for rest in (b"", raw[44:45], raw[44 : 48 + length], raw[44 : len(raw) - 1]):
        with pytest.raises(SnapshotError):
            decode(resealed(raw, rest), "here", HERE)


def test_an_edge_that_leads_nowhere_is_damage() -> None:
    whole = archive()
    graph = whole.graphs["1x8"]
    odd = GraphNodes(
        graph.nodes,
        array("I", [0]),
        array("I", [2]),
        graph.ports,
        graph.operations,
        graph.words,
        graph.kinds,
        graph.fixed,
    )
    raw = encode(GraphArchive(HERE, whole.regions, whole.kernels, whole.attributes, {"1x8": odd}))
    with pytest.raises(ImageDamaged, match="an edge leads nowhere"):
        decode(raw, "here", HERE)


# -- the folder ----------------------------------------------------------------------------------


def test_a_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store = GraphStore(str(tmp_path / "graphs"))
    with pytest.raises(NoImage, match="no archive of graphs for this model"):
        store.read(HERE)
    path = Path(store.write(archive()))
    assert store.read(HERE) == archive()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_another_model_has_a_file_of_its_own_and_another_driver_the_same(tmp_path: Path) -> None:
    store = GraphStore(str(tmp_path))
    newer, model = HERE._replace(driver="13010"), HERE._replace(model="beef")
    store.write(archive())
    store.write(archive(model))
    store.write(archive(newer))
    assert store.read(model).fingerprint == model
    with pytest.raises(NoImage, match=r"another driver, in .*, expected 13010, got 13000"):
        store.read(HERE)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_others_could_have_written_is_not_read(tmp_path: Path) -> None:
    store = GraphStore(str(tmp_path))
    path = Path(store.write(archive()))
    path.chmod(0o620)
    with pytest.raises(SnapshotError, match="others could put"):
        store.read(HERE)
    path.chmod(0o600)
    tmp_path.chmod(0o777)
    with pytest.raises(SnapshotError, match="others could put"):
        store.read(HERE)
    with pytest.raises(SnapshotError, match="others could put"):
        store.write(archive())
    tmp_path.chmod(0o700)
    assert store.read(HERE) == archive()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_archive_is_not_read(tmp_path: Path) -> None:
    store = GraphStore(str(tmp_path))
    os.chown(store.write(archive()), 4321, 4321)
    with pytest.raises(SnapshotError, match=r"others could put .* of user 4321"):
        store.read(HERE)


def test_no_link_is_followed_and_nothing_but_a_file_read(tmp_path: Path) -> None:
    there, linked = tmp_path / "there", tmp_path / "linked"
    path = Path(GraphStore(str(there)).write(archive()))
    linked.symlink_to(there)
    with pytest.raises(SnapshotError, match="may not be symbolic links"):
        GraphStore(str(linked)).read(HERE)
    path.rename(there / "elsewhere")
    path.symlink_to(there / "elsewhere")
    with pytest.raises(SnapshotError, match="cannot be read"):
        GraphStore(str(there)).read(HERE)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SnapshotError, match=r"no archive of graphs, in .*, expected a file"):
        GraphStore(str(there)).read(HERE)


def test_a_writer_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = GraphStore(str(tmp_path))
    store.write(archive())
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnapshotError, match=r"cannot be written.*expected room for"):
        store.write(archive(HERE._replace(driver="1")))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert store.read(HERE) == archive()


def test_the_oldest_go_and_so_does_what_dead_writers_left(tmp_path: Path) -> None:
    store = GraphStore(str(tmp_path))
    for number in range(20):
        path = store.write(archive(HERE._replace(model=str(number))))
        os.utime(path, (number, number))
    old, new = tmp_path / ".writing-1-a", tmp_path / ".writing-2-b"
    old.touch()
    os.utime(old, (1, 1))
    new.touch()
    store.write(archive())
    assert not old.exists()
    assert new.exists()
    assert len(list(tmp_path.glob("*.graphs"))) == 16
    assert store.read(HERE) == archive()
    with pytest.raises(NoImage):
        store.read(HERE._replace(model="0"))


def test_only_what_is_an_archive_is_taken_from_others(tmp_path: Path) -> None:
    store, raw = GraphStore(str(tmp_path)), encode(archive())
    assert store.publish(name_of(HERE), raw) == store.path(HERE)
    assert store.read(HERE) == archive()
    with pytest.raises(ImageDamaged):
        store.publish(name_of(HERE), raw[:-1])
    for name in ("../" + name_of(HERE), "a.graphs", name_of(HERE) + "\n", ""):
        with pytest.raises(SnapshotError, match="no name of an archive"):
            store.publish(name, raw)
    assert store.read(HERE) == archive()
