"""The clock that stands still while its process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from coldframe.loader.awake import AwakeClock


def test_it_goes_with_the_time_and_counts_a_leap_as_a_short_gap() -> None:
    moment = 100.0
    clock = AwakeClock(lambda: moment, most_s=2.0)
    assert clock() == 0.0
    for _ in range(5):
        moment += 1.5
        clock()
    assert clock() == 7.5
    moment += 3600.0
    assert clock() == 9.5
    moment += 0.5
    assert clock() == 10.0


def test_a_process_that_is_stopped_does_not_age() -> None:
    code = (
        "import sys, time\n"
        "from coldframe.loader.awake import AwakeClock\n"
        "clock, began = AwakeClock(most_s=0.5), time.monotonic()\n"
        "for line in sys.stdin:\n"
        "    print(clock(), time.monotonic() - began, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ages() -> tuple[float, float]:
            print(file=process.stdin, flush=True)
            awake, real = process.stdout.readline().split()  # type: ignore[union-attr]
            return float(awake), float(real)

        awake, real = ages()
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGCONT)
        later, after = ages()
        process.stdin.close()
    assert after - real >= 1.0
    assert later - awake <= 0.5
