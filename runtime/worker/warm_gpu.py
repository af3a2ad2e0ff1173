"""What a clone on a GPU has from before it was frozen: a context, and what was made in it.

The context is off the GPU while the clone is restored, and comes back behind its hooks
(`thaws`): whatever asks the driver before that waits in its call. Then all that follows is as it
was: kernels and libraries in the GPU's memory, a model over addresses that are reserved and have
nothing behind them yet, and captured steps. Those hold for one plan, and for KV blocks of one size
that lie within the reserved addresses; where a start has others, they are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices import Device
from coldframe.loader.memory_client.client import KvArena
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine.device import reserved

if TYPE_CHECKING:
    from coldframe.runtime.engine.graphs import StepGraphs
    from coldframe.runtime.engine.model import Model
    from coldframe.runtime.engine.varlen import Finding

__all__ = ["WarmGpu"]


@dataclass(frozen=True, slots=True)
class WarmGpu:
    """A GPU as a frozen worker has it.

    Args:
        device: With its context. What this process calls it, it may be another GPU by now.
        attention: What was found for attention.
        model: Over all of the reserved addresses.
        graphs: Its captured steps; None where there is nothing to capture them with.
        plan: The fingerprint of the plan by which the weights lay.
        block_bytes: Of a KV block.
        blocks: How many of them the reserved addresses have room for.
        cuda: The version of CUDA that torch was built with.
    """

    device: Device
    attention: Finding
    model: Model
    graphs: StepGraphs | None
    plan: str
    block_bytes: int
    blocks: int
    cuda: str

    @property
    def own_bytes(self) -> int:
        """What this process has of the GPU for itself, besides the context."""
        own = 0 if self.graphs is None else self.graphs.own_bytes
        return reserved(self.model.device) + own

    def state(self) -> dict[str, Any]:
        """What the manifest is to say of it."""
        graphs = () if self.graphs is None else sorted(self.graphs.captured)
        return {
            "cuda": self.cuda,
            "plan": self.plan,
            "block_bytes": self.block_bytes,
            "blocks": self.blocks,
            "graphs": [[bucket.sequences, bucket.blocks] for bucket in graphs],
        }

    def settle_in(self, recorder: Recorder, since_ns: int, misfit: str | None) -> None:
        """Has the graphs be the clone's, or drops them; the timeline says which.

        Args:
            recorder: The clone's.
            since_ns: When they were looked at.
            misfit: Why they are of no use, if they are not.
        """
        count = 0 if self.graphs is None else len(self.graphs.captured)
        note = f"{count} captured steps came back"
        if misfit is not None:
            note = f"{count} captured steps are dropped: {misfit}"
        if self.graphs is not None:
            self.graphs.report_to(recorder)
            if misfit is not None:
                self.graphs.drop()
        recorder.add("graph_restore", since_ns, note=note)

    def misfit(self, plan: Plan, kv: KvArena) -> str | None:
        """Why model and graphs are of no use to a start; None where they are."""
        if plan.fingerprint != self.plan:
            return f"plan: expected {self.plan[:8]}, got {plan.fingerprint[:8]}"
        if kv.block_bytes != self.block_bytes:
            return f"KV blocks: expected {self.block_bytes} bytes, got {kv.block_bytes}"
        if kv.blocks > self.blocks:
            return f"KV blocks: expected at most {self.blocks}, got {kv.blocks}"
        return None
