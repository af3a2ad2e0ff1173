"""Images and restores that go wrong: the worker starts fresh, answers, and it is said why."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.errors import ReplicaError, SnapshotError
from coldframe.runtime.frozen.freezing import Freezing
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica import tiers
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot import cloner
from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import ask, expected, finish
from tests.runtime.snapshots import (
    PROMPT,
    PROMPT_IDS,
    Commands,
    Made,
    edited,
    eventually,
    flip,
    left_behind,
    objects,
    options,
    program,
    small_disk,
    tier,
)
from tests.support import unavailable

Document = dict[str, Any]
TOKENS = 4


pytestmark = pytest.mark.heavy


def is_fresh(made: Made, found: Document, *words: str) -> None:
    """The right tokens, of workers that started fresh; the reason names those words."""
    assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)
    snapshot = found["snapshot"]
    assert (snapshot["tier"], snapshot["image"]) == ("fresh", None)
    notes = " ".join(stage.get("note") or "" for stage in found["stages"])
    for word in words:
        assert word in snapshot["why"]
        assert word in snapshot["failed"]
        assert word in notes
    assert any(stage["name"] == "imports" for stage in worker_stages(found))


def is_refused(made: Made, runs: Path, *words: str, **snapshot: object) -> None:
    """Where an image is required there is an error instead, with those words: soon found out."""
    with Replica(options(made, runs, "require", snapshot=snapshot)) as replica:
        client = ask(replica, PROMPT, TOKENS)
        finish(replica, client)
        assert isinstance(client.error, SnapshotError)
        assert client.error is replica.error
        for word in words:
            assert word in str(client.error.got)


def worker_stages(found: Document) -> list[Document]:
    return [s for s in found["stages"] if s["process"].startswith(("prefill", "decode"))]


@pytest.fixture
def spoilt(made: Made, tmp_path: Path) -> Made:
    """A copy of the image, to be spoilt."""
    return made.copy(tmp_path / "store")


# -- what is stored is not what it was -----------------------------------------------------------

SMALL, PAGES = 0, 1


@pytest.mark.parametrize("which", [SMALL, PAGES], ids=["small", "pages"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_bytes_are_never_run(
    spoilt: Made, commands: Commands, which: int, damage: str
) -> None:
    path = objects(spoilt)[which]
    size = path.stat().st_size
    if damage == "cut":
        os.truncate(path, size - 1)
    elif damage == "flipped":
        flip(path, size // 2)
    else:
        path.unlink()
    if which == SMALL:
        is_refused(spoilt, commands.runs, path.name)
    else:
        is_fresh(spoilt, commands.run(spoilt), path.name)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: bytes(range(256)), "JSON"),
        (lambda raw: b"", "JSON"),
        (lambda raw: raw.replace(b'"version":1', b'"version":2'), "version"),
        (lambda raw: raw.replace(b'"pid":1000', b'"pid":1001'), "not what its name says"),
    ],
    ids=["garbage", "empty", "another version", "changed"],
)
def test_a_damaged_manifest_is_no_image(
    spoilt: Made, no_leaks: Path, damage: Callable[[bytes], bytes], word: str
) -> None:
    path = spoilt.store / "manifests" / f"{spoilt.image}.json"
    path.write_bytes(damage(path.read_bytes()))
    is_refused(spoilt, no_leaks, spoilt.image, word)


def test_a_manifest_that_was_cut(spoilt: Made, commands: Commands) -> None:
    path = spoilt.store / "manifests" / f"{spoilt.image}.json"
    os.truncate(path, path.stat().st_size // 2)
    is_fresh(spoilt, commands.run(spoilt), spoilt.image, "JSON")


def test_what_anybody_may_write_is_not_run(spoilt: Made, commands: Commands) -> None:
    spoilt.store.chmod(0o777)
    is_fresh(spoilt, commands.run(spoilt), "others could put images there", str(spoilt.store))


# -- it does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["machine"].update(kernel=[99, 1]), ("kernel", "99.1")),
        (lambda m: m["machine"]["cpu_features"].append("avx99"), ("cpu_features", "avx99")),
        (lambda m: m["machine"].update(torch="1.0"), ("torch", "1.0")),
        (lambda m: m["machine"]["libraries"][3].update(size=1), ("library /", "1 bytes")),
        (lambda m: m["model"].update(tokenizer="0" * 64), ("model.tokenizer",)),
    ],
    ids=lambda value: value[0].strip(" /") if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_not_restored(
    spoilt: Made,
    commands: Commands,
    change: Callable[[Document], object],
    words: tuple[str, ...],
) -> None:
    image = edited(spoilt, change)
    is_fresh(image, commands.run(image), image.image[:8], *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["machine"].update(glibc="glibc 9.9"), "glibc: expected glibc 9.9"),
        (lambda m: m["machine"].update(python="2.7"), "python: expected 2.7"),
        (lambda m: m["machine"].update(executable="/python"), "executable: expected /python"),
        (lambda m: m["machine"].update(coldframe="0"), "coldframe: expected 0"),
        (lambda m: m["machine"]["libraries"][3].update(path="/gone.so"), "library /gone.so"),
        (lambda m: m["model"].update(config="0" * 64), "model.config"),
        (lambda m: m["model"].update(generation=None), "model.generation"),
        (lambda m: m["model"].update(tensors="0" * 64), "model.tensors"),
    ],
    ids=lambda value: value.split(":")[0].replace("/", "") if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named_where_an_image_is_required(
    spoilt: Made, no_leaks: Path, change: Callable[[Document], object], words: str
) -> None:
    image = edited(spoilt, change)
    is_refused(image, no_leaks, words, image.image[:8])


def test_the_reason_is_told_in_one_line(spoilt: Made, commands: Commands) -> None:
    asked = ("run", spoilt.model, "-p", "Once", "-n", 2, "--no-snapshot-create")
    clone = commands.call(*asked, "--snapshot", spoilt.store)
    assert "coldframe: " not in clone.stderr
    path = objects(spoilt)[PAGES]
    flip(path, 1000)
    for done in (
        commands.call(*asked, "--snapshot", spoilt.store),
        commands.call(
            *asked, "--snapshot", edited(spoilt, lambda m: m["machine"].update(torch="1.0")).store
        ),
    ):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("coldframe: ")]
        assert "no clone could be used" in line
        assert done.stdout == clone.stdout
    # Where it is required there is no answer instead.
    required = ("--snapshot-store", spoilt.store, "--snapshot", "require")
    done = commands.call(*asked, *required, code=1)
    assert "SnapshotError" in done.stderr
    assert "torch: expected 1.0" in done.stderr
    assert done.stdout == ""


# -- signed --------------------------------------------------------------------------------------


def test_an_image_must_be_signed_where_a_key_is_given(
    spoilt: Made, commands: Commands, tmp_path: Path
) -> None:
    keys = [tmp_path / "key", tmp_path / "other"]
    for key in keys:
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
    is_fresh(spoilt, commands.run(spoilt, "--snapshot-key", keys[0]), "sign", spoilt.image)
    signed = edited(spoilt, lambda m: None, key=keys[0].read_bytes())
    found = commands.run(signed, "--snapshot-key", keys[0])
    assert found["snapshot"]["tier"] == "image"
    is_fresh(signed, commands.run(signed, "--snapshot-key", keys[1]), "sign", signed.image)
    path = signed.store / "manifests" / f"{signed.image}.json"
    path.write_bytes(path.read_bytes().replace(b'"logprobs":[-', b'"logprobs":['))
    is_fresh(signed, commands.run(signed, "--snapshot-key", keys[0]), "sign", signed.image)


# -- CRIU ----------------------------------------------------------------------------------------


def wrapped(criu: Criu, path: Path, what: str, body: str) -> str:
    """A CRIU that does something else when it is to restore or dump."""
    return program(path, f'[ "$1" = {what} ] || exec {criu.path} "$@"\n{body}')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("does not run", "4.1 or later")),
        ('echo "Version: 3.17"', ("3.17", "4.1 or later")),
        ("echo Version: 4.2; [ $1 = --version ] || exit 1", ("exit status 1",)),
        ("echo Version: 4.2; [ $1 = --version ] || kill -9 $$", ("signal 9",)),
        ("echo Version: 4.2", ("a clone died",)),
    ],
    ids=["none", "old", "fails", "is killed", "does nothing"],
)
def test_a_criu_that_does_not_work(
    made: Made, commands: Commands, tmp_path: Path, text: str | None, words: tuple[str, ...]
) -> None:
    path = str(tmp_path / "criu") if text is None else program(tmp_path / "criu", text)
    is_fresh(made, commands.run(made, COLDFRAME_CRIU=path), *words)


@pytest.mark.parametrize("ms", [5, 15, 30])
def test_criu_killed_half_way(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path, ms: int
) -> None:
    kill = f'{criu.path} "$@" &\nsleep 0.{ms:03}; kill -9 $!; wait $!'
    path = wrapped(criu, tmp_path / "criu", "restore", kill)
    found = commands.run(made, COLDFRAME_CRIU=path)
    if found["snapshot"]["tier"] == "fresh":
        is_fresh(made, found, "CRIU cannot restore the image")
    else:  # it was done by then
        assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)


def test_only_one_of_two_clones_can_be_made(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path
) -> None:
    once = f'mkdir {tmp_path}/first 2>/dev/null && exec {criu.path} "$@"; exit 1'
    path = wrapped(criu, tmp_path / "criu", "restore", once)
    found = commands.run(made, COLDFRAME_CRIU=path)
    assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)
    assert found["snapshot"]["tier"] == "image"  # it made the first token
    assert "CRIU cannot restore the image" in found["snapshot"]["why"]
    (imports,) = [stage for stage in worker_stages(found) if stage["name"] == "imports"]
    assert imports["process"] == "decode-2"


def test_a_large_environment_that_nobody_reads(made: Made, commands: Commands) -> None:
    """More than a socket holds, and no clone that would read it."""
    large = {f"LARGE_{n}": "x" * 120_000 for n in range(8)}
    found = commands.run(made, COLDFRAME_CRIU="/nonexistent", **large)
    is_fresh(made, found, "does not run")


@pytest.mark.parametrize("where", ["criu", "hook"])
def test_a_restore_that_hangs_is_given_up(
    made: Made,
    commands: Commands,
    criu: Criu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setattr(tiers, "RESTORE_S", 0.3)
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(commands.runs))
    if where == "criu":
        path = wrapped(criu, tmp_path / "criu", "restore", "sleep 100")
        monkeypatch.setenv("COLDFRAME_CRIU", path)
    else:
        monkeypatch.setenv("WITNESS_SLEEPS", "100")
    with Replica(options(made, commands.runs)) as replica:
        client = ask(replica, PROMPT, TOKENS)
        finish(replica, client, seconds=20)
        assert tier(replica) == "fresh"
        assert "a clone was not there in time" in replica.facts["snapshot"]["why"]
    assert client.tokens == expected(made.model, tuple(PROMPT), TOKENS)


def test_a_hook_that_raises(made: Made, commands: Commands) -> None:
    found = commands.run(made, WITNESS_RAISES="1")
    is_fresh(made, found, "a hook failed after the restore", "witness", "does not like it here")


def test_without_privileges(made: Made, commands: Commands) -> None:
    """Not those that namespaces need, nor a user namespace that would give them."""
    under = ("setpriv", "--bounding-set", "-sys_admin,-checkpoint_restore")
    found = commands.run(made, under=under)
    if found["snapshot"]["tier"] == "fresh":
        is_fresh(made, found, "image")
    else:  # user namespaces are allowed here
        assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)
    nobody = (*under, "unshare", "--user", "--map-root-user", "sh", "-c")
    limits = "for kind in user mnt pid; do echo 0 > /proc/sys/user/max_${kind}_namespaces; done"
    found = commands.run(made, under=(*nobody, f'{limits}; exec "$0" "$@"'))
    is_fresh(made, found, "namespace")


# -- full disks ----------------------------------------------------------------------------------


def on_a_small_disk(path: Path, size: str) -> Any:
    try:
        disk = small_disk(path, size)
        disk.__enter__()
    except subprocess.CalledProcessError as error:
        unavailable(f"a tmpfs cannot be mounted here: {error.stderr}")
    return disk


def test_no_room_for_an_image(made: Made, commands: Commands, tmp_path: Path) -> None:
    store = tmp_path / "small"
    disk = on_a_small_disk(store, "8m")
    try:
        asked = ("snapshot", "create", made.model, "--snapshot-store", store)
        done = commands.call(*asked, code=1)
        assert "coldframe: SnapshotError: " in done.stderr
        assert "No space left on device" in done.stderr
        assert [path for path in store.rglob("*") if path.is_file()] == []
        ran = ("run", made.model, "--prompt-ids", PROMPT_IDS, "-n", TOKENS, "--ignore-eos")
        found = commands.json(*ran, "--snapshot", store)
        assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)
        assert "No space left on device" in found["snapshot"]["not_created"]
        assert [path for path in store.rglob("*") if path.is_file()] == []
    finally:
        disk.__exit__(None, None, None)


def test_no_room_for_a_dump(made: Made, commands: Commands, criu: Criu, tmp_path: Path) -> None:
    # Over the folder that CRIU writes to; `--images-dir` is its sixth argument.
    full = f'mount -t tmpfs -o size=8m none "$6" && exec {criu.path} "$@"'
    path = wrapped(criu, tmp_path / "criu", "dump", full)
    asked = ("snapshot", "create", made.model, "--snapshot-store", tmp_path / "store")
    done = commands.call(*asked, COLDFRAME_CRIU=path, code=1)
    assert "coldframe: SnapshotError: CRIU cannot write the image" in done.stderr
    assert not list((tmp_path / "store").rglob("*.json"))


def test_a_run_directory_that_is_small(made: Made, commands: Commands, tmp_path: Path) -> None:
    runs = tmp_path / "r"
    disk = on_a_small_disk(runs, "64k")
    try:
        found = commands.run(made, COLDFRAME_RUN_DIR=str(runs))
        assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)
        assert list(runs.iterdir()) == []
        eventually(lambda: not left_behind(runs))
    finally:
        disk.__exit__(None, None, None)


# -- those who make images -----------------------------------------------------------------------


def test_two_creators_at_once(made: Made, commands: Commands, tmp_path: Path) -> None:
    asked = ("snapshot", "create", made.model, "--snapshot-store", tmp_path / "store", "--json")
    creators = [commands.start(*asked) for _ in range(2)]
    told = [creator.communicate(timeout=60) for creator in creators]
    assert [creator.returncode for creator in creators] == [0, 0], told
    images = {json.loads(out)["image"] for out, _ in told}
    listed = commands.json("snapshot", "list", "--snapshot-store", tmp_path / "store")
    assert {row["image"] for row in listed["images"]} == images
    assert all(row["fits"] for row in listed["images"])
    found = commands.run(made._replace(store=tmp_path / "store"))
    assert found["snapshot"]["image"] in images


def test_a_creator_that_is_killed(made: Made, commands: Commands, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "store")
    source = random.Random(4)
    for _ in range(3):
        creator = commands.start("snapshot", "create", made.model, "--snapshot-store", copy.store)
        time.sleep(source.uniform(0.2, 1.8))
        creator.kill()
        creator.communicate()
        eventually(lambda: not left_behind(commands.runs), seconds=10)
        listed = commands.json("snapshot", "list", "--snapshot-store", copy.store)
        assert copy.image in {row["image"] for row in listed["images"]}
        assert commands.run(copy)["snapshot"]["tier"] == "image"


def test_the_memory_service_dies_while_an_image_is_tried(
    made: Made, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(commands.runs))
    size = sum(file.stat().st_size for file in made.model.glob("*.safetensors"))
    slow = ReplicaOptions(
        str(made.model), prefill=0, decode=0, run_dir=str(commands.runs), throttle=size / 10
    )
    with Replica(slow) as replica:
        freezing = Freezing(replica, SnapshotOptions("off", str(tmp_path / "store")))
        replica.run_until(lambda: len(replica.pids) > 1)
        os.kill(replica.pids["memory"], signal.SIGKILL)
        try:
            freezing.follow()
            told = freezing.error  # a clone has noticed it first
        except ReplicaError as error:
            told = error
        assert told is not None
        assert "memory service" in str(told)
        assert freezing.done
        assert freezing.image is None
    assert not list((tmp_path / "store").rglob("*.json"))


# -- other processes -----------------------------------------------------------------------------


def test_the_memory_service_dies_while_clones_are_restored(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(commands.runs))
    path = wrapped(criu, tmp_path / "criu", "restore", f'sleep 1; exec {criu.path} "$@"')
    monkeypatch.setenv("COLDFRAME_CRIU", path)
    with Replica(options(made, commands.runs)) as replica:
        client = ask(replica, PROMPT, TOKENS)
        os.kill(replica.pids["memory"], signal.SIGKILL)
        finish(replica, client)
        why = "the memory service died while workers were restored: killed by SIGKILL"
        assert replica.facts["restarted"] == why
        found = {"tier": "fresh", "image": None, "why": why, "failed": why}
        assert replica.facts["snapshot"] == found
        assert why in {span.note for span in replica.recorder.drain()}
    assert client.tokens == expected(made.model, tuple(PROMPT), TOKENS)


def test_the_memory_service_dies_later(made: Made, no_leaks: Path) -> None:
    with Replica(options(made, no_leaks)) as replica:
        client = ask(replica, PROMPT, 500)
        replica.run_until(lambda: len(client.events) > 2)
        os.kill(replica.pids["memory"], signal.SIGKILL)
        finish(replica, client)
        assert isinstance(client.error, ReplicaError)
        assert client.error.what == "the memory service died"
        assert client.error is replica.error


@pytest.mark.parametrize("early", [True, False])
def test_the_process_that_restores_dies(
    made: Made, commands: Commands, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(commands.runs))
    with Replica(options(made, commands.runs)) as replica:
        client = ask(replica, PROMPT, 400)
        if not early:
            replica.run_until(lambda: len(client.events) > 2)
        children = psutil.Process().children()
        (restorer,) = [c for c in children if "snapshot.restorer" in " ".join(c.cmdline())]
        restorer.kill()
        finish(replica, client)
        replica.run_until(lambda: tier(replica) == "fresh")
        assert "the process that makes clones is gone" in replica.facts["snapshot"]["why"]
    assert client.tokens == expected(made.model, tuple(PROMPT), 400)


def test_a_restorer_that_is_deaf_holds_up_no_end(
    made: Made, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it reads an image over a slow network."""
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(commands.runs))
    monkeypatch.setenv("COLDFRAME_CRIU", program(tmp_path / "criu", "exec sleep 1"))
    replica = Replica(options(made, commands.runs))
    children = psutil.Process().children()
    (restorer,) = [c for c in children if "snapshot.restorer" in " ".join(c.cmdline())]
    restorer.suspend()
    client = ask(replica, PROMPT, TOKENS)
    replica.poll(0.05)
    # None of its clones can be asked to end, nor need be: there is none.
    with monkeypatch.context() as patch:
        patch.setattr(cloner, "_END_S", 1000.0)
        replica.close()
    assert client.events == []


