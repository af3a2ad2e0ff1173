"""`coldframe snapshot`: what it makes, tries, lists and removes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from coldframe.runtime.frozen import freezing
from coldframe.runtime.frozen.freezing import Freezing
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import expected
from tests.runtime.snapshots import (
    PROMPT,
    Commands,
    Made,
    edited,
    flip,
    manifest_of,
    objects,
    program,
)

pytestmark = pytest.mark.heavy


def key_file(path: Path) -> Path:
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    return path


# -- create --------------------------------------------------------------------------------------


def test_what_is_made(made: Made, commands: Commands) -> None:
    manifest = manifest_of(made)
    oracle = manifest["oracle"]
    assert manifest["name"] == str(made.model)
    assert oracle["token_ids"] == expected(
        made.model, tuple(oracle["prompt_ids"]), len(oracle["token_ids"])
    )
    # No weights, no KV: those are memory of other processes.
    assert sum(file["size"] for file in manifest["files"]) < 170 << 20
    for path in (made.store, *made.store.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    listed = commands.json("snapshot", "list", "--snapshot-store", made.store)
    assert [row["image"] for row in listed["images"]] == [made.image]


def test_the_secrets_of_who_makes_an_image_are_not_in_it(made: Made, tmp_path: Path) -> None:
    from coldframe.snapshot.store import open_store

    store = open_store(str(made.store))
    (manifest,), _ = store.manifests()
    into = tmp_path / "image"
    into.mkdir()
    store.fetch(manifest, into)
    found = [path.name for path in into.iterdir() if b"secret-of-the-creator" in path.read_bytes()]
    assert found == []
    # What it is looked for in is what the image holds.
    assert any(b"coldframe" in path.read_bytes() for path in into.glob("pages-*.img"))


def test_an_image_is_found_under_any_name_of_its_model(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    """It is of a model's shape, and works with all weights of that."""
    other = Path(shutil.copytree(made.model, tmp_path / "other"))
    for file in other.glob("*.safetensors"):
        tensors = {name: tensor.flip(0) for name, tensor in load_file(file).items()}
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    found = commands.run(made._replace(model=other))
    assert found["snapshot"]["image"] == made.image
    assert found["token_ids"] == expected(other, tuple(PROMPT), 4)
    assert found["token_ids"] != expected(made.model, tuple(PROMPT), 4)


def test_a_creator_that_hangs_is_given_up(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "FREEZE_S", 1.2)
    path = program(tmp_path / "criu", f'[ "$1" = dump ] || exec {criu.path} "$@"\nsleep 100')
    monkeypatch.setenv("COLDFRAME_CRIU", path)
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(commands.runs))
    options = ReplicaOptions(str(made.model), prefill=0, decode=0, run_dir=str(commands.runs))
    with Replica(options) as replica:
        freezing_it = Freezing(replica, SnapshotOptions("off", str(tmp_path / "store")))
        freezing_it.follow()
        assert freezing_it.image is None
        assert "no image was made in time" in str(freezing_it.error)
    assert not list((tmp_path / "store").rglob("*.json"))


def test_an_image_that_does_not_come_back_is_not_published(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path
) -> None:
    path = program(tmp_path / "criu", f'[ "$1" = restore ] || exec {criu.path} "$@"\nexit 3')
    asked = ("snapshot", "create", made.model, "--snapshot-store", tmp_path / "store")
    done = commands.call(*asked, COLDFRAME_CRIU=path, code=1)
    assert "coldframe: SnapshotError: CRIU cannot restore the image" in done.stderr
    assert "exit status 3" in done.stderr
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_without_criu_it_says_what_to_do(made: Made, commands: Commands, tmp_path: Path) -> None:
    asked = ("snapshot", "create", made.model, "--snapshot-store", tmp_path / "store")
    done = commands.call(*asked, COLDFRAME_CRIU="/nonexistent", code=1)
    assert "there is no CRIU to use" in done.stderr
    assert "make criu" in done.stderr
    # That is no reason to say anything when nobody has asked for an image.
    ran = ("run", made.model, "-p", "Once", "-n", 2, "--quiet", "--snapshot", tmp_path / "store")
    done = commands.call(*ran, COLDFRAME_CRIU="/nonexistent")
    assert done.stderr == ""


