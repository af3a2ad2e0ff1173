"""Weights that leave a device while nobody asks, and come back when somebody does.

A replica at rest can be *resident*: the memory service and the workers are up with their contexts,
the weights are in locked host memory (`devices.pinned`), and the device's memory is others'. What
the next request waits for is the bytes over the link, and nothing else.

    front            memory service                 workers
    park ──────────> keep the bytes
                     detach ──────────────────────> let go of the weights between two steps
                     all have, or are dead <─────── detached
         <── parked  give the device's memory back
    wake ──────────> take memory, where it was
                     attach ──────────────────────> map it at the same address
                     copy, stage by stage ── stage ─> run layer i when stage i is in
         <─── woken  all is in

The rules that make this safe:

- Each `detach` is answered once, and no `attach` is sent to a worker before that. So neither
  crosses the other, however fast orders follow one another.
- A worker that lets go takes every stage for not ready from then on: a request that comes before
  its weights waits for them as in a cold start.
- A worker that comes while the weights are away gets the plan, and its segments when they are back.
- The device's memory is given back only when all bytes are kept *and* nobody has it attached. What
  is kept stays kept, since weights do not change: they leave for the second time at once. They can
  be kept ahead, while requests are answered (`keep`).
- What was ordered last counts. Nobody is told more than that a state was reached, or why not.

What can go wrong: no host memory (the weights stay, `parked` says why); no memory of the device
when they are to come back (`woken` says so; it may be ordered again, and they are still kept); a
copy that cannot be made (likewise); and the loss of the device, which ends the load as ever.

On the CPU the weights are where they stay. No worker lets go, and each order is met at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Literal, Protocol, TypeVar

from coldframe.loader.devices.parked import Check, ParkedWeights
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceLost, ReplicaError

__all__ = ["Parking", "ParkingService"]

Worker = TypeVar("Worker", bound=Hashable)
_Hold = Literal["attached", "asked", "out"]
_Worker = TypeVar("_Worker", bound=Hashable, contravariant=True)


class ParkingService(Protocol[_Worker]):
    """What parking has done by the process that it is in; all of it by its loop."""

    def detach(self, worker: _Worker) -> None:
        """Has a worker let go of the weights. It answers, which is `Parking.detached`, or dies."""
        ...

    def attach(self, worker: _Worker) -> None:
        """Gives a worker the segments."""
        ...

    def stage(self, worker: _Worker, stage: int) -> None:
        """Tells a worker that a stage is in."""
        ...

    def parked(self, error: ColdframeError | None) -> None:
        """The device's memory is free; or why it is not, and the weights stay."""
        ...

    def woken(self, error: ColdframeError | None) -> None:
        """The weights are in; or why they are not, and it may be tried again."""
        ...

    def lost(self, error: DeviceLost) -> None:
        """The device is gone, and with it all that was on it."""
        ...


class _Cancelled(Exception):
    """Ends a job early."""


