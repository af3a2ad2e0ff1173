"""Which policy a text names, for a simulation and as a server's flags."""

from __future__ import annotations

from coldframe.loader.errors import RequestError
from coldframe.runtime.scaling import FixedKeepAlive, PolicyFactory
from coldframe.runtime.scaling_spec import policy_from

__all__ = ["NEVER", "Chosen", "fixed", "policy", "seconds_or_never"]

NEVER = "never"


class Chosen:
    """A policy.

    Args:
        text: As it was chosen.
        factory: Makes one for each model.
        flags: `coldframe serve` follows it with these.
        idle_s: How long it keeps a model warm, where it is a fixed one; None for ever.
    """

    def __init__(
        self,
        text: str,
        factory: PolicyFactory,
        flags: tuple[str, ...],
        idle_s: float | None = None,
    ) -> None:
        self.text = text
        self.factory = factory
        self.flags = flags
        self.idle_s = idle_s


def policy(text: str) -> Chosen:
    """The policy that a text names, as `coldframe serve --policy` reads it.

    Raises:
        RequestError: There is none of that name, or not with such parameters.
    """
    factory = policy_from(text)
    one = factory()
    if isinstance(one, FixedKeepAlive):
        return fixed(one.idle_s, one.park_s)
    return Chosen(text, factory, ("--policy", text))


def fixed(idle_s: float | None, park_s: float | None = 0.0) -> Chosen:
    """Warm for a time, parked for a time; None for ever."""
    times = [NEVER if found is None else f"{found:g}" for found in (idle_s, park_s)]
    text = "fixed:" + (times[0] if park_s == 0 else ",".join(times))
    flags: tuple[str, ...] = () if idle_s is None else ("--idle", times[0])
    if park_s is None and idle_s is not None:
        flags = ("--policy", text)
    elif idle_s is not None:
        flags = (*flags, "--park", times[1])
    return Chosen(text, lambda: FixedKeepAlive(idle_s, park_s), flags, idle_s)


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
