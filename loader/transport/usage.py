"""What the memory service counts of KV that came with a ticket."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

__all__ = ["TakeUsage"]

_PREFIX = "kv_ticket_"


@dataclass(frozen=True, slots=True)
class TakeUsage:
    """What has become of tickets, so far.

    Args:
        taken: Requests whose KV is here now.
        lost: Requests whose KV could not be had, so that it was computed again.
        taken_bytes: What was copied for the former: blocks that were here already are not.
    """

    taken: int = 0
    lost: int = 0
    taken_bytes: int = 0

    def with_taken(self, nbytes: int) -> TakeUsage:
        """The same, and a request whose KV has come."""
        return replace(self, taken=self.taken + 1, taken_bytes=self.taken_bytes + nbytes)

    def with_lost(self) -> TakeUsage:
        """The same, and a request whose KV has not."""
        return replace(self, lost=self.lost + 1)

    def to_wire(self) -> dict[str, int]:
        """The numbers, named as what they are of."""
        return {f"{_PREFIX}{name}": count for name, count in asdict(self).items()}

    @staticmethod
    def names() -> list[str]:
        """The names in `to_wire`."""
        return [f"{_PREFIX}{part.name}" for part in fields(TakeUsage)]