def test_the_replica_fails_while_clones_are_asked(made: Made, no_leaks: Path) -> None:
    """What was held for their answer fails with it, once, and nothing is started any more."""
    size = sum(file.stat().st_size for file in made.model.glob("*.safetensors"))
    held = options(made, no_leaks, throttle=size / 5, snapshot={"verify": True})
    with Replica(held) as replica:
        client = ask(replica, PROMPT, TOKENS)
        replica.run_until(lambda: "snapshot" in replica.facts)
        os.kill(replica.pids["memory"], signal.SIGKILL)
        finish(replica, client)
        assert isinstance(client.error, ReplicaError)
        # A worker may have said first that the service is gone, and have been replaced by then.
        then = set(replica.pids)
        for _ in range(20):
            replica.poll(0.02)
        assert set(replica.pids) <= then


def test_nothing_is_left_of_a_start_that_is_killed(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path
) -> None:
    path = wrapped(criu, tmp_path / "criu", "restore", f'sleep 0.1; exec {criu.path} "$@"')
    asked = ("run", made.model, "--prompt-ids", PROMPT_IDS, "-n", 1000, "--ignore-eos")
    for seconds in (0.1, 0.25, 0.45):
        front = commands.start(*asked, "--snapshot", made.store, COLDFRAME_CRIU=path)
        time.sleep(seconds)
        front.kill()
        front.communicate()
        eventually(lambda: not left_behind(commands.runs), seconds=10)
    # A run directory that nobody was left to remove goes with the next start.
    commands.run(made)
    assert list(commands.runs.iterdir()) == []


