"""A model's life over real processes: from zero and back, and through deaths."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from coldframe.loader.errors import ColdframeError, ReplicaError, SourceNotFound
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.endpoint import relapses
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.scaling.policies import FixedKeepAlive, Level
from tests.runtime.helpers import Client, expected, prompt_of

Make = Callable[..., Path]
PROMPT = prompt_of(40)
NEVER = FixedKeepAlive()


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


@contextmanager
def supervised(
    model: Path, runs: Path, policy: FixedKeepAlive = NEVER, **more: object
) -> Iterator[Supervisor]:
    options = ReplicaOptions(model=str(model), run_dir=str(runs), **more)  # type: ignore[arg-type]
    log = Log(process="front")
    loop = Loop()
    supervisor = Supervisor(options, policy, Recorder("front"), log, loop, None, now())
    try:
        yield supervisor
    finally:
        supervisor.close()
        assert not loop.selector.get_map()
        loop.close()


def until(supervisor: Supervisor, done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"it never came: {supervisor.state}"
        supervisor.loop.poll(min(0.05, supervisor.wait_s))
        supervisor.tick()
        supervisor.step()


def ask(supervisor: Supervisor, count: int, prompt: Sequence[int] = PROMPT) -> Client:
    client = Client()
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    client.request = supervisor.submit(params, client, prompt_ids=tuple(prompt))
    return client


def answers(supervisor: Supervisor, model: Path) -> None:
    client = ask(supervisor, 8)
    until(supervisor, lambda: client.done)
    assert client.tokens == expected(model, tuple(PROMPT), 8)


def is_in(supervisor: Supervisor, *states: str) -> Callable[[], bool]:
    return lambda: supervisor.state in states


def processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile, or has ended
            if "coldframe" in " ".join(child.cmdline()):
                found.append(child)
    return found


def kv_bytes(supervisor: Supervisor) -> int:
    """Memory that is behind the KV's descriptor."""
    assert supervisor.replica is not None
    for fd in Path(f"/proc/{supervisor.replica.pids['memory']}/fd").iterdir():
        # The service opens and closes others meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if "coldframe-kv" in os.readlink(fd):
                return fd.stat().st_blocks * 512
    raise AssertionError("the memory service holds no KV memory")


def kill(supervisor: Supervisor, name: str) -> None:
    assert supervisor.replica is not None
    os.kill(supervisor.replica.pids[name], signal.SIGKILL)


# -- rest -----------------------------------------------------------------------------------------


def test_nobody_asks_and_it_goes_to_zero_and_comes_back(model: Path, no_leaks: Path) -> None:
    with supervised(model, no_leaks, FixedKeepAlive(0.1, 0.0)) as supervisor:
        until(supervisor, is_in(supervisor, "zero"))  # warm first, without anybody
        assert supervisor.count.stats(None, {}).cold_starts == {"fresh": 1}
        assert processes() == []
        assert supervisor.open
        assert supervisor.load_state().phase == "zero"
        answers(supervisor, model)
        assert supervisor.starts == 2
        until(supervisor, is_in(supervisor, "zero"))
        told = supervisor.start_log.document()["timeline"]
        assert told["ttft_s"] > 0
        stats = supervisor.count.stats(supervisor.start_log.timeline(), {})
        assert stats.cold_starts == {"fresh": 2}
        assert stats.zero_s > 0


@pytest.mark.heavy
def test_who_is_warm_stays_so_while_somebody_asks(model: Path, no_leaks: Path) -> None:
    with supervised(model, no_leaks, FixedKeepAlive(0.0, 0.0)) as supervisor:
        client = ask(supervisor, 400)
        until(supervisor, lambda: client.done)
        assert len(client.tokens) == 400
        assert client.tokens[:8] == expected(model, tuple(PROMPT), 8)
        assert supervisor.starts == 1
        until(supervisor, is_in(supervisor, "zero"))


