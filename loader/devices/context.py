"""A process's context on one GPU: the device's primary one, which torch takes too."""

from __future__ import annotations

from contextlib import suppress

from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import DeviceLost, NoDevice

__all__ = ["Context"]


class Context:
    """A GPU, ready for work; making one may take hundreds of milliseconds.

    Args:
        driver: Whose.
        ordinal: Which GPU, of those that this process sees.

    Attributes:
        name: As the device is named on the command line, such as `cuda:0`.
        granularity: What memory is cut into, in bytes; addresses and sizes are multiples of it.

    Raises:
        NoDevice: There is no such GPU, or it cannot share memory between processes.
        DeviceError: No context can be made on it.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver = driver
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        if not 0 <= ordinal < driver.device_count():
            raise NoDevice(
                "there is no such GPU",
                where=self.name,
                expected=f"less than {driver.device_count()}",
                hint="Name a GPU that this process can see (CUDA_VISIBLE_DEVICES, nvidia-smi).",
            )
        if not driver.shares_memory(ordinal):
            raise NoDevice(
                "this GPU's memory cannot be shared between processes",
                where=f"{self.name}, {driver.device_name(ordinal)}",
                expected="virtual memory management and POSIX descriptors",
            )
        self.granularity = driver.granularity(ordinal)
        self._handle = driver.retain_context(ordinal)
        self._closed = False

    def bind(self) -> None:
        """Has the calling thread work with this context.

        Until it works with another's, or a library has it do so: cheap enough to be sure.
        """
        self.driver.make_current(self._handle)

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all of them, by what the driver says."""
        self.bind()
        return self.driver.memory_info()

    def available(self) -> int:
        """Bytes of the device that are free."""
        return self.memory()[0]

    def close(self) -> None:
        """Lets the context go; what was made in it must be gone."""
        if not self._closed:
            self._closed = True
            with suppress(DeviceLost):  # and the context with it
                self.driver.release_context(self.ordinal)
