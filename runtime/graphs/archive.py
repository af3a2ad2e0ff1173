"""A decode worker's captured steps, kept for the next start, and had back from the last one.

A start that finds an archive captures one step, as any start does, once somebody has had a token.
That step's kernels lead to those of the others, which are put together from the archive: one
between two steps now and then, and all the rest while nobody asks. What the archive has not, or
what cannot be found here, is captured. Whatever comes from it is held against a computed step
before anybody is answered by it, as what was captured is (`engine/trial.py`).

A start that has found none saves what it has captured, once there is nothing left to capture and
nobody to answer: the front gets the bytes and writes them (`graphs/shelf.py`), since a worker may
run as a user who may write nowhere. For the same reason the archive is read before the worker
becomes that user.
"""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.arena import SCRATCH_BASE
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Stream
from coldframe.loader.devices.graph_calls import Executable, Graph, GraphCalls
from coldframe.loader.errors import DeviceError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.engine.buckets import Bucket
from coldframe.runtime.engine.graphs import StepGraphs
from coldframe.runtime.engine.trial import as_refusal
from coldframe.runtime.graphs.lookup import REGIONS, Shelved
from coldframe.snapshot.graph_file import encode
from coldframe.snapshot.graph_store import name_of
from coldframe.snapshot.graphs import GraphArchive, GraphBuilder, GraphSaver, Kernels

__all__ = ["KeptSteps", "Launch"]

_SCRATCH, _NUMBERS, _LOGITS = "scratch_bytes", "numbers", "logits"
"""What an archive notes beside its steps: how much of their own memory they compute in, and where
they look for their numbers and leave their logits."""

_EVERY = 8
"""Steps of which at most one has another put together behind it: somebody waits for the next."""

Launch = Callable[[Executable], None]
"""Runs a graph in the stream that steps are computed in."""


