"""A ring of host buffers between who reads bytes and the device that they go to.

    readers             slot.view <- source        any number of threads
    `ring-copy`         buffer    -> device        asynchronous copies, on one or two streams
    `ring-arrive`       event passed: arrived      a chunk is in, its buffer is free again

Readers begin before the device's context is up, since making one takes as long as reading the first
stages. Nothing can be copied without it, not even from memory that is not locked. So buffers are
ordinary memory, what has been read waits in them, and once they are full so do the readers; with
`connect` the copies begin, in the order in which buffers were handed in.

A buffer is locked (`cuMemHostRegister`) just before its first copy, by the copying thread: locking
all of them first would keep the first bytes waiting. It stays locked, for this load and the next.
Where the kernel will lock no more (a limit on locked memory) the rest is copied through buffers of
the driver's own: as right, and slower.

Memory is bounded by buffers x size, whatever is in flight. No thread spins: each sleeps on a lock,
or in the driver, which wakes it when an event has passed.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

from coldframe.loader.arena import PAGE, round_up
from coldframe.loader.devices.buffers import Buffer, make_buffers
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver, Stream
from coldframe.loader.devices.transfer import Job, Transfer
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceLost, ReplicaError

__all__ = ["Ring"]


class Ring:
    """Buffers and the two threads that empty them.

    An error of the driver ends it for good: with that error, for everybody who waits, and for who
    asks later.

    Args:
        buffers: How many. As many as there are readers, and two or more to be copied meanwhile.
        nbytes: Of each; rounded up to whole pages.
    """

    def __init__(self, buffers: int, nbytes: int) -> None:
        self.nbytes = round_up(nbytes, PAGE)
        self._buffers = make_buffers(buffers, self.nbytes)
        self._free = deque(self._buffers)
        self._queue: deque[Job] = deque()
        self._sending: Job | None = None
        self._flying: deque[Job] = deque()
        self._connecting = threading.Lock()
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._queued = threading.Condition(self._lock)
        self._flown = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._error: ColdframeError | None = None
        self._not_locked: str | None = None
        self._context: Context | None = None
        self._streams: list[Stream] = []
        self._copying: threading.Thread | None = None
        self._arriving: threading.Thread | None = None
        self._closed = False

    @property
    def error(self) -> ColdframeError | None:
        """What has ended it."""
        return self._error

    @property
    def note(self) -> str:
        """How the bytes are copied, for the timeline."""
        if self._not_locked is None:
            return "from locked memory"
        return f"from memory that could not be locked: {self._not_locked}"

    def connect(self, context: Context, *, streams: int = 1) -> None:
        """The device is up: from now on it is copied.

        Args:
            context: The device.
            streams: Queues that the copies alternate between: 1 or 2.

        Raises:
            ColdframeError: The ring has ended, or ends here since the device is not up after all.
        """
        try:
            with self._connecting:
                if self._error is not None:
                    raise self._error
                self._connect(context, streams)
        except ColdframeError as error:
            self.fail(error)
            raise

    def _connect(self, context: Context, streams: int) -> None:
        self._context = context
        context.bind()
        for _ in range(streams):
            self._streams.append(context.driver.stream())
        for buffer in self._buffers:
            buffer.event = context.driver.event()
        self._copying = threading.Thread(
            target=self._copy, args=(context,), name="ring-copy", daemon=True
        )
        self._arriving = threading.Thread(
            target=self._arrive, args=(context,), name="ring-arrive", daemon=True
        )
        self._copying.start()
        self._arriving.start()

    def fail(self, error: ColdframeError) -> None:
        """The device will not be up, or is no good any more: ends everything that waits."""
        with self._lock:
            self._end(error)
        with self._connecting:
            connected = self._arriving is not None
        if not connected:
            self._drop_everything()

    def transfer(self) -> Transfer:
        """A load's share of the ring."""
        return Transfer(self)

    def close(self) -> None:
        """Ends what is still on its way, and gives the buffers back; for good."""
        if self._closed:
            return
        self._closed = True
        self.fail(ReplicaError("the copies to the device are ended"))
        for thread in (self._copying, self._arriving):
            if thread is not None:
                thread.join()
        if self._context is not None:
            self._give_back(self._context)
        # Who has kept a view keeps the memory, and it goes with the view.
        self._free.clear()
        self._buffers.clear()

    def _give_back(self, context: Context) -> None:
        driver = context.driver
        try:
            context.bind()
            for buffer in self._buffers:
                if buffer.locked:
                    driver.unregister_host(buffer.address)
                if buffer.event is not None:
                    driver.destroy_event(buffer.event)
            for stream in self._streams:
                driver.destroy_stream(stream)
        except DeviceLost:
            return  # and with it all of that

    # -- for transfers ---------------------------------------------------------------------------

    def take(self, transfer: Transfer) -> Buffer:
        """A free buffer; waits for one."""
        with self._lock:
            while True:
                transfer.check()
                if self._free:
                    transfer.open += 1
                    return self._free.popleft()
                self._freed.wait()

    def hand_in(self, job: Job) -> None:
        """A buffer that was filled."""
        with self._lock:
            try:
                job.transfer.check()
            except ColdframeError:
                self._put_back(job.buffer)
                self._settle(job.transfer)
                raise
            self._queue.append(job)
            self._queued.notify()

    def take_back(self, buffer: Buffer, transfer: Transfer) -> None:
        """A buffer that was taken for nothing."""
        with self._lock:
            self._put_back(buffer)
            self._settle(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """See `Transfer.cancel`."""
        with self._lock:
            transfer.cancelled = True
            self._freed.notify_all()
            for job in [job for job in self._queue if job.transfer is transfer]:
                self._queue.remove(job)
                self._put_back(job.buffer)
                self._settle(transfer)
            while transfer.open:
                self._settled.wait()

    def _put_back(self, buffer: Buffer) -> None:
        # The one used last is the one that is in the cache, and locked already.
        self._free.appendleft(buffer)
        self._freed.notify()

    def _settle(self, transfer: Transfer) -> None:
        transfer.open -= 1
        self._settled.notify_all()

    def _end(self, error: ColdframeError) -> None:
        if self._error is None:
            self._error = error
        for condition in (self._freed, self._queued, self._flown):
            condition.notify_all()

    # -- the copying thread ----------------------------------------------------------------------

    def _copy(self, context: Context) -> None:
        turn = 0
        try:
            context.bind()
            while True:
                with self._lock:
                    while self._error is None and not self._queue:
                        self._queued.wait()
                    if self._error is not None:
                        return
                    job = self._sending = self._queue.popleft()
                self._send(context.driver, job, self._streams[turn % len(self._streams)])
                turn += 1
                with self._lock:
                    self._sending = None
                    self._flying.append(job)
                    self._flown.notify()
        except ColdframeError as error:
            with self._lock:
                self._end(error)
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            with self._lock:
                self._end(DeviceError("the copies to the device broke", got=repr(error)))

    def _send(self, driver: Driver, job: Job, stream: Stream) -> None:
        buffer = job.buffer
        if not buffer.locked and self._not_locked is None:
            try:
                driver.register_host(buffer.address, self.nbytes)
                buffer.locked = True
            except DeviceLost:
                raise
            except DeviceError as error:
                self._not_locked = error.got or error.what
        for copy in job.copies:
            to, host = job.transfer.base + copy.place, buffer.address + copy.offset
            if copy.count == 1:
                driver.copy_in(to, host, copy.length, stream)
            else:
                driver.copy_rows_in(to, host, copy.length, copy.count, copy.stride, stream)
        assert buffer.event is not None
        driver.record(buffer.event, stream)

    # -- the arriving thread ---------------------------------------------------------------------

    def _arrive(self, context: Context) -> None:
        try:
            context.bind()
            while (job := self._next_flying()) is not None:
                assert job.buffer.event is not None
                context.driver.wait(job.buffer.event)
                self._landed(job)
        except ColdframeError as error:
            with self._lock:
                self._end(error)
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            with self._lock:
                self._end(DeviceError("the copies to the device broke", got=repr(error)))
        # Nobody gets a buffer back before the device has let go of it.
        assert self._copying is not None
        self._copying.join()
        for stream in self._streams:
            with suppress(DeviceError):
                context.driver.synchronize(stream)
        self._drop_everything()

    def _next_flying(self) -> Job | None:
        with self._lock:
            while self._error is None and not self._flying:
                self._flown.wait()
            return self._flying[0] if self._error is None else None

    def _landed(self, job: Job) -> None:
        with self._lock:
            self._flying.popleft()
            self._put_back(job.buffer)
            told = not job.transfer.cancelled
        try:
            if told:
                job.arrived(None)
        finally:
            with self._lock:
                self._settle(job.transfer)

    def _drop_everything(self) -> None:
        """Tells everybody whose bytes are not there why they will not be."""
        with self._lock:
            error = self._error
            sending = [] if self._sending is None else [self._sending]
            jobs = [*self._flying, *sending, *self._queue]
            self._flying.clear()
            self._sending = None
            self._queue.clear()
            for job in jobs:
                self._put_back(job.buffer)
        for job in jobs:
            # Each is told, whatever another makes of it.
            with suppress(Exception):
                if not job.transfer.cancelled:
                    job.arrived(error)
            with self._lock:
                self._settle(job.transfer)
