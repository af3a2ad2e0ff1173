"""What became of a trace: who waited how long, which models were in which state, what it cost.

The same for a replay and for a simulation. Of several models each holds a device of its own for
this: `gpu_s` is the sum over them, `held_s` the time in which at least one was held, which is what
a device costs that they share. Who waits for room on a device that it shares is *starting*, as the
endpoint says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coldframe.benchmarks.document import percentile
from coldframe.loader.errors import PlatformError, RequestError

__all__ = ["HELD", "PARKED_SHARE", "Asked", "From", "Outcome", "Played", "Prices", "Stay"]

From = Literal["zero", "parked", "warm"]
Outcome = Literal["answered", "refused", "failed"]
HELD = ("starting", "warm", "draining")
"""States in which a model holds its device."""
PARKED_SHARE = 0.05
"""What a parked model costs of its device, where nobody says otherwise: 16 to 80 GB of host memory
at some 3 $ a month and GB are 2 to 10 % of a device of 3 $ an hour."""
_MOST_PRICE = 1e6


@dataclass(frozen=True, slots=True)
class Prices:
    """What a model costs.

    Args:
        held: Its device, for an hour.
        parked: Its place in host memory, for an hour.
    """

    held: float
    parked: float

    @staticmethod
    def of(price: float, parked: float | None) -> Prices:
        """Prices as they are given; `PARKED_SHARE` where nothing is said of parked.

        Raises:
            RequestError: Nothing costs that.
        """
        parked = price * PARKED_SHARE if parked is None else parked
        for flag, found in (("--price", price), ("--parked-price", parked)):
            if not 0 <= found <= _MOST_PRICE:
                raise RequestError(
                    "this is no price of an hour",
                    where=flag,
                    expected=f"0 to {_MOST_PRICE:,.0f}",
                    got=found,
                )
        return Prices(price, parked)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Args:
        at_s: When it was sent, since the beginning.
        model: Whom it asked.
        ttft_s: How long its first token took; None where there was none.
        met: What its model was: `zero` is also who was starting from there or about to be there.
        outcome: `refused` by a status of HTTP, or `failed`: broken off, or with too few tokens.
    """

    at_s: float
    model: str
    ttft_s: float | None
    met: From
    outcome: Outcome = "answered"


@dataclass(frozen=True, slots=True)
class Stay:
    """A model in one state.

    Args:
        state: Which.
        start_s: Since when.
        end_s: Until when.
    """

    state: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Played:
    """What became of a trace.

    Args:
        asked: Its requests, in their order.
        states: What each model was, from 0 to `seconds` without a gap.
        seconds: How long it was looked at.
    """

    asked: Sequence[Asked]
    states: Mapping[str, Sequence[Stay]]
    seconds: float

    @property
    def ttfts_s(self) -> list[float]:
        """How long first tokens took, of requests that were answered."""
        found = [asked.ttft_s for asked in self.asked if asked.outcome == "answered"]
        return [ttft_s for ttft_s in found if ttft_s is not None]

    def lost(self, outcome: Outcome) -> int:
        """How many requests came to that."""
        return sum(asked.outcome == outcome for asked in self.asked)

    @property
    def cold_starts(self) -> int:
        """Requests that met a model at zero, or on its way from there or to it."""
        return sum(asked.met == "zero" for asked in self.asked)

    @property
    def gpu_s(self) -> float:
        """Seconds in which devices were held, of all models together."""
        return self.seconds_in(*HELD)

    @property
    def parked_s(self) -> float:
        return self.seconds_in("parked")

    @property
    def held_s(self) -> float:
        """Seconds in which at least one model held its device."""
        stays = sorted(
            (stay.start_s, stay.end_s)
            for stays in self.states.values()
            for stay in stays
            if stay.state in HELD
        )
        total, until = 0.0, 0.0
        for start_s, end_s in stays:
            total += max(0.0, end_s - max(start_s, until))
            until = max(until, end_s)
        return total

    @property
    def starts(self) -> int:
        """How often a model was started."""
        return sum(stay.state == "starting" for stays in self.states.values() for stay in stays)

    def seconds_in(self, *states: str) -> float:
        """Seconds in some states, of all models together."""
        return sum(
            stay.end_s - stay.start_s
            for stays in self.states.values()
            for stay in stays
            if stay.state in states
        )

    def cost(self, prices: Prices, *, shared: bool = False) -> float:
        """What it costs.

        Args:
            prices: Of an hour.
            shared: Whether models share one device, which is paid for once while any holds it.
        """
        held_s = self.held_s if shared else self.gpu_s
        return held_s * prices.held / 3600 + self.parked_s * prices.parked / 3600

    def ttft(self, percent: float) -> float:
        """A percentile of the times to the first token, 0 to 100, in seconds.

        Raises:
            PlatformError: No request was answered.
        """
        if not self.ttfts_s:
            raise PlatformError("no request was answered", got=f"{len(self.asked)} requests")
        return percentile(self.ttfts_s, percent / 100)

    def to_json(self, prices: Prices | None, *, shared: bool = False) -> dict[str, Any]:
        """As `played` in `schema.json`; see `cost`.

        Raises:
            PlatformError: No request was answered.
        """
        ttft = {f"p{percent}": self.ttft(percent) for percent in (50, 90, 99)}
        times = self.ttfts_s
        return {
            "requests": len(self.asked),
            "refused": self.lost("refused"),
            "failed": self.lost("failed"),
            "cold_starts": self.cold_starts,
            "cold_share": self.cold_starts / len(self.asked),
            "starts": self.starts,
            "ttft": {
                **ttft,
                "max": max(times),
                "mean": sum(times) / len(times),
            },
            "gpu_s": self.gpu_s,
            "held_s": self.held_s,
            "parked_s": self.parked_s,
            "seconds": self.seconds,
            "cost": None if prices is None else self.cost(prices, shared=shared),
            "asked": [
                {"at_s": a.at_s, "model": a.model, "ttft_s": a.ttft_s, "from": a.met}
                for a in self.asked
                if a.outcome == "answered"
            ],
            "unanswered": [
                {"at_s": a.at_s, "model": a.model, "outcome": a.outcome, "from": a.met}
                for a in self.asked
                if a.outcome != "answered"
            ],
            "states": {
                name: [{"state": s.state, "start_s": s.start_s, "end_s": s.end_s} for s in stays]
                for name, stays in self.states.items()
            },
        }
