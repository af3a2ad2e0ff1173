"""How many workers of a role there may be, and where: what `--prefill` and `--decode` say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coldframe.loader.errors import DeviceError, RequestError

__all__ = ["MOST_WORKERS", "Scale"]

MOST_WORKERS = 256
"""Of one role in one replica: a number with a digit too many shall not fill the machine."""
_SPEC = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?(?:@(.*))?", re.DOTALL)
_CUDA = re.compile(r"cuda(?::[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Scale:
    """The bounds of a role's workers.

    Args:
        least: So many there are as long as the replica is warm.
        most: So many there may be when there is much to do.
        device: Where they compute.
    """

    least: int = 1
    most: int = 1
    device: str = "cpu"

    @property
    def fixed(self) -> bool:
        """Whether their number never changes."""
        return self.least == self.most

    @classmethod
    def of(cls, wanted: int | Scale) -> Scale:
        """The bounds that a plain number stands for."""
        return cls(wanted, wanted) if isinstance(wanted, int) else wanted

    @classmethod
    def parse(cls, text: str, where: str = "") -> Scale:
        """Reads `2`, `1-4` or `1-4@cpu`.

        Args:
            text: What to read.
            where: Whose it is, for the error.

        Raises:
            RequestError: It is no such text, or says nothing that can be.
            DeviceError: It names a device that this build cannot use.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise RequestError(
                "this is no number of workers",
                where=where,
                expected="N, MIN-MAX, or one of them with @DEVICE",
                got=repr(text),
                hint="Write 2, 1-4 or 1-4@cpu.",
            )
        least = int(match[1])
        most = least if match[2] is None else int(match[2])
        if not 1 <= least <= most <= MOST_WORKERS:
            raise RequestError(
                "there cannot be so many workers",
                where=where,
                expected=f"1 <= MIN <= MAX <= {MOST_WORKERS}",
                got=text.strip(),
            )
        device = "cpu" if match[3] is None else match[3]
        if _CUDA.fullmatch(device):
            raise DeviceError(
                "no CUDA code is in this build yet",
                where=where,
                expected="cpu",
                got=device,
                hint="Leave the device out, or write @cpu.",
            )
        if device != "cpu":
            raise RequestError(
                "there is no such device", where=where, expected="cpu", got=repr(device)
            )
        return cls(least, most, device)
