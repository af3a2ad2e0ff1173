"""What the memory service asks of a device."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Device"]


class Device(Protocol):
    """Memory that weights and KV can live in."""

    @property
    def name(self) -> str:
        """As it is named on the command line, such as `cpu`."""
        ...

    def available(self) -> int:
        """Bytes that can still be allocated."""
        ...

    def allocate(self, purpose: str, nbytes: int, *, now: bool) -> int:
        """Memory that other processes can map, filled with zeros.

        Args:
            purpose: What for; it shows in the process's memory map.
            nbytes: How much.
            now: Whether all of it will be filled at once (weights), so that it must be there,
                or be taken as it is touched (KV).

        Returns:
            A descriptor, the caller's to close.

        Raises:
            DeviceError: The device has not that much left.
        """
        ...

    def discard(self, fd: int, nbytes: int) -> None:
        """Gives memory back that stays reserved: whoever touches it again finds zeros.

        Args:
            fd: Of memory that was allocated with `now` off.
            nbytes: Its size.

        Raises:
            DeviceError: It cannot be done.
        """
        ...
