"""A resident replica: memory service and workers are up with their contexts, weights in pinned RAM.

Nothing is in the GPU's memory. A request comes; the weights follow over the link, and the first
token behind them. No start can beat bytes / bare rate.
"""

from __future__ import annotations

import time
from importlib.util import find_spec

from coldframe.benchmarks.gpu.copies import BARE
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import ask, options
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.runtime.replica import Replica

__all__ = ["measure"]

_RATIO = 1.10
_AT_REST_S = 1.0


def measure(report: Report, setting: Setting) -> None:
    """Parks a replica and asks it, several times."""
    model = report.earlier.need(MODEL)
    told = options(model, setting.device)
    if find_spec("coldframe.loader.devices.pinned") is None:
        raise LeftOut("weights cannot be parked in pinned RAM yet")
    bare = report.earlier.median(BARE) * 1e9
    times: list[float] = []
    with Replica(told) as replica:
        first = ask(replica, 8).wait(replica, setting.seconds)
        nbytes = int(replica.facts["weights_bytes"])
        for number in range(setting.runs):
            _park(replica, setting.seconds)
            answer = ask(replica, 8, shift=number + 1).wait(replica, setting.seconds)
            times.append(answer.ttft_s)
        again = ask(replica, 8).wait(replica, setting.seconds)
    least = nbytes / bare
    report.answer("the same tokens before and after", first.tokens == again.tokens)
    report.figure(Row("resident: TTFT", times, "s"))
    report.figure(Row("  bytes / bare rate", [least], "s"))
    ratios = [value / least for value in times]
    report.figure(Row("resident: TTFT / (bytes / bare rate)", ratios, "ratio", _RATIO))


def _park(replica: Replica, seconds: float) -> None:
    """Has the weights leave the GPU, and waits until they have."""
    replica.run_until(lambda: replica.idle)
    replica.park()
    # Nothing tells when it is done but that there is nothing left to do.
    until = time.monotonic() + min(_AT_REST_S, seconds)
    while time.monotonic() < until:
        replica.poll(0.05)
