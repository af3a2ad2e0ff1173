"""What memory the processes of a replica have, and whose it is: theirs, the weights', or KV.

Proportional set sizes (PSS, proc_pid_smaps(5)): what several have mapped is divided among them, so
that a sum over processes counts no page twice. Weights and KV are told by their addresses, at
which every process of a replica maps them (`loader.arena`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coldframe.loader.arena import KV_BASE, SCRATCH_BASE, WEIGHTS_BASE

__all__ = ["Footprint", "footprint", "forks_of", "tree"]

_KIB = 1024
_NAMES = {
    "loader.memory_service.service": "memory",
    "runtime.worker.process": "worker",
    "vllm.worker_process": "worker",
    "runtime.frozen.worker": "worker",
    "gateway.process": "gateway",
    "template_process": "templates",
    "snapshot.restorer": "restorer",
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of PSS.

    Args:
        own: What processes have for themselves and share with one another: code, heaps, torch.
        weights: What is mapped of the weights.
        kv: What is mapped of KV, as far as it was touched.
        processes: `own` by what each process is; clones of a role are added up.
    """

    own: int
    weights: int
    kv: int
    processes: dict[str, int]

    @property
    def total(self) -> int:
        return self.own + self.weights + self.kv


def footprint(pid: int, template: int | None = None) -> Footprint:
    """Of a process and all that descend from it; what ends meanwhile counts for nothing.

    Args:
        pid: The front of a replica.
        template: `coldframe snapshot template`, where workers are forks of what that has made:
            neither of the two is of the replica.
    """
    own = weights = kv = 0
    processes: dict[str, int] = {}
    forks = forks_of(template)
    for each in (*tree(pid), *forks):
        try:
            mine, of_weights, of_kv = _of(each)
            # A fork has the command line of its template.
            name = "front" if each == pid else "worker" if each in forks else _name(each)
        except OSError:
            continue
        own, weights, kv = own + mine, weights + of_weights, kv + of_kv
        processes[name] = processes.get(name, 0) + mine
    return Footprint(own, weights, kv, processes)


def tree(pid: int) -> Iterator[int]:
    """A process and all that descend from it, as they are found."""
    yield pid
    for child in _children(pid):
        yield from tree(child)


def _children(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for task in tasks:
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        yield from map(int, children)


def forks_of(template: int | None) -> list[int]:
    """The forks of the template that a command has made; none where there is none."""
    if template is None:
        return []
    made = list(_children(template))
    return [each for one in made for each in tree(one) if each != one]


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return next((name for sign, name in _NAMES.items() if sign in words), "others")


def _of(pid: int) -> tuple[int, int, int]:
    """PSS of what is its own, of weights and of KV."""
    own = weights = kv = 0
    start = 0
    with Path(f"/proc/{pid}/smaps").open(errors="replace") as lines:
        for line in lines:
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):
                start = int(key.partition("-")[0], 16)
            # Pages of hugetlbfs are counted on lines of their own.
            elif key in ("Pss:", "Private_Hugetlb:"):
                nbytes = int(rest.split()[0]) * _KIB
                if WEIGHTS_BASE <= start < KV_BASE:
                    weights += nbytes
                elif KV_BASE <= start < SCRATCH_BASE:
                    kv += nbytes
                else:
                    own += nbytes
    return own, weights, kv