class KeptSteps:
    """Captured steps, of which some come from an archive, or go into one.

    Args:
        graphs: The steps.
        shelved: What there was of them.
        context: The GPU.
        launch: Runs a graph in the stream that steps are computed in.
        keep: Sends an archive away: its name and its bytes.
        recorder: Gets a span `graph_restore` for what was put together, and one `graph_save`.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        shelved: Shelved,
        context: Context,
        launch: Launch,
        keep: Callable[[str, bytes], None],
        recorder: Recorder,
    ) -> None:
        self._graphs = graphs
        self._shelved = shelved
        self._context = context
        self._launch = launch
        self._keep = keep
        self._recorder = recorder
        self._keys = {_key(bucket): bucket for bucket in graphs.buckets}
        archive = shelved.archive
        self._pending = [] if archive is None else [k for k in self._keys if k in archive.graphs]
        self._builder: GraphBuilder | None = None
        self._stream: Stream | None = None
        self._rebuilt = 0
        self._spent_ns = 0
        self._steps = 0
        self._saver: GraphSaver | None = None
        self._added: set[Bucket] = set()
        self._saved = bool(self._pending)
        if archive is None:
            recorder.add("graph_restore", now(), note=f"none: {shelved.why}")

    # -- as `StepGraphs` has it ------------------------------------------------------------------

    def between_steps(self) -> bool:
        """See `StepGraphs.between_steps`; now and then one is put together in place of that."""
        due = self._graphs.due
        kept = due is not None and _key(due) in self._pending
        if not self._pending or not self._graphs.captured or (due is not None and not kept):
            return self._graphs.between_steps()
        self._steps += 1
        if self._steps % _EVERY:
            return False
        if due is not None:  # the one in use first
            self._pending.remove(_key(due))
            self._pending.insert(0, _key(due))
        self._restore_one()
        return True

    def while_idle(self) -> bool:
        """See `StepGraphs.while_idle`; in the end what was captured is saved."""
        if self._pending and self._graphs.captured:
            self._restore_one()
            return True
        return self._graphs.while_idle() or self._save_one()

    def weights_leave(self) -> None:
        """See `StepGraphs.weights_leave`."""
        self._graphs.weights_leave()

    # -- back ------------------------------------------------------------------------------------

    def _restore_one(self) -> None:
        """Puts one step together; where that cannot be done at all, none is tried again."""
        started = now()
        try:
            if self._builder is None:
                self._begin()
            settled = self._graphs.captured.keys() | self._graphs.refused.keys()
            self._pending = [k for k in self._pending if self._keys[k] not in settled]
            if self._pending:
                self._put_together(self._keys[self._pending.pop(0)])
        except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
            self._pending.clear()
            self._saved = self._rebuilt > 0  # what is of no use may be written over
            note = f"failed: {as_refusal(error, 'steps of an archive')}"
            self._recorder.add("graph_restore", started, note=note)
            self._end()
            return
        self._spent_ns += now() - started
        if not self._pending:
            self._tell(started)
            self._end()

    def _begin(self) -> None:
        self._context.bind()
        self._check_places()
        archive = self._archive
        calls = GraphCalls(self._context.driver)
        kernels = Kernels(calls)
        for graph in _handles(self._graphs, calls):
            kernels.learn(graph)
        self._builder = GraphBuilder(self._context.driver, archive, REGIONS, kernels)
        self._stream = self._context.driver.stream()

    @property
    def _archive(self) -> GraphArchive:
        assert self._shelved.archive is not None
        return self._shelved.archive

    def _notes(self) -> dict[str, int]:
        """What an archive of these steps has to say beside them.

        Raises:
            DeviceError: Nothing that would hold in another process.
        """
        if self._graphs.dropped:
            raise DeviceError(
                "steps were given up before, and lie otherwise in memory since",
                hint="Steps are captured, and not kept.",
            )
        scratch = self._graphs.scratch
        if scratch is None or scratch[0] != SCRATCH_BASE:
            raise DeviceError(
                "what steps compute in is not where it is in other processes",
                expected=f"{SCRATCH_BASE:#x}",
                got="another place" if scratch is None else f"{scratch[0]:#x}",
                hint="Steps are captured, and not kept.",
            )
        numbers, logits = self._graphs.places
        return {_SCRATCH: scratch[1], _NUMBERS: numbers, _LOGITS: logits}

    def _check_places(self) -> None:
        """That steps find their numbers here: those that do not would write anywhere in the KV."""
        here, there = self._notes(), self._archive.notes
        for name in (_NUMBERS, _LOGITS):
            if here[name] != there[name]:
                raise DeviceError(
                    "steps were captured over another place",
                    where=name,
                    expected=f"{there[name]:#x}",
                    got=f"{here[name]:#x}",
                    hint="They are captured, and written again.",
                )

    def _put_together(self, bucket: Bucket) -> None:
        assert self._builder is not None
        assert self._stream is not None
        made = self._builder.build(_key(bucket), self._stream)
        if made is None:
            return
        try:
            self._context.driver.synchronize(self._stream)
            replay = _Rebuilt(self._launch, self._builder.destroy, made)
            self._graphs.install(bucket, replay, self._archive.notes[_SCRATCH])
        except BaseException:
            self._builder.destroy(made)
            raise
        self._rebuilt += 1

    def _tell(self, started: int) -> None:
        assert self._builder is not None
        note = f"{self._rebuilt} steps in {self._spent_ns / 1e6:.1f} ms"
        refused = {k: why for k, why in self._builder.refused.items() if k in self._keys}
        for key, why in list(refused.items())[:1]:
            note += f"; {len(refused)} not: {self._keys[key]}: {why}"
        self._recorder.add("graph_restore", started, note=note)

    def _end(self) -> None:
        if self._stream is not None:
            self._context.driver.destroy_stream(self._stream)
            self._stream = None

    # -- there -----------------------------------------------------------------------------------

    def _save_one(self) -> bool:
        """Reads one captured step, and sends the archive when there is none left."""
        captured = self._graphs.captured
        if self._saved or not captured:
            return False
        started = now()
        try:
            if self._saver is None:
                self._notes()
                self._context.bind()
                self._saver = GraphSaver(self._context.driver, REGIONS)
            left = [bucket for bucket in captured if bucket not in self._added]
            if left:
                self._added.add(left[0])
                handle = captured[left[0]].handle
                if handle is not None:
                    graph = self._context.driver.api.CUgraph(handle)
                    self._saver.add(_key(left[0]), graph)
                return True
            note = self._send(self._saver)
        except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
            note = f"failed: {as_refusal(error, 'captured steps')}"
        self._saved = True
        self._recorder.add("graph_save", started, note=note)
        return True

    def _send(self, saver: GraphSaver) -> str:
        archive = saver.archive(self._shelved.fingerprint, notes=self._notes())
        note = f"{len(archive.graphs)} steps"
        for key, why in list(archive.refused.items())[:1]:
            note += f"; {len(archive.refused)} not: {self._keys[key]}: {why}"
        if archive.graphs:
            raw = encode(archive)
            self._keep(name_of(archive.fingerprint), raw)
            note += f", {len(raw):,} bytes"
        return note


class _Rebuilt:
    """A step that was put together."""

    def __init__(self, launch: Launch, destroy: Launch, made: Executable) -> None:
        self._launch = launch
        self._destroy = destroy
        self._made = made

    def replay(self) -> None:
        self._launch(self._made)

    def close(self) -> None:
        self._destroy(self._made)


def _handles(graphs: StepGraphs, calls: GraphCalls) -> list[Graph]:
    found = [captured.handle for captured in graphs.captured.values()]
    return [calls.api.CUgraph(handle) for handle in found if handle is not None]


def _key(bucket: Bucket) -> str:
    return f"{bucket.sequences}x{bucket.blocks}"
