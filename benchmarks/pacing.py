"""What two ways to serve are measured by: running decodes, prompts that arrive, and gaps."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field

__all__ = ["Load", "Pace", "Phase", "prompt_ids"]

_SHORT = 64


@dataclass(frozen=True, slots=True)
class Load:
    """What runs, and what comes between.

    Args:
        decodes: How many requests are decoded at once.
        prompt_tokens: Of each prompt that arrives; it asks for one token.
    """

    decodes: int
    prompt_tokens: int

    def short(self, seed: int, vocabulary: int) -> tuple[int, ...]:
        """The prompt of one of the decodes."""
        return prompt_ids(_SHORT, seed, vocabulary)

    def decode_tokens(self, context: int) -> int:
        """What each decode may generate: it is stopped long before, if the model lets it."""
        return context - _SHORT


@dataclass(slots=True)
class Phase:
    """What came out of one window.

    Args:
        gaps_s: The seconds between each token of a decode and the one before it, of all decodes.
        ttft_s: Each arriving prompt's time to its first token, from when it was due.
        waited: The part of the window in which whoever decodes wanted a core and had none: what
            of the gaps is other processes' doing, also of such as have nothing to do with this.
    """

    gaps_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    waited: float = 0.0

    def percentile_ms(self, percent: float) -> float:
        """The least gap that so many percent of all are not above (nearest rank)."""
        ordered = sorted(self.gaps_s)
        return 1e3 * ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Pace:
    """One window: when the next prompt is due, and what has come when.

    Args:
        seconds: How long it is.
        interval_s: From one prompt to the next, whether or not that is answered; the first comes
            after half of it. None for no prompts.
        pid: Of the process that decodes.
    """

    def __init__(self, seconds: float, interval_s: float | None, pid: int) -> None:
        self.phase = Phase()
        self._pid = pid
        self._waited_ns = _run_delay_ns(pid)
        self._interval_s = interval_s
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        self._arrived = 0
        self._last: dict[str, float] = {}

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end

    @property
    def due(self) -> bool:
        """Whether a prompt arrives now."""
        return self._interval_s is not None and time.monotonic() >= self._due(self._arrived)

    @property
    def wait_s(self) -> float:
        """Until something is due."""
        moment = self._end
        if self._interval_s is not None:
            moment = min(moment, self._due(self._arrived))
        return max(0.0, moment - time.monotonic())

    def take(self) -> int:
        """The number of the prompt that arrives."""
        self._arrived += 1
        return self._arrived - 1

    def answered(self, number: int) -> None:
        """A prompt has its first token."""
        self.phase.ttft_s.append(time.monotonic() - self._due(number))

    def token(self, stream: str) -> None:
        """A decode has another token."""
        moment = time.monotonic()
        if stream in self._last:
            self.phase.gaps_s.append(moment - self._last[stream])
        self._last[stream] = moment

    def close(self) -> Phase:
        """The window is over: what came out of it."""
        waited_s = (_run_delay_ns(self._pid) - self._waited_ns) / 1e9
        self.phase.waited = waited_s / (time.monotonic() - self._begin)
        return self.phase

    def _due(self, number: int) -> float:
        return self._begin + (number + 0.5) * (self._interval_s or 0.0)


def _run_delay_ns(pid: int) -> int:
    """For how long a process's main thread has been ready to run, and did not."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[1])


def prompt_ids(length: int, seed: int, vocabulary: int) -> tuple[int, ...]:
    """Token ids that no other seed has: nothing of a prompt may be in the KV already."""
    draw = random.Random(seed)
    return tuple(draw.randrange(vocabulary) for _ in range(length))
