"""Workers started and ended as there is work for them.

It looks once a second: what the router has to give, how many workers of the role there are, and
what the policy (`headcount`) says to that. A worker that is to go gets no more requests and ends
when it has none; should there be more to do by then, it stays. Before the first token nothing of
this happens: what the first token needs has been started, and the rest would only delay it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.headcount import Scaler
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.router import Router

__all__ = ["Employer", "Staffing"]


class Employer(Protocol):
    """Who has the workers."""

    workers: dict[str, WorkerProcess]

    def start(self, role: str) -> None:
        """Starts a worker.

        Raises:
            ColdframeError: It cannot be started.
        """
        ...

    def end(self, worker: WorkerProcess, why: str) -> None:
        """Ends a worker; what it has goes elsewhere."""
        ...


class Staffing:
    """The numbers of a replica's workers.

    Args:
        employer: Has them.
        router: Knows what there is to do.
        recorder: Gets a span for each change.
        options: The bounds, and what calls for more.
        clock: Monotonic seconds.
        stands_in_for: Whether an engine does the work of a role's workers, so that none is wanted.
    """

    def __init__(
        self,
        employer: Employer,
        router: Router,
        recorder: Recorder,
        options: ReplicaOptions,
        clock: Callable[[], float] = time.monotonic,
        stands_in_for: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._employer = employer
        self._stands_in_for = stands_in_for
        self._roles = list(options.scales)
        self._router = router
        self._recorder = recorder
        scaling = options.scaling
        shares = {"prefill": scaling.prefill_tokens, "decode": scaling.decode_blocks}
        self._scalers = {
            role: Scaler(scale, shares[role], scaling.down_s, clock)
            for role, scale in options.scales.items()
            if not scale.fixed
        }
        self._going = False
        # A start with other processes, whose first token is still to come.
        router.placement.share = None

    def forget(self, role: str) -> None:
        """There are to be no workers of a role, whatever there is to do."""
        self._scalers.pop(role, None)

    def begin(self) -> None:
        """The first token is out: from now on there are as many workers as there is work for."""
        if not self._going:
            self._going = True
            scaler = self._scalers.get("prefill")
            self._router.placement.share = None if scaler is None else scaler.share

    def tick(self) -> None:
        """Looks what there is to do; to be called about once a second."""
        if not self._going:
            return
        for role, scaler in self._scalers.items():
            if self._stands_in_for(role):
                continue
            staying = [w for w in self._of(role) if not self._router.is_leaving(w.name)]
            load = self._router.load(role)
            wanted = scaler.wanted(load, len(staying))
            if wanted != len(staying):
                note = f"{role}: {len(staying)} to {wanted}, to do: {load} of {scaler.share} each"
                self._recorder.add("scale", now(), note=note)
            if wanted > len(staying):
                self._add(role, wanted - len(staying))
            elif wanted < len(staying):
                self._retire(staying, len(staying) - wanted)
        for worker in list(self._employer.workers.values()):
            if self._router.is_leaving(worker.name) and self._router.is_free(worker.name):
                self._employer.end(worker, "there is not work enough for it")

    def replace(self, dead: WorkerProcess) -> bool:
        """Whether it is settled who takes a dead worker's place; else another is to be started.

        One that was to go needs nobody. For any other, one of those that were to go stays. And one
        that never came up, and was wanted only for so much work, is not tried again at once: it
        may be what there is no room for.
        """
        scaler = self._scalers.get(dead.role)
        if not dead.group and self._router.is_leaving(dead.name):
            return True
        if scaler is None or dead.group:
            return False
        if self._keep(dead.role):
            return True
        others = [worker for worker in self._of(dead.role) if worker.up]
        if self._going and not dead.up and len(others) >= scaler.scale.least:
            self._recorder.add("scale", now(), note=f"{dead.name} did not come up")
            scaler.failed()
            return True
        return False

    def counts(self) -> dict[str, dict[str, int]]:
        """By role: how many workers start, are up, and are to go."""
        return {role: self.counts_of(role) for role in self._roles}

    def counts_of(self, role: str) -> dict[str, int]:
        """The same of one role."""
        counts = {"starting": 0, "up": 0, "leaving": 0}
        for worker in self._of(role):
            leaving = self._router.is_leaving(worker.name)
            counts["leaving" if leaving else "up" if worker.up else "starting"] += 1
        return counts

    def _of(self, role: str) -> list[WorkerProcess]:
        workers = self._employer.workers.values()
        return [worker for worker in workers if worker.role == role and not worker.group]

    def _add(self, role: str, count: int) -> None:
        for _ in range(count):
            if self._keep(role):
                continue
            try:
                self._employer.start(role)
            except ColdframeError as error:  # those that there are go on
                self._recorder.add("scale", now(), note=f"{role}: none can be started: {error}")
                self._scalers[role].failed()
                return

    def _keep(self, role: str) -> bool:
        """Has one that was to go stay, where there is one."""
        for worker in self._of(role):
            if self._router.is_leaving(worker.name):
                self._router.retain(worker.name)
                return True
        return False

    def _retire(self, workers: list[WorkerProcess], count: int) -> None:
        """Has the least busy go; those that still start may be what the next second needs."""
        up = [worker for worker in workers if worker.up]
        count = min(count, len(up) - 1)
        for worker in sorted(up, key=lambda w: self._router.work_of(w.name))[: max(0, count)]:
            self._router.retire(worker.name)
