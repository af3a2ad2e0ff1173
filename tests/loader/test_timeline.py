from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import pytest

from coldframe.loader.timeline import Recorder, Span, now, process_start_ns, time_namespace


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
    # Asked at 100 and answered at 140: the answer was read at 120 of this clock.
    recorder.calibrate(sent_ns=100, their_ns=1_000_120, received_ns=140)
    assert recorder.offset_ns == 1_000_000
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


def test_processes_of_one_machine_have_one_clock() -> None:
    code = "from coldframe.loader.timeline import time_namespace; print(time_namespace())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(time_namespace())