def test_parked_it_gives_its_kv_back_and_wakes_in_place(model: Path, no_leaks: Path) -> None:
    with supervised(model, no_leaks, FixedKeepAlive(0.1, None)) as supervisor:
        client = ask(supervisor, 8)
        until(supervisor, lambda: client.done)
        assert kv_bytes(supervisor) > 0
        until(supervisor, is_in(supervisor, "parked"))
        until(supervisor, lambda: kv_bytes(supervisor) == 0)
        assert supervisor.load_state().phase == "parked"
        before = processes()
        answers(supervisor, model)
        assert processes() == before
        assert (supervisor.starts, supervisor.state) == (1, "warm")
        until(supervisor, is_in(supervisor, "parked"))


@pytest.mark.heavy
def test_after_it_was_parked_for_so_long_it_goes_to_zero(model: Path, no_leaks: Path) -> None:
    with supervised(model, no_leaks, FixedKeepAlive(0.1, 0.1)) as supervisor:
        until(supervisor, is_in(supervisor, "parked"))
        until(supervisor, is_in(supervisor, "zero"))
        answers(supervisor, model)
        stats = supervisor.count.stats(None, {})
        assert stats.parked_s >= 0.1


@pytest.mark.heavy
@pytest.mark.parametrize(("level", "state"), [(1, "parked"), (2, "zero")])
def test_put_to_sleep_it_ends_what_it_has_first(
    model: Path, no_leaks: Path, level: int, state: str
) -> None:
    with supervised(model, no_leaks) as supervisor:
        client = ask(supervisor, 300)
        until(supervisor, lambda: len(client.events) > 5)
        until(supervisor, is_in(supervisor, "warm"))
        supervisor.sleep(level)
        assert supervisor.state == "draining"
        later = ask(supervisor, 8)
        until(supervisor, lambda: client.done)
        # It is asleep for a moment between the two, so that who has ordered that hears of it.
        until(supervisor, is_in(supervisor, state))
        assert later.events == []
        until(supervisor, lambda: later.done)
        assert len(client.tokens) == 300
        assert client.tokens[:8] == expected(model, tuple(PROMPT), 8)
        assert later.tokens == expected(model, tuple(PROMPT), 8)
        assert supervisor.starts == level
        supervisor.sleep(level)
        until(supervisor, is_in(supervisor, state))
        stays = time.monotonic() + 0.3
        until(supervisor, lambda: time.monotonic() > stays)
        assert supervisor.state == state
        supervisor.sleep(2)
        assert supervisor.state == "zero"
        supervisor.wake()
        supervisor.sleep(1)
        # It rests once it has started, behind who has asked meanwhile.
        last = ask(supervisor, 8)
        until(supervisor, lambda: last.done)
        until(supervisor, is_in(supervisor, "parked"))
        supervisor.sleep(1)  # as it does already
        last = ask(supervisor, 8)
        assert supervisor.state == "warm"
        until(supervisor, lambda: last.done)
        supervisor.sleep(2)
        supervisor.wake()
        assert supervisor.state == "warm"


@pytest.mark.heavy
def test_a_request_that_is_held_can_be_taken_back(model: Path, no_leaks: Path) -> None:
    with supervised(model, no_leaks, FixedKeepAlive(0.0, 0.0)) as supervisor:
        until(supervisor, is_in(supervisor, "zero"))
        client = ask(supervisor, 8)
        supervisor.cancel(client.request)
        supervisor.cancel(client.request)
        until(supervisor, lambda: supervisor.starts == 2 and supervisor.state == "zero")
        assert client.events == []
        assert client.error is None


class Told(FixedKeepAlive):
    """Writes down what it is told of starts."""

    def __init__(self, idle_s: float | None = None, park_s: float | None = 0.0) -> None:
        super().__init__(idle_s, park_s)
        self.starts: list[tuple[Level, float]] = []

    def started(self, level: Level, seconds: float) -> None:
        self.starts.append((level, seconds))


