"""Many workers of one replica at once: when the last is up, what they answer, what they take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import now
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["Served", "serve"]

_PROMPT_TOKENS = 64
_TOKENS = 64
_WORKED_NS = 2_000_000


@dataclass(frozen=True, slots=True)
class Served:
    """What a replica with many workers did.

    Args:
        up_s: From nothing until the last of its workers was up, in seconds.
        answers: Token ids, one answer for each prefill worker.
        worked: How many workers have computed for them.
        pss: Each worker's proportional set size, in bytes; what they share counts once.
        pss_anon: Of that, what is in no file.
    """

    up_s: float
    answers: tuple[tuple[int, ...], ...]
    worked: int
    pss: tuple[int, ...]
    pss_anon: tuple[int, ...]


def serve(model: Path, workers: int, snapshot: SnapshotOptions) -> Served:
    """Starts a replica, has all its workers answer at the same moment, and ends it.

    Args:
        model: The checkpoint's directory.
        workers: How many, half of them for prefill.
        snapshot: How they start.

    Raises:
        ColdframeError: A worker cannot start, or does not answer.
    """
    pairs = workers // 2
    options = ReplicaOptions(str(model), prefill=pairs, decode=pairs, snapshot=snapshot)
    started = now()
    with Replica(options) as replica:
        replica.run_until(lambda: len(_ready(replica)) == workers and all(replica.pids.values()))
        up_s = (max(_ready(replica)) - started) / 1e9
        pids = {name: pid for name, pid in replica.pids.items() if name != "memory"}
        before = {name: _computed_ns(pid) for name, pid in pids.items()}
        # One for each pair: alone in its worker, an answer does not depend on the others.
        clients = [_Client() for _ in range(pairs)]
        for number, client in enumerate(clients):
            vocabulary = replica.spec.vocab_size
            prompt = tuple((5 + 7 * i + 31 * number) % vocabulary for i in range(_PROMPT_TOKENS))
            params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True)
            replica.submit(params, client, prompt_ids=prompt)
        replica.run_until(lambda: all(client.done for client in clients))
        for client in clients:
            if client.error is not None:
                raise client.error
        after = {name: _computed_ns(pid) for name, pid in pids.items()}
        sizes = [_pss(pid) for pid in pids.values()]
    return Served(
        up_s,
        tuple(tuple(client.tokens) for client in clients),
        sum(after[name] - before[name] > _WORKED_NS for name in pids),
        tuple(size["Pss"] for size in sizes),
        tuple(size["Pss_Anon"] for size in sizes),
    )


class _Client:
    """Remembers an answer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.done = False
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self.tokens.append(event.token)
        self.done = event.finish is not None

    def on_error(self, error: ColdframeError) -> None:
        self.error, self.done = error, True


def _ready(replica: Replica) -> list[int]:
    """When each worker that is up was."""
    return [span.end_ns for span in replica.spans if span.name == "ready"]


def _computed_ns(pid: int) -> int:
    """The processor time of all threads of a process."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat") as file:
            total += int(file.read().split()[0])
    return total


def _pss(pid: int) -> dict[str, int]:
    """The lines of smaps_rollup, in bytes."""
    sizes = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name.startswith("Pss"):
                sizes[name] = int(rest.split()[0]) * 1024
    return sizes