class _Job:
    """Something that takes long, done by a thread of its own."""

    def __init__(self, name: str, work: Callable[[Check], None]) -> None:
        self.cancelled = False
        """Whether it was cancelled, and ended by that."""
        self.error: ColdframeError | None = None
        self._work = work
        self._stop = threading.Event()
        self._ended: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name=f"park-{name}", daemon=True)

    def start(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._thread.start()

    def cancel(self) -> None:
        self._stop.set()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work(self._check)
        except _Cancelled:
            self.cancelled = True
        except ColdframeError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            self.error = DeviceError("the weights' way to or from rest broke", got=repr(error))
        self._ended()

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Cancelled


class Parking(Generic[Worker]):
    """Where the weights of one load are, and where they are wanted.

    All methods are the loop's. At first all of the weights are in.

    Args:
        weights: The device's.
        stages: How many there are.
        service: Does what is to be done outside.
        post: Has something done by the loop; any thread may call it.
        workers: Those that have the weights attached.

    Attributes:
        ready: The stages that are in.
    """

    def __init__(
        self,
        weights: ParkedWeights,
        stages: int,
        service: ParkingService[Worker],
        post: Callable[[Callable[[], None]], None],
        workers: Iterable[Worker] = (),
    ) -> None:
        self.ready = list(range(stages))
        self._stages = stages
        self._weights = weights
        self._service = service
        self._post = post
        self._workers: dict[Worker, _Hold] = dict.fromkeys(workers, "attached")
        self._place: Literal["here", "leaving", "away"] = "here"
        self._whole = True
        """Whether all bytes are on the device, while it has memory for them."""
        self._wanted: Literal["here", "away"] = "here"
        self._keep = False
        """Whether they are to be kept ahead."""
        self._job: _Job | None = None
        self._lost = False
        self._closed = False

    @property
    def away(self) -> bool:
        """Whether the device's memory is others'."""
        return self._place == "away" and self._job is None

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return self._job is not None or self._place == "leaving"

    @property
    def note(self) -> str:
        """How the weights are kept, for the timeline."""
        return self._weights.note

    # -- orders ----------------------------------------------------------------------------------

    def keep(self) -> None:
        """Has the bytes kept ahead, so that they can leave at once; who computes goes on."""
        self._keep = True
        self._step()

    def park(self) -> None:
        """Has the weights leave."""
        if self._lost:
            return
        self._wanted = "away"
        if self._job is None and self._place == "away":
            self._service.parked(None)
            return
        if not self._whole and self._job is not None:
            self._job.cancel()
        self._step()

    def wake(self) -> None:
        """Has the weights come back."""
        if self._lost:
            return
        self._wanted = "here"
        if self._place == "here" and self._whole:
            # Bytes that are being kept may go on to be: it is in nobody's way.
            self._service.woken(None)
            return
        self._step()

    # -- workers ---------------------------------------------------------------------------------

    def came(self, worker: Worker) -> bool:
        """A worker has come. Whether it may have the segments now; else it gets them later."""
        let_in = self._let_in
        self._workers[worker] = "attached" if let_in else "out"
        return let_in

    def detached(self, worker: Worker) -> None:
        """A worker has let go.

        Raises:
            ReplicaError: It was not asked to.
        """
        if self._workers.get(worker) != "asked":
            raise ReplicaError("a worker let go of weights that it was to keep")
        self._workers[worker] = "out"
        if self._let_in:
            self._attach(worker)
        self._step()

    def gone(self, worker: Worker) -> None:
        """A worker is dead, which is as good as letting go."""
        if self._workers.pop(worker, None) is not None:
            self._step()

    def close(self) -> None:
        """Ends what is under way. The weights are their owner's to close."""
        if self._closed:
            return
        self._closed = True
        if self._job is not None:
            self._job.cancel()
            self._job.join()

    @property
    def _let_in(self) -> bool:
        return self._place == "here" or not self._weights.leaves

    # -- what there is to do ---------------------------------------------------------------------

    def _step(self) -> None:
        if self._job is not None or self._lost or self._closed:
            return
        if self._place == "here":
            self._step_here()
        elif self._place == "leaving":
            self._step_leaving()
        elif self._wanted == "here":
            self._return()

    def _step_here(self) -> None:
        if not self._whole and self._wanted == "here":
            self._start("bring", self._bring, self._brought)
        elif not self._weights.kept:
            if self._keep or self._wanted == "away":
                self._start("keep", self._weights.keep, self._kept)
        elif self._wanted == "away":
            self._let_go()

    def _let_go(self) -> None:
        """Has all workers let go of the weights."""
        if not self._weights.leaves:
            self._place = "away"
            self._service.parked(None)
            return
        self._place = "leaving"
        self.ready.clear()
        asked = [worker for worker, how in self._workers.items() if how == "attached"]
        # All of them first: one may turn out to be dead while another is told.
        for worker in asked:
            self._workers[worker] = "asked"
        for worker in asked:
            self._service.detach(worker)
        self._step()

    def _step_leaving(self) -> None:
        if self._wanted == "here" and self._whole:
            # They have not left yet. Who has let go already gets them again.
            self._place = "here"
            self.ready += range(self._stages)
            self._attach_all()
            self._service.woken(None)
        elif "asked" not in self._workers.values():
            self._start("leave", lambda check: self._weights.leave(), self._left)

    def _return(self) -> None:
        if self._weights.leaves:
            self._start("take", lambda check: self._weights.come_back(), self._taken)
        else:
            self._place = "here"
            self._service.woken(None)

    def _attach_all(self) -> None:
        for worker in [worker for worker, how in self._workers.items() if how == "out"]:
            self._attach(worker)

    def _attach(self, worker: Worker) -> None:
        self._workers[worker] = "attached"
        self._service.attach(worker)
        for stage in list(self.ready):
            self._service.stage(worker, stage)

    # -- what takes long -------------------------------------------------------------------------

    def _start(
        self, name: str, work: Callable[[Check], None], done: Callable[[_Job], None]
    ) -> None:
        job = self._job = _Job(name, work)
        job.start(lambda: self._post(lambda: self._ended(job, done)))

    def _ended(self, job: _Job, done: Callable[[_Job], None]) -> None:
        job.join()
        self._job = None
        if self._closed:
            return
        if isinstance(job.error, DeviceLost):
            self._lost = True
            self._service.lost(job.error)
            return
        done(job)
        self._step()

    def _kept(self, job: _Job) -> None:
        if job.error is not None:
            self._keep = False
            self._stay(job.error)

    def _left(self, job: _Job) -> None:
        self._place, self._whole = "away", False
        if job.error is not None:
            self._stay(job.error)
        elif self._wanted == "away":
            self._service.parked(None)

    def _stay(self, error: ColdframeError) -> None:
        """They cannot leave."""
        if self._wanted == "away":
            self._wanted = "here"
            self._service.parked(error)

    def _taken(self, job: _Job) -> None:
        if job.error is None:
            self._place = "here"
            if self._wanted == "here":
                self._attach_all()
        elif self._wanted == "here":
            self._stay_away(job.error)
        else:
            self._service.parked(None)

    def _bring(self, check: Check) -> None:
        self._weights.bring(lambda stage: self._post(lambda: self._stage_is_in(stage)), check)

    def _stage_is_in(self, stage: int) -> None:
        if self._closed or stage in self.ready:
            return
        self.ready.append(stage)
        for worker in [worker for worker, how in self._workers.items() if how == "attached"]:
            self._service.stage(worker, stage)

    def _brought(self, job: _Job) -> None:
        self._whole = job.error is None and not job.cancelled
        if self._wanted == "here":
            if self._whole:
                self._service.woken(None)
            elif job.error is not None:
                self._stay_away(job.error)

    def _stay_away(self, error: ColdframeError) -> None:
        """They cannot come back; what is there already leaves again."""
        self._wanted = "away"
        self._service.woken(error)
