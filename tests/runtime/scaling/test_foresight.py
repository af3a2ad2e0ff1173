"""Models that are there before somebody asks, and those that are not: over real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import CheckpointError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.endpoint.fleet import Fleet
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.scaling.budget import Budget
from coldframe.runtime.scaling.histogram import HybridHistogram
from coldframe.runtime.scaling.next import Costs, NextArrival
from coldframe.runtime.scaling.policies import FixedKeepAlive, Level, LivePolicy, Schedule
from coldframe.runtime.scaling.unasked import since_boot
from tests.runtime.helpers import Client, expected, prompt_of
from tests.runtime.serving import Server, greedy, served
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
PROMPT = prompt_of(40)
KV = 2 << 20


class Script:
    """A policy that has the same schedule each time that somebody has asked, and says it is sure.

    Args:
        steps: The schedule; before somebody has asked, and where it is started for nobody, it stays
            warm.
        chance: How likely it says that somebody asks, whenever that is.
        times: How often it goes by that schedule; then it stays warm.
    """

    name = "script"
    why = "it is written so"
    parks = True
    always = False

    def __init__(
        self, *steps: tuple[float, Level], chance: float = 1.0, times: int = 1_000_000
    ) -> None:
        self._schedule = Schedule(steps)
        self._chance = chance
        self._times = times
        self._asked = False

    def arrived(self, at_s: float) -> None:
        self._asked = True

    def idle(self, at_s: float) -> Schedule:
        asked, self._asked = self._asked, False
        if not asked or not self._times:
            return Schedule(((0.0, "warm"),))
        self._times -= 1
        return self._schedule

    def started(self, level: Level, seconds: float) -> None: ...

    def chance(self, idle_s: float, within_s: float) -> float:
        return self._chance

    def saved(self, at_s: float) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any], at_s: float, away_s: float) -> None: ...


@pytest.fixture(scope="module")
def models(demo_model: Make) -> dict[str, Path]:
    return {name: demo_model(name, "float32") for name in ("llama", "qwen2")}


def need(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) + KV


@contextmanager
def fleet_of(
    models: Mapping[str, Path],
    policies: Mapping[str, LivePolicy],
    runs: Path,
    *,
    memory: int = 1 << 30,
    budget: Budget | None = None,
) -> Iterator[Fleet]:
    loop, room, log = Loop(), Room(memory), Log(process="front")
    supervisors: dict[str, Supervisor] = {}
    for name, policy in policies.items():
        options = ReplicaOptions(str(models[name]), run_dir=str(runs), kv_bytes=KV)
        began = None if supervisors else now()
        supervisors[name] = Supervisor(
            *(options, policy, Recorder("front"), log.about(model=name)),
            *(loop, None, began, room),
        )
    fleet = Fleet(supervisors, loop, room, 0, budget)
    try:
        yield fleet
    finally:
        fleet.close()
        assert not loop.selector.get_map()
        loop.close()


def until(fleet: Fleet, done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, {name: model.state for name, model in fleet}
        fleet.poll(0.05)
        fleet.step()


def answers(fleet: Fleet, name: str, model: Path) -> None:
    client = Client()
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    client.request = fleet[name].submit(params, client, prompt_ids=tuple(PROMPT))
    until(fleet, lambda: client.done)
    assert client.tokens == expected(model, tuple(PROMPT), 4)


def later(fleet: Fleet, name: str, seconds: float) -> None:
    """Nobody has asked it for so much longer."""
    fleet[name].unasked._since -= seconds
    fleet[name].unasked._left_at -= seconds


def is_in(fleet: Fleet, name: str, state: str) -> Callable[[], bool]:
    return lambda: fleet[name].state == state


def test_it_is_there_before_somebody_asks(
    models: dict[str, Path], no_leaks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = Script((0.0, "zero"), (1000.0, "warm"))
    with fleet_of(models, {"llama": policy}, no_leaks) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        assert not fleet.at_zero  # it is to come back
        later(fleet, "llama", 1000)
        until(fleet, is_in(fleet, "llama", "warm"))
        assert llama.idle
        told = llama.life.document()
        assert (told["cold_starts"], told["prewarmed"], told["prewarmed_used"]) == (1, 1, 0)
        answers(fleet, "llama", models["llama"])
        told = llama.life.document()
        assert (told["cold_starts"], told["prewarmed"], told["prewarmed_used"]) == (1, 1, 1)
        assert llama.starts == 2
        assert set(told["seconds"]) >= {"zero", "starting", "warm", "draining", "parked"}
        assert min(told["seconds"][state] for state in ("zero", "starting", "warm")) > 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    changes = [line for line in map(json.loads, lines) if line["event"] == "state"]
    ways = [(line.get("from"), line["to"]) for line in changes]
    assert ways[:5] == [
        (None, "starting"),
        ("starting", "warm"),
        ("warm", "draining"),
        ("draining", "zero"),
        ("zero", "starting"),
    ]
    assert ways[5] == ("starting", "warm")


@pytest.mark.heavy
def test_parked_first_then_warm_and_gone_again_where_nobody_comes(
    models: dict[str, Path], no_leaks: Path
) -> None:
    policy = Script((0.0, "zero"), (1000.0, "parked"), (2000.0, "warm"), (3000.0, "zero"))
    with fleet_of(models, {"llama": policy}, no_leaks) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        later(fleet, "llama", 1000)
        until(fleet, is_in(fleet, "llama", "parked"))
        assert llama.starts == 2
        replica = llama.replica
        later(fleet, "llama", 1000)
        until(fleet, is_in(fleet, "llama", "warm"))
        assert llama.replica is replica
        later(fleet, "llama", 1000)
        until(fleet, is_in(fleet, "llama", "zero"))
        told = llama.life.document()
        assert (told["prewarmed"], told["prewarmed_in_vain"], told["cold_starts"]) == (1, 1, 1)
        until(fleet, lambda: fleet.at_zero)


@pytest.mark.heavy
def test_who_comes_while_it_is_on_its_way_waits_for_what_is_left(
    models: dict[str, Path], no_leaks: Path
) -> None:
    policy = Script((0.0, "zero"), (0.1, "parked"), times=1)
    with fleet_of(models, {"llama": policy}, no_leaks) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        until(fleet, lambda: llama.state == "starting" and llama.starts == 2)
        answers(fleet, "llama", models["llama"])
        told = llama.life.document()
        assert (told["prewarmed"], told["prewarmed_late"], told["cold_starts"]) == (1, 1, 2)
        assert llama.starts == 2


@pytest.mark.heavy
def test_what_was_ordered_to_sleep_or_died_does_not_come_before_somebody_asks(
    models: dict[str, Path], no_leaks: Path
) -> None:
    policy = Script((0.0, "warm"), (1000.0, "zero"), (2000.0, "warm"))
    with fleet_of(models, {"llama": policy}, no_leaks) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        llama.sleep(2)
        later(fleet, "llama", 2000)
        stays = time.monotonic() + 1.0
        until(fleet, lambda: time.monotonic() > stays)
        assert (llama.state, llama.starts) == ("zero", 1)
        answers(fleet, "llama", models["llama"])
        later(fleet, "llama", 1000)
        until(fleet, is_in(fleet, "llama", "zero"))
        later(fleet, "llama", 1000)
        until(fleet, is_in(fleet, "llama", "warm"))
        assert llama.replica is not None
        os.kill(llama.replica.pids["memory"], signal.SIGKILL)
        until(fleet, is_in(fleet, "llama", "zero"))
        stays = time.monotonic() + 1.0
        until(fleet, lambda: time.monotonic() > stays)
        assert (llama.state, llama.starts) == ("zero", 3)
        assert llama.life.document()["prewarmed_in_vain"] == 1
        answers(fleet, "llama", models["llama"])


@pytest.mark.heavy
@pytest.mark.parametrize("likely", ["held", "ahead"])
def test_where_there_is_room_for_one_it_is_the_likelier_one(
    models: dict[str, Path], no_leaks: Path, likely: str
) -> None:
    most = max(need(models[name]) for name in models)
    policies: dict[str, LivePolicy] = {
        "llama": Script((0.0, "zero"), (1000.0, "warm"), chance=float(likely == "ahead")),
        "qwen2": Script((0.0, "warm"), chance=float(likely == "held")),
    }
    with fleet_of(models, policies, no_leaks, memory=most) as fleet:
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        answers(fleet, "qwen2", models["qwen2"])
        assert [fleet[name].state for name in policies] == ["zero", "warm"]
        later(fleet, "llama", 1000)
        if likely == "ahead":
            until(fleet, is_in(fleet, "llama", "warm"))
            assert fleet["qwen2"].state == "zero"
        else:
            stays = time.monotonic() + 1.0
            until(fleet, lambda: time.monotonic() > stays)
            assert [fleet[name].state for name in policies] == ["zero", "warm"]
            assert fleet["llama"].life.document()["prewarmed"] == 0


def asked_every(policy: LivePolicy, seconds: float, times: int = 60) -> LivePolicy:
    """One that has learned of requests by a timer, the last of them so long ago."""
    at_s = since_boot() - seconds * (times + 1)
    for _ in range(times):
        policy.arrived(at_s)
        policy.idle(at_s)
        at_s += seconds
    return policy


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["histogram", "next"])
def test_who_is_asked_all_the_time_does_not_go_for_who_is_to_be_asked_within_the_hour(
    models: dict[str, Path], no_leaks: Path, kind: str
) -> None:
    def policy() -> LivePolicy:
        costs = Costs(penalty=500.0, parked=1.0)
        return HybridHistogram() if kind == "histogram" else NextArrival(costs)

    most = max(need(models[name]) for name in models)
    policies = {"llama": asked_every(policy(), 3600.0), "qwen2": asked_every(policy(), 5.0)}
    with fleet_of(models, policies, no_leaks, memory=most) as fleet:
        llama, qwen2 = fleet["llama"], fleet["qwen2"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        answers(fleet, "qwen2", models["qwen2"])
        later(fleet, "llama", llama.unasked.change_s + 1e-3)
        assert llama.rising == "warm"
        stays = time.monotonic() + 1.0
        until(fleet, lambda: time.monotonic() > stays)
        assert [model.state for _, model in fleet] == ["zero", "warm"]
        assert not qwen2.unasked.foregone
        # Who has stayed away for long is held no more: the other one is to be asked first.
        later(fleet, "qwen2", 30.0 if kind == "histogram" else 3000.0)
        until(fleet, is_in(fleet, "llama", "warm"))
        assert qwen2.state == "zero"


@pytest.mark.heavy
def test_who_is_asked_does_not_wait_for_a_start_that_nobody_has_asked_for(
    models: dict[str, Path], no_leaks: Path
) -> None:
    most = max(need(models[name]) for name in models)
    policies: dict[str, LivePolicy] = {
        "llama": Script((0.0, "zero"), (1000.0, "warm")),
        "qwen2": Script((0.0, "warm")),
    }
    with fleet_of(models, policies, no_leaks, memory=most) as fleet:
        llama, qwen2 = fleet["llama"], fleet["qwen2"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        until(fleet, lambda: qwen2.known)
        llama._options = replace(llama.options, throttle=need(models["llama"]) / 100)
        later(fleet, "llama", 1000)
        until(fleet, lambda: llama.replica is not None and llama.replica.known)
        client = Client()
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        client.request = qwen2.submit(params, client, prompt_ids=tuple(PROMPT))
        until(fleet, is_in(fleet, "llama", "zero"), 20)
        until(fleet, lambda: client.done)
        assert client.tokens == expected(models["qwen2"], tuple(PROMPT), 4)
        told = llama.life.document()
        assert (told["prewarmed"], told["prewarmed_in_vain"], llama.starts) == (1, 1, 2)
        assert llama.failures == 0


@pytest.mark.heavy
def test_an_end_is_not_put_off_for_what_cannot_come(
    models: dict[str, Path], no_leaks: Path
) -> None:
    policy = Script((0.0, "warm"), (1000.0, "zero"), (2000.0, "warm"))
    with fleet_of(models, {"llama": policy}, no_leaks) as fleet:
        answers(fleet, "llama", models["llama"])
        fleet["llama"].sleep(2)
        until(fleet, is_in(fleet, "llama", "zero"))
        assert fleet["llama"].unasked.will_rise  # by its schedule; but it was sent to sleep
        assert fleet.at_zero
        answers(fleet, "llama", models["llama"])
        fleet["llama"].give_up(CheckpointError("these are no weights"))
        assert fleet["llama"].state == "failed"
        assert not fleet["llama"].will_rise


@pytest.mark.heavy
def test_who_is_asked_all_the_time_it_goes_is_a_cold_start(
    models: dict[str, Path], no_leaks: Path
) -> None:
    with fleet_of(models, {"llama": FixedKeepAlive()}, no_leaks) as fleet:
        llama = fleet["llama"]
        client, late = Client(), Client()
        params = SamplingParams(max_tokens=300, ignore_eos=True)
        client.request = llama.submit(params, client, prompt_ids=tuple(PROMPT))
        until(fleet, lambda: len(client.events) > 5 and llama.state == "warm")
        llama.sleep(2)
        late.request = llama.submit(params, late, prompt_ids=tuple(PROMPT))
        assert llama.state == "draining"
        until(fleet, lambda: late.done and client.done)
        assert (llama.starts, llama.life.cold_starts) == (2, 2)
        # And one that dies under somebody who has no token yet.
        last = Client()
        last.request = llama.submit(params, last, prompt_ids=tuple(PROMPT))
        assert llama.replica is not None
        os.kill(llama.replica.pids["memory"], signal.SIGKILL)
        until(fleet, lambda: last.done)
        assert (llama.starts, llama.life.cold_starts) == (3, 3)


@pytest.mark.heavy
def test_who_is_asked_is_never_sent_away_for_who_is_not(
    models: dict[str, Path], no_leaks: Path
) -> None:
    most = max(need(models[name]) for name in models)
    policies: dict[str, LivePolicy] = {
        "llama": Script((0.0, "zero"), (1000.0, "warm")),
        "qwen2": Script((0.0, "warm"), chance=0.0),
    }
    with fleet_of(models, policies, no_leaks, memory=most) as fleet:
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        later(fleet, "llama", 1000)
        client = Client()
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        client.request = fleet["qwen2"].submit(params, client, prompt_ids=tuple(PROMPT))
        until(fleet, lambda: len(client.events) > 5)
        assert fleet["qwen2"].state in ("starting", "warm")
        assert fleet["llama"].state == "zero"
        until(fleet, lambda: client.done)
        assert len(client.tokens) == 400
        until(fleet, is_in(fleet, "llama", "warm"))


@pytest.mark.heavy
def test_a_budget_ends_what_is_held_for_nobody(models: dict[str, Path], no_leaks: Path) -> None:
    budget = Budget(1.5)
    with fleet_of(models, {"llama": FixedKeepAlive()}, no_leaks, budget=budget) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        assert budget.left < 1.5
        answers(fleet, "llama", models["llama"])
        assert llama.starts == 2


@pytest.mark.heavy
def test_a_start_for_nobody_ends_where_the_budget_does(
    models: dict[str, Path], no_leaks: Path
) -> None:
    budget = Budget(360.0)
    policy = Script((0.0, "zero"), (1000.0, "warm"))
    with fleet_of(models, {"llama": policy}, no_leaks, budget=budget) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        # The weights of the next start take minutes.
        llama._options = replace(llama.options, throttle=need(models["llama"]) / 300)
        later(fleet, "llama", 1000)
        until(fleet, lambda: llama.replica is not None and llama.replica.known)
        assert (llama.state, llama.devices_unasked) == ("starting", 1)
        budget.left = 1.5  # others have had the rest
        until(fleet, is_in(fleet, "llama", "zero"), 60)
        assert llama.replica is None
        told = llama.life.document()
        assert (told["prewarmed"], told["prewarmed_in_vain"], llama.starts) == (1, 1, 2)
        assert llama.failures == 0
        # Nor is it begun again before somebody asks.
        stays = time.monotonic() + 1.0
        until(fleet, lambda: time.monotonic() > stays)
        assert (llama.state, llama.starts) == ("zero", 2)
        llama._options = replace(llama.options, throttle=None)
        answers(fleet, "llama", models["llama"])
        assert llama.starts == 3


@pytest.mark.heavy
def test_a_start_that_somebody_waits_for_goes_on_without_a_budget(
    models: dict[str, Path], no_leaks: Path
) -> None:
    budget = Budget(360.0)
    policy = Script((0.0, "zero"), (1000.0, "warm"))
    with fleet_of(models, {"llama": policy}, no_leaks, budget=budget) as fleet:
        llama = fleet["llama"]
        answers(fleet, "llama", models["llama"])
        until(fleet, is_in(fleet, "llama", "zero"))
        llama._options = replace(llama.options, throttle=need(models["llama"]) / 3)
        later(fleet, "llama", 1000)
        until(fleet, lambda: llama.replica is not None and llama.replica.known)
        client = Client()
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        client.request = llama.submit(params, client, prompt_ids=tuple(PROMPT))
        budget.left = 0.0
        until(fleet, lambda: client.done)
        assert client.tokens == expected(models["llama"], tuple(PROMPT), 4)
        assert (llama.starts, llama.life.document()["prewarmed_late"]) == (2, 1)


def startup(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/startup").json()
    return found


@pytest.mark.heavy
def test_an_endpoint_is_there_before_the_next_request(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """What an earlier process has learned has it warm again 16 s after the last answer."""
    file = tmp_path / "policy.json"
    learned = {
        "policy": "histogram",
        "bin_s": 1.0,
        "counts": {"16": 50, "500": 1},
        "beyond": 0,
        "forecast": [0, 0.0, 0.0],
        "start_s": 0.5,
        "idle_s": 3.0,
        "asked": True,
    }
    state = {"version": 1, "saved_at": time.time(), "models": {"demo": learned}}
    file.write_text(json.dumps(state))
    flags = ("--policy", "histogram:bin=1,range=600", "--policy-state", file)
    prompt, want = [5, *prompt_of(23)], greedy(models["llama"], (5, *prompt_of(23)), 8)
    with served(models["llama"], "--model-name", "demo", *flags) as server:
        server.ready()
        assert server.complete(prompt=prompt, max_tokens=8, ignore_eos=True) == want
        eventually(lambda: startup(server)["state"] == "zero", seconds=60)
        told = startup(server)
        assert told["policy"]["name"] == "histogram"
        assert told["policy"]["next"]["level"] == "warm"
        assert "5 % end by 16 s" in told["policy"]["why"]
        eventually(lambda: startup(server)["state"] == "ready", seconds=90)
        told = startup(server)["states"]
        assert (told["prewarmed"], told["prewarmed_used"], told["cold_starts"]) == (1, 0, 0)
        assert server.complete(prompt=prompt, max_tokens=8, ignore_eos=True) == want
        told = startup(server)["states"]
        assert (told["prewarmed"], told["prewarmed_used"], told["cold_starts"]) == (1, 1, 0)
        assert told["seconds"]["zero"] > 0
        numbers = server.metrics()
        assert numbers["coldframe_prewarms_total{used}"] == 1
        assert numbers["coldframe_prewarms_total{vain}"] == 0
    kept = json.loads(file.read_text())["models"]["demo"]
    assert sum(kept["counts"].values()) + kept["beyond"] >= 52
