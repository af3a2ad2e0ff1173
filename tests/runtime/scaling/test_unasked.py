"""A schedule in time, what is counted of a model's life, the budget, and what is kept of it all."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.runtime.endpoint.lifelog import LifeLog
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.scaling.budget import Budget
from coldframe.runtime.scaling.histogram import HybridHistogram
from coldframe.runtime.scaling.late_writer import LateWriter
from coldframe.runtime.scaling.next import Costs, NextArrival
from coldframe.runtime.scaling.policies import LEVELS, FixedKeepAlive, Level, LivePolicy, Schedule
from coldframe.runtime.scaling.policy_state import PolicyState
from coldframe.runtime.scaling.unasked import Unasked, since_boot


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def logged(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


# -- a schedule in time ---------------------------------------------------------------------------


def timed(clock: Clock, every_s: float = 600.0, count: int = 20) -> Unasked:
    """Behind requests by a timer: warm ahead of the next from 530 s on."""
    unasked = Unasked(HybridHistogram(start_s=10.0), clock)
    for _ in range(count):
        unasked.asked()
        unasked.begin()
        clock.now += every_s
    unasked.asked()
    return unasked


def test_the_loop_is_woken_for_the_next_change_and_none_is_missed() -> None:
    clock = Clock()
    unasked = timed(clock)
    assert (unasked.due, unasked.change_s, unasked.idle_s) == ("warm", math.inf, 0.0)
    unasked.begin()
    assert (unasked.due, unasked.rising, unasked.change_s) == ("zero", None, 530.0)
    assert unasked.will_rise
    clock.now += 529
    unasked.begin()  # it is idle still
    assert (unasked.due, unasked.rising) == ("zero", None)
    assert unasked.change_s == pytest.approx(1.0)
    clock.now += unasked.change_s
    assert (unasked.due, unasked.rising) == ("warm", "warm")
    clock.now += unasked.change_s
    assert (unasked.due, unasked.rising, unasked.change_s) == ("zero", None, math.inf)
    assert not unasked.will_rise


class Written(FixedKeepAlive):
    """Has a schedule that the test has written."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._schedule = schedule


@given(
    st.lists(st.floats(0.01, 1e5), unique=True, max_size=6),
    st.lists(st.sampled_from(LEVELS), min_size=7, max_size=7),
)
def test_who_looks_when_it_is_told_to_sees_every_step(
    times: list[float], levels: list[Level]
) -> None:
    steps = tuple(zip([0.0, *sorted(times)], levels, strict=False))
    clock = Clock(0.0)
    unasked = Unasked(Written(Schedule(steps)), clock)
    unasked.begin()
    seen = [unasked.due]
    risen = [unasked.rising]
    while not math.isinf(unasked.change_s):
        # As exact as a clock is that is late by a little.
        clock.now += unasked.change_s + 1e-6
        seen.append(unasked.due)
        risen.append(unasked.rising)
    assert seen == [level for _, level in steps]
    for i in range(1, len(seen)):
        up = LEVELS.index(seen[i]) > LEVELS.index(seen[i - 1])
        assert risen[i] == (seen[i] if up else None)


def test_what_others_leave_it_and_what_it_forgoes_last_until_somebody_asks() -> None:
    clock = Clock()
    unasked = timed(clock)
    unasked.begin()
    clock.now += 535
    unasked.most = "zero"
    assert unasked.due == "zero"
    unasked.foregone = True
    assert unasked.rising is None
    assert not unasked.will_rise
    clock.now += 65
    unasked.asked()
    assert unasked.due == "warm"
    unasked.begin()
    clock.now += 535
    assert unasked.rising == "warm"


def test_what_only_goes_down_is_parked_for_as_long_as_it_says() -> None:
    clock = Clock()
    for parked_after, held_s in ((60.0, 0.0), (63.0, 0.0), (5.0, 0.0), (60.0, 300.0)):
        unasked = Unasked(FixedKeepAlive(60.0, 40.0), clock)
        unasked.asked()
        unasked.begin()
        clock.now += held_s
        if held_s:  # an image is made: only then the time begins
            unasked.hold()
            assert unasked.change_s == 60
        clock.now += parked_after
        unasked.parked()
        assert (unasked.due, unasked.change_s) == ("parked", pytest.approx(40.0))
        clock.now += unasked.change_s
        assert unasked.due == "zero"
    # What goes up again does so when the next request is expected, however late all else is.
    unasked = timed(clock)
    unasked.begin()
    clock.now += 100
    unasked.hold()
    unasked.parked()
    assert unasked.change_s == pytest.approx(430)