# -- clones that are there and wrong -------------------------------------------------------------


def worse(oracle: Document) -> None:
    oracle["logprobs"][3] -= 1.0


def other(oracle: Document) -> None:
    oracle["token_ids"][0] = (oracle["token_ids"][0] + 1) % 500


def shorter(oracle: Document) -> None:
    oracle["token_ids"].pop()
    oracle["logprobs"].pop()


def longer(oracle: Document) -> None:
    oracle["logprobs"].append(-1.0)
    oracle["token_ids"].append(3)


def impossible(oracle: Document) -> None:
    oracle["prompt_ids"][0] = 1 << 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (worse, ("log-probability 3",)),
        (other, ("token 0",)),
        (shorter, ("length",)),
        (longer, ("length",)),
        (impossible, ()),
        (None, ("does not say what its clones must answer",)),
    ],
    ids=lambda value: getattr(value, "__name__", "none") if not isinstance(value, tuple) else "",
)
def test_clones_that_answer_otherwise_serve_nobody(
    spoilt: Made,
    commands: Commands,
    change: Callable[[Document], object] | None,
    words: tuple[str, ...],
) -> None:
    def edit(manifest: Document) -> None:
        if change is None:
            manifest["oracle"] = None
        else:
            change(manifest["oracle"])

    wrong = edited(spoilt, edit)
    assert wrong.image == spoilt.image  # the oracle does not make another image of it
    if change in (worse, None):
        is_fresh(wrong, commands.run(wrong, "--verify-on-restore"), *words)
    else:
        is_refused(wrong, commands.runs, *words, verify=True)


