"""Workers that come back from an image: the same answers, sooner, whatever else is asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.criu import Criu
from tests.loader.web.servers import nginx
from tests.runtime.helpers import ask, expected, finish, prompt_of
from tests.runtime.snapshots import (
    PROMPT,
    PROMPT_IDS,
    Commands,
    Made,
    edited,
    eventually,
    options,
    pid,
    program,
    tier,
)

PATH = {"snapshot_check", "snapshot_read", "snapshot_restore"}


def spans(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [stage for stage in document["stages"] if stage["name"] == name]


# -- the answers ---------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "Once upon a time, a replica slept at zero", "-n", 24),
        ("-p", "Once upon", "-n", 24, "--temperature", 1.5, "--seed", 7, "--top-p", 0.9),
        ("--prompt-ids", PROMPT_IDS, "-n", 8, "--logprobs", 2, "--layout", "aligned"),
        ("--prompt-ids", PROMPT_IDS, "-n", 8, "--threads", 1, "--copy"),
    ],
    ids=["text", "sampled", "aligned", "copied"],
)
def test_a_clone_answers_as_a_fresh_worker(
    made: Made, commands: Commands, arguments: tuple[object, ...]
) -> None:
    asked = ("run", made.model, "--no-snapshot-create", *arguments)
    fresh = commands.json(*asked, "--snapshot", "off")
    clone = commands.json(*asked, "--snapshot", made.store)
    assert fresh["snapshot"]["tier"] == "fresh"
    assert fresh["snapshot"]["why"] == "snapshots are off"
    assert clone["snapshot"] == {"tier": "image", "image": made.image, "why": None, "failed": None}
    for name in ("token_ids", "text", "finish_reason"):
        assert clone[name] == fresh[name]
    # One process's kernels may sum in another order than another's.
    assert [t["token"] for t in clone.get("logprobs", ())] == [
        t["token"] for t in fresh.get("logprobs", ())
    ]


def test_the_answers_are_those_of_transformers(
    made: Made, commands: Commands, in_memory: Callable[[Path], Path]
) -> None:
    answer = expected(in_memory(made.model), tuple(PROMPT), 24)
    mapped = commands.run(made, "-n", 24)
    assert (mapped["token_ids"], mapped["load_mode"]) == (answer, "mapped")
    size = sum(file.stat().st_size for file in made.model.glob("*.safetensors"))
    slow = commands.run(made, "-n", 24, "--throttle", f"{size // 4}B/s")
    assert (slow["token_ids"], slow["load_mode"]) == (answer, "copied")
    one = commands.run(made, "-n", 1, "--no-snapshot-hash")
    assert (one["token_ids"], one["snapshot"]["tier"]) == (answer[:1], "image")
    # A clone is there long before weights that take four seconds.
    ready = max(stage["end_s"] for stage in slow["stages"] if stage["name"].startswith("stage_rea"))
    (restored,) = [s for s in spans(slow, "snapshot_restore") if s["process"] == "prefill-0"]
    assert restored["end_s"] < ready < slow["ttft_s"]


def test_the_timeline_says_what_a_restore_was(made: Made, commands: Commands) -> None:
    found = commands.run(made)
    (check,) = spans(found, "snapshot_check")
    (read,) = spans(found, "snapshot_read")
    assert made.image in check["note"]
    assert (check["process"], read["process"]) == ("snapshot", "snapshot")
    prefill, decode = sorted(spans(found, "snapshot_restore"), key=lambda s: s["start_s"])
    assert (prefill["process"], decode["process"]) == ("prefill-0", "decode-1")
    assert [span["process"] for span in spans(found, "hooks")] == ["prefill-0", "decode-1"]
    assert prefill["start_s"] <= check["end_s"] <= read["start_s"] <= prefill["end_s"]
    # What a restore waits for is what the first token waits for.
    path = found["critical_path"]
    names = [(step["name"], step["process"]) for step in path]
    assert ("snapshot_check", "snapshot") in names
    assert ("snapshot_read", "snapshot") in names
    read_at = names.index(("snapshot_read", "snapshot"))
    assert ("snapshot_restore", "prefill-0") in names[read_at:]  # CRIU's part of it
    for before, after in pairwise(path):
        assert before["end_s"] == after["start_s"]


@pytest.mark.heavy
def test_the_table_names_the_tier_too(made: Made, commands: Commands) -> None:
    asked = ("run", made.model, "-p", "Once", "-n", 2, "--no-snapshot-create")
    done = commands.call(*asked, "--snapshot", made.store)
    for name in PATH:
        assert name in done.stderr
    quiet = commands.call(*asked, "--snapshot", made.store, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


# -- which images --------------------------------------------------------------------------------


@pytest.mark.heavy
def test_where_images_are_taken_from(made: Made, commands: Commands, tmp_path: Path) -> None:
    off = commands.run(made, "--snapshot", "off", "--snapshot-store", made.store)
    assert (off["snapshot"]["tier"], off["snapshot"]["image"]) == ("fresh", None)
    named = commands.run(made, "--snapshot", "require", "--snapshot-store", made.store)
    given = commands.run(made, "--snapshot", "auto", COLDFRAME_SNAPSHOT_STORE=str(made.store))
    for found in (named, given):
        assert found["snapshot"]["image"] == made.image
        assert found["token_ids"] == off["token_ids"]
    shutil.copytree(made.store, tmp_path / "cache" / "coldframe" / "snapshots")
    default = commands.run(made, "--snapshot", "auto")  # the user's own store
    assert default["snapshot"]["image"] == made.image


def test_what_is_required_and_not_there_is_an_error(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    asked = ("run", made.model, "-p", "Once", "-n", 2, "--snapshot", "require")
    done = commands.call(*asked, "--snapshot-store", tmp_path / "none", "--json", code=1)
    error = json.loads(done.stdout)
    assert error["error"] == "SnapshotError"
    assert f"no image in {tmp_path / 'none'}" in error["got"]
    assert "coldframe snapshot create" in done.stderr


def test_an_unknown_way_to_start_is_refused(made: Made, commands: Commands) -> None:
    done = commands.call("run", made.model, "-p", "Once", "--snapshot", "maybe", code=1)
    assert "--snapshot" in done.stderr
    assert "maybe" in done.stderr


@pytest.mark.heavy
def test_an_image_for_the_next_start(made: Made, commands: Commands, tmp_path: Path) -> None:
    store = tmp_path / "store"
    asked = ("run", made.model, "--prompt-ids", PROMPT_IDS, "-n", 4, "--snapshot", store)
    none = commands.json(*asked, "--no-snapshot-create")
    assert "created" not in none["snapshot"]
    assert not store.exists()
    first = commands.json(*asked)
    assert first["snapshot"]["tier"] == "fresh"
    assert first["snapshot"]["why"] == f"no image in {store}"
    image = first["snapshot"]["created"]
    (manifest,) = (store / "manifests").iterdir()
    assert manifest.stem == image
    second = commands.json(*asked)
    assert second["snapshot"] == {"tier": "image", "image": image, "why": None, "failed": None}
    assert second["token_ids"] == first["token_ids"] == none["token_ids"]
    assert list((store / "manifests").iterdir()) == [manifest]


@pytest.mark.heavy
def test_a_new_version_makes_a_new_image(made: Made, commands: Commands, tmp_path: Path) -> None:
    old = edited(
        made.copy(tmp_path / "store"), lambda m: m["machine"].update(coldframe="0.0.9 0123456789")
    )
    asked = ("run", made.model, "--prompt-ids", PROMPT_IDS, "-n", 4, "--snapshot", old.store)
    first = commands.call(*asked)
    assert "coldframe: expected 0.0.9 0123456789" in first.stderr
    (image,) = {path.stem for path in (old.store / "manifests").iterdir()} - {old.image}
    assert f"for the next start a worker was frozen: image {image}" in first.stderr
    second = commands.json(*asked)
    assert second["snapshot"]["image"] == image
    # The old one stays until a limit says otherwise.
    listed = commands.json("snapshot", "list", "--snapshot-store", old.store)["images"]
    assert {row["image"]: row["fits"] for row in listed} == {image: True, old.image: False}


@pytest.mark.heavy
def test_a_model_from_the_network_is_known_by_its_name(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        served = Path(shutil.copytree(made.model, tmp_path / "www" / "m"))
        url = f"{stack.enter_context(nginx(tmp_path / 'www'))}/m"
        store = tmp_path / "store"
        asked = ("run", url, "--prompt-ids", PROMPT_IDS, "-n", 4, "--ignore-eos")
        first = commands.json(*asked, "--snapshot", store)
        image = first["snapshot"]["created"]
        second = commands.json(*asked, "--snapshot", store)
        assert second["snapshot"]["image"] == image
        assert second["token_ids"] == first["token_ids"] == expected(made.model, tuple(PROMPT), 4)
        # What is there under that name by now is another model, which is seen when it has come.
        tokenizer = json.loads((served / "tokenizer.json").read_text())
        tokenizer["model"]["dropout"] = None
        (served / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
        third = commands.json(*asked, "--snapshot", store, "--no-snapshot-create")
        assert third["snapshot"]["tier"] == "fresh"
        assert "model.tokenizer" in third["snapshot"]["why"]
        assert third["token_ids"] == first["token_ids"]


# -- clones --------------------------------------------------------------------------------------


def test_as_many_clones_as_there_are_workers(made: Made, no_leaks: Path) -> None:
    prompts = [prompt_of(20 + n, seed=n) for n in range(6)]
    with Replica(options(made, no_leaks, "require", prefill=2, decode=2)) as replica:
        clients = [ask(replica, prompt, 8) for prompt in prompts]
        finish(replica, *clients)
        replica.run_until(lambda: len(replica.pids) == 5 and all(replica.pids.values()))
        assert sorted(name.split("-")[0] for name in replica.pids) == [
            *("decode", "decode", "memory", "prefill", "prefill")
        ]
        clones = set(replica.pids) - {"memory"}
        replica.run_until(lambda: {s.process for s in replica.spans if s.name == "hooks"} == clones)
        assert not any(span.name == "imports" for span in replica.spans if "-" in span.process)
    for client, prompt in zip(clients, prompts, strict=True):
        assert client.tokens == expected(made.model, tuple(prompt), 8)


@pytest.mark.parametrize("role", [pytest.param("prefill", marks=pytest.mark.heavy), "decode"])
def test_a_clone_that_is_killed_is_replaced_by_another(
    made: Made, no_leaks: Path, role: str
) -> None:
    size = sum(file.stat().st_size for file in made.model.glob("*.safetensors"))
    # Slow enough to be killed while it prefills; there is decode's own moment behind that.
    rate = size / 1.5 if role == "prefill" else None
    with Replica(options(made, no_leaks, "require", throttle=rate)) as replica:
        client = ask(replica, PROMPT, 200)
        if role == "prefill":
            replica.run_until(lambda: "snapshot" in replica.facts)
        else:
            replica.run_until(lambda: len(client.events) > 20)
        victim = pid(replica, role)
        inside = psutil.Process(victim)
        assert "runtime.frozen.worker" in " ".join(inside.cmdline())
        os.kill(victim, signal.SIGKILL)
        replica.run_until(lambda: pid(replica, role) not in (0, victim))
        finish(replica, client)
        assert tier(replica) == "image"
        assert replica.facts["snapshot"]["why"] is None
        successor = psutil.Process(pid(replica, role))
        assert "runtime.frozen.worker" in " ".join(successor.cmdline())
    assert client.tokens == expected(made.model, tuple(PROMPT), 200)


def test_a_clone_has_the_environment_of_its_own_start(
    made: Made, commands: Commands, tmp_path: Path
) -> None:
    commands.run(made, WITNESS=str(tmp_path / "seen"), ONLY_OF="this start", OMP_SCHEDULE="x")
    eventually(lambda: len(list(tmp_path.glob("seen-*"))) == 2)
    for path in tmp_path.glob("seen-*"):
        seen = dict(line.partition("=")[::2] for line in path.read_text().splitlines())
        assert (seen["ONLY_OF"], seen["OMP_SCHEDULE"]) == ("this start", "x")
        assert seen["COLDFRAME_RUN_DIR"] == str(commands.runs)
        assert "ONLY_THE_CREATORS" not in seen


@pytest.mark.heavy
def test_a_large_environment_is_no_obstacle(made: Made, commands: Commands) -> None:
    """More than a socket holds before anybody reads from it."""
    large = {f"LARGE_{n}": "x" * 120_000 for n in range(8)}
    found = commands.run(made, **large)
    assert found["snapshot"]["tier"] == "image"
    assert found["token_ids"] == expected(made.model, tuple(PROMPT), 4)


# -- answers first, if so wanted -----------------------------------------------------------------


@pytest.mark.heavy
def test_clones_answer_their_images_prompt_before_any_other(
    made: Made, commands: Commands, demo_model: Callable[..., Path]
) -> None:
    found = commands.run(made, "--verify-on-restore")
    assert found["snapshot"] == {"tier": "image", "image": made.image, "why": None, "failed": None}
    assert found["token_ids"] == expected(made.model, tuple(PROMPT), 4)
    heads = spans(found, "prefill[head]")
    assert len(heads) == 2  # the image's own prompt, then this one


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_answer_is_out_when_the_making_of_an_image_is_cut_short(
    made: Made, commands: Commands, criu: Criu, tmp_path: Path, number: int
) -> None:
    begun = tmp_path / "begun"
    stuck = program(
        tmp_path / "criu", f'[ "$1" = dump ] || exec {criu.path} "$@"\ntouch {begun}\nsleep 100'
    )
    asked = ("run", made.model, "--prompt-ids", PROMPT_IDS, "-n", 4, "--ignore-eos", "--json")
    with commands.start(*asked, "--snapshot", tmp_path / "store", COLDFRAME_CRIU=stuck) as process:
        eventually(begun.exists)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
    assert json.loads(out)["token_ids"] == expected(made.model, tuple(PROMPT), 4)
