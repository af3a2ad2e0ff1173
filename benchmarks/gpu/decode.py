"""Decode at batch 1, against the device's own memory: each token reads all weights once."""

from __future__ import annotations

import time
from statistics import median

import torch

from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import ask, options
from coldframe.benchmarks.gpu.report import Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.runtime.replica import Replica

__all__ = ["measure"]

_TOKENS = 130
_SHARE = 0.3
_COPIES = 10


def measure(report: Report, setting: Setting) -> None:
    """Measures the device's memory, then decodes."""
    bandwidth = _bandwidth(setting)
    report.figure(Row("device memory, a copy counted twice", [b / 1e9 for b in bandwidth], "GB/s"))
    torch.cuda.empty_cache()
    told = options(report.earlier.need(MODEL), setting.device)
    with Replica(told) as replica:
        ask(replica, 8).wait(replica, setting.seconds)
        nbytes = int(replica.facts["weights_bytes"])
        limit = median(bandwidth) / nbytes
        report.figure(Row("  bandwidth / bytes of weights", [limit], "tokens/s"))
        rates: list[float] = []
        for number in range(setting.runs):
            answer = ask(replica, _TOKENS, shift=number + 1).wait(replica, setting.seconds)
            rates.append(answer.rate)
            # Again after each run: what there is when the time is up counts.
            report.figure(Row("decode, batch 1", rates, "tokens/s"))
            shares = [rate / limit for rate in rates]
            report.figure(Row("decode, batch 1 / that", shares, "ratio", _SHARE, at_least=True))


def _bandwidth(setting: Setting) -> list[float]:
    """Bytes per second that the device's memory reads and writes, by copies of it."""
    free, _ = torch.cuda.mem_get_info(setting.device)
    nbytes = min(setting.nbytes, free // 4)
    source = torch.empty(nbytes, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    found = []
    for _ in range(_COPIES):
        torch.cuda.synchronize(setting.device)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(setting.device)
        found.append(2 * nbytes / (time.perf_counter() - started))
    return found