# -- signed --------------------------------------------------------------------------------------


def test_signed_images_from_end_to_end(made: Made, commands: Commands, tmp_path: Path) -> None:
    key, other = key_file(tmp_path / "key"), key_file(tmp_path / "other")
    old = edited(made.copy(tmp_path / "store"), lambda m: m["machine"].update(torch="1.0"))
    month_ago = time.time() - 31 * 86_400
    os.utime(old.store / "manifests" / f"{old.image}.json", (month_ago, month_ago))
    store = ("--snapshot-store", old.store)
    signed = commands.json("snapshot", "create", made.model, *store, "--snapshot-key", key)
    assert signed["removed"] == [old.image]  # nobody has used it for longer than images are kept
    assert signed["model"] == str(made.model)
    assert signed["bytes"] > 1 << 20
    (row,) = commands.json("snapshot", "list", *store, "--snapshot-key", key)["images"]
    assert (row["image"], row["signed"], row["fits"]) == (signed["image"], True, True)
    commands.call("snapshot", "verify", made.model, *store, "--snapshot-key", key)
    mine = made._replace(store=old.store)
    assert len(objects(mine)) == len(manifest_of(mine)["objects"])
    found = commands.run(mine, "--snapshot-key", key, "--verify-on-restore")
    assert found["snapshot"]["image"] == signed["image"]
    assert found["token_ids"] == expected(made.model, tuple(PROMPT), 4)
    listed = commands.json("snapshot", "list", *store, "--snapshot-key", other)
    assert listed["images"] == []
    ((unusable),) = listed["unusable"]
    assert unusable["image"] == signed["image"]
    assert "sign" in unusable["why"]
    # A key that others can read is no key, and nothing stands in for it.
    key.chmod(0o644)
    commands.call("snapshot", "list", *store, "--snapshot-key", key, code=1)


# -- verify --------------------------------------------------------------------------------------


def other_machine(manifest: dict[str, Any]) -> None:
    manifest["machine"]["cpu_features"].append("avx99")


def other_model(manifest: dict[str, Any]) -> None:
    manifest["model"]["tokenizer"] = "0" * 64


def other_answer(manifest: dict[str, Any]) -> None:
    manifest["oracle"]["token_ids"][5] += 1


def no_answer(manifest: dict[str, Any]) -> None:
    manifest["oracle"] = None


def test_an_image_that_answers_as_it_must_verifies(made: Made, commands: Commands) -> None:
    asked = ("snapshot", "verify", made.model, "--snapshot-store", made.store)
    found = commands.json(*asked)
    assert found == {"images": [{"image": made.image, "ok": True, "error": None}]}
    done = commands.call(*asked, "--image", made.image[:6])
    assert done.stdout == f"{made.image}  ok\n"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (other_answer, "token 5"),
        (no_answer, "image"),
        (other_machine, "cpu_features"),
        (other_model, "model.tokenizer"),
    ],
)
def test_an_image_that_is_not_to_be_trusted_does_not(
    made: Made,
    commands: Commands,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    where: str,
) -> None:
    wrong = edited(made.copy(tmp_path / "store"), change)
    asked = ("snapshot", "verify", made.model, "--snapshot-store", wrong.store)
    found = commands.json(*asked, code=1)
    (result,) = found["images"]
    assert (result["image"], result["ok"]) == (wrong.image, False)
    assert where in result["error"]["where"]
    done = commands.call(*asked, code=1)
    assert done.stdout.startswith(f"{wrong.image}  ")
    assert done.stderr == ""