def test_a_policy_is_told_what_starts_and_wakes_take(model: Path, no_leaks: Path) -> None:
    policy = Told(0.1, None)
    began = time.monotonic()
    with supervised(model, no_leaks, policy) as supervisor:
        until(supervisor, is_in(supervisor, "parked"))
        assert [level for level, _ in policy.starts] == ["zero"]
        answers(supervisor, model)
        until(supervisor, lambda: len(policy.starts) == 2)
        passed_s = time.monotonic() - began
        until(supervisor, is_in(supervisor, "parked"))
        answers(supervisor, model)
        until(supervisor, lambda: len(policy.starts) == 3)
        assert [level for level, _ in policy.starts] == ["zero", "parked", "parked"]
        assert policy.starts[0][1] + policy.starts[1][1] < passed_s


@pytest.mark.heavy
def test_a_start_anew_is_not_as_old_as_the_process(model: Path, no_leaks: Path) -> None:
    policy = Told()
    with supervised(model, no_leaks, policy) as supervisor:
        answers(supervisor, model)
        supervisor._started_at -= 10800  # three hours later
        assert supervisor.replica is not None
        # As where a weight file shrinks under it, or its GPU is lost.
        supervisor.replica._start_over("its GPU is gone", supervisor.options)
        until(supervisor, lambda: supervisor.state == "starting")
        until(supervisor, is_in(supervisor, "warm"))
        answers(supervisor, model)
        until(supervisor, lambda: len(policy.starts) == 2)
        assert 0 < policy.starts[1][1] < 3600


# -- deaths ---------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_what_dies_while_it_rests_or_is_about_to_is_not_started_for_nobody(
    model: Path, no_leaks: Path
) -> None:
    with supervised(model, no_leaks) as supervisor:
        until(supervisor, is_in(supervisor, "warm"))
        supervisor.sleep(1)
        until(supervisor, is_in(supervisor, "parked"))
        kill(supervisor, "memory")
        until(supervisor, is_in(supervisor, "zero"))
        client = ask(supervisor, 400)
        until(supervisor, lambda: len(client.events) > 5)
        supervisor.sleep(2)
        later = ask(supervisor, 8)
        kill(supervisor, "memory")
        until(supervisor, lambda: client.done and later.done)
        assert isinstance(client.error, ReplicaError)
        assert later.tokens == expected(model, tuple(PROMPT), 8)
        # The order stands: it is carried out behind those who came before it was.
        until(supervisor, is_in(supervisor, "zero"))
        assert supervisor.starts == 3
        answers(supervisor, model)
        assert supervisor.state == "warm"


def test_who_has_no_token_yet_does_not_notice_that_all_died(model: Path, no_leaks: Path) -> None:
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with supervised(model, no_leaks, throttle=size / 0.5) as supervisor:
        first = ask(supervisor, 8)
        until(supervisor, lambda: supervisor.replica is not None and supervisor.replica.known)
        kill(supervisor, "memory")
        until(supervisor, lambda: supervisor.failures == 1)
        assert not supervisor.open  # it never was warm
        assert supervisor.load_state().error is not None
        until(supervisor, lambda: first.done)
        assert first.tokens == expected(model, tuple(PROMPT), 8)
        until(supervisor, is_in(supervisor, "warm"))
        assert supervisor.load_state().error is None


def test_who_has_tokens_is_told_and_the_next_is_answered(model: Path, no_leaks: Path) -> None:
    with supervised(model, no_leaks) as supervisor:
        begun = ask(supervisor, 900)
        until(supervisor, lambda: len(begun.events) > 5)
        until(supervisor, is_in(supervisor, "warm"))
        kill(supervisor, "memory")
        until(supervisor, lambda: begun.done)
        assert isinstance(begun.error, ReplicaError)
        assert begun.error.retry_after_s == 1.0  # the next start is under way then
        assert begun.tokens[:5] == expected(model, tuple(PROMPT), 8)[:5]
        answers(supervisor, model)
        assert (supervisor.starts, supervisor.failures) == (2, 1)
        assert supervisor.open


