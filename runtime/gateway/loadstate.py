"""How far the replica is, as the gateway knows it, and when it will answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LoadState"]


@dataclass(frozen=True, slots=True)
class LoadState:
    """What the front last said of the replica.

    Args:
        phase: `starting`, `ready`, `draining` or `failed`.
        stage: What the first token waits for: `plan`, `weights`, `workers`, `first_token`; None
            once it is out.
        bytes_done: Of the weights.
        bytes_total: 0 while that is not known.
        elapsed_s: How long they have been coming.
        tier: How the prefill worker started: `image`, `template` or `fresh`.
        error: Why the replica cannot go on: an error of ours, as JSON values.
    """

    phase: str = "starting"
    stage: str | None = "plan"
    bytes_done: int = 0
    bytes_total: int = 0
    elapsed_s: float = 0.0
    tier: str | None = None
    error: Mapping[str, Any] | None = None

    @property
    def cold(self) -> bool:
        """Whether no token has been made yet."""
        return self.phase == "starting"

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
