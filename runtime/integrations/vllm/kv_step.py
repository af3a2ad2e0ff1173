"""What the connector's scheduler side tells its workers for one step, and what they tell it back.

Plain values: where vLLM's workers are processes of their own they are pickled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Load", "Report", "Save", "Step"]


@dataclass(frozen=True, slots=True)
class _Copy:
    """Some of a request's tokens, in the arena and in vLLM's cache.

    Args:
        request: vLLM's name of it.
        name: The ledger's name of it.
        blocks: Of the arena, from the request's first token on.
        start, end: The tokens.
        table: vLLM's blocks, from the request's first token on; -1 where there is none.
        block_tokens: Tokens in one of those.
        checksums: See `transfer.Consume`.
    """

    request: str
    name: str
    blocks: tuple[int, ...]
    start: int
    end: int
    table: tuple[int, ...]
    block_tokens: int
    checksums: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Load(_Copy):
    """Tokens to be copied into vLLM's cache.

    Args:
        waits: Whether the step of this plan needs them; else they come beside steps.
        lost: Why there is nothing to copy, where vLLM is to hear of a failure.
    """

    waits: bool = True
    lost: str | None = None

    def slots(self) -> tuple[Tensor, Tensor]:
        """The tokens that vLLM has a place for, and which.

        It has none where a sliding window has left them behind.

        Returns:
            Positions and slots, each `[T]` int64, on the CPU.
        """
        positions = torch.arange(self.start, self.end)
        block = torch.tensor(self.table, dtype=torch.int64)[positions // self.block_tokens]
        slots = block * self.block_tokens + positions % self.block_tokens
        kept = block >= 0
        return positions[kept], slots[kept]

    @property
    def touched(self) -> set[int]:
        """vLLM's blocks that its tokens lie in."""
        first, last = self.start // self.block_tokens, (self.end - 1) // self.block_tokens
        return {block for block in self.table[first : last + 1] if block >= 0}


@dataclass(frozen=True, slots=True)
class Save(_Copy):
    """Tokens to be copied into the arena.

    Args:
        sums: Whether the request's checksums are wanted, of all its tokens up to `end`.
    """

    sums: bool = False


@dataclass(slots=True)
class Step:
    """One step's copies.

    Args:
        idle: Whether the step computes nothing, so that there is time to wait for a copy.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    idle: bool = False


@dataclass(slots=True)
class Report:
    """What the workers have done since they last said so, by vLLM's names of the requests.

    Args:
        loaded: Ranks that have nothing more to do with a request's load, come what came of it.
        saved: Copies into the arena that are done.
        failed: Loads that came to nothing, and why.
        unsaved: Copies that came to nothing, and why.
        checksums: Of saved requests.
    """

    loaded: Counter[str] = field(default_factory=Counter)
    saved: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    unsaved: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.loaded or self.saved or self.failed or self.unsaved)

    def add(self, other: Report) -> None:
        """Takes what another rank says, too."""
        self.loaded += other.loaded
        self.saved += other.saved
        self.failed |= other.failed
        self.unsaved |= other.unsaved
        self.checksums |= other.checksums
