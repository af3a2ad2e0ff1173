"""How far the replica is, as the gateway knows it, and when it will answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PHASES", "LoadState"]

PHASES = ("zero", "starting", "ready", "parked", "draining", "failed")
"""What a replica can be in, for whoever looks at it."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """What the front last said of the replica.

    Args:
        phase: One of `PHASES`.
        stage: What the first token waits for: `plan`, `weights`, `workers`, `first_token`; None
            once it is out.
        bytes_done: Of the weights.
        bytes_total: 0 while that is not known.
        elapsed_s: How long they have been coming.
        tier: How the prefill worker started: `image`, `template` or `fresh`.
        error: Why the replica cannot go on, or why the last one could not: an error of ours, as
            JSON values.
        open: Whether requests are welcome, even where they have to wait for a start.
        failures: How many replicas have died, one soon after the other.
        device: Where it computes: `cpu`, `cuda:N`, or two of them (`cuda:0, cuda:1`); None where
            nothing is held.
        device_why: Why there, where nobody has named it.
        contexts: Where the workers' contexts are while it is parked on a GPU; see
            `coldframe.runtime.replica.contexts.Contexts.status`.
    """

    phase: str = "starting"
    stage: str | None = "plan"
    bytes_done: int = 0
    bytes_total: int = 0
    elapsed_s: float = 0.0
    tier: str | None = None
    error: Mapping[str, Any] | None = None
    open: bool = False
    failures: int = 0
    device: str | None = None
    device_why: str | None = None
    contexts: Mapping[str, Any] | None = None

    @property
    def cold(self) -> bool:
        """Whether a request has to wait for more than a place."""
        return self.phase in ("zero", "starting", "parked")

    @property
    def health(self) -> str:
        """What a platform's probe is told: `ready` is who wakes when somebody asks, too."""
        return "ready" if self.open else "starting" if self.cold else self.phase

    @property
    def rate(self) -> float | None:
        """Bytes per second, as measured."""
        if not self.bytes_done or self.elapsed_s <= 0:
            return None
        return self.bytes_done / self.elapsed_s

    @property
    def eta_s(self) -> float | None:
        """Seconds until the weights are in: what is left over the measured rate.

        None while there is nothing to go by.
        """
        if self.rate is None or not self.bytes_total:
            return None
        return (self.bytes_total - self.bytes_done) / self.rate

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> LoadState:
        return LoadState(**{name: data[name] for name in LoadState.__slots__})
