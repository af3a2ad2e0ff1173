"""What `make gpu` runs, in its order: correctness, then figures, each behind what it needs."""

from __future__ import annotations

from coldframe.benchmarks.gpu.budget import Part

__all__ = ["BUDGET_S", "MACHINE", "PARTS"]

BUDGET_S = 540.0
"""Seconds for all parts; `make gpu` promises that it is over after 560, whatever hangs."""

_HERE = "coldframe.benchmarks.gpu"

MACHINE = Part("machine", "The machine", f"{_HERE}.machine", 20, 10)
"""The first: without a GPU there are no others."""

PARTS = (
    Part("correctness", "Correctness", f"{_HERE}.correctness", 155, 30),
    Part("returning", "Correctness of what comes back", f"{_HERE}.returning", 75, 25),
    Part("copies", "Rates of the path", f"{_HERE}.copies", 20, 10),
    Part("model", "The model that is loaded", f"{_HERE}.model", 30, 15),
    Part("loads", "The loader beside the link", f"{_HERE}.loads", 40, 15),
    Part("decode", "Decode", f"{_HERE}.decode", 75, 20),
    Part("resident", "First token of a resident replica", f"{_HERE}.resident", 50, 20),
    Part("archive", "Captured steps from an archive", f"{_HERE}.archived", 25, 15),
    Part("cold", "First token of a cold container", f"{_HERE}.cold", 40, 20),
    Part("restored", "First token out of an image", f"{_HERE}.restored", 60, 25),
    Part("probes", "Open questions", f"{_HERE}.probes", 110, 10),
    Part("sanitizer", "compute-sanitizer", f"{_HERE}.sanitizer", 90, 30),
)
"""All but the last three keep within the budget, however long each takes: every aim is theirs. The
last three take what is left, and leave out what does not fit."""
