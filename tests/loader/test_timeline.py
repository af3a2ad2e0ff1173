from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import pytest

from coldframe.loader.timeline import Recorder, Span, clock_shift_ns, now, process_start_ns
from tests.support import unavailable


def test_a_span_travels_whole() -> None:
    span = Span("weight_read", "memory", 1, 2, note="mapped in place", waits_for="disk")
    assert Span.from_wire(span.to_wire()) == span


def test_a_recorder_gives_each_span_once() -> None:
    recorder = Recorder("memory")
    start = now()
    with recorder.span("plan", note="small"):
        pass
    recorder.add("imports", start, start + 5)
    plan, imports = recorder.drain()
    assert (plan.name, plan.process, plan.note) == ("plan", "memory", "small")
    assert start <= plan.start_ns <= plan.end_ns <= now()
    assert imports == Span("imports", "memory", start, start + 5)
    assert recorder.drain() == []


def test_a_span_that_ends_in_an_error_is_recorded_too() -> None:
    recorder = Recorder("memory")
    with pytest.raises(ZeroDivisionError), recorder.span("plan"):
        raise ZeroDivisionError
    assert [span.name for span in recorder.drain()] == ["plan"]


def test_spans_of_all_threads_are_kept() -> None:
    recorder = Recorder("memory")

    def record() -> None:
        for n in range(500):
            recorder.add("x", n, n)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.drain()) == 2000


def test_a_calibrated_recorder_speaks_in_the_starters_clock() -> None:
    recorder = Recorder("clone")
    recorder.offset_ns = 1_000_000
    recorder.add("hooks", 5, 7)
    (span,) = recorder.drain()
    assert (span.start_ns, span.end_ns) == (1_000_005, 1_000_007)


def test_the_start_of_a_process_lies_between_its_spawn_and_its_first_line() -> None:
    code = (
        "import time; first = time.monotonic_ns()\n"
        "from coldframe.loader.timeline import process_start_ns\n"
        "print(process_start_ns(), first)"
    )
    before = now()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    start, first = map(int, done.stdout.split())
    tick = 10_000_000
    assert before - tick <= start <= first


def test_the_given_instant_of_the_exec_is_taken_if_it_can_be_true(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = now() - 1_000
    monkeypatch.setenv("COLDFRAME_EXEC_NS", str(given))
    assert process_start_ns() == given
    for nonsense in ("", "x", "-5", str(now() + 10**12), "1" if now() > 61 * 10**9 else "x"):
        monkeypatch.setenv("COLDFRAME_EXEC_NS", nonsense)
        assert abs(process_start_ns() - _start_by_ps()) < 1_500_000_000


def _start_by_ps() -> int:
    """The start of this process as psutil has it, to the second, in CLOCK_MONOTONIC."""
    age = time.time() - psutil.Process().create_time()
    return now() - int(age * 1e9)


_SHIFT = "from coldframe.loader.timeline import clock_shift_ns, now; print(clock_shift_ns(), now())"


def test_processes_of_one_time_namespace_have_one_clock() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHIFT], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[0]) == clock_shift_ns()


@pytest.mark.parametrize("seconds", [2_592_000, -100])
def test_the_clock_of_a_time_namespace_is_ahead_by_its_shift(seconds: int) -> None:
    if now() < 200 * 10**9 and seconds < 0:
        seconds = -1  # a clock cannot be set back beyond its start
    command = ["unshare", "--user", "--map-root-user", "--time", "--fork", "--monotonic"]
    done = subprocess.run(
        [*command, str(seconds), sys.executable, "-c", _SHIFT], capture_output=True, text=True
    )
    if done.returncode != 0 and "unshare" in done.stderr:
        unavailable(f"no time namespaces here: {done.stderr.strip()}")
    shift, clock = map(int, done.stdout.split())
    assert shift - clock_shift_ns() == seconds * 10**9
    assert abs(clock - (now() + seconds * 10**9)) < 60 * 10**9
