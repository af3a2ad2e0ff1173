"""A device's memory, shared by the models that are served from it.

Who starts asks for room first. Where there is too little, those that were used longest ago make
some: nobody asks them any more, or their requests get their answers before they go. They come back
when they are asked again, in their turn, so that models which do not fit together take turns.

How much memory a GPU has shows only when somebody is up on it. Until then there is one tenant, who
finds it out, and the others wait.
"""

from __future__ import annotations

from typing import Protocol

from coldframe.loader.errors import DeviceError

__all__ = ["Room", "Tenant"]


class Tenant(Protocol):
    """Who takes room."""

    @property
    def used_at(self) -> float:
        """When somebody asked it last, in seconds; who is being asked now was used just now."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether its memory will be free soon."""
        ...

    @property
    def can_go(self) -> bool:
        """Whether it may be sent away now."""
        ...

    def make_room(self) -> None:
        """Has it go, once those who have asked it have their answers; `Room.leave` follows."""
        ...


class Room:
    """Bytes, and who has them.

    Args:
        total: All that there are; None where that shows later (`learn`).
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.changed = False
        """Whether somebody has left since this was set to False."""
        self._held: dict[Tenant, int] = {}
        self._takes_all: Tenant | None = None
        """Who is the first, and has all that there will be to have."""
        self._waiting: list[Tenant] = []

    @property
    def free(self) -> int:
        """Bytes that nobody has; below zero where somebody took more than was known."""
        return 0 if self.total is None else self.total - sum(self._held.values())

    def awaited(self, tenant: Tenant) -> bool:
        """Whether another one waits for some of it."""
        return any(other is not tenant for other in self._waiting)

    def held(self, tenant: Tenant) -> int:
        """Bytes that a tenant has."""
        return self._held.get(tenant, 0)

    def learn(self, total: int) -> None:
        """How much there is has shown."""
        if self.total is None:
            self.total, self.changed = total, True
            if self._takes_all in self._held:
                self._held[self._takes_all] = total
            self._takes_all = None

    def fit(self, need: int, name: str) -> None:
        """Raises where something would not fit if it were alone.

        Raises:
            DeviceError: It needs more than there is.
        """
        if self.total is not None and need > self.total:
            raise DeviceError(
                "the model does not fit the device's memory",
                where=name,
                expected=f"weights and KV in {self.total:,} bytes",
                got=f"{need:,}",
                hint="Raise --device-memory, or lower --kv-memory.",
            )

    def take(self, tenant: Tenant, need: int | None) -> bool:
        """Room for a tenant, in the order in which they asked; others are sent away for it.

        Args:
            tenant: Who starts.
            need: Bytes; None where that shows only later (`settle`): then all that is free.

        Returns:
            Whether it has it. If not, it is to ask again when something has changed.
        """
        held = self._held.get(tenant, 0)
        if held and (need is None or held >= need):
            return True
        if tenant not in self._waiting:
            self._waiting.append(tenant)
        if self._waiting[0] is not tenant:
            return False  # small ones would pass a large one for ever
        if self.total is None:
            return self._take_first(tenant, need)
        wanted = max(1, (need or 0) - held)
        if self.free >= wanted:
            self._waiting.remove(tenant)
            self._held[tenant] = self.free if need is None else need
            return True
        self._send_away(wanted, tenant)
        return False

    def _take_first(self, tenant: Tenant, need: int | None) -> bool:
        if self._held.keys() - {tenant}:
            return False
        self._waiting.remove(tenant)
        self._held[tenant] = max(1, need or 0)
        self._takes_all = tenant if need is None else None
        return True

    def shrink(self, tenant: Tenant, need: int) -> None:
        """A tenant needs no more than so many bytes for now; it has to `take` the others again."""
        if self._held.get(tenant, 0) > need:
            self._held[tenant] = need
            self.changed = True

    def withdraw(self, tenant: Tenant) -> None:
        """A tenant does not want more than it has any more."""
        if tenant in self._waiting:
            self._waiting.remove(tenant)
            self.changed = True

    def settle(self, tenant: Tenant, need: int) -> bool:
        """What a tenant needs has become known.

        Returns:
            Whether there is room for it. If not, it has none any more.
        """
        if tenant not in self._held:
            return False
        self._held[tenant] = need
        if self.free >= 0:
            return True
        del self._held[tenant]
        return False

    def leave(self, tenant: Tenant) -> None:
        """A tenant's memory is free, or it does not want any now."""
        self.withdraw(tenant)
        if self._held.pop(tenant, None) is not None:
            self.changed = True

    def _send_away(self, wanted: int, asking: Tenant) -> None:
        """Has as few go as will do, those used longest ago."""
        missing = wanted - self.free
        missing -= sum(size for tenant, size in self._held.items() if tenant.leaving)
        found: list[Tenant] = []
        there = [tenant for tenant, size in self._held.items() if size and tenant is not asking]
        here = [tenant for tenant in there if tenant.can_go and not tenant.leaving]
        for tenant in sorted(here, key=lambda tenant: tenant.used_at):
            if missing <= 0:
                break
            found.append(tenant)
            missing -= self._held[tenant]
        for tenant in reversed(found):  # the last one may have been enough for others as well
            if missing + self._held[tenant] <= 0:
                missing += self._held[tenant]
            else:
                tenant.make_room()
