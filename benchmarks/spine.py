"""`coldframe bench spine MODEL`: one cold start and its decode, against their limits.

Every figure is a ratio to something measured in the same run, or to the physical limit: bytes over
bandwidth. Cold starts are real processes with the clock from the exec on; runs are interleaved, so
that a machine whose speed drifts drifts for both sides.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import (
    Row,
    cold_start,
    import_torch_s,
    print_rows,
    warm_page_cache,
)
from coldframe.benchmarks.peers import transformers_decode_rates
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "run"]

_PROMPT = [5 + (7 * i) % 997 for i in range(64)]
_SLOW = 200e6
_FAST = 1e9
_DECODED = 128
_OVERHEAD_BYTES = 700_000_000


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=5, help="runs of each cell (5)")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether all targets are met.

    Raises:
        ColdframeError: A replica failed.
    """
    cells: dict[str, list[Any]] = {
        name: [] for name in ("slow", "no_overlap", "mapped", "import_torch", "workers_up")
    }
    for number in range(args.runs):
        print(f"run {number + 1} of {args.runs}", file=sys.stderr)
        slow = f"--throttle={_SLOW / 1e6:.0f}MB/s"
        cells["slow"].append(cold_start(args.model, slow, prompt_ids=_PROMPT, tokens=2))
        cells["no_overlap"].append(
            cold_start(args.model, slow, "--no-overlap", prompt_ids=_PROMPT, tokens=2)
        )
        warm_page_cache(args.model)
        cells["import_torch"].append(import_torch_s())
        warm_page_cache(args.model)
        cells["mapped"].append(cold_start(args.model, prompt_ids=_PROMPT, tokens=2))
        cells["workers_up"].append(_with_workers_up(args.model))
    print("decode", file=sys.stderr)
    decode = _decode(args.model, args.runs)
    rows = [*_start_rows(cells), *decode]
    print_rows(rows, {"model": str(args.model), "runs": args.runs})
    return 0 if all(row.met is not False for row in rows) else 1


def _start_rows(cells: dict[str, list[Any]]) -> list[Row]:
    slow, apart = cells["slow"], cells["no_overlap"]
    mapped = [cell for cell in cells["mapped"] if cell["load_mode"] == "mapped"]
    if not mapped:
        reason = cells["mapped"][0]["load_mode_reason"]
        raise ReplicaError("no start could map its weights", got=reason)
    beyond = [
        cell["ttft_s"] - torch - _prefill_s(cell)
        for cell, torch in zip(cells["mapped"], cells["import_torch"], strict=True)
        if cell["load_mode"] == "mapped"
    ]
    everything = slow + apart + mapped
    return [
        Row(
            "first byte asked for, from the exec",
            [c["first_byte_s"] for c in everything],
            "s",
            0.12,
        ),
        Row(
            "200 MB/s: TTFT / last stage ready",
            [c["ttft_s"] / c["load_s"] for c in slow],
            "ratio",
            1.03,
        ),
        Row(
            "200 MB/s: TTFT / (bytes / rate)",
            [c["ttft_s"] / (c["weights_bytes"] / _SLOW) for c in slow],
            "ratio",
            1.08,
        ),
        Row(
            "  without overlap: TTFT / (bytes / rate)",
            [c["ttft_s"] / (c["weights_bytes"] / _SLOW) for c in apart],
            "ratio",
        ),
        Row(
            "workers up, 1 GB/s: (first token - last stage) / load",
            cells["workers_up"],
            "ratio",
            0.05,
        ),
        Row("mapped, fresh: TTFT", [c["ttft_s"] for c in mapped], "s"),
        Row("  import torch alone", cells["import_torch"], "s"),
        Row("  the prefill's compute", [_prefill_s(c) for c in mapped], "s"),
        Row("  TTFT - import torch - prefill", beyond, "s", 0.15),
        Row(
            "unattributed time before the first token",
            [c["unattributed_s"] for c in everything],
            "s",
        ),
    ]


def _prefill_s(cell: dict[str, Any]) -> float:
    spans = [s for s in cell["stages"] if s["name"].startswith("prefill[")]
    return float(sum(span["end_s"] - span["start_s"] for span in spans))


