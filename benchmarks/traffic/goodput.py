"""What a load came to: latencies, rates, and how many requests met their objectives.

    TTFT    from when a request was sent to the first part of its answer
    ITL     from one part of an answer to the next, of all answers together
    TPOT    of one answer: the time from its first part to its end, by the tokens behind the first
    e2e     from when a request was sent to its answer's end

A request is *good* if its answer is whole, its TTFT is within the objective, and so are its gaps:
in the mean (its TPOT, as DistServe and vLLM's `bench serve` have it), or at a percentile of them.
Goodput is the share of good requests among all, those refused too, and how many they are a second
(Zhong et al., "DistServe", OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from coldframe.benchmarks.document import percentile
from coldframe.benchmarks.traffic.open_loop import Record

__all__ = ["Objectives", "account", "is_good", "spread"]

_REFUSED = (429, 503)
_LATE_S = 0.005
"""How late a client may be, at its 99th percentile, for its figures to be the server's."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request is to meet.

    Args:
        ttft_s: Its first token comes within so many seconds.
        itl_s: The next ones do so, one after the other,
        at: in the mean, or at this percentile of its gaps (1 for the longest of them).
    """

    ttft_s: float
    itl_s: float
    at: float | None = None


def spread(values: Sequence[float], unit: str = "s") -> dict[str, Any] | None:
    """Percentiles of what was seen once a request, or once a token; None where it never was."""
    if not values:
        return None
    return {
        "unit": unit,
        "count": len(values),
        "mean": sum(values) / len(values),
        "p50": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
        "max": max(values),
    }


def is_good(record: Record, wanted: Objectives) -> bool:
    """Whether a request has met its objectives."""
    if not record.answered or _ttft(record) > wanted.ttft_s:
        return False
    if wanted.at is None:
        tpot = _tpot(record)
        return tpot is None or tpot <= wanted.itl_s
    gaps = _gaps(record)
    return not gaps or percentile(gaps, wanted.at) <= wanted.itl_s


def account(loads: Sequence[Sequence[Record]], wanted: Objectives) -> dict[str, Any]:
    """What loads of one kind came to, as JSON values; their requests are counted together.

    Args:
        loads: Each of at least one request.
        wanted: What is good.
    """
    records = [record for load in loads for record in load]
    answered = [record for record in records if record.answered]
    good = sum(is_good(record, wanted) for record in records)
    # Each load lasts until its last request is over, or was to be sent.
    seconds = sum(max(max(_over_s(record) for record in load), 1e-9) for load in loads)
    offered_s = sum(max(load[-1].due_s, 1e-9) for load in loads)
    refused = sum(record.status in _REFUSED for record in records)
    wrong = [r for r in records if r.end_s is not None and not r.answered]
    lateness = spread([max(0.0, record.sent_s - record.due_s) for record in records])
    assert lateness is not None
    errors = sorted({record.error for record in records if record.error is not None})
    return {
        "requests": len(records),
        "answered": len(answered),
        "refused": refused,
        "wrong": len(wrong),
        "failed": len(records) - len(answered) - refused - len(wrong),
        "errors": errors[:5],
        "seconds": seconds,
        "offered_rate": len(records) / offered_s if offered_s > 1e-6 else None,
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "answer_tokens": sum(record.tokens for record in answered),
        "tokens_rate": sum(record.tokens for record in answered) / seconds,
        "requests_rate": len(answered) / seconds,
        "ttft": spread([_ttft(record) for record in answered]),
        "itl": spread([gap for record in answered for gap in _gaps(record)]),
        "tpot": spread([t for t in map(_tpot, answered) if t is not None]),
        "e2e": spread([_over_s(record) - record.sent_s for record in answered]),
        "lateness": lateness,
        "client_late": lateness["p99"] > _LATE_S,
        "goodput": {
            **asdict(wanted),
            "good": good,
            "share": good / len(records),
            "rate": good / seconds,
        },
    }


def _ttft(record: Record) -> float:
    return record.token_s[0] - record.sent_s


def _gaps(record: Record) -> list[float]:
    return [after - before for before, after in pairwise(record.token_s)]


def _tpot(record: Record) -> float | None:
    if record.tokens < 2 or record.end_s is None:
        return None
    return (record.end_s - record.token_s[0]) / (record.tokens - 1)


def _over_s(record: Record) -> float:
    """When nothing more came of a request, as far as is known."""
    if record.end_s is not None:
        return record.end_s
    return max([record.sent_s, *record.token_s])