@pytest.mark.heavy
def test_what_keeps_dying_is_started_ever_later(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relapses, "_FIRST_DELAY_S", 0.01)
    with supervised(model, no_leaks) as supervisor:
        until(supervisor, is_in(supervisor, "warm"))
        for deaths in range(1, 6):
            kill(supervisor, "memory")
            until(supervisor, lambda deaths=deaths: supervisor.failures == deaths)  # type: ignore[misc]
            retry_at = supervisor._relapses._retry_at
            assert supervisor.open == (deaths < 3)
            until(supervisor, lambda: supervisor.replica is not None)
            assert time.monotonic() >= retry_at  # how late that is: see `Relapses`
        state = supervisor.load_state()
        assert (state.phase, state.failures, state.health) == ("starting", 5, "starting")
        answers(supervisor, model)
        assert supervisor.open
        monkeypatch.setattr(relapses, "_STABLE_S", 0.0)
        kill(supervisor, "memory")
        until(supervisor, lambda: supervisor.replica is None or supervisor.starts == 7)
        assert supervisor.failures == 1  # the deaths before are forgotten


@pytest.mark.heavy
def test_a_request_under_which_all_die_again_and_again_is_given_up(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relapses, "_FIRST_DELAY_S", 0.01)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with supervised(model, no_leaks, throttle=size / 60) as supervisor:
        client = ask(supervisor, 8)
        for _ in range(3):
            assert not client.done
            until(supervisor, lambda: supervisor.replica is not None and supervisor.replica.known)
            deaths = supervisor.failures
            kill(supervisor, "memory")
            until(supervisor, lambda deaths=deaths: supervisor.failures > deaths)  # type: ignore[misc]
        assert isinstance(client.error, ReplicaError)
        # A replica that never was warm is not tried for ever either.
        for _ in range(2):
            until(supervisor, lambda: supervisor.replica is not None and supervisor.replica.known)
            deaths = supervisor.failures
            kill(supervisor, "memory")
            until(supervisor, lambda deaths=deaths: supervisor.failures > deaths)  # type: ignore[misc]
        assert supervisor.state == "failed"
        with pytest.raises(ReplicaError):
            ask(supervisor, 8)


@pytest.mark.heavy
def test_a_model_that_has_gone_meanwhile_is_an_error_for_who_asks(
    model: Path, no_leaks: Path, tmp_path: Path
) -> None:
    here, away = tmp_path / "here", tmp_path / "away"
    shutil.copytree(model, here)
    with supervised(here, no_leaks, FixedKeepAlive(0.0, 0.0)) as supervisor:
        until(supervisor, is_in(supervisor, "zero"))
        here.rename(away)
        client = ask(supervisor, 8)
        until(supervisor, lambda: client.done)
        assert isinstance(client.error, SourceNotFound)
        assert (supervisor.state, supervisor.error) == ("zero", None)
        away.rename(here)
        answers(supervisor, model)


def test_a_first_start_that_cannot_succeed_is_none(model: Path, no_leaks: Path) -> None:
    with pytest.raises(ColdframeError), supervised(model / "nowhere", no_leaks):
        pass


def test_a_damaged_model_fails_for_good(model: Path, no_leaks: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(model, bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "hidden_size": 12}))
    error = ""
    try:
        with supervised(bad, no_leaks) as supervisor:
            client = ask(supervisor, 8)
            until(supervisor, lambda: client.done)
            assert supervisor.state == "failed"
            assert supervisor.error is client.error is not None
            assert processes() == []
            error = str(client.error)
    except ColdframeError as wrong:  # whichever comes first
        error = str(wrong)
    assert "does not match config.json" in error
