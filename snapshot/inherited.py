"""What a process inherits from whoever starts it, and a clone must get from its own start.

The umask, the resource limits, the nice value and the out-of-memory score are in an image as the
creator had them. To raise a hard limit, or to lower one of the last two, takes privileges that a
clone does not have any more. So its PID 1, which has them and is a child of this start, gives it
its own (`give`) before the clone runs; a clone takes what its front has told it (`take`) then.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import SnapshotError

__all__ = ["Inherited"]

_LIMITS = {
    name: getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"  # another name of RLIMIT_NOFILE
}


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a process has of its parent.

    Args:
        umask: Of its new files.
        limits: The soft and the hard limit by name, such as `RLIMIT_NOFILE`; -1 is none.
        nice: From -20 to 19.
        oom_score_adj: From -1000 to 1000.
    """

    umask: int
    limits: dict[str, tuple[int, int]]
    nice: int
    oom_score_adj: int

    @staticmethod
    def here() -> Inherited:
        """What this process has."""
        # To ask the system call for the umask is to set it, for all threads.
        with open("/proc/self/status") as file:
            umask = next(line for line in file if line.startswith("Umask:"))
        with open("/proc/self/oom_score_adj") as file:
            score = int(file.read())
        limits = {name: resource.getrlimit(number) for name, number in _LIMITS.items()}
        return Inherited(
            int(umask.split()[1], 8), limits, os.getpriority(os.PRIO_PROCESS, 0), score
        )

    def give(self, pid: int) -> None:
        """Gives another process all but the umask, as far as this one may."""
        for name, limit in self.limits.items():
            if name in _LIMITS:
                _limit(pid, _LIMITS[name], limit)
        with contextlib.suppress(OSError):
            if os.getpriority(os.PRIO_PROCESS, pid) != self.nice:
                os.setpriority(os.PRIO_PROCESS, pid, self.nice)
        path = f"/proc/{pid}/oom_score_adj"
        with contextlib.suppress(OSError):
            with open(path) as file:
                score = int(file.read())
            if score != self.oom_score_adj:
                with open(path, "w") as file:
                    file.write(str(self.oom_score_adj))

    def take(self) -> None:
        """Gives this process all of it, as far as it may; the umask always."""
        os.umask(self.umask)
        self.give(os.getpid())

    def to_wire(self) -> dict[str, Any]:
        limits = {name: list(limit) for name, limit in self.limits.items()}
        return {
            "umask": self.umask,
            "limits": limits,
            "nice": self.nice,
            "oom_score_adj": self.oom_score_adj,
        }

    @staticmethod
    def from_wire(data: Any) -> Inherited:
        """What a message says.

        Raises:
            SnapshotError: It says something else.
        """
        if isinstance(data, Mapping):
            numbers = [data.get(name) for name in ("umask", "nice", "oom_score_adj")]
            limits = data.get("limits")
            if isinstance(limits, dict) and all(type(number) is int for number in numbers):
                pairs = {name: _pair(limit) for name, limit in limits.items()}
                umask, nice, score = numbers
                if 0 <= umask <= 0o777 and None not in pairs.values():  # type: ignore[operator]
                    return Inherited(umask, pairs, nice, score)  # type: ignore[arg-type]
        raise SnapshotError(
            "what a clone is to inherit is malformed",
            where="inherited",
            expected="umask, limits, nice and oom_score_adj",
            got=repr(data),
            hint="Front and image must be of the same version of coldframe.",
        )


def _limit(pid: int, number: int, wanted: tuple[int, int]) -> None:
    """Sets a limit; where the hard one may not be raised, the soft one as far as it goes."""
    with contextlib.suppress(OSError):
        found = resource.prlimit(pid, number)
        if found == wanted:
            return
        # ValueError is Python's name for EPERM with a limit that is too high.
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, number, wanted)
            return
        soft, hard = wanted[0], found[1]
        if soft == resource.RLIM_INFINITY or (hard != resource.RLIM_INFINITY and soft > hard):
            soft = hard
        with contextlib.suppress(ValueError):
            resource.prlimit(pid, number, (soft, hard))


def _pair(limit: object) -> tuple[int, int] | None:
    if isinstance(limit, list) and len(limit) == 2 and all(type(part) is int for part in limit):
        return limit[0], limit[1]
    return None
