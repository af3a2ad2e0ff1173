"""A resident replica: memory service and workers are up, weights in pinned RAM.

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
"""The first time host memory is locked, and all bytes are copied there; in seconds."""
_FREED = 0.9
_OUTCOMES = {True: "passed", False: "failed"}


def measure(report: Report, setting: Setting) -> None:
    """Parks a replica and asks it, several times."""
    model = report.earlier.need(MODEL)
    told = options(model, setting.device)
    times: list[float] = []
    kept: list[float] = []
    back: list[float] = []
    gpu = CudaDevice(setting.ordinal)
    try:
        with Replica(told) as replica:
            first = ask(replica, 8).wait(replica, setting.seconds)
            replica.run_until(lambda: replica.loaded)
            nbytes = int(replica.facts["weights_bytes"])
            free = gpu.available()
            for number in range(setting.runs):
                kept.append(_park(replica))
                if number == 0:
                    report.answer("how the weights are kept", replica.resting.told["note"])
                    report.check(_is_free(gpu.available() - free, nbytes))
                answer = ask(replica, 8, shift=number + 1).wait(replica, setting.seconds)
                times.append(answer.ttft_s)
                replica.run_until(lambda: not replica.resting.left)
                back.append(replica.resting.told["seconds"])
            again = ask(replica, 8).wait(replica, setting.seconds)
    finally:
        gpu.close()
    same = first.tokens == again.tokens
    why = None if same else f"{first.tokens} before, {again.tokens} behind it"
    report.check(Check("the same tokens before and after it was parked", _OUTCOMES[same], why))
    report.figure(Row("resident: TTFT", times, "s"))
    report.figure(Row("  resident: all weights back", back, "s"))
    report.figure(Row("  resident: parked for the first time", kept[:1], "s"))
    report.figure(Row("  resident: parked again", kept[1:], "s"))
    ratio = "resident: TTFT / (bytes / bare rate)"
    try:
        least = nbytes / (report.earlier.median(BARE) * 1e9)
    except LeftOut as error:
        report.left_out(ratio, str(error))
        return
    report.figure(Row("  resident: bytes / bare rate", [least], "s"))
    report.figure(Row(ratio, [value / least for value in times], "ratio", _RATIO))


def _park(replica: Replica) -> float:
    """Has the weights leave the GPU, and waits until they have; the seconds that it took.

    Raises:
        LeftOut: They stay.
    """
    replica.run_until(lambda: replica.idle)
    resting = replica.resting
    replica.park()
    deadline = time.monotonic() + _PARK_S
    while not resting.left or replica.contexts.leaving:
        if replica.error is not None:
            raise replica.error
        if resting.told.get("why") or time.monotonic() > deadline:
            why = resting.told.get("why") or f"they were there after {_PARK_S:.0f} s"
            raise LeftOut(f"the weights do not leave the GPU: {why}")
        replica.poll(0.05)
    return float(resting.told["seconds"])


def _is_free(freed: int, nbytes: int) -> Check:
    """Whether the driver says that a GPU's memory is others'."""
    name = "a parked replica's weights are not in the GPU's memory"
    if freed >= _FREED * nbytes:
        return Check(name, "passed")
    return Check(name, "failed", f"{freed:,} bytes more are free, of {nbytes:,}")
