from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot import bucket
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.store import Store, open_store
from tests.loader.web.moto_server import isolate, moto, only_allowed
from tests.snapshot.images import draft, same_files, write_image

BUCKET = "images"
PLACE = f"s3://{BUCKET}/of/models"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as url:
        yield url


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("written") / "image", mebibytes=6)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> Iterator[Any]:
    isolate(monkeypatch, tmp_path, server)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in keys(client):
        client.delete_object(Bucket=BUCKET, Key=item)
    client.close()


@pytest.fixture
def store(client: Any) -> Store:
    return open_store(PLACE)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    path = tmp_path / "into"
    path.mkdir()
    return path


def keys(client: Any) -> list[str]:
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", ())
    return [item["Key"] for item in found]


def later(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """Our clock goes on; the server's does not."""
    now = (datetime.now(UTC) + timedelta(hours=hours)).timestamp()
    monkeypatch.setattr(bucket.time, "time", lambda: now)


@pytest.mark.parametrize("compress", ["auto", "none"])
def test_an_image_comes_back_as_it_was(
    store: Store, client: Any, image: Path, into: Path, compress: str
) -> None:
    manifest = store.put(image, draft(), compress=compress)
    assert open_store(PLACE).manifests() == ([manifest], [])
    assert sorted(keys(client)) == sorted(
        [f"of/models/manifests/{manifest.id}.json"]
        + [f"of/models/objects/{item.digest}" for item in manifest.objects]
    )
    store.fetch(manifest, into)
    assert same_files(image, into)
    assert store.usage() == (1, manifest.stored_bytes, None)


def test_a_bucket_may_be_all_of_it(client: Any, image: Path, into: Path) -> None:
    store = open_store(f"s3://{BUCKET}")
    store.fetch(store.put(image, draft()), into)
    assert same_files(image, into)
    assert {key.split("/")[0] for key in keys(client)} == {"objects", "manifests"}


def test_an_image_is_tried_before_others_see_it(store: Store, image: Path, into: Path) -> None:
    def finish(manifest: Manifest) -> Manifest:
        assert open_store(PLACE).manifests() == ([], [])
        open_store(PLACE).fetch(manifest, into)
        return manifest.with_oracle({"prompt_ids": [1], "token_ids": [2], "logprobs": [-0.5]})

    manifest = store.put(image, draft(), finish=finish)
    assert same_files(image, into)
    assert store.manifests() == ([manifest], [])


def test_an_image_that_fails_is_not_there(store: Store, client: Any, image: Path) -> None:
    def finish(manifest: Manifest) -> Manifest:
        raise SnapshotError("it answers nonsense")

    with pytest.raises(SnapshotError, match="nonsense"):
        store.put(image, draft(), finish=finish)
    assert keys(client) == []
    kept = store.put(image, draft("kept"))
    with pytest.raises(SnapshotError, match="nonsense"):
        store.put(image, draft(), finish=finish)  # it has the same objects
    assert store.manifests() == ([kept], [])
    assert len(keys(client)) == 1 + len(kept.objects)


def test_what_somebody_has_removed_meanwhile_is_not_published(
    store: Store, client: Any, image: Path
) -> None:
    def finish(manifest: Manifest) -> Manifest:
        key = f"of/models/objects/{manifest.objects[1].digest}"
        client.delete_object(Bucket=BUCKET, Key=key)
        return manifest

    with pytest.raises(SnapshotError, match="removed before it was complete"):
        store.put(image, draft(), finish=finish)
    assert keys(client) == []


def test_what_is_damaged_cut_or_missing_is_found(
    store: Store, client: Any, image: Path, into: Path
) -> None:
    manifest = store.put(image, draft())
    for item in manifest.objects:
        key = f"of/models/objects/{item.digest}"
        content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for changed in (flipped, content[:-1], content + b"\0"):
            client.put_object(Bucket=BUCKET, Key=key, Body=changed)
            with pytest.raises(SnapshotError) as raised:
                store.fetch(manifest, into)
            assert item.digest in str(raised.value.where)
            assert list(into.iterdir()) == []
        client.delete_object(Bucket=BUCKET, Key=key)
        with pytest.raises(SnapshotError, match="there is no such object"):
            store.fetch(manifest, into)
        client.put_object(Bucket=BUCKET, Key=key, Body=content)
    store.fetch(manifest, into)


def test_manifests_that_cannot_be_used_are_skipped(store: Store, client: Any, image: Path) -> None:
    good, foreign = store.put(image, draft("good")), store.put(image, draft("foreign"))
    content = json.dumps({**foreign.to_json(), "version": 2}).encode()
    folder = "of/models/manifests"
    client.put_object(Bucket=BUCKET, Key=f"{folder}/{foreign.id}.json", Body=content)
    client.put_object(Bucket=BUCKET, Key=f"{folder}/{'0' * 32}.json", Body=b"{")
    client.put_object(Bucket=BUCKET, Key=f"{folder}/notes.txt", Body=b"of somebody else")
    found, skipped = store.manifests()
    assert found == [good]
    assert {item.id for item in skipped} == {foreign.id, "0" * 32}


def test_removed_is_gone_and_what_others_need_stays(
    store: Store, client: Any, image: Path, into: Path
) -> None:
    first, second = store.put(image, draft("first")), store.put(image, draft("second"))
    store.remove(first.id)
    store.fetch(second, into)
    with pytest.raises(SnapshotError, match="no such image"):
        store.remove(first.id)
    store.touch(second.id)
    assert f"of/models/used/{second.id}" in keys(client)
    store.remove(second.id)
    assert keys(client) == []


def test_what_was_not_used_for_longest_goes_first(
    store: Store, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [
        store.put(write_image(tmp_path / f"{number}", seed=number, mebibytes=1), draft())
        for number in range(2)
    ]
    store.touch(made[0].id)
    assert store.prune(max_age_s=3600) == []
    client.put_object(Bucket=BUCKET, Key="of/models/objects/" + "0" * 64, Body=b"left over")
    assert store.prune(max_bytes=made[0].stored_bytes, keep=frozenset({made[0].id})) == [made[1].id]
    assert f"of/models/objects/{'0' * 64}" in keys(client)  # somebody may just be writing it
    later(monkeypatch, 2)
    assert store.prune() == []
    assert f"of/models/objects/{'0' * 64}" not in keys(client)
    assert store.manifests() == ([made[0]], [])


def test_what_others_keep_under_objects_stays(
    store: Store, client: Any, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = [
        "of/models/objects/photo.jpg",
        f"of/models/objects/{'0' * 63}",
        f"of/models/objects/{'A' * 64}",
        f"of/models/objects/{'0' * 64}.txt",
        f"of/models/objects/deeper/{'0' * 64}",
        f"of/models/{'0' * 64}",
        "of/models/manifests/notes.json",
    ]
    for key in foreign:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"of somebody else")
    manifest = store.put(image, draft())
    assert store.usage() == (1, manifest.stored_bytes, None)
    later(monkeypatch, 2)
    with pytest.raises(SnapshotError, match="no such image"):
        store.remove("../manifests/notes")
    store.prune(max_bytes=0)
    assert sorted(keys(client)) == sorted(foreign)


@pytest.mark.parametrize("key", [None, b"0123456789abcdef"])
def test_what_comes_over_the_network_is_not_used_unchecked(
    client: Any, image: Path, into: Path, key: bytes | None
) -> None:
    store = open_store(PLACE, key=key)
    manifest = store.put(image, draft())
    with pytest.raises(SnapshotError, match="without checking") as raised:
        store.direct(manifest, into)
    assert "network" in str(raised.value.got)
    assert list(into.iterdir()) == []


def test_that_a_bucket_is_there_can_be_asked_beforehand(
    store: Store, client: Any, server: str
) -> None:
    store.check_writable()
    assert keys(client) == []
    with pytest.raises(SnapshotError, match="cannot be listed"):
        open_store("s3://nosuchbucket/x").check_writable()
    with only_allowed(server), pytest.raises(SnapshotError, match="cannot be listed"):
        open_store(PLACE).check_writable()


@pytest.mark.heavy
def test_what_is_not_allowed_is_said(
    store: Store, server: str, image: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store.put(image, draft())
    with only_allowed(server):
        for attempt in (
            lambda: open_store(PLACE).manifests(),
            lambda: open_store(PLACE).put(image, draft()),
            lambda: open_store(PLACE).fetch(manifest, into),
            lambda: open_store(PLACE).remove(manifest.id),
        ):
            with pytest.raises(SnapshotError) as raised:
                attempt()
            assert raised.value.hint
        open_store(PLACE).touch(manifest.id)  # no reason not to start
    assert store.manifests() == ([manifest], [])


def test_a_bucket_that_is_not_there_is_said(client: Any, image: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be listed") as raised:
        open_store("s3://nosuchbucket/x").manifests()
    assert "NoSuchBucket" in str(raised.value.got)


def test_without_credentials_it_is_an_error_of_ours(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(SnapshotError, match="credentials"):
        open_store(PLACE).manifests()
