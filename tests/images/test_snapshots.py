"""Snapshots in the image, on a volume and in a bucket: made in containers, and restored there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import botocore.session
import pytest

from tests.images.building import Builder
from tests.images.conftest import Image, readable
from tests.images.container import Container, Platform
from tests.images.networks import network, within
from tests.images.platforms import (
    ASK,
    COUNT,
    PLATFORMS,
    PROMPT,
    RIGHTS,
    STORE,
    served,
    startup,
    text_of,
)
from tests.loader.web.moto_server import KEY, SECRET, moto
from tests.runtime.serving import greedy, ids_of
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

PLACE = "/models/demo"
REQUIRED = {"COLDFRAME_SNAPSHOT": "require"}


def answers(container: Container, expected: str) -> Any:
    """What a replica says of its start, once it has answered as it must."""
    answer = container.post(8000, "/v1/completions", ASK)
    assert answer.status_code == 200, answer.text
    assert text_of(answer.json()) == expected
    return startup(container, 8000)


def are_clones(told: Any) -> None:
    """Its workers have come out of an image."""
    assert told["tier"] == "image", told
    stages = [stage["name"] for stage in told["timeline"]["stages"]]
    assert {"snapshot_check", "snapshot_restore", "hooks"} <= set(stages)


def ends(container: Container) -> None:
    container.signal("TERM")
    assert container.end(PLATFORMS["docker"].grace_s) == 0, container.log


def create(image: Image, model: Path, **more: Any) -> dict[str, Any]:
    """What `snapshot create` says in a container, as a job would run it."""
    platform = Platform(
        args=["snapshot", "create", PLACE, "--json"],
        mounts={PLACE: model, **more.pop("mounts", {})},
        **RIGHTS,
        **more,
    )
    with image.run(platform) as container:
        assert container.end(600) == 0, container.log
        (line,) = (line for line in container.log.splitlines() if line.startswith("{"))
    document: dict[str, Any] = json.loads(line)
    return document


# -- in the image ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baked(
    builder: Builder,
    image: Image,
    mounted: Callable[[str], Image],
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Image:
    """The image with a snapshot in it, made in a container of that very image."""
    store = tmp_path_factory.mktemp("store")
    create(image, model, writable={STORE: store})
    assert any(store.iterdir())
    name = "localhost/coldframe:cpu-baked"
    return mounted(builder.baked(image.name, store, name))


def test_clones_of_a_snapshot_in_the_image_answer(baked: Image, model: Path, expected: str) -> None:
    with served(baked, model, env=REQUIRED, **RIGHTS) as container:
        are_clones(answers(container, expected))
        # Who answers has no rights, whatever the container has.
        owners = {container.status(pid)["Uid"].split()[0] for pid in container.pids()}
        assert "65532" in owners
        ends(container)


def test_an_image_with_a_snapshot_is_the_same_but_for_a_layer(baked: Image, image: Image) -> None:
    for name in ("User", "Entrypoint", "Cmd", "Env", "WorkingDir", "ExposedPorts"):
        assert baked.config[name] == image.config[name], name
    for path in (baked.root / STORE.lstrip("/")).rglob("*"):
        status = path.stat()
        # Whoever the container runs as reads it, and nobody but root could have put it there.
        assert (status.st_uid, status.st_gid) == (0, 0), path
        assert status.st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_without_the_rights_for_it_workers_start_fresh_and_say_why(
    baked: Image, model: Path, expected: str
) -> None:
    with served(baked, model) as container:
        told = answers(container, expected)
        assert told["tier"] == "fresh"
        assert "namespace" in told["no_clone"] or "mounts of its own" in told["no_clone"]
        ends(container)


def test_user_namespaces_are_rights_enough(baked: Image, model: Path, expected: str) -> None:
    # Whose a file is cannot be seen in there: hashes are checked all the same.
    for hashed in ({}, {"COLDFRAME_NO_SNAPSHOT_HASH": "1"}):
        env = {**REQUIRED, **hashed}
        with served(baked, model, env=env, confined=False, masked=False) as container:
            told = answers(container, expected)
            are_clones(told)
            stages = told["timeline"]["stages"]
            (read,) = (stage["note"] for stage in stages if stage["name"] == "snapshot_read")
            assert read == "hashed"
            for pid in container.pids():
                assert container.status(pid)["Uid"].split() == ["65532"] * 4
            ends(container)


# -- on a volume ----------------------------------------------------------------------------------


def test_a_replica_fills_a_volume_and_the_next_one_is_restored_from_it(
    image: Image, model: Path, expected: str, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    manifests = volume / "manifests"
    with served(image, model, writable={STORE: volume}, **RIGHTS) as container:
        told = answers(container, expected)
        assert told["tier"] == "fresh"
        assert f"no image in {STORE}" in told["no_clone"]
        # Behind its first answer, when nobody asks.
        eventually(lambda: manifests.is_dir() and any(manifests.glob("*.json")), seconds=240)
        assert text_of(container.post(8000, "/v1/completions", ASK).json()) == expected
        ends(container)
    before = sorted(path.name for path in manifests.iterdir())
    assert len(before) == 1
    # Where it cannot be written to, it serves as well.
    for rights in ({"writable": {STORE: volume}}, {"mounts": {STORE: volume}}):
        with served(image, model, env=REQUIRED, **rights, **RIGHTS) as container:
            are_clones(answers(container, expected))
            ends(container)
    assert sorted(path.name for path in manifests.iterdir()) == before


# -- in a bucket ----------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """A bucket, and the network that it is in.

    Args:
        network: For `Platform`.
        env: What a container is told of it.
        keys: A folder with keys to sign with, by their names.
    """

    network: int
    env: Mapping[str, str]
    keys: Path


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    keys = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        (keys / name).write_bytes(name.encode().ljust(32, b"."))
        (keys / name).chmod(0o600)
    with network() as place, ExitStack() as stack:
        url = within(place, lambda: stack.enter_context(moto()))
        settings = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

        def make() -> None:
            client = botocore.session.get_session().create_client(
                "s3",
                region_name="us-east-1",
                endpoint_url=url,
                aws_access_key_id=KEY,
                aws_secret_access_key=SECRET,
            )
            client.create_bucket(Bucket="snapshots")
            client.close()

        within(place, make)
        ours = {
            "COLDFRAME_SNAPSHOT_STORE": "s3://snapshots/of/demo",
            "COLDFRAME_SNAPSHOT_KEY": "/keys/ours",
        }
        yield Bucket(place, {**settings, **ours}, keys)


def test_a_node_with_an_empty_disk_is_restored_from_a_bucket(
    image: Image, model: Path, expected: str, bucket: Bucket
) -> None:
    more: dict[str, Any] = {"network": bucket.network, "mounts": {"/keys": bucket.keys}}
    create(image, model, env=bucket.env, **more)
    # Its root is read-only, and nothing of the first one's is mounted into it.
    with served(image, model, env={**bucket.env, **REQUIRED}, **more, **RIGHTS) as container:
        are_clones(answers(container, expected))
        assert not any(Path(f"/proc/{container.pid}/root{STORE}").iterdir())
        ends(container)
    # What somebody else has put there is not run.
    env = {**bucket.env, "COLDFRAME_SNAPSHOT_KEY": "/keys/theirs"}
    with served(image, model, env=env, **more, **RIGHTS) as container:
        told = answers(container, expected)
        assert told["tier"] == "fresh"
        assert "signature" in told["no_clone"]
        ends(container)


# -- with compiled decode steps -------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(demo_model: Callable[..., Path]) -> Iterator[Path]:
    """One that is large enough for its steps to be compiled."""
    with readable(demo_model("llama", "float32", "small")) as place:
        yield place


def test_steps_that_a_compiler_beside_the_image_made_are_used_in_it(
    builder: Builder,
    image: Image,
    mounted: Callable[[str], Image],
    larger: Path,
    tmp_path: Path,
) -> None:
    compiler = mounted(builder.compiler())
    assert shutil.which("g++", path=str(compiler.root / "usr/bin"))
    assert not shutil.which("g++", path=str(image.root / "usr/bin"))
    volume = tmp_path / "volume"
    volume.mkdir()
    # A compiler's own files are larger than a replica's: of headers that it has read, for one.
    work = tmp_path / "work"
    work.mkdir()
    made = create(compiler, larger, writable={STORE: volume, "/tmp": work})
    assert list(work.iterdir()) == []
    steps = str(made["decode_steps"])
    # How much faster they are depends on who else is here; that they were compiled and tried, and
    # what is then done in the image, does not.
    said = re.match(r"(compiled|not fast enough); \d+\.\d\dx \(1 sequence", steps)
    assert said is not None, steps
    expected = greedy(larger, ids_of(larger, PROMPT), COUNT)
    more = {"mounts": {STORE: volume}, "env": REQUIRED}
    with served(image, larger, **more, **RIGHTS) as container:
        told = answers(container, expected)
        are_clones(told)
        stages = told["timeline"]["stages"]
        notes = [stage["note"] for stage in stages if stage["name"] == "graph_restore"]
        assert notes == ([steps] if said[1] == "compiled" else [])
        ends(container)