def test_one_that_cannot_be_restored_and_one_that_can(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    copy = made.copy(tmp_path / "store")
    document = manifest_of(copy)
    path = copy.store / "manifests" / f"{copy.image}.json"
    second = edited(copy, lambda m: m.update(name="another"))
    path.write_text(json.dumps(document))  # beside it again: both are of this model
    path.chmod(0o600)
    flip(objects(copy)[1], 5000)
    found = commands.json("snapshot", "verify", made.model, "--snapshot-store", copy.store, code=1)
    assert {result["image"] for result in found["images"]} == {made.image, second.image}
    for result in found["images"]:
        assert not result["ok"]
        assert objects(copy)[1].name in str(result["error"])


def test_no_image_is_no_success(made: Made, commands: Commands, tmp_path: Path) -> None:
    asked = ("snapshot", "verify", made.model, "--snapshot-store", tmp_path)
    assert "there is no image to verify" in commands.call(*asked, code=1).stderr


# -- list and remove -----------------------------------------------------------------------------


def test_what_is_there_is_listed(made: Made, commands: Commands, tmp_path: Path) -> None:
    store = ("--snapshot-store", made.store)
    done = commands.call("snapshot", "list", *store)
    (line,) = done.stdout.splitlines()
    assert line.startswith(made.image)
    assert line.endswith(f"{made.model}  eager  fits this machine")
    assert commands.call("snapshot", "list", made.model, *store).stdout == done.stdout
    assert commands.call("snapshot", "list", tmp_path, *store).stdout == ""
    empty = commands.call("snapshot", "list", "--snapshot-store", tmp_path / "none")
    assert (empty.stdout, empty.stderr) == ("", f"no images in {tmp_path / 'none'}\n")
    assert not (tmp_path / "none").exists()
    wrong = edited(made.copy(tmp_path / "store"), other_machine)
    bad = wrong.store / "manifests" / f"{'0' * 32}.json"
    bad.write_text("{")
    done = commands.call("snapshot", "list", "--snapshot-store", wrong.store)
    assert "does not fit: cpu_features: expected avx99" in done.stdout
    assert f"image {'0' * 32} cannot be used" in done.stderr


def test_removed_by_model_and_by_image(made: Made, commands: Commands, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    copy = made.copy(tmp_path / "store")
    first = edited(copy, lambda m: m.update(name=str(model)))
    document = manifest_of(first)
    path = first.store / "manifests" / f"{first.image}.json"
    second = edited(first, lambda m: m["machine"].update(torch="1.0"))
    path.write_text(json.dumps(document))
    path.chmod(0o600)
    store = ("--snapshot-store", copy.store)
    done = commands.json("snapshot", "remove", "--image", second.image[:8], *store)
    assert done == {"removed": [second.image]}
    assert objects(copy)  # the other needs them
    assert commands.run(made._replace(store=copy.store))["snapshot"]["image"] == first.image
    shutil.rmtree(model)  # an image outlives its model, and goes by its name
    done = commands.call("snapshot", "remove", model, *store)
    assert done.stdout == f"removed {first.image} from {copy.store}\n"
    assert objects(copy) == []
    done = commands.call("snapshot", "remove", model, *store)
    assert done.stdout == f"removed nothing from {copy.store}\n"


def test_an_image_that_cannot_be_used_can_be_removed(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    copy = made.copy(tmp_path / "store")
    (copy.store / "manifests" / f"{made.image}.json").write_text("{")
    store = ("--snapshot-store", copy.store)
    assert commands.json("snapshot", "list", *store)["unusable"][0]["image"] == made.image
    done = commands.json("snapshot", "remove", "--image", made.image, *store)
    assert done == {"removed": [made.image]}
    assert [path for path in copy.store.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("remove",), "not said what is to be removed"),
        (("create",), "needs a model"),
        (("verify",), "needs a model"),
        (("remove", "--image", "0123"), "there is no such image"),
        (("list", "--image", "0123"), "there is no such image"),
        (("remove", "--image", ""), "there are several such images"),
        (("create", "m", "--threads", "0"), "there must be a thread"),
        (("list", "--snapshot-key", "/nonexistent"), "/nonexistent"),
        (("list", "--snapshot-store", "ftp://x"), "there can be no store of images there"),
    ],
)
def test_what_cannot_be_done_is_said(
    made: Made, commands: Commands, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    copy = made.copy(tmp_path / "store")
    document = manifest_of(copy)
    edited(copy, lambda m: m.update(name="another"))
    path = copy.store / "manifests" / f"{made.image}.json"
    path.write_text(json.dumps(document))
    done = commands.call("snapshot", *arguments, COLDFRAME_SNAPSHOT_STORE=str(copy.store), code=1)
    assert told in done.stderr
    assert done.stdout == ""
    assert len(list((copy.store / "manifests").iterdir())) == 2
