"""A resident replica: its processes are up, its weights in pinned RAM, and a request comes.

With the workers' contexts on the GPU, or with these, too, in host memory. Then nothing of the
replica is on the GPU but the memory service's own context, which is seen from outside: that the
memory is free is what the replica rests for. No start can beat bytes / bare rate; with its contexts
away it may take so much longer as is not hidden behind the weights' way back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from coldframe.benchmarks.gpu.copies import BARE
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import ask, options
from coldframe.benchmarks.gpu.report import Check, LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.timeline import Span, now
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica

__all__ = ["Rested", "measure", "rows", "waking"]

_RATIO = 1.10
_BEYOND_S = 0.3
_PARK_S = 20.0
"""The first time host memory is locked, and all bytes are copied there; in seconds."""
_FREED = 0.9
_OUTCOMES = {True: "passed", False: "failed"}
_NAMES = {
    "resident": "auto",
    "resident, contexts up": "off",
}
"""What is measured, and the `--checkpoint` of it."""


@dataclass(slots=True)
class Rested:
    """What was seen of a replica that rested, several times.

    Attributes:
        nbytes: Of its weights.
        ttft: Seconds from each question to its first token.
        back: Seconds until all weights were back.
        kept: Seconds until they had left.
        taken: Bytes of the GPU that the replica had at rest, the memory service's context included.
        freed: Bytes of the GPU that came free when it went to rest.
    """

    nbytes: int
    ttft: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    taken: int = 0
    freed: int = 0


def measure(report: Report, setting: Setting) -> None:
    """Parks replicas and asks them, several times: first one whose contexts leave the GPU, too."""
    model = report.earlier.need(MODEL)
    gpu = CudaDevice(setting.ordinal)
    try:
        for name, checkpoint in _NAMES.items():
            told = options(model, setting.device, checkpoint=checkpoint)
            try:
                _measure(report, setting, gpu, name, told)
            except LeftOut as error:
                report.left_out(name, str(error))
    finally:
        gpu.close()


def _measure(
    report: Report, setting: Setting, gpu: CudaDevice, name: str, told: ReplicaOptions
) -> None:
    free, away = gpu.available(), told.checkpoint != "off"
    with Replica(told) as replica:
        first = ask(replica, 8).wait(replica, setting.seconds)
        replica.run_until(lambda: replica.loaded)
        rested = Rested(int(replica.facts["weights_bytes"]))
        for number in range(setting.runs):
            up = gpu.available()
            rested.kept.append(_park(replica))
            contexts = _contexts(replica) if away else 0
            if number == 0:
                rested.freed, rested.taken = gpu.available() - up, free - gpu.available()
                report.answer(f"{name}: how the weights are kept", replica.resting.told["note"])
                report.check(_is_free(name, rested.freed, rested.nbytes, contexts))
            asked_ns = now()
            answer = ask(replica, 8, shift=number + 1).wait(replica, setting.seconds)
            rested.ttft.append(answer.ttft_s)
            replica.run_until(lambda: not replica.resting.left)
            rested.back.append(replica.resting.told["seconds"])
            # Again after each run: what there is when the time is up counts.
            for row in rows(name, rested, _bare(report), away=away):
                report.figure(row)
        again = ask(replica, 8).wait(replica, setting.seconds)
        report.answer(f"{name}: the last wake, by its stages", waking(replica.spans, asked_ns))
    same = first.tokens == again.tokens
    why = None if same else f"{first.tokens} before, {again.tokens} behind it"
    what = f"{name}: the same tokens before and after it was parked"
    report.check(Check(what, _OUTCOMES[same], why))


def rows(name: str, rested: Rested, bare: float | None, *, away: bool) -> list[Row]:
    """The figures of a replica that rested.

    Args:
        name: What is said before each.
        rested: What was seen of it.
        bare: The link's own rate in bytes per second, if that is known.
        away: Whether its contexts were away, too.
    """
    beyond = [a - b for a, b in zip(rested.ttft, rested.back, strict=True)]
    found = [
        Row(f"{name}: TTFT", rested.ttft, "s"),
        Row(f"  {name}: all weights back", rested.back, "s"),
        Row(f"{name}: TTFT - the weights' way back", beyond, "s", _BEYOND_S if away else None),
        Row(f"  {name}: parked for the first time", rested.kept[:1], "s"),
        Row(f"  {name}: left on the GPU at rest", [rested.taken / 1e6], "MB"),
    ]
    if rested.kept[1:]:
        found.append(Row(f"  {name}: parked again", rested.kept[1:], "s"))
    if bare is not None:
        least = rested.nbytes / bare
        found.append(Row(f"  {name}: bytes / bare rate", [least], "s"))
        ratios = [value / least for value in rested.ttft]
        ratio = f"{name}: TTFT / (bytes / bare rate)"
        found.append(Row(ratio, ratios, "ratio", None if away else _RATIO))
    return found


def _bare(report: Report) -> float | None:
    try:
        return report.earlier.median(BARE) * 1e9
    except LeftOut as error:
        report.left_out("resident: TTFT / (bytes / bare rate)", str(error))
        return None


def _park(replica: Replica) -> float:
    """Has the weights leave the GPU, and waits until they have; the seconds that it took.

    Raises:
        LeftOut: They stay.
    """
    replica.run_until(lambda: replica.idle)
    resting = replica.resting
    replica.park()
    deadline = time.monotonic() + _PARK_S
    while not resting.left:
        if replica.error is not None:
            raise replica.error
        if resting.told.get("why") or time.monotonic() > deadline:
            why = resting.told.get("why") or f"they were there after {_PARK_S:.0f} s"
            raise LeftOut(f"the weights do not leave the GPU: {why}")
        replica.poll(0.05)
    return float(resting.told["seconds"])


def _contexts(replica: Replica) -> int:
    """Waits until the workers' contexts are in host memory: how many bytes they had on the GPU.

    Raises:
        LeftOut: They stay.
    """
    contexts, deadline = replica.contexts, time.monotonic() + _PARK_S
    while not contexts.left:
        if contexts.why is not None:
            raise LeftOut(f"contexts do not leave the GPU: {contexts.why}")
        if time.monotonic() > deadline:
            raise LeftOut(f"contexts were on the GPU after {_PARK_S:.0f} s")
        replica.poll(0.05)
    return int(contexts.told["bytes"])


def waking(spans: Sequence[Span], since_ns: int) -> dict[str, str]:
    """What was done for a question and by whom: the seconds of each, those of layers together."""
    found: dict[str, float] = {}
    for span in spans:
        if span.start_ns < since_ns:
            continue
        name = f"{span.process} {span.name.partition('[')[0]}"
        found[name] = found.get(name, 0.0) + (span.end_ns - span.start_ns) / 1e9
    return {name: f"{seconds:.3f} s" for name, seconds in found.items()}


def _is_free(name: str, freed: int, nbytes: int, contexts: int) -> Check:
    """Whether the driver says that a GPU's memory is others'.

    Args:
        name: What was parked.
        freed: Bytes that came free.
        nbytes: Of its weights.
        contexts: Bytes of its workers' contexts that left, with all that was captured meanwhile:
            of that nobody knows when it came.
    """
    what = f"{name}: what was parked is not in the GPU's memory"
    if freed >= _FREED * nbytes + contexts // 2:
        return Check(what, "passed")
    return Check(what, "failed", f"{freed:,} bytes more are free, of {nbytes + contexts:,}")
