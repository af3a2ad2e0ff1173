"""Reads which scaling policy is meant: `fixed:300,600`, `histogram:bin=60`, `next:penalty=100`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.scaling.histogram import HybridHistogram
from coldframe.runtime.scaling.next import Costs, NextArrival
from coldframe.runtime.scaling.policies import FixedKeepAlive, LivePolicy

__all__ = ["POLICY_HELP", "POLICY_NAMES", "policy_from"]

POLICY_NAMES = ("fixed", "histogram", "next")
POLICY_HELP = (
    "when it rests and is warmed ahead: fixed:IDLE[,PARK] (seconds, or never); "
    "histogram[:bin=,range=,head=,tail=,margin=,keep=,cv=,oob=,samples=,rest=zero|parked,start=,"
    "half=], of each model's idle times; "
    "next[:penalty=,parked=,zero=,parked_start=,samples=,keep=], by "
    "what holding it costs against what clients wait"
)
_HISTOGRAM: dict[str, tuple[str, float, float]] = {
    # as it is written, what it is called, more than, at most
    "bin": ("bin_s", 0.0, 86400.0),
    "range": ("range_s", 0.0, 30 * 86400.0),
    "head": ("head", 0.0, 100.0),
    "tail": ("tail", 0.0, 100.0),
    "margin": ("margin", -1e-9, 0.9),
    "keep": ("keep_s", 0.0, 1e9),
    "cv": ("cv", -1e-9, 1e6),
    "oob": ("oob", 0.0, 1.0),
    "samples": ("samples", 0.0, 1e6),
    "start": ("start_s", -1e-9, 1e6),
    "half": ("half_s", 0.0, 1e9),
}
_COSTS: dict[str, tuple[str, float, float]] = {
    "penalty": ("penalty", 0.0, 1e9),
    "parked": ("parked", -1e-9, 1.0),
    "zero": ("zero_s", -1e-9, 1e6),
    "parked_start": ("parked_s", -1e-9, 1e6),
}
_NEXT: dict[str, tuple[str, float, float]] = {
    "samples": ("samples", 0.0, 1e6),
    "keep": ("keep_s", 0.0, 1e9),
}
_MOST_BINS = 100_000


def policy_from(text: str, where: str = "--policy") -> Callable[[], LivePolicy]:
    """What makes the policy that a text names, one for each model.

    Args:
        text: A name, and behind a colon its parameters; see POLICY_HELP.
        where: Whose it is, for the error.

    Raises:
        RequestError: There is none of that name, or not with such parameters.
    """
    name, colon, rest = text.strip().partition(":")
    if colon and not rest.strip():
        raise _wrong("there are no parameters behind the colon", where, "NAME:PARAMETERS", text)
    match name:
        case "fixed":
            idle_s, park_s = _fixed(rest, where)
            return lambda: FixedKeepAlive(idle_s, park_s)
        case "histogram":
            return _histogram(rest, where)
        case "next":
            given = _numbers(rest, _COSTS | _NEXT, where)
            costs = {key: given.pop(key) for key, _, _ in _COSTS.values() if key in given}
            return lambda: NextArrival(Costs(**costs), **given)
    raise _wrong("there is no such policy", where, ", ".join(POLICY_NAMES), name)


def _fixed(rest: str, where: str) -> tuple[float | None, float | None]:
    parts = [part.strip() for part in rest.split(",")] if rest.strip() else []
    if not 1 <= len(parts) <= 2:
        raise _wrong("this is no fixed policy", where, "fixed:IDLE or fixed:IDLE,PARK", rest)
    times = [None if part == "never" else _number("fixed", part, where, -1e-9) for part in parts]
    return times[0], times[1] if len(times) > 1 else 0.0


def _histogram(rest: str, where: str) -> Callable[[], LivePolicy]:
    words = [word.strip() for word in rest.split(",") if word.strip()]
    rests = [word.partition("=")[2] for word in words if word.partition("=")[0] == "rest"]
    if len(rests) > 1 or any(found not in ("zero", "parked") for found in rests):
        raise _wrong("this is no rest", where, "rest=zero or rest=parked", ",".join(rests))
    numbers = ",".join(word for word in words if word.partition("=")[0] != "rest")
    given: dict[str, Any] = _numbers(numbers, _HISTOGRAM, where)
    head, tail = given.get("head", 5.0), given.get("tail", 99.0)
    if head >= tail:
        raise _wrong("the head is not before the tail", where, "head < tail", f"{head}, {tail}")
    bins = given.get("range_s", 14400.0) / given.get("bin_s", 10.0)
    if not 1 <= bins <= _MOST_BINS:
        expected = f"range / bin between 1 and {_MOST_BINS:,}"
        raise _wrong("there cannot be so many bins", where, expected, f"{bins:g}")
    if rests:
        given["rest"] = rests[0]
    return lambda: HybridHistogram(**given)


def _numbers(rest: str, known: dict[str, tuple[str, float, float]], where: str) -> dict[str, Any]:
    """Reads `name=number,name=number`: by the parameters' own names."""
    found: dict[str, Any] = {}
    for word in filter(None, (word.strip() for word in rest.split(","))):
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise _wrong("there is no such parameter", where, ", ".join(known), word)
        key, more_than, at_most = known[name]
        if key in found:
            raise _wrong("a parameter is given twice", where, f"one {name}=", word)
        number = _number(name, value, where, more_than, at_most)
        if key == "samples" and number != int(number):
            raise _wrong("this is no number of samples", where, "a whole number", value)
        found[key] = int(number) if key == "samples" else number
    return found


def _number(name: str, text: str, where: str, more_than: float, at_most: float = math.inf) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (more_than < number <= at_most and number < math.inf):
        low = "0 or more" if more_than < 0 else "more than 0"
        high = "" if at_most == math.inf else f", at most {at_most:g}"
        raise _wrong(f"{name} cannot be that", where, low + high, text)
    return number


def _wrong(what: str, where: str, expected: str, got: str) -> RequestError:
    return RequestError(
        what,
        where=where,
        expected=expected,
        got=repr(got),
        hint="Write fixed:300, fixed:300,600, histogram, histogram:bin=60,keep=900, next or "
        "next:penalty=100,parked=1.",
    )
