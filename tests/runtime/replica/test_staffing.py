"""Replicas whose workers come and go with the work, in real processes, and whatever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import DeviceError, PlatformError
from coldframe.runtime.options import ReplicaOptions, ScalingOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.snapshots import Made
from tests.runtime.snapshots import options as of_clones
from tests.support import unavailable

Make = Callable[..., Path]

QUICK = ScalingOptions(prefill_tokens=400, decode_blocks=16, down_s=0.5)
PROMPTS = [prompt_of(150, seed=seed) for seed in range(8)]
FEW = 8


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    scaled = {"scaling": QUICK, "threads": 1, **more}
    return ReplicaOptions(model=str(model), run_dir=str(runs), **scaled)  # type: ignore[arg-type]


def pids(replica: Replica, role: str) -> dict[str, int]:
    return {name: pid for name, pid in replica.pids.items() if name.startswith(role)}


def stop(replica: Replica, role: str) -> int:
    """Stops the one worker of a role, so that work piles up: its process."""
    (pid,) = pids(replica, role).values()
    os.kill(pid, signal.SIGSTOP)
    return pid


def warm(replica: Replica) -> None:
    """Until the first token nothing is scaled."""
    finish(replica, ask(replica, prompt_of(3), 2))


def right(model: Path, clients: list[Client], count: int) -> None:
    for prompt, client in zip(PROMPTS, clients, strict=True):
        assert client.error is None
        assert client.tokens == expected(model, tuple(prompt), count)


def holders(replica: Replica) -> set[str]:
    return {found.worker for found in replica._router._requests.values() if found.worker}


@pytest.mark.heavy
def test_a_prefill_worker_comes_to_help_and_goes_when_all_is_done(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model()
    with Replica(options(model, no_leaks, prefill=Scale(1, 2))) as replica:
        warm(replica)
        stuck = stop(replica, "prefill")
        clients = [ask(replica, prompt, FEW) for prompt in PROMPTS]
        # What the stuck one has not been given is answered by the one that comes.
        wait_for(replica, lambda: sum(client.done for client in clients) == len(clients) - 2)
        assert replica.staff["prefill"] == {"starting": 0, "up": 2, "leaving": 0}
        os.kill(stuck, signal.SIGCONT)
        finish(replica, *clients)
        right(model, clients, FEW)
        wait_for(replica, lambda: len(pids(replica, "prefill")) == 1)
        again = [ask(replica, prompt, FEW) for prompt in PROMPTS]
        finish(replica, *again)
        right(model, again, FEW)
        notes = [s.note for s in replica.recorder.drain() if s.name == "scale"]
        assert notes[0].startswith("prefill: 1 to 2, to do: 1200 of 400 each")
        assert any(note.startswith("prefill: 2 to 1") for note in notes)
        assert replica.error is None


@pytest.mark.heavy
def test_two_of_each_answer_as_transformers_does_and_share_the_work(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model()
    with Replica(options(model, no_leaks, prefill=2, decode=2)) as replica:
        warm(replica)
        wait_for(replica, lambda: all(s["up"] == 2 for s in replica.staff.values()))
        seen: set[str] = set()
        clients = [ask(replica, prompt, 60) for prompt in PROMPTS]
        wait_for(
            replica,
            lambda: seen.update(holders(replica)) or all(client.done for client in clients),
        )
        right(model, clients, 60)
        assert seen == set(replica.pids) - {"memory"}


@pytest.mark.heavy
def test_a_decode_worker_comes_to_help_and_goes_when_it_has_nothing_left(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model()
    with Replica(options(model, no_leaks, decode=Scale(1, 2))) as replica:
        warm(replica)
        stuck = stop(replica, "decode")
        clients = [ask(replica, prompt, FEW) for prompt in PROMPTS[:4]]
        wait_for(replica, lambda: replica.staff["decode"]["up"] == 2)
        clients += [ask(replica, prompt, FEW) for prompt in PROMPTS[4:]]
        finish(replica, *clients[4:])
        assert not any(client.done for client in clients[:4])
        os.kill(stuck, signal.SIGCONT)
        finish(replica, *clients)
        right(model, clients, FEW)
        wait_for(replica, lambda: len(pids(replica, "decode")) == 1)
        assert replica.error is None


@pytest.mark.heavy
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("moment", ["starting", "up", "leaving"])
def test_nothing_is_lost_whoever_is_killed_while_their_number_changes(
    demo_model: Make, no_leaks: Path, role: str, moment: str
) -> None:
    model = demo_model()
    one_or_two = Scale(1, 2)
    with Replica(options(model, no_leaks, prefill=one_or_two, decode=one_or_two)) as replica:
        warm(replica)
        (first,) = pids(replica, role)
        stuck = stop(replica, role)
        clients = [ask(replica, prompt, FEW) for prompt in PROMPTS]
        wait_for(replica, lambda: len(pids(replica, role)) == 2)
        (second,) = set(pids(replica, role)) - {first}
        if moment == "starting":
            assert replica.staff[role]["starting"] == 1
        else:
            wait_for(replica, lambda: replica.staff[role]["up"] == 2)
        if moment == "leaving":
            # The one that has requests is told to go, and dies with them.
            replica._router.retire(first)
            assert replica.staff[role]["leaving"] == 1
            assert not replica._router.is_free(first)
        os.kill(replica.pids[first if moment == "leaving" else second], signal.SIGKILL)
        if moment != "leaving":
            os.kill(stuck, signal.SIGCONT)
        finish(replica, *clients)
        right(model, clients, FEW)
        wait_for(replica, lambda: all(sum(s.values()) == 1 for s in replica.staff.values()))
        assert replica.error is None


@pytest.mark.heavy
def test_one_that_cannot_be_had_leaves_the_others_at_work(
    demo_model: Make, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PlatformError("no process is left")

    model = demo_model()
    with Replica(options(model, no_leaks, decode=Scale(1, 2))) as replica:
        warm(replica)
        stuck = stop(replica, "decode")
        monkeypatch.setattr("coldframe.runtime.replica.launch.spawn_python", refuse)
        clients = [ask(replica, prompt, FEW) for prompt in PROMPTS]
        notes: list[str] = []

        def tried() -> bool:
            notes.extend(s.note or "" for s in replica.recorder.drain() if s.name == "scale")
            return any("no process is left" in note for note in notes)

        wait_for(replica, tried)
        assert replica.staff["decode"] == {"starting": 0, "up": 1, "leaving": 0}
        os.kill(stuck, signal.SIGCONT)
        finish(replica, *clients)
        right(model, clients, FEW)
        assert replica.error is None


def test_workers_keep_to_their_halves_of_the_cores(demo_model: Make, no_leaks: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        unavailable("there is one core")
    pinned = ReplicaOptions(str(demo_model()), run_dir=str(no_leaks), pin=True)
    with Replica(pinned) as replica:
        client = ask(replica, PROMPTS[0], FEW)
        finish(replica, client)
        assert client.tokens == expected(demo_model(), tuple(PROMPTS[0]), FEW)
        found = {}
        for name, pid in replica.pids.items():
            allowed = {frozenset(os.sched_getaffinity(int(t))) for t in tasks(pid)}
            assert len(allowed) == 1, "a thread of its own mind"
            found[name.partition("-")[0]] = allowed.pop()
            if name != "memory":
                environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
                assert f"OMP_NUM_THREADS={max(1, len(cores) // 2)}" in environ
        assert found["memory"] == set(cores)
        assert found["prefill"] | found["decode"] == set(cores)
        assert not found["prefill"] & found["decode"]


@pytest.mark.heavy
def test_clones_come_to_help_too_and_keep_to_their_cores(made: Made, no_leaks: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        unavailable("there is one core")
    more = {"prefill": Scale(1, 2), "scaling": QUICK, "pin": True}
    with Replica(of_clones(made, no_leaks, "require", **more)) as replica:
        warm(replica)
        stuck = stop(replica, "prefill")
        clients = [ask(replica, prompt, FEW) for prompt in PROMPTS]
        wait_for(replica, lambda: sum(client.done for client in clients) == len(clients) - 2)
        os.kill(stuck, signal.SIGCONT)
        finish(replica, *clients)
        right(made.model, clients, FEW)
        cores = {}
        for name in ("prefill", "decode"):
            allowed = [
                frozenset(os.sched_getaffinity(int(task)))
                for pid in pids(replica, name).values()
                for task in tasks(pid)
            ]
            cores[name] = frozenset.union(*allowed)
            assert {*allowed} == {cores[name]}
        assert not cores["prefill"] & cores["decode"]
        clones = {span.process for span in replica.spans if span.name == "hooks"}
        assert len([name for name in clones if name.startswith("prefill")]) == 2
        assert replica.facts["snapshot"]["tier"] == "image"
        wait_for(replica, lambda: len(pids(replica, "prefill")) == 1)
        # One that goes is no clone that has failed: the next one is a clone as well.
        assert replica.facts["snapshot"]["why"] is None
        assert not replica._workforce.tiers.why
        assert replica.error is None


def tasks(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/task")


def test_one_core_is_not_cut(
    demo_model: Make, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(DeviceError, match="not cores enough"):
        Replica(ReplicaOptions(str(demo_model()), run_dir=str(no_leaks), pin=True))