def test_it_tells_where_it_is_and_why() -> None:
    clock = Clock()
    unasked = timed(clock)
    told = unasked.document()
    assert (told["idle_s"], told["schedule"], told["next"]) == (None, None, None)
    unasked.begin()
    clock.now += 30
    told = unasked.document()
    assert told["name"] == "histogram"
    assert told["idle_s"] == 30
    assert told["next"] == {"in_s": 500.0, "level": "warm"}
    assert told["schedule"] == [[0.0, "zero"], [530.0, "warm"], [671.0, "zero"]]
    assert "20 idle times" in told["why"]


def test_a_policy_learns_of_time_in_which_nothing_ran() -> None:
    """The machine is suspended between two requests: the schedule stands, the idle time is long."""
    awake, real = Clock(0.0), Clock(50.0)
    policy = HybridHistogram()
    unasked = Unasked(policy, awake, real)
    unasked.asked()
    unasked.begin()
    awake.now, real.now = awake.now + 2, real.now + 7200
    assert unasked.idle_s == 2
    assert unasked.due == "warm"
    assert unasked.chance(7200) == pytest.approx(0.5)
    unasked.asked()
    assert policy.histogram.counts[720] == 1
    before = time.monotonic()
    assert since_boot() >= before  # which does not go on while the machine is suspended


def test_what_is_asked_all_the_time_is_worth_more_than_what_is_certain_to_be_asked() -> None:
    policies: list[Callable[[], LivePolicy]] = [
        lambda: HybridHistogram(start_s=2.0),
        lambda: NextArrival(Costs(penalty=200.0, parked=1.0)),
    ]
    for make in policies:
        often, hourly = Clock(), Clock()
        busy, seldom = Unasked(make(), often), Unasked(make(), hourly)
        for unasked, clock, every_s in ((busy, often, 5.0), (seldom, hourly, 3600.0)):
            for _ in range(60):
                unasked.asked()
                unasked.begin()
                clock.now += every_s
            unasked.asked()
            unasked.begin()
        # As it is due to be there: before the earliest that it may be asked.
        while seldom.rising != "warm":
            assert seldom.change_s < 3600
            hourly.now += seldom.change_s + 1e-6
        assert seldom.chance(3600) > 0.9
        for idle_s in (0.0, 1.0, 2.0, 1.9):
            often.now += idle_s
            held, ahead = busy.worth(2.0, there=True), seldom.worth(2.0, there=False)
            assert held > 2 * ahead, (make, idle_s)
        # Who has not come for long is worth nothing against who is about to come.
        often.now += 600
        assert busy.worth(2.0, there=True) < ahead


# -- what is counted ------------------------------------------------------------------------------


def test_each_second_is_one_of_a_state(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    life = LifeLog(Log(process="front"), "starting", 995.0, clock)
    for state, seconds in (("warm", 2), ("warm", 3), ("draining", 1), ("zero", 7)):
        life.enter(state)  # type: ignore[arg-type]
        clock.now += seconds
    told = life.document()["seconds"]
    want = {"starting": 5, "warm": 5, "draining": 1, "zero": 7, "parked": 0, "failed": 0}
    assert told == want
    assert sum(told.values()) == clock.now - 995
    lines = [(line.get("from"), line["to"], line["at_s"]) for line in logged(capfd)]
    assert lines == [
        (None, "starting", 995.0),
        ("starting", "warm", 1000.0),
        ("warm", "draining", 1005.0),
        ("draining", "zero", 1006.0),
    ]


def test_starts_are_counted_by_whom_they_were_for() -> None:
    life = LifeLog(Log(process="front", level="error"))

    def counted() -> list[int]:
        told = life.document()
        names = ("cold_starts", "wakes", "prewarmed", "prewarmed_used", "prewarmed_late")
        return [told[name] for name in (*names, "prewarmed_in_vain")]

    life.enter("starting")
    life.asked("zero")
    life.asked("starting")  # who waits with another one waits for the same start
    assert counted() == [1, 0, 0, 0, 0, 0]
    life.enter("warm")
    life.asked("warm")
    life.enter("parked")
    life.asked("parked")
    assert counted() == [1, 1, 0, 0, 0, 0]
    life.enter("zero")
    life.begin_ahead()
    life.enter("starting")
    life.asked("starting")
    assert counted() == [2, 1, 1, 0, 1, 0]
    life.enter("zero")
    life.begin_ahead()
    life.begin_ahead()
    life.enter("starting")
    life.enter("warm")
    life.asked("warm")
    life.gone()
    assert counted() == [2, 1, 2, 1, 1, 0]
    life.begin_ahead()
    life.gone()
    life.asked("zero")
    assert counted() == [3, 1, 3, 1, 1, 1]
    life.enter("zero")
    # Somebody has asked while it went, and was held; then it dies under somebody.
    life.enter("starting", asked=True)
    life.asked("starting")
    assert counted()[0] == 4
    life.enter("warm")
    life.enter("starting", asked=True)
    assert counted()[0] == 5
    life.enter("warm")
    life.enter("starting")
    assert counted()[0] == 5


# -- the budget -----------------------------------------------------------------------------------


def test_a_budget_is_used_by_who_is_held_and_comes_back_with_time() -> None:
    clock = Clock()
    budget = Budget(360.0, clock)
    assert budget.wait_s(1.0) == math.inf
    budget.hold(2)
    assert budget.wait_s(360 - 190) == pytest.approx(100)
    clock.now += 100
    budget.hold(0)  # from now on; there were two until now
    assert budget.left == pytest.approx(360 - 200 + 10)
    assert budget.wait_s(0.0) == math.inf
    clock.now += 100
    budget.hold(1)
    assert budget.left == pytest.approx(180)
    assert budget.wait_s(200.0) == 0
    budget.hold(0)
    clock.now += 1e6
    budget.hold(0)
    assert budget.left == 360


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 4))), st.floats(1, 4000))
def test_never_more_than_an_hours_budget_and_what_time_has_brought(
    spans: list[tuple[float, int]], per_hour: float
) -> None:
    clock = Clock()
    budget = Budget(per_hour, clock)
    held = 0.0
    for seconds, devices in spans:
        wanted = devices if budget.left > 0 else 0
        budget.hold(wanted)
        clock.now += seconds
        left = budget.left + seconds * per_hour / 3600
        held += min(seconds * wanted, left)
        budget.hold(0)
        assert 0 <= budget.left <= per_hour
    assert held <= per_hour + (clock.now - 1000) * per_hour / 3600 + 1e-6


