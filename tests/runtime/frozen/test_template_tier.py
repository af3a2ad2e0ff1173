"""Replicas whose workers are clones, of an image and of a resident template alike."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.engine.saturation import SIZES
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.snapshots import command, place, resident
from tests.snapshot.tiny import gone, until
from tests.support import unavailable

PROMPT = prompt_of(40)


@dataclasses.dataclass(frozen=True)
class Tier:
    """Where clones come from.

    Args:
        name: `image` or `template`.
        model: The model.
        store: Where images are.
        runs: Where run directories are, and templates' sockets.
    """

    name: str
    model: Path
    store: str
    runs: str

    def options(self, mode: str = "require", **more: object) -> ReplicaOptions:
        snapshot = SnapshotOptions(mode, self.store)
        return ReplicaOptions(
            str(self.model),
            run_dir=self.runs,
            snapshot=snapshot,
            **more,  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module", params=["template", "image"])
def tier(
    request: pytest.FixtureRequest,
    demo_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Tier]:
    """Both ways to have clones."""
    model, store = demo_model(), str(tmp_path_factory.mktemp("store"))
    with place() as runs:
        found = Tier(request.param, model, store, runs)
        if found.name == "template":
            with resident(model):
                yield found
            return
        try:
            Criu.find().check()
        except SnapshotError as error:
            unavailable(str(error))
        create = command("snapshot", "create", str(model), "--snapshot-store", store)
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        yield found


def descendants() -> set[int]:
    """The processes that this one has started, and theirs."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test ends all that it has started."""
    if "tier" in request.fixturenames:
        request.getfixturevalue("tier")
    before = descendants()
    yield
    assert descendants() == before


# -- what clones of both must do ------------------------------------------------------------------


def test_clones_answer_as_transformers_does(tier: Tier) -> None:
    with Replica(tier.options()) as replica:
        first = ask(replica, PROMPT, 12)
        second = ask(replica, prompt_of(7), 12)
        finish(replica, first, second)
        snapshot = replica.facts["snapshot"]
        assert snapshot["tier"] == tier.name
        assert snapshot["image"]
        restored = {s.process for s in replica.spans if s.name == "snapshot_restore"}
        checked = [s for s in replica.spans if s.name == "snapshot_check"]
        imported = [s for s in replica.spans if s.name == "imports" and "-" in s.process]
    assert first.tokens == expected(tier.model, tuple(PROMPT), 12)
    assert second.tokens == expected(tier.model, tuple(prompt_of(7)), 12)
    assert restored == {"prefill-0", "decode-1"}
    assert len(checked) == 1
    assert imported == []  # as a worker that starts fresh does


def test_clones_know_how_large_a_batch_should_be(tier: Tier) -> None:
    with Replica(tier.options()) as replica:
        finish(replica, ask(replica, PROMPT, 2))
        found = replica.facts["prefill_batch"]
        assert found["tokens"] in SIZES
        assert found["threads"] == replica.threads
        (ready,) = [s for s in replica.spans if (s.name, s.process) == ("ready", "prefill-0")]
        assert f"batches of {found['tokens']} tokens" in (ready.note or "")


@pytest.mark.heavy
def test_clones_with_other_threads_measure_anew(tier: Tier) -> None:
    with Replica(tier.options(threads=3)) as replica:
        finish(replica, ask(replica, PROMPT, 2))
        wait_for(replica, lambda: "prefill_batch" in replica.facts)
        assert replica.facts["prefill_batch"]["threads"] == 3


