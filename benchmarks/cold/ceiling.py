"""What the path itself can do: the same files read by as little as possible, in the same round.

From a disk that is a read past the page cache by eight threads; from a server, a read from eight
sockets into memory that nobody parses. Interpreter and imports are not in the time.
"""

from __future__ import annotations

from pathlib import Path

from coldframe.benchmarks.cold.sources import Place, weight_files
from coldframe.benchmarks.harness import evict_files
from coldframe.benchmarks.loaders import load_once

__all__ = ["DIRECT", "SOCKETS", "ceiling_rate"]

DIRECT = "a raw O_DIRECT read of the same files"
SOCKETS = "a raw read of the same files from sockets"
_LIMIT_S = 600.0


def ceiling_rate(place: Place, model: Path) -> float:
    """Measures the rate of a path once, in bytes a second.

    Args:
        place: Where the weights are.
        model: The same checkpoint's directory, by which its files are known.

    Raises:
        PlatformError: The path cannot be measured: no O_DIRECT, no eviction, no such file there.
    """
    if place.base is None:
        evict_files(weight_files(model))
        read = load_once("raw O_DIRECT", str(model), limit_s=_LIMIT_S)
    else:
        sizes = {file.name: file.stat().st_size for file in weight_files(model)}
        read = load_once("raw sockets", place.base, more={"sizes": sizes}, limit_s=_LIMIT_S)
    return float(read["bytes"] / read["seconds"])