class _Client:
    """Remembers when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.done = False
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self.times.append(time.monotonic())
        self.done = event.finish is not None

    def on_error(self, error: ColdframeError) -> None:
        self.error, self.done = error, True


def _ask(replica: Replica, count: int, shift: int = 0) -> _Client:
    client = _Client()
    prompt = tuple(token + shift for token in _PROMPT)
    replica.submit(SamplingParams(max_tokens=count, ignore_eos=True), client, prompt_ids=prompt)
    return client


def _finish(replica: Replica, *clients: _Client) -> None:
    replica.run_until(lambda: all(client.done for client in clients))
    for client in clients:
        if client.error is not None:
            raise client.error


def _with_workers_up(model: Path) -> float:
    """(First token - last stage ready) / load time, where only the weights are missing."""
    options = ReplicaOptions(model=str(model), throttle=_FAST, hold_load=True)
    with Replica(options) as replica:
        replica.run_until(lambda: replica.imported)
        replica.start_load()
        client = _ask(replica, 2)
        _finish(replica, client)
        replica.run_until(lambda: replica.loaded)
        (read,) = [s for s in replica.spans if s.name == "weight_read"]
        ready = max(s.end_ns for s in replica.spans if s.name.startswith("stage_ready["))
        return (client.times[0] * 1e9 - ready) / (ready - read.start_ns)


def _decode(model: Path, runs: int) -> list[Row]:
    """Decode rates at batch 1 and 8, Transformers beside them, and the memory of it all."""
    ones: list[float] = []
    eights: list[float] = []
    theirs: list[float] = []
    beside: dict[str, list[float]] = {"copied": [], "mapped": []}
    for _ in range(runs):
        with Replica(ReplicaOptions(model=str(model), copy=True)) as replica:
            _finish(replica, _ask(replica, 8))
            one = _ask(replica, _DECODED)
            _finish(replica, one)
            ones.append((_DECODED - 2) / (one.times[-1] - one.times[1]))
            batch = _batch_of_eight(replica, beside)
            # All eight run between the latest first step and the earliest end.
            begin = max(client.times[1] for client in batch)
            end = min(client.times[-1] for client in batch)
            steps = sum(sum(begin < t <= end for t in client.times) for client in batch)
            eights.append(steps / (end - begin))
        warm_page_cache(model)
        with Replica(ReplicaOptions(model=str(model))) as replica:
            _batch_of_eight(replica, beside)
        theirs += transformers_decode_rates(model, _PROMPT, _DECODED, 1, cpu_count())
    return [
        Row("decode, batch 1", ones, "tokens/s"),
        Row("  transformers.generate", theirs, "tokens/s"),
        Row(
            "  ours / transformers",
            [a / b for a, b in zip(ones, theirs, strict=True)],
            "ratio",
            1.0,
            at_least=True,
        ),
        Row("decode, batch 8", eights, "tokens/s"),
        Row(
            "  batch 8 / batch 1",
            [a / b for a, b in zip(eights, ones, strict=True)],
            "ratio",
            3.0,
            at_least=True,
        ),
        *(
            Row(f"PSS - weights - KV in use, weights {mode}", values, "MB", _OVERHEAD_BYTES / 1e6)
            for mode, values in beside.items()
            if values
        ),
    ]


def _batch_of_eight(replica: Replica, beside: dict[str, list[float]]) -> list[_Client]:
    """Eight requests decoded together, and the memory of all processes half-way, in MB."""
    batch = [_ask(replica, _DECODED, shift) for shift in range(8)]
    replica.run_until(lambda: all(len(client.times) > _DECODED // 2 for client in batch))
    blocks = -(-(len(_PROMPT) + _DECODED) // 32)
    kv = len(batch) * blocks * replica.spec.kv_block_bytes(replica.spec.dtype_bytes)
    over = _pss(replica) - replica.facts["weights_bytes"] - kv
    beside[replica.facts["mode"]].append(over / 1e6)
    _finish(replica, *batch)
    return batch


def _pss(replica: Replica) -> int:
    """Proportional set size of all processes together, in bytes: shared pages count once."""
    total = 0
    for pid in ("self", *replica.pids.values()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total
