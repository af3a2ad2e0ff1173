"""A resident replica: memory service and workers are up with their contexts, weights in pinned RAM.

Nothing of the model is in the GPU's memory, which is seen from outside: that it is free is what the
replica rests for. A request comes; the weights follow over the link, and the first token behind
them. No start can beat bytes / bare rate.
"""

from __future__ import annotations

import time

from coldframe.benchmarks.gpu.copies import BARE
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import ask, options
from coldframe.benchmarks.gpu.report import Check, LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.runtime.replica import Replica

__all__ = ["measure"]

_RATIO = 1.10
_PARK_S = 20.0
"""The first time host memory is locked, and all bytes are copied there."""
_FREED = 0.9
_OUTCOMES = {True: "passed", False: "failed"}


def measure(report: Report, setting: Setting) -> None:
    """Parks a replica and asks it, several times."""
    model = report.earlier.need(MODEL)
    told = options(model, setting.device)
    times: list[float] = []
    gpu = CudaDevice(setting.ordinal)
    try:
        with Replica(told) as replica:
            first = ask(replica, 8).wait(replica, setting.seconds)
            replica.run_until(lambda: replica.loaded)
            nbytes = int(replica.facts["weights_bytes"])
            for number in range(setting.runs):
                _park(replica, gpu, nbytes)
                answer = ask(replica, 8, shift=number + 1).wait(replica, setting.seconds)
                times.append(answer.ttft_s)
            again = ask(replica, 8).wait(replica, setting.seconds)
    finally:
        gpu.close()
    same = first.tokens == again.tokens
    why = None if same else f"{first.tokens} before, {again.tokens} behind it"
    report.check(Check("the same tokens before and after it was parked", _OUTCOMES[same], why))
    report.figure(Row("resident: TTFT", times, "s"))
    ratio = "resident: TTFT / (bytes / bare rate)"
    try:
        least = nbytes / (report.earlier.median(BARE) * 1e9)
    except LeftOut as error:
        report.left_out(ratio, str(error))
        return
    report.figure(Row("  resident: bytes / bare rate", [least], "s"))
    report.figure(Row(ratio, [value / least for value in times], "ratio", _RATIO))


def _park(replica: Replica, gpu: CudaDevice, nbytes: int) -> None:
    """Has the weights leave the GPU, and waits until they have.

    Raises:
        LeftOut: They stay.
    """
    replica.run_until(lambda: replica.idle)
    wanted = gpu.available() + int(_FREED * nbytes)
    replica.park()
    deadline = time.monotonic() + _PARK_S
    while gpu.available() < wanted:
        if time.monotonic() > deadline:
            raise LeftOut(f"parked weights were still in the GPU's memory after {_PARK_S:.0f} s")
        if replica.error is not None:
            raise replica.error
        replica.poll(0.05)
