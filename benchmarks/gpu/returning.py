"""Correctness of what comes back: steps, contexts and images; see `correctness`."""

from __future__ import annotations

from coldframe.benchmarks.gpu.correctness import measure_returning as measure

__all__ = ["measure"]
