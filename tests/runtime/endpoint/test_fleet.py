"""Several models in the memory of one device, over real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.loader.errors import CheckpointError, SourceUnreachable
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.endpoint import supervisor
from coldframe.runtime.endpoint.fleet import Fleet
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import sizing
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.scaling.policies import FixedKeepAlive
from tests.loader.web.servers import nginx
from tests.runtime.helpers import Client, expected, prompt_of

Make = Callable[..., Path]
PROMPT = prompt_of(40)
KV = 1 << 20


@pytest.fixture(scope="module")
def models(demo_model: Make) -> dict[str, Path]:
    return {name: demo_model(name, "float32") for name in ("llama", "qwen2", "qwen3")}


def need(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) + KV


@contextmanager
def fleet_of(
    places: dict[str, str],
    runs: Path,
    memory: int,
    *,
    policy: FixedKeepAlive | None = None,
    pool: int = 0,
) -> Iterator[Fleet]:
    """The first one is started, the others are not."""
    loop, room, log = Loop(), Room(memory), Log(process="front")
    supervisors: dict[str, Supervisor] = {}
    for name, place in places.items():
        options = ReplicaOptions(place, run_dir=str(runs), kv_bytes=KV)
        began = None if supervisors else now()
        supervisors[name] = Supervisor(
            options,
            policy or FixedKeepAlive(),
            Recorder("front"),
            log.about(model=name),
            loop,
            None,
            began,
            room,
        )
    fleet = Fleet(supervisors, loop, room, pool)
    try:
        yield fleet
    finally:
        fleet.close()
        assert room.free == memory
        assert not loop.selector.get_map()
        loop.close()


def until(fleet: Fleet, done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, {name: model.state for name, model in fleet}
        fleet.poll(0.05)
        fleet.step()


def ask(fleet: Fleet, name: str, count: int = 8) -> Client:
    client = Client()
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    client.request = fleet[name].submit(params, client, prompt_ids=tuple(PROMPT))
    return client


def finish(fleet: Fleet, *clients: Client) -> None:
    until(fleet, lambda: all(client.done for client in clients))


def places(models: dict[str, Path], *names: str) -> dict[str, str]:
    return {name: str(models[name]) for name in names}


def states(fleet: Fleet) -> list[str]:
    return [model.state for _, model in fleet]


def right(client: Client, model: Path) -> bool:
    return client.tokens == expected(model, tuple(PROMPT), len(client.tokens))


def test_two_that_do_not_fit_together_take_turns(models: dict[str, Path], no_leaks: Path) -> None:
    most = max(need(models[name]) for name in ("llama", "qwen2"))
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, most) as fleet:
        for name in ("llama", "qwen2", "llama"):
            client = ask(fleet, name)
            finish(fleet, client)
            assert right(client, models[name])
            assert [model.replica is not None for _, model in fleet].count(True) == 1
        assert [model.starts for _, model in fleet] == [2, 1]
        assert [model.failures for _, model in fleet] == [0, 0]


@pytest.mark.heavy
def test_what_another_one_has_is_there_for_who_takes_its_place(
    models: dict[str, Path], no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = max(need(models[name]) for name in ("llama", "qwen2"))
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, most) as fleet:
        # As on a machine that one of them fills.
        monkeypatch.setattr(
            sizing,
            "memory_available",
            lambda: KV - 1 if fleet["llama"].state == "warm" else 1 << 30,
        )
        finish(fleet, ask(fleet, "llama"))
        until(fleet, lambda: fleet["qwen2"].known)
        client = ask(fleet, "qwen2")
        finish(fleet, client)
        assert right(client, models["qwen2"])


@pytest.mark.heavy
def test_two_that_fit_stay(models: dict[str, Path], no_leaks: Path) -> None:
    both = need(models["llama"]) + need(models["qwen2"])
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, both) as fleet:
        for _ in range(2):
            clients = {name: ask(fleet, name) for name, _ in fleet}
            finish(fleet, *clients.values())
            assert all(right(client, models[name]) for name, client in clients.items())
        assert states(fleet) == ["warm", "warm"]
        assert [model.starts for _, model in fleet] == [1, 1]
        # Each has a timeline of its own.
        told = [model.start_log.document()["timeline"] for _, model in fleet]
        assert all(timeline["ttft_s"] > 0 for timeline in told)


@pytest.mark.heavy
def test_who_is_asked_answers_before_it_goes(models: dict[str, Path], no_leaks: Path) -> None:
    most = max(need(models[name]) for name in ("llama", "qwen2"))
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, most) as fleet:
        first = ask(fleet, "llama", 400)
        until(fleet, lambda: len(first.events) > 5)
        assert not fleet["llama"].can_go  # it has just come
        fleet["llama"]._start_s = 0.0  # or it would be left alone for as long as its start took
        second = ask(fleet, "qwen2")
        until(fleet, lambda: fleet["llama"].state == "draining")
        assert not first.done
        # What comes while it goes is held, and brings it back afterwards.
        third = ask(fleet, "llama")
        finish(fleet, first)
        assert not third.done
        finish(fleet, second, third)
        assert len(first.tokens) == 400
        assert first.tokens[:8] == expected(models["llama"], tuple(PROMPT), 8)
        assert right(second, models["qwen2"])
        assert right(third, models["llama"])
        assert [model.starts for _, model in fleet] == [2, 1]


@pytest.mark.heavy
def test_nobody_goes_for_who_does_not_wait_any_more(
    models: dict[str, Path], no_leaks: Path
) -> None:
    most = max(need(models[name]) for name in ("llama", "qwen2"))
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, most) as fleet:
        client = ask(fleet, "llama", 400)
        until(fleet, lambda: fleet["llama"].state == "warm" and len(client.events) > 5)
        fleet["llama"]._start_s = 1000.0  # it stays as long as somebody asks it
        late = ask(fleet, "qwen2")
        until(fleet, lambda: fleet["qwen2"].load_state().stage == "memory")
        fleet["qwen2"].cancel(late.request)
        until(fleet, lambda: fleet["qwen2"].state == "zero")
        finish(fleet, client)
        assert states(fleet) == ["warm", "zero"]
        # One that was told to start does so, whether somebody asks it or not.
        fleet["qwen2"].wake()
        until(fleet, lambda: states(fleet) == ["zero", "warm"])


@pytest.mark.heavy
def test_the_one_used_longest_ago_goes(models: dict[str, Path], no_leaks: Path) -> None:
    names = ("llama", "qwen2", "qwen3")
    sizes = sorted(need(models[name]) for name in names)
    with fleet_of(places(models, *names), no_leaks, sizes[1] + sizes[2]) as fleet:
        for name in ("llama", "qwen2", "llama", "qwen3"):
            finish(fleet, ask(fleet, name))
        assert states(fleet) == ["warm", "zero", "warm"]
        finish(fleet, ask(fleet, "qwen2"))
        assert states(fleet) == ["zero", "warm", "warm"]


@pytest.mark.heavy
def test_a_pool_of_parked_models(models: dict[str, Path], no_leaks: Path) -> None:
    names = ("llama", "qwen2", "qwen3")
    all_of_them = sum(need(models[name]) for name in names)
    policy = FixedKeepAlive(0.1, None)
    with fleet_of(places(models, *names), no_leaks, all_of_them, policy=policy, pool=2) as fleet:
        until(fleet, lambda: sorted(states(fleet)) == ["parked", "parked", "zero"])
        assert fleet["qwen3"].state == "zero"
        started = fleet["qwen2"].starts
        client = ask(fleet, "qwen2")
        finish(fleet, client)
        assert right(client, models["qwen2"])
        assert fleet["qwen2"].starts == started
        # A third one takes the place of the one that was asked longest ago, or never.
        finish(fleet, ask(fleet, "qwen3"))
        until(fleet, lambda: sorted(states(fleet)) == ["parked", "parked", "zero"])
        assert fleet["llama"].state == "zero"


@pytest.mark.heavy
def test_one_of_the_pool_that_is_asked_while_it_starts_stays(
    models: dict[str, Path], no_leaks: Path
) -> None:
    both = need(models["llama"]) + need(models["qwen2"])
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, both, pool=2) as fleet:
        until(fleet, lambda: fleet["qwen2"].state == "starting")
        client = ask(fleet, "qwen2", 400)
        until(fleet, lambda: fleet["qwen2"].state not in ("zero", "starting"))
        # Else who comes next would have to wait until all that it has is answered.
        assert fleet["qwen2"].state == "warm"
        finish(fleet, client)


@pytest.mark.heavy
def test_one_of_the_pool_that_is_sent_to_zero_stays_there_until_somebody_asks(
    models: dict[str, Path], no_leaks: Path
) -> None:
    policy = FixedKeepAlive(0.1, None)
    with fleet_of(places(models, "llama"), no_leaks, 1 << 30, policy=policy, pool=1) as fleet:
        until(fleet, lambda: states(fleet) == ["parked"])
        fleet["llama"].sleep(2)
        stays = time.monotonic() + 0.3
        until(fleet, lambda: time.monotonic() > stays)
        assert states(fleet) == ["zero"]
        finish(fleet, ask(fleet, "llama"))
        until(fleet, lambda: states(fleet) == ["parked"])
        assert fleet["llama"].starts == 2
        fleet["llama"].make_room()  # as for another one, which does not come
        until(fleet, lambda: fleet["llama"].starts == 3)
        until(fleet, lambda: states(fleet) == ["parked"])


@pytest.mark.heavy
def test_one_of_the_pool_that_dies_before_it_is_there_sends_nobody_away(
    models: dict[str, Path], no_leaks: Path
) -> None:
    sizes = {name: need(models[name]) for name in ("llama", "qwen2")}
    policy, both = FixedKeepAlive(0.1, None), sum(sizes.values())
    with fleet_of(places(models, *sizes), no_leaks, both, policy=policy, pool=2) as fleet:
        qwen2, room = fleet["qwen2"], fleet._room
        assert room is not None
        qwen2._options = replace(qwen2.options, throttle=sizes["qwen2"] / 100)
        until(fleet, lambda: qwen2.replica is not None and qwen2.replica.known)
        until(fleet, lambda: states(fleet) == ["parked", "starting"])
        assert qwen2.replica is not None
        os.kill(qwen2.replica.pids["memory"], signal.SIGKILL)
        room.total = max(sizes.values())  # in the meantime there is less
        until(fleet, lambda: qwen2.failures == 1)
        stays = time.monotonic() + 0.5
        until(fleet, lambda: time.monotonic() > stays)
        assert states(fleet) == ["parked", "zero"]
        assert fleet["llama"].starts == 1
        room.total = both
        until(fleet, lambda: qwen2.replica is not None)


@pytest.mark.heavy
def test_what_is_parked_makes_room(models: dict[str, Path], no_leaks: Path) -> None:
    most = max(need(models[name]) for name in ("llama", "qwen2"))
    policy = FixedKeepAlive(0.1, None)
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, most, policy=policy) as fleet:
        until(fleet, lambda: fleet["llama"].state == "parked")
        client = ask(fleet, "qwen2")
        finish(fleet, client)
        assert right(client, models["qwen2"])
        assert fleet["llama"].state == "zero"


@pytest.mark.heavy
def test_two_whose_kv_does_not_fit_together_are_both_parked(
    models: dict[str, Path], no_leaks: Path
) -> None:
    memory = need(models["llama"]) + need(models["qwen2"]) - KV
    policy = FixedKeepAlive(0.1, None)
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, memory, policy=policy) as fleet:
        until(fleet, lambda: fleet["llama"].state == "parked")
        finish(fleet, ask(fleet, "qwen2"))
        until(fleet, lambda: states(fleet) == ["parked", "parked"])
        client = ask(fleet, "llama")
        finish(fleet, client)
        assert right(client, models["llama"])
        assert [model.starts for _, model in fleet] == [1, 1]
        # The other one's KV has no room beside it, so that it makes some, or comes back later.
        clients = {name: ask(fleet, name, 200) for name, _ in fleet}
        finish(fleet, *clients.values())
        assert all(len(client.tokens) == 200 for client in clients.values())


@pytest.mark.heavy
def test_who_waits_for_room_can_be_sent_to_sleep(models: dict[str, Path], no_leaks: Path) -> None:
    most = max(need(models[name]) for name in ("llama", "qwen2"))
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, most) as fleet:
        long = ask(fleet, "llama", 300)
        until(fleet, lambda: len(long.events) > 2)
        fleet["qwen2"].wake()
        until(fleet, lambda: fleet["qwen2"].load_state().stage == "memory")
        fleet["qwen2"].sleep(2)
        assert fleet["qwen2"].state == "zero"
        finish(fleet, long)
        assert len(long.tokens) == 300


@pytest.mark.heavy
def test_one_from_elsewhere_makes_room_once_it_is_known_how_much(
    models: dict[str, Path], no_leaks: Path
) -> None:
    far = models["qwen2"]
    memory = max(need(models["llama"]), need(far)) + need(far) // 2
    with nginx(far.parent) as base:
        where = {**places(models, "llama"), "far": f"{base}/{far.name}"}
        with fleet_of(where, no_leaks, memory) as fleet:
            finish(fleet, ask(fleet, "llama"))
            for name, place in (("far", far), ("llama", models["llama"]), ("far", far)):
                client = ask(fleet, name)
                finish(fleet, client)
                assert right(client, place)
            # The first time it came too early.
            assert [model.starts for _, model in fleet] == [2, 3]
            assert [model.failures for _, model in fleet] == [0, 0]


@pytest.mark.heavy
def test_one_that_is_no_model_leaves_the_others_alone(
    models: dict[str, Path], no_leaks: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    where = {**places(models, "llama"), "none": str(tmp_path)}
    with fleet_of(where, no_leaks, 1 << 30) as fleet:
        client = ask(fleet, "none")
        finish(fleet, client)
        assert client.error is not None
        assert fleet["none"].state == "failed"
        assert not fleet.at_zero
        assert fleet.error is None
        good = ask(fleet, "llama")
        finish(fleet, good)
        assert right(good, models["llama"])
        assert fleet["none"].load_state().error is not None


@pytest.mark.heavy
def test_who_never_was_anywhere_else_has_not_gone_to_zero(
    models: dict[str, Path], no_leaks: Path
) -> None:
    with fleet_of(places(models, "llama", "qwen2"), no_leaks, 1 << 30) as fleet:
        fleet["llama"]._lost(CheckpointError("these are no weights"))
        fleet.step()
        assert states(fleet) == ["failed", "zero"]
        assert not fleet.at_zero  # the other one could still be asked
        finish(fleet, ask(fleet, "qwen2"))
        assert not fleet.at_zero
        fleet["qwen2"].sleep(2)
        until(fleet, lambda: fleet.at_zero)


@pytest.mark.heavy
def test_what_may_be_mended_is_tried_again_and_nothing_else(
    models: dict[str, Path], no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet_of(places(models, "llama", "qwen2", "qwen3"), no_leaks, 1 << 30) as fleet:
        finish(fleet, ask(fleet, "llama"))
        fleet["qwen2"]._lost(SourceUnreachable("the network is down"))
        fleet["qwen3"]._lost(CheckpointError("these are no weights"))
        fleet.step()
        assert states(fleet) == ["warm", "failed", "failed"]
        with pytest.raises(SourceUnreachable):
            ask(fleet, "qwen2")
        monkeypatch.setattr(supervisor, "_AGAIN_S", 0.0)
        fleet.step()
        assert states(fleet) == ["warm", "zero", "failed"]
        client = ask(fleet, "qwen2")
        finish(fleet, client)
        assert right(client, models["qwen2"])


@pytest.mark.heavy
def test_one_that_is_larger_than_the_device_says_so(
    models: dict[str, Path], no_leaks: Path
) -> None:
    sizes = {name: need(models[name]) for name in ("llama", "qwen2")}
    small, large = sorted(sizes, key=sizes.__getitem__)
    assert sizes[large] - sizes[small] > 100_000  # headers count here, and not there
    with fleet_of(places(models, small, large), no_leaks, sizes[small]) as fleet:
        client = ask(fleet, large)
        finish(fleet, client)
        assert client.error is not None
        assert client.error.what == "the model does not fit the device's memory"
        finish(fleet, ask(fleet, small))
