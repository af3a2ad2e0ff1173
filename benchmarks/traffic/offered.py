"""Loads offered to each way in turn, and what they came to."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from coldframe.benchmarks.document import figure
from coldframe.benchmarks.traffic.arrivals import Ask, Traffic
from coldframe.benchmarks.traffic.goodput import Objectives, account
from coldframe.benchmarks.traffic.highest import highest_rate
from coldframe.benchmarks.traffic.open_loop import Record
from coldframe.benchmarks.traffic.ways import Way
from coldframe.loader.errors import PlatformError

__all__ = ["AUTO", "Offered", "say"]

AUTO = "auto"
"""In the place of rates: the highest that is served well is searched."""
_AS_IT_IS: tuple[None] = (None,)
_WITHIN = 0.1
_LEAST_REQUESTS = 20
"""At least, in the mean, in a load that is to say whether a rate is too high."""


def say(text: str) -> None:
    """How far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Offered:
    """The loads so far.

    Args:
        args: The command line.
        traffic: What they are made of.
        wanted: What a request is to meet.

    Attributes:
        ways: Who answers, warm, by name.
        highest: Of each of them the highest rate that it serves well, where that was searched.
    """

    def __init__(self, args: argparse.Namespace, traffic: Traffic, wanted: Objectives) -> None:
        self.ways: dict[str, Way] = {}
        self.highest: list[dict[str, Any]] = []
        self._args = args
        self._traffic = traffic
        self._wanted = wanted
        self._found: dict[tuple[str, float | None], list[list[Record]]] = {}

    def run(self, rates: list[float] | str | None) -> None:
        """Offers each way what it is to have, run by run in turn."""
        if rates == AUTO:
            pairs = self._search_all()
        else:
            assert not isinstance(rates, str)
            pairs = [(name, rate) for rate in rates or _AS_IT_IS for name in self.ways]
        for number in range(self._args.runs):
            # All of a run's loads are of one seed: whoever answers gets the same.
            for name, rate in pairs if number % 2 == 0 else reversed(pairs):
                asks = self._traffic.load(rate, self._args.seed + number)
                records = self._offer(name, asks, rate, f"run {number + 1}")
                self._found.setdefault((name, rate), []).append(records)

    def loads(self) -> list[dict[str, Any]]:
        """What they came to, by way and rate."""
        found = []
        for (name, rate), loads in self._found.items():
            runs = [account([load], self._wanted) for load in loads]
            figures = {
                "tokens_rate": figure([one["tokens_rate"] for one in runs], "tok/s"),
                "goodput_share": figure([one["goodput"]["share"] for one in runs], "1"),
                "goodput_rate": figure([one["goodput"]["rate"] for one in runs], "req/s"),
            }
            together = account(loads, self._wanted)
            found.append(
                {"way": name, "rate": rate, "all": together, "runs": runs, "figures": figures}
            )
        return found

    def compared(self) -> list[dict[str, Any]]:
        """Prefill and decode apart, against each way in which they are together, rate by rate."""
        loads = {(load["way"], load["rate"]): load["all"] for load in self.loads()}
        found = []
        for (name, rate), ours in loads.items():
            for beside in ("together", "vllm", "vllm-compiled"):
                theirs = loads.get((beside, rate))
                if name in ("apart", "pinned") and theirs is not None:
                    ratios = {
                        f"{what}_{at}": _ratio(ours[what], theirs[what], at)
                        for what, at in (("ttft", "p50"), ("ttft", "p99"), ("itl", "p99"))
                    }
                    shares = [one["goodput"]["share"] for one in (ours, theirs)]
                    ratios["goodput"] = shares[0] / shares[1] if shares[1] else None
                    found.append({"way": name, "beside": beside, "rate": rate, **ratios})
        return found

    def _search_all(self) -> list[tuple[str, float | None]]:
        """Each way's highest rate, and the lowest of those for all."""
        pairs: list[tuple[str, float | None]] = []
        for name in self.ways:
            rate, probes = self._search(name)
            self.highest.append({"way": name, "rate": rate, "probes": probes})
            if rate is not None:
                pairs.append((name, rate))
        if pairs:
            common = min(rate for _, rate in pairs if rate is not None)
            pairs += [(name, common) for name in self.ways if (name, common) not in pairs]
        return pairs

    def _search(self, name: str) -> tuple[float | None, list[dict[str, float]]]:
        traffic, seed = self._traffic, self._args.seed
        if traffic.trace is None:
            (alone,) = self.ways[name].offer([traffic.load(1.0, seed)[0]])
            if not alone.answered or alone.end_s is None:
                raise PlatformError("a request was not answered", where=name, got=alone.error)
            start = 1 / (alone.end_s - alone.sent_s)
        else:
            start = len(traffic.load(None, seed)) / traffic.seconds

        def share(rate: float) -> float:
            seconds = self._args.seconds
            if traffic.trace is None:
                seconds = max(seconds, _LEAST_REQUESTS / rate)
            longer = replace(traffic, seconds=seconds)
            records = self._offer(name, longer.load(rate, seed), rate, "search")
            return float(account([records], self._wanted)["goodput"]["share"])

        rate, probes = highest_rate(share, start, self._args.good, _WITHIN)
        return rate, [{"rate": probe.rate, "share": probe.share} for probe in probes]

    def _offer(self, name: str, asks: list[Ask], rate: float | None, what: str) -> list[Record]:
        told = "as in the trace" if rate is None else f"{rate:.3g} a second"
        say(f"{what}: {name}, {len(asks)} requests {told}, {asks[-1].due_s:.0f} s")
        return self.ways[name].offer(asks)


def _ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None, at: str) -> float | None:
    if ours is None or theirs is None or not theirs[at]:
        return None
    return float(ours[at] / theirs[at])
