"""Open questions about a machine, each asked in a process of its own: some cost their GPU context.

A question that cannot be answered is left out with the reason; it never keeps the others from being
asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.benchmarks.within import run_within

__all__ = ["PROBES", "Probe", "answer", "ask_all", "measure"]

_QUESTIONS = "coldframe.benchmarks.gpu.questions"
_TORCH = "coldframe.benchmarks.gpu.torch_questions"
_CHECKPOINT = "coldframe.benchmarks.gpu.checkpoint_questions"
_CRIU = "coldframe.benchmarks.gpu.criu_questions"
_GRAPH = "coldframe.benchmarks.gpu.graph_questions"


@dataclass(frozen=True, slots=True)
class Probe:
    """A question.

    Args:
        question: For people.
        name: The function that answers it.
        seconds: How long it may take.
        times: In how many processes it is asked. The numbers of several are figures.
        module: What has that function.
    """

    question: str
    name: str
    seconds: float = 20.0
    times: int = 1
    module: str = _QUESTIONS


PROBES = (
    Probe("what the driver can do", "driver_calls"),
    Probe("checkpoint of torch's context", "checkpoint_torch", module=_CHECKPOINT),
    Probe(
        "checkpoint of one that has let its imports go",
        "checkpoint_unmapped",
        module=_CHECKPOINT,
    ),
    Probe(
        "checkpoint with memory of its own and a live graph over it",
        "checkpoint_private",
        module=_CHECKPOINT,
    ),
    Probe("CRIU", "criu", module=_CRIU),
    Probe("CRIU with memory of the GPU", "criu_private", module=_CRIU),
    Probe("CRIU with torch's context", "criu_context", 40.0, module=_CRIU),
    Probe("the nodes of our captured steps", "nodes_of_ours", 30.0, module=_GRAPH),
    Probe("a capture in memory of ours", "memory_of_ours", module=_GRAPH),
    Probe("checkpoint by a fresh helper", "checkpoint_by_a_fresh_helper", module=_CHECKPOINT),
    Probe("checkpoint of one that has imports mapped", "checkpoint_mapped", module=_CHECKPOINT),
    Probe("checkpoint with locked host memory", "checkpoint_pinned", module=_CHECKPOINT),
    Probe("checkpoint with a captured graph", "checkpoint_graph", module=_CHECKPOINT),
    Probe("checkpoint of one process twice", "checkpoint_twice", module=_CHECKPOINT),
    Probe("restore with each GPU named for itself", "checkpoint_pairs", module=_CHECKPOINT),
    Probe("CRIU with a captured graph", "criu_graph", 40.0, module=_CRIU),
    Probe("CRIU without a GPU", "criu_plain", module=_CRIU),
    Probe("seconds of a fresh process's start", "start", times=3),
    Probe("are the arenas' addresses to be had in a fresh process", "addresses"),
    Probe("and where torch was there first", "addresses_with_torch"),
    Probe("what a copy into a read-only mapping does", "read_only_copy"),
    Probe("what a kernel's write into a read-only mapping does", "read_only_kernel"),
    Probe("may an imported handle be released right after it is mapped", "released"),
    Probe("what locking host memory takes", "pages"),
    Probe("does torch take our context", "same_context", module=_TORCH),
    Probe("seconds of a worker's first work", "first_work", times=2, module=_TORCH),
    Probe("varlen_attn", "varlen", module=_TORCH),
    Probe("the nodes of a captured step", "graph", module=_TORCH),
)
"""Those first that most depends on, should there not be time for all."""


def measure(report: Report, setting: Setting) -> None:
    """Asks all of them, as far as there is time."""
    ask_all(report, setting, PROBES)


def ask_all(report: Report, setting: Setting, probes: tuple[Probe, ...]) -> None:
    """Asks questions in their order until the time is up.

    Args:
        report: Where the answers go.
        setting: The GPU, and how long all of it may take.
        probes: The questions.
    """
    deadline = time.monotonic() + setting.seconds - 2.0
    for probe in probes:
        answers: list[Any] = []
        try:
            for _ in range(probe.times):
                left = deadline - time.monotonic()
                answers.append(answer(probe, setting.device, min(probe.seconds, left)))
        except LeftOut as error:
            report.left_out(probe.question, str(error))
        else:
            _tell(report, probe, answers)


def _tell(report: Report, probe: Probe, answers: list[Any]) -> None:
    if probe.times == 1:
        report.answer(probe.question, answers[0])
        return
    for name in answers[0]:
        runs = [float(answer[name]) for answer in answers]
        report.figure(Row(f"{probe.question}: {name}", runs, "s"))


def answer(probe: Probe, device: str, seconds: float) -> Any:
    """Asks one question in a process of its own.

    Args:
        probe: The question.
        device: The GPU.
        seconds: How long that may take.

    Raises:
        LeftOut: There is no answer; it says why.
    """
    if seconds <= 0:
        raise LeftOut("no time was left")
    command = [sys.executable, "-P", "-m", _QUESTIONS, probe.module, probe.name, device]
    try:
        done = run_within(command, seconds)
    except subprocess.TimeoutExpired as error:
        raise LeftOut(f"no answer within {seconds:.3g} s") from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = " ".join(said[-1].split()) if said else "without a word"
        raise LeftOut(f"exit status {done.returncode}: {why}")
    return json.loads(lines[-1])
