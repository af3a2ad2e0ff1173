"""How a worker's decode steps are computed: replayed, by code made ahead of time, or as they come.

Steps are replayed on a GPU, from what is captured there, what was kept by the start before
(`graphs/worker.py`), or what a clone has captured before it was frozen (`warm_gpu.py`). A clone
on a CPU may have code that was compiled for them (`compiled/warmup.py`).

Before a step is replayed for the first time the front is told, and told again when that has gone
well. A worker that is lost in between may have been lost by that: see `GraphShelf.lost`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldframe.loader.timeline import now

if TYPE_CHECKING:
    from coldframe.runtime.engine.compiled import CompiledSteps
    from coldframe.runtime.engine.graphs import StepGraphs
    from coldframe.runtime.engine.model import Model
    from coldframe.runtime.graphs.archive import KeptSteps
    from coldframe.runtime.graphs.lookup import Shelved
    from coldframe.runtime.worker.warm_gpu import WarmGpu
    from coldframe.runtime.worker.worker import Warm, Worker

__all__ = ["DecodeSteps"]


class DecodeSteps:
    """What a worker has to compute decode steps with, besides its model.

    Args:
        worker: Whose they are.
        warm: What a clone has; None for a worker that starts fresh.

    Attributes:
        worker: The worker.
        compiled: The steps by the code that a clone came with; None where it has none.
    """

    def __init__(self, worker: Worker, warm: Warm | None) -> None:
        self.worker = worker
        self.compiled: CompiledSteps | None = None
        self._warm = warm
        self._gpu = None if warm is None else warm.gpu
        self._misfit: str | None = None
        """Why the model and the graphs that a clone has on a GPU are of no use."""
        self._wanted = False
        self._store: str | None = None
        self._shelved: Shelved | None = None
        self._captured: StepGraphs | None = None

    def told(self, init: dict[str, Any]) -> None:
        """Takes what the front wants."""
        self._wanted = init["graphs"]
        # What a clone has captured it has brought along.
        self._store = init["graph_store"] if self._warm is None else None

    @property
    def may_replay(self) -> bool:
        """Whether steps are replayed, if anything captures them."""
        return self._wanted and self.worker.role == "decode"

    def take_model(self, gpu: WarmGpu) -> Model | None:
        """The model that a clone has had before it was frozen, with its graphs.

        Returns:
            None where it is of no use.
        """
        started, worker = now(), self.worker
        self._misfit = gpu.misfit(worker.plan, worker.kv)
        gpu.settle_in(worker.recorder, started, self._misfit)
        return gpu.model if self._misfit is None else None

    def look_up(self) -> None:
        """Reads what the start before has kept; as whoever may read it."""
        if self.may_replay and self.worker.attention and self._store:
            from coldframe.runtime.graphs.worker import shelved_steps

            self._shelved = shelved_steps(self.worker, self._store)

    def load_code(self) -> bool:
        """Looks at the code that a clone came with. Whether steps are computed by it."""
        code = None if self._warm is None else self._warm.code
        if code is None or not self.may_replay:
            return False
        from coldframe.runtime.compiled.warmup import compiled_steps

        self.compiled = compiled_steps(self.worker.model, code, self.worker.recorder)
        return self.compiled is not None and self.compiled.in_use

    def graphs(self) -> StepGraphs | None:
        """The model's decode steps, to be captured; None where nothing captures them."""
        found = self._captured = self._graphs()
        if found is not None:
            found.tell_trials(self._tell)
        return found

    @property
    def own_bytes(self) -> int:
        """What captured steps have of the device besides torch's own."""
        return 0 if self._captured is None else self._captured.own_bytes

    def kept(self, graphs: StepGraphs | None) -> StepGraphs | KeptSteps | None:
        """The same steps, with what is kept of them from one start to the next, if anything."""
        if graphs is None or self._shelved is None:
            return graphs
        from coldframe.runtime.graphs.worker import kept_steps

        return kept_steps(graphs, self._shelved, self.worker)

    def _graphs(self) -> StepGraphs | None:
        worker = self.worker
        if not self._wanted or worker.attention is None:
            return None
        from coldframe.runtime.graphs.graphing import graphs_for

        if self._gpu is None:
            return graphs_for(worker.model, worker.device, worker.recorder)
        if self._misfit is None and self._gpu.graphs is not None:
            return self._gpu.graphs
        # What a clone calls its GPU need not be what the front does.
        return graphs_for(worker.model, self._gpu.device.name, worker.recorder)

    def _tell(self, what: str) -> None:
        name = ""
        if self._shelved is not None:
            from coldframe.snapshot.graph_store import name_of

            name = name_of(self._shelved.fingerprint)
        self.worker.control.send({"type": "trying", "what": what, "archive": name})
