"""When a vLLM engine that decodes beside native workers is started, and who decodes meanwhile.

    native decodes ── first token ─> vLLM starts, out of the way ── up ─> vLLM decodes
         ^                                   │                               │
         └──────── it did not come up ───────┴──────────── it died ──────────┘

An engine takes some ten seconds to start, and a first token waits for none of them: it is started
when that is out, or when the weights are in and nobody asks. Once it is up it gets all that is
handed over. The native workers keep what they have, or give it back for the engine to go on with
it, and go when they have nothing left. They come back when it is gone, until there is another; what
does not come up, or dies, is tried again ever later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.router import Router
from coldframe.runtime.replica.staffing import Employer

__all__ = ["AGAIN_S", "Bridge"]

AGAIN_S = 5.0
"""After so long an engine that is gone is started again, in seconds; twice as long each time."""
_MOST_S = 600.0
_PROVEN_S = 60.0
"""An engine that was up for so long had come up well: its death says nothing of the next one."""


class Bridge:
    """The engine, or that there is none at the moment.

    Args:
        employer: Has the workers.
        router: Knows what they have to do.
        recorder: Gets a span for each start, and for the moment when decode changes hands.
        options: Whether there is to be one, and what becomes of running requests.
        warn: Told why there is none, where one is wanted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        employer: Employer,
        router: Router,
        recorder: Recorder,
        options: ReplicaOptions,
        warn: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        vllm = options.vllm
        self.wanted = vllm is not None and not vllm.alone
        """Whether there are both."""
        self.decodes = False
        """Whether the engine is up, and gets all that is handed over."""
        self.why: str | None = None
        """Why there is none at the moment, where that is no start."""
        self.counts: Counter[str] = Counter()
        """How often one took decode over (`takeover`), died (`died`), never came up
        (`failed_start`), and was a `clone` when it came up."""
        self._employer = employer
        self._router = router
        self._recorder = recorder
        self._natives = options.scales["decode"].least
        self._moves = vllm is not None and vllm.move
        self._warn = warn
        self._clock = clock
        self._again_s = AGAIN_S
        self._not_before = 0.0
        self._up_at = 0.0
        self._started_ns = 0
        self._hurried = False
        """Whether a request has cut this wait for the next start short already."""
        router.placement.natives_help = self.wanted

    def tick(self, *, calm: bool) -> None:
        """Starts an engine where one is due; to be called about once a second.

        Args:
            calm: Whether no first token has to wait for what is started now, and the replica is
                not at rest or about to be.
        """
        if not self.wanted:
            return
        if any(worker.role == "vllm" for worker in self._employer.workers.values()):
            if self.decodes:
                self._have_natives_go()
            return
        if self._clock() < self._not_before and not self._is_urgent():
            return
        if not calm:
            return
        self._hurried = self._clock() < self._not_before
        self._started_ns = now()
        try:
            self._employer.start("vllm")
        except ColdframeError as error:
            self.counts["failed_start"] += 1
            self._failed(str(error))

    def _is_urgent(self) -> bool:
        """Whether a request waits for an engine, and nobody has had one started out of turn.

        Where somebody has, in vain, those that wait are told: the next start may be minutes away.
        """
        if not self._router.waits_for("vllm"):
            return False
        if not self._hurried:
            return True
        wait_s = self._not_before - self._clock()
        error = ReplicaError(
            "only vLLM serves this, and it does not start at the moment",
            where="vllm",
            got=self.why,
            hint=f"It is tried again in {wait_s:.0f} s.",
        )
        error.retry_after_s = wait_s  # who comes then waits for that start
        self._router.refuse_waiting("vllm", error)
        return False

    def _have_natives_go(self) -> None:
        """Native workers that have come up meanwhile are to go, but for what vLLM cannot take."""
        natives = self._native_workers()
        if self._router.too_long_for_vllm and not natives:
            try:
                self._employer.start("decode")
            except ColdframeError as error:
                self._warn(f"no native worker for what is too long for vLLM: {error}")
        for native in natives:
            if native.up and not self._router.is_leaving(native.name):
                self._router.retire(native.name)

    def rest(self) -> None:
        """Nobody is to be served for a while: an engine that is not up yet is ended."""
        for worker in list(self._employer.workers.values()):
            if self.wanted and worker.role == "vllm" and not worker.up:
                self._employer.end(worker, "the replica is at rest")

    def is_up(self, worker: WorkerProcess) -> None:
        """An engine is up: decode is its from now on."""
        if worker.role != "vllm":
            return
        if worker.cloner is not None:
            self.counts["clone"] += 1
        if not self.wanted:
            return
        self.decodes, self.why, self._hurried = True, None, False
        self.counts["takeover"] += 1
        self._up_at = self._clock()
        moved = stay = 0
        for native in self._native_workers():
            self._router.retire(native.name)
            if self._moves:
                moved += self._router.move(native.name)
            stay += self._router.work_of(native.name) > 0
        note = f"native decode to {worker.name}"
        if self._moves:
            note += f"; requests asked to move: {moved}"
        elif stay:
            note += "; what is under way stays"
        self._recorder.add("takeover", now(), note=note)

    def died(self, worker: WorkerProcess, why: str) -> bool:
        """A worker is dead. Whether it was an engine beside native workers, which are back then.

        To be called before the router hears of it, so that its requests find somebody.
        """
        if not self.wanted or worker.role != "vllm":
            return False
        if self.decodes and self._clock() - self._up_at > _PROVEN_S:
            self._again_s = AGAIN_S
        self.counts["died" if self.decodes else "failed_start"] += 1
        self.decodes = False
        self._router.retire(worker.name)  # it is still there, and gets nothing more
        self._failed(why)
        natives = self._native_workers()
        for native in natives:
            if self._router.is_leaving(native.name):
                self._router.retain(native.name)
        for _ in range(self._natives - len(natives)):
            self._employer.start("decode")
        return True

    def stands_in_for(self, role: str) -> bool:
        """Whether an engine decodes in the place of a role's workers: none is to be started."""
        return self.decodes and role == "decode"

    def _failed(self, why: str) -> None:
        self.why = why
        self._recorder.add("vllm_failed", self._started_ns, note=why)
        self._warn(f"native workers decode, not vLLM, which is tried in {self._again_s:g} s: {why}")
        self._not_before = self._clock() + self._again_s
        self._again_s = min(2 * self._again_s, _MOST_S)

    def _native_workers(self) -> list[WorkerProcess]:
        workers = self._employer.workers.values()
        return [worker for worker in workers if worker.role == "decode" and not worker.group]