# -- what is kept ---------------------------------------------------------------------------------


class Kept(PolicyState):
    """One whose file is written when it has been told to."""

    def save(self, models: Iterable[tuple[str, Unasked]]) -> None:
        super().save(models)
        assert self.flush(30)


def test_what_was_learned_goes_on_in_the_next_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, wall, clock = tmp_path / "state", Clock(1e9), Clock()
    before = timed(clock)
    before.begin()
    clock.now += 100
    keeper = Kept(str(path), Log(process="front"), wall)
    keeper.restore({"m": before})  # there is none yet
    first = path.read_bytes()  # so that it is known at once whether it can be written
    keeper.step([("m", before)])
    assert path.read_bytes() == first
    wall.now += 31
    keeper.step([("m", before)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    wall.now += 200
    later = Clock(5.0)
    after = Unasked(HybridHistogram(start_s=10.0), later)
    other = Unasked(HybridHistogram(), later)
    Kept(str(path), Log(process="front"), wall).restore({"m": after, "new": other})
    later.now += 300  # 600 s in all, of which 200 in no process
    after.asked()
    after.begin()
    assert after.document()["schedule"] == [[0.0, "zero"], [530.0, "warm"], [671.0, "zero"]]
    assert isinstance(after.policy, HybridHistogram)
    # What was seen an hour ago or two counts a little less.
    assert 20.8 < after.policy.histogram.counts[60] < 21
    assert isinstance(other.policy, HybridHistogram)
    assert other.policy.histogram.total == 0
    assert logged(capfd) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2, "saved_at": 1, "models": {}}',
        b'{"version": 1, "saved_at": "x", "models": {}}',
        b'{"version": 1, "saved_at": 1e9, "models": []}',
        b'{"version": 1, "saved_at": 1e9, "models": {"m": 3}}',
        b'{"version": 1, "saved_at": 1e9, "models": {"m": {"policy": "fixed"}}}',
        b'{"version": 1, "saved_at": 1, "models": {"m": {"policy": "histogram"}}}',
    ],
)
def test_a_file_that_cannot_be_used_is_a_warning(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    unasked = Unasked(HybridHistogram(), Clock())
    Kept(str(path), Log(process="front"), Clock(1e9)).restore({"m": unasked})
    assert unasked.policy.saved(0.0) == HybridHistogram().saved(0.0)
    if content.endswith(b"[]}"):
        return  # which is no model
    (line,) = logged(capfd)
    assert (line["level"], line["event"], line["path"]) == ("warning", "policy state", str(path))
    assert (tmp_path / "state.bad").read_bytes() == content
    assert json.loads(path.read_text())["models"]["m"]["policy"] == "histogram"


def test_what_is_said_of_models_that_are_not_served_here_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, wall, clock = str(tmp_path / "state"), Clock(1e9), Clock()
    replicas = {}
    for name in ("one", "two"):
        learned = timed(clock, 600.0 if name == "one" else 900.0)
        replicas[name] = (Kept(path, Log(process="front"), wall), {name: learned})
        keeper, models = replicas[name]
        keeper.save(models.items())
    for _ in range(2):
        wall.now += 31
        for keeper, models in replicas.values():
            keeper.step(models.items())
    wall.now += 100
    both = {name: Unasked(HybridHistogram(), clock) for name in ("one", "two")}
    Kept(path, Log(process="front"), wall).restore(both)
    for name, unasked in both.items():
        assert isinstance(unasked.policy, HybridHistogram)
        assert unasked.policy.histogram.total > 19, name
    # What nobody serves any more goes in the end.
    wall.now += 31 * 86400
    replicas["one"][0].save(replicas["one"][1].items())
    assert json.loads(Path(path).read_text())["others"] == {}
    assert logged(capfd) == []


def test_nobody_who_knows_the_name_has_it_written_elsewhere(tmp_path: Path) -> None:
    """In containers that share a volume all are process 1, and links may lie there."""
    path, victim = tmp_path / "state", tmp_path / "victim"
    victim.write_text("of somebody else")
    for name in (f"state.{os.getpid()}", f".state.{os.getpid()}.new", "state.1"):
        (tmp_path / name).symlink_to(victim)
    path.symlink_to(victim)
    Kept(str(path), Log(process="front"), Clock()).save([("m", timed(Clock()))])
    assert victim.read_text() == "of somebody else"
    assert not path.is_symlink()
    assert json.loads(path.read_text())["models"]["m"]["policy"] == "histogram"


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    script = (
        "import sys; from coldframe.loader.checkpoints.whole_file import write_whole\n"
        "for _ in range(40): write_whole(sys.argv[1], sys.argv[2].encode() * 50000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, path, word]) for word in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert path.read_text() in [word * 50000 for word in "abc"]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_where_it_cannot_be_written_is_said_when_it_begins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "state"
    Kept(str(path), Log(process="front"), Clock()).restore({"m": timed(Clock())})
    (line,) = logged(capfd)
    assert "cannot be written" in line["why"]
    # What is no file is left alone.
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        Kept(str(tmp_path / name), Log(process="front"), Clock()).restore({})
    assert (tmp_path / "folder").is_dir()
    assert len(logged(capfd)) >= 2


def test_where_it_cannot_be_written_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "state"
    keeper = Kept(str(path), Log(process="front"), Clock())
    models = [("m", Unasked(NextArrival(), Clock())), ("n", Unasked(FixedKeepAlive(), Clock()))]
    for _ in range(2):
        keeper.save(models)
    (line,) = logged(capfd)
    assert "cannot be written" in line["why"]
    path.parent.mkdir()
    keeper.save(models)
    assert set(json.loads(path.read_text())["models"]) == {"m", "n"}


def test_the_last_word_is_in_the_file_when_the_process_ends(tmp_path: Path) -> None:
    path, clock = tmp_path / "state", Clock()
    keeper = PolicyState(str(path), Log(process="front"), Clock(1e9))
    learned = timed(clock)
    for number in range(20):
        learned.asked()
        learned.begin()
        clock.now += number
        keeper.save([("m", learned)])
    keeper.close()
    assert json.loads(path.read_text())["models"]["m"] == json.loads(
        json.dumps(learned.policy.saved(clock.now))
    )
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_slow_disk_is_waited_for_by_its_thread_alone() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    written: list[int] = []
    wrong: list[Exception] = []

    def write(number: int) -> None:
        begun.set()
        assert goes_on.wait(60)
        written.append(number)

    writer = LateWriter(write, wrong.append, "test")
    assert writer.wait(0)  # there is nothing to wait for
    for number in range(5):
        writer.give(number)
        assert begun.wait(60)
    assert not writer.wait(0.01)
    goes_on.set()
    assert writer.wait(60)
    # One at a time, and what was waiting when something newer came is not written any more.
    assert written == [0, 4]
    writer.give(5)
    assert writer.wait(60)
    assert (written, wrong) == ([0, 4, 5], [])


def test_what_cannot_be_written_keeps_nobody_from_the_next() -> None:
    written: list[int] = []
    wrong: list[Exception] = []

    def write(number: int) -> None:
        written.append(1 // number)

    writer = LateWriter(write, wrong.append, "test")
    for number in (0, 1):
        writer.give(number)
        assert writer.wait(60)
    assert written == [1]
    assert [type(error) for error in wrong] == [ZeroDivisionError]
