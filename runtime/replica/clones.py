"""Following clones: what came of each that was asked for, and whether it may go on.

Whoever lost a clone starts its worker in the next best way: what a request waits for is only put
off by that, never lost.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable
from functools import partial
from typing import Any

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import now
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.replica.tiers import Tiers
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.model_key import ModelKey

__all__ = ["FETCH_S", "Clones"]

FETCH_S = 20.0
"""How long an image may take to come over a network, in seconds."""
_LAST_WORDS_NS = 500_000_000


class Clones:
    """The clones of one replica, or of one group of its workers.

    Args:
        tiers: The ways to start workers that are left.
        selector: Gets the sockets to those who make clones, with what to call as their data.
        lost: Called with the name of a worker that will not come, and why.
        started: Called with the name of a worker that is there, and runs its hooks.
        ready: Called when it is known what clones are made of.
        spans: Takes the spans of the processes that make clones.
    """

    def __init__(
        self,
        tiers: Tiers,
        selector: selectors.BaseSelector,
        *,
        lost: Callable[[str, ColdframeError], None],
        started: Callable[[str], None],
        ready: Callable[[], None],
        spans: Callable[[list[list[Any]]], None],
    ) -> None:
        self.tiers = tiers
        self._selector = selector
        self._lost = lost
        self._started = started
        self._ready = ready
        self._spans = spans
        self._pending: dict[str, tuple[Cloner, int]] = {}
        """Clones that have not said a word: who makes them, and since when."""
        self._prepared: dict[Cloner, int] = {}
        """Since when those who make clones can."""
        for cloner in tiers.cloners:
            self._watch(cloner)

    def end_idle(self) -> None:
        """Ends those who have made no clone yet: while they read an image, they are deaf."""
        for cloner in self.tiers.cloners:
            if cloner.image is None:
                cloner.close()

    def close(self) -> None:
        """Ends those who make clones, and every clone with them."""
        self._pending.clear()
        self.tiers.close()

    def added(self, worker: WorkerProcess) -> None:
        """A worker was started."""
        if worker.cloner is not None:
            self._pending[worker.name] = (worker.cloner, worker.child.spawned_ns)

    def spoke(self, worker: WorkerProcess) -> None:
        """A worker has said its first word, or is not waited for any more."""
        self._pending.pop(worker.name, None)

    def may_go_on(self, worker: WorkerProcess, model: ModelFacts) -> bool:
        """Whether a worker may be told what to serve; where it never may, `lost` is called."""
        cloner = worker.cloner
        # Whoever makes clones has seen the model's own files where they lie in a directory, and
        # was told what to take where an image is on trial.
        if cloner is None or self.tiers.directory is not None or self.tiers.options.manifest:
            return True
        if cloner.manifest is None:
            return False
        made_for = ModelKey.from_json(cloner.manifest["model"])
        refusal = made_for.refusal(ModelKey.of(model.directory, model.tensors))
        if refusal is None:
            return True
        self.failed(
            worker,
            SnapshotError(
                "the image is of another model of that name",
                where=refusal.field,
                expected=refusal.expected,
                got=refusal.got,
                hint="A new image is made of the model as it is now.",
            ),
        )
        return False

    def failed(self, worker: WorkerProcess, error: ColdframeError) -> None:
        """A clone is of no use: its tier is not tried again."""
        assert worker.cloner is not None
        self._give_up(worker.name, worker.cloner, error)

    def wait_for_end(self, worker: WorkerProcess) -> None:
        """Waits a moment for the end of a clone whose socket has ended.

        It is dead or dying, and whoever makes it may know of what: it has CRIU's own words.
        """
        assert worker.cloner is not None
        deadline = now() + _LAST_WORDS_NS
        while worker.child.poll() is None and now() < deadline:
            worker.cloner.receive(0.01)

    def catch_up(self) -> None:
        """Takes in what was read from the sockets while something else was waited for."""
        for cloner in self.tiers.cloners:
            if cloner.events:
                self._follow(cloner)

    def tick(self) -> None:
        """Gives up on clones that take too long; to be called about once a second."""
        for name, (cloner, asked_ns) in list(self._pending.items()):
            remote = cloner.image is None and cloner.tier == "image" and self.tiers.remote
            limit_s = max(FETCH_S if remote else 0.0, self.tiers.restore_s)
            since_ns = max(asked_ns, self._prepared.get(cloner, 0))
            if now() - since_ns < limit_s * 1e9 or name not in self._pending:
                continue
            error = SnapshotError(
                "a clone was not there in time", where=name, expected=f"{limit_s:g} s"
            )
            if cloner.image is None:  # it is deaf while it reads an image, and has no clones yet
                cloner.end(error)
                self._follow(cloner)
            else:
                self._give_up(name, cloner, error)

    def _watch(self, cloner: Cloner) -> None:
        fd = cloner.fileno()
        self._selector.register(fd, selectors.EVENT_READ, lambda: self._follow(cloner))
        cloner.closing = partial(self._selector.unregister, fd)

    def _give_up(self, name: str, cloner: Cloner, error: ColdframeError) -> None:
        self.tiers.drop(cloner, error)
        self._pending.pop(name, None)
        self._lost(name, error)

    def _follow(self, cloner: Cloner) -> None:
        cloner.receive()
        self._spans(cloner.spans)
        cloner.spans = []
        while cloner.events:
            name, error = cloner.events.popleft()
            if error is not None:
                self.tiers.drop(cloner, error)
            if name is not None and error is not None:
                self._pending.pop(name, None)
                self._lost(name, error)
            elif name is not None:
                self._started(name)
            elif error is None:
                self._prepared[cloner] = now()
                self._ready()
