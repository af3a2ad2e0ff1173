"""Which policy a text names, for a simulation and as a server's flags."""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.scaling.policies import FixedKeepAlive, LivePolicy
from coldframe.runtime.scaling.spec import policy_from

__all__ = ["NEVER", "Chosen", "fixed", "policy", "seconds_or_never", "served"]

NEVER = "never"


class Chosen:
    """A policy.

    Args:
        text: As `coldframe serve --policy` reads it.
        factory: Makes one for each model.
        keeps: Where it is a fixed one: how long it keeps a model warm, in seconds; None for ever.
    """

    def __init__(
        self, text: str, factory: Callable[[], LivePolicy], keeps: tuple[float | None] | None = None
    ) -> None:
        self.text = text
        self.factory = factory
        self.keeps = keeps


def policy(text: str) -> Chosen:
    """The policy that a text names, as `coldframe serve --policy` reads it.

    Raises:
        RequestError: There is none of that name, or not with such parameters.
    """
    factory = policy_from(text)
    one = factory()
    if isinstance(one, FixedKeepAlive):
        return fixed(one.idle_s, one.park_s)
    return Chosen(text, factory)


def fixed(idle_s: float | None, park_s: float | None = 0.0) -> Chosen:
    """Warm for a time, parked for a time; None for ever."""
    times = [NEVER if found is None else f"{found:g}" for found in (idle_s, park_s)]
    text = "fixed:" + (times[0] if park_s == 0 else ",".join(times))
    return Chosen(text, lambda: FixedKeepAlive(idle_s, park_s), (idle_s,))


def served(
    chosen: Chosen, pool: int, budget: float | None = None
) -> tuple[list[str], Callable[[], LivePolicy]]:
    """The flags by which a server follows a policy, and what it makes of them for each model.

    Args:
        chosen: The policy.
        pool: So many models are kept parked.
        budget: Device seconds in an hour for which models may be held for nobody.

    Raises:
        RequestError: `coldframe serve` would refuse these flags.
    """
    # Not at the top: `--help` is to come at once.
    from coldframe.runtime.flags.serve import add_arguments, policy_for, settings_for
    from coldframe.runtime.gateway.platforms.table import PROFILES

    if pool and chosen.keeps is not None:
        # Only by --idle: who is in a pool stays parked, whatever is said of parking.
        (idle_s,) = chosen.keeps
        flags = [*(() if idle_s is None else ("--idle", f"{idle_s:g}")), "--pool", str(pool)]
    else:
        flags = ["--policy", chosen.text, *(("--pool", str(pool)) if pool else ())]
    if budget is not None:
        flags += ["--budget", f"{budget:g}"]
    parser = Parser(exit_on_error=False)
    add_arguments(parser)
    args = parser.parse_intermixed_args(flags)  # and not what the environment says
    settings_for(args, PROFILES[0], ())
    return flags, policy_for(args)


def seconds_or_never(text: str, where: str) -> float | None:
    """Seconds; None for never.

    Raises:
        RequestError: It is neither.
    """
    if text.strip() == NEVER:
        return None
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise RequestError(
            "this is no time",
            where=where,
            expected=f"0 or more seconds, or {NEVER}",
            got=repr(text),
        )
    return found
