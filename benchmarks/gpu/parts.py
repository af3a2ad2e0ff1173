"""What `make gpu` runs, in its order: correctness, then figures, each behind what it needs."""

from __future__ import annotations

from coldframe.benchmarks.gpu.budget import Part

__all__ = ["BUDGET_S", "MACHINE", "PARTS"]

BUDGET_S = 470.0
"""Seconds for all parts; `make gpu` promises eight minutes."""

_HERE = "coldframe.benchmarks.gpu"

MACHINE = Part("machine", "The machine", f"{_HERE}.machine", 40, 10)
"""The first: without a GPU there are no others."""

PARTS = (
    Part("correctness", "Correctness", f"{_HERE}.correctness", 170, 30),
    Part("copies", "Rates of the path", f"{_HERE}.copies", 25, 10),
    Part("model", "The model that is loaded", f"{_HERE}.model", 40, 15),
    Part("loads", "The loader beside the link", f"{_HERE}.loads", 55, 15),
    Part("resident", "First token of a resident replica", f"{_HERE}.resident", 40, 20),
    Part("cold", "First token of a cold container", f"{_HERE}.cold", 50, 20),
    Part("decode", "Decode", f"{_HERE}.decode", 35, 15),
    Part("probes", "Open questions", f"{_HERE}.probes", 30, 10),
    Part("sanitizer", "compute-sanitizer", f"{_HERE}.sanitizer", 90, 30),
)
"""All but the last two keep within the budget, however long each takes. Those two take what is
left, and leave out what does not fit."""
