from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.manifest import Manifest, Oracle
from coldframe.snapshot.signing import check, read_key, sign
from coldframe.snapshot.store import open_store
from tests.snapshot.images import draft, write_image
from tests.snapshot.test_manifest import MANIFEST
from tests.support import unavailable

KEY = b"0123456789abcdef"


def test_a_signature_is_the_hmac_of_the_canonical_manifest() -> None:
    signed = sign(MANIFEST, KEY)
    assert signed.signature == hmac.new(KEY, MANIFEST.canonical(), hashlib.sha256).hexdigest()
    check(signed, KEY)
    check(Manifest.decode(signed.encode()), KEY)


def test_another_key_and_no_signature_are_refused() -> None:
    with pytest.raises(SnapshotError, match="not of this key"):
        check(sign(MANIFEST, b"another key, really"), KEY)
    with pytest.raises(SnapshotError, match="not signed"):
        check(MANIFEST._replace(signature=None), KEY)


@pytest.mark.parametrize("field", [name for name in Manifest._fields if name != "signature"])
def test_every_field_is_signed(field: str) -> None:
    signed = sign(MANIFEST, KEY)
    other = {
        "created": 1.0,
        "name": "another",
        "model": MANIFEST.model._replace(tokenizer=None),
        "machine": MANIFEST.machine._replace(kernel=(4, 0)),
        "arena": MANIFEST.arena._replace(kv=MANIFEST.arena.weights),
        "process": MANIFEST.process._replace(pid=8),
        "decode_steps": "others",
        "gpu": None,
        "engine": None,
        "objects": MANIFEST.objects[::-1],
        "files": MANIFEST.files[1:],
        "oracle": Oracle((), (), ()),
    }[field]
    with pytest.raises(SnapshotError, match="signature"):
        check(signed._replace(**{field: other}), KEY)


def test_the_key_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    assert read_key(str(path)) == KEY + b"\n"


def key_of(user: int, mode: int, path: Path) -> str:
    path.write_bytes(KEY)
    if path.stat().st_uid != user:
        try:
            os.chown(path, user, -1)
        except PermissionError:
            unavailable("only root can give a file to somebody else")
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_may_read_is_refused(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = os.geteuid() or 1234
    path = key_of(user, mode, tmp_path / "key")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(SnapshotError, match="others may read"):
        read_key(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
@pytest.mark.parametrize("user", [0, 1234])
def test_a_key_of_root_may_be_read_by_its_group(
    tmp_path: Path, mode: int, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_of(0, mode, tmp_path / "key")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert read_key(path) == KEY


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o660, 0o620, 0o444])
def test_a_key_of_root_that_more_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_of(0, mode, tmp_path / "key")
    with pytest.raises(SnapshotError, match="others may read"):
        read_key(path)


def test_a_key_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = key_of(os.geteuid() + 1234, 0o600, tmp_path / "key")
    with pytest.raises(SnapshotError, match="somebody else"):
        read_key(path)


@pytest.mark.parametrize("nbytes", [0, 15, 4097, 100_000])
def test_a_key_of_the_wrong_length_is_refused(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(bytes(nbytes))
    with pytest.raises(SnapshotError, match="wrong length") as raised:
        read_key(str(path))
    assert raised.value.got == f"{nbytes} bytes"


def test_a_key_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(SnapshotError, match="cannot be read"):
            read_key(str(path))


def test_a_store_with_a_key_takes_its_own_images_only(tmp_path: Path) -> None:
    image = write_image(tmp_path / "image", mebibytes=1)
    place = str(tmp_path / "store")
    unsigned = open_store(place).put(image, draft("unsigned"))
    foreign = open_store(place, key=b"another key, really").put(image, draft("foreign"))
    store = open_store(place, key=KEY)
    seen: list[Manifest] = []

    def finish(manifest: Manifest) -> Manifest:
        (tmp_path / "staged").mkdir()
        store.fetch(manifest, tmp_path / "staged")  # signed before it is complete
        seen.append(manifest)
        return manifest.with_oracle(Oracle((1,), (2,), (-0.5,)))

    own = store.put(image, draft("own"), finish=finish)
    assert own.oracle is not None
    assert own.id == seen[0].id
    assert own.signature != seen[0].signature
    found, skipped = store.manifests()
    assert found == [own]
    assert {item.id: "not signed" in item.why for item in skipped} == {
        unsigned.id: True,
        foreign.id: False,
    }
    for manifest in (unsigned, foreign, own._replace(process=own.process._replace(pid=9))):
        with pytest.raises(SnapshotError, match="sign"):
            store.fetch(manifest, tmp_path)
    assert {manifest.name for manifest in open_store(place).manifests()[0]} == {
        "unsigned",
        "foreign",
        "own",
    }