@pytest.mark.heavy
def test_prefill_of_clones_runs_ahead_of_the_weights(tier: Tier) -> None:
    size = sum(file.stat().st_size for file in tier.model.glob("*.safetensors"))
    with Replica(tier.options(throttle=size / 8.0, copy=True)) as replica:
        client = ask(replica, PROMPT, 4)
        finish(replica, client)
        wait_for(replica, lambda: replica.loaded)
        last = max(s.end_ns for s in replica.spans if s.name.startswith("stage_ready"))
        assert [s for s in replica.spans if s.name == "prefill[0]" and s.end_ns < last]
    assert client.tokens == expected(tier.model, tuple(PROMPT), 4)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_outlives_the_clone_that_serves_it(tier: Tier, role: str) -> None:
    with Replica(tier.options(mode="auto")) as replica:
        client = ask(replica, PROMPT, 60)
        wait_for(replica, lambda: len(client.events) > 3)
        (victim,) = [pid for name, pid in replica.pids.items() if name.startswith(role)]
        os.kill(victim, signal.SIGKILL)
        wait_for(replica, lambda: victim not in replica.pids.values())
        finish(replica, client)
        # Another clone has taken its place.
        finish(replica, ask(replica, prompt_of(7), 2))
        assert replica.facts["snapshot"]["tier"] == tier.name
    assert client.tokens == expected(tier.model, tuple(PROMPT), 60)


def test_clones_end_with_their_front(tier: Tier) -> None:
    before = descendants()
    arguments = ["run", str(tier.model), "--prompt-ids", "5,6,7", "--copy", "--throttle", "1KB/s"]
    arguments += ["--snapshot", "require", "--snapshot-store", tier.store]
    # The memory service and a prefill worker; for an image, the restorer and a PID 1 as well.
    count = {"template": 2, "image": 4}[tier.name]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE) as front:
        until(lambda: len(descendants() - before) == 1 + count)
        started = descendants() - before
        front.kill()
        until(lambda: all(gone(pid) for pid in started))
    until(lambda: descendants() <= before)  # those that it was just about to start, too


# -- what a template alone must do ----------------------------------------------------------------


@pytest.fixture
def alone(demo_model: Callable[..., Path], tmp_path: Path) -> Iterator[Tier]:
    """No image, and no template yet."""
    with place() as runs:
        yield Tier("template", demo_model(), str(tmp_path), runs)


def fresh_instead(replica: Replica, client: Client, tier: Tier) -> str:
    """Finishes a request with fresh workers: why there are no clones."""
    finish(replica, client)
    wait_for(replica, lambda: replica.facts["snapshot"]["tier"] == "fresh")
    assert client.tokens == expected(tier.model, tuple(PROMPT), len(client.tokens))
    why: str = replica.facts["snapshot"]["why"]
    return why


@pytest.mark.heavy
def test_workers_start_fresh_when_the_template_dies_while_it_forks(alone: Tier) -> None:
    with resident(alone.model) as (_, said), Replica(alone.options("auto")) as replica:
        os.kill(int(str(said["pid"])), signal.SIGKILL)
        why = fresh_instead(replica, ask(replica, PROMPT, 4), alone)
    assert "; template: " in why


@pytest.mark.heavy
def test_a_request_goes_on_fresh_when_its_template_dies(alone: Tier) -> None:
    with resident(alone.model) as (_, said), Replica(alone.options("auto")) as replica:
        client = ask(replica, PROMPT, 60)
        wait_for(replica, lambda: len(client.events) > 3)
        assert replica.facts["snapshot"]["tier"] == "template"
        os.kill(int(str(said["pid"])), signal.SIGKILL)
        why = fresh_instead(replica, client, alone)
        assert len(client.tokens) == 60
    assert "; template: " in why


@pytest.mark.heavy
def test_a_template_of_another_model_is_left_alone(
    alone: Tier, demo_model: Callable[..., Path]
) -> None:
    with resident(demo_model("qwen3")), Replica(alone.options("auto")) as replica:
        why = fresh_instead(replica, ask(replica, PROMPT, 2), alone)
    assert "template:" not in why  # its socket's name says whose it is; it is not even asked


def test_a_template_says_when_it_is_ready_and_goes_at_ctrl_c(alone: Tier) -> None:
    with subprocess.Popen(
        command("snapshot", "template", str(alone.model), "--threads", "1"),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"template of {alone.model} ready: {alone.runs}")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs a model"),
        (["/nowhere/at/all"], "SourceNotFound"),
        (["MODEL", "--threads", "0"], "there must be a thread"),
    ],
)
def test_there_is_no_template_of_nothing(alone: Tier, arguments: list[str], says: str) -> None:
    given = [str(alone.model) if word == "MODEL" else word for word in arguments]
    done = subprocess.run(
        command("snapshot", "template", *given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert says in done.stderr
