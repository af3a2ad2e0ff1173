"""What all processes of a replica have of memory together, each shared page counted once."""

from __future__ import annotations

from collections.abc import Iterable

from coldframe.runtime.planning.footprint import tree

__all__ = ["pss_of"]

_KIB = 1024


def pss_of(pid: int, others: Iterable[int] = ()) -> int | None:
    """Proportional set size of a process and of all below it, in bytes (proc_pid_smaps(5)).

    Args:
        pid: The first one.
        others: Further ones that are below another process, as forks of a template are.

    Returns:
        The sum; None where the kernel does not tell, as of another user's.
    """
    total = 0
    for each in {*tree(pid), *others}:
        try:
            with open(f"/proc/{each}/smaps_rollup", encoding="ascii", errors="replace") as lines:
                told = [line.split() for line in lines if line.startswith("Pss:")]
        except (ProcessLookupError, FileNotFoundError):
            continue  # it has ended meanwhile, and has none
        except OSError:
            return None
        total += sum(int(words[1]) * _KIB for words in told)
    return total