# -- clocks --------------------------------------------------------------------------------------

MONTH_S = 30 * 86_400


def shifted(seconds: int) -> tuple[str, ...]:
    """A command that has another clock than this machine, as after a boot."""
    command = ("unshare", "--time", "--fork", "--kill-child", "--monotonic", str(seconds))
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        unavailable(f"no time namespaces here: {tried.stderr.strip()}")
    return command


def is_within_the_run(found: Document) -> None:
    end = max(stage["end_s"] for stage in found["stages"] if stage["name"] == "last_token")
    for stage in found["stages"]:
        assert -0.05 <= stage["start_s"] <= stage["end_s"] <= end + 1, stage
    names = [step["name"] for step in found["critical_path"]]
    assert "snapshot_read" in names
    assert found["unattributed_s"] < found["ttft_s"] / 2


def test_an_image_of_a_clock_that_was_ahead_or_behind(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    ahead = made._replace(store=tmp_path / "ahead")
    asked = ("snapshot", "create", made.model, "--snapshot-store", ahead.store)
    commands.call(*asked, under=shifted(MONTH_S))
    # From a clock that was a month ahead, to one that is, and from one to the other.
    for image, under in ((ahead, ()), (made, shifted(MONTH_S)), (ahead, shifted(2 * MONTH_S))):
        found = commands.run(image, under=under)
        assert found["snapshot"]["tier"] == "image"
        assert found["token_ids"] == expected(made.model, tuple(PROMPT), TOKENS)
        is_within_the_run(found)
