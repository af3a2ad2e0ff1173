"""What a prefix in the KV store is worth: cells of `coldframe bench prefix`, over HTTP.

One server with a store on disk and in host memory. In each run a prompt that nobody has asked
before is asked from zero; then its beginning with other ends: from zero again, with the store's
files in the page cache and without, and of a replica that has come from zero and is warm. Then the
same from parked. The start's own time is in all figures from zero.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from coldframe.benchmarks.harness import Row, evict_files, warm_page_cache
from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.servers import coldframe_server
from coldframe.benchmarks.snapshot_cells import Image
from coldframe.loader.errors import PlatformError, ReplicaError

__all__ = ["measure_store"]

_WAIT_S = 120.0
_BETWEEN_S = 2.0
"""Between two prompts: what a start still does behind its first token is none of the next one's."""
_MOST = 0.5
_MEMORY = "1GiB"

_CELLS = {
    "zero, nothing of it kept": None,
    "zero, its prefix on disk, files cached": "zero, nothing of it kept",
    "zero, its prefix on disk, files not cached": "zero, nothing of it kept",
    "warm, nothing of it kept": None,
    "warm after zero, its prefix on disk": "warm, nothing of it kept",
    "parked, nothing of it kept": None,
    "parked, its prefix in host memory": "parked, nothing of it kept",
}
"""What is measured, and beside what."""


def measure_store(
    model: Path, tier: str, vocabulary: range, runs: int, prefix: int, rest: int, reused: int
) -> list[Row]:
    """Measures all cells in turn, so many times.

    Args:
        model: A checkpoint's directory.
        tier: How workers start: `image` or `fresh`.
        vocabulary: Token ids to make prompts of.
        runs: How often.
        prefix: Tokens that prompts have in common.
        rest: Tokens behind them.
        reused: How many of a prompt are to be found.

    Raises:
        PlatformError: A server failed, or there can be no image.
        ReplicaError: What should have been in the store was not, or the other way round.
    """
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as scratch:
        environment = {}
        if tier == "image":
            store = Image.create(model, Path(scratch), "lz4").store
            environment = {
                "COLDFRAME_SNAPSHOT": "require",
                "COLDFRAME_SNAPSHOT_STORE": str(store),
            }
        warm_page_cache(model)
        kept = Path(scratch) / "kv"
        flags = ("--kv-store", str(kept), "--kv-store-memory", _MEMORY)
        with coldframe_server(model, *flags, environment=environment) as server:
            sock = knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9))
            with Connection(sock, _WAIT_S) as connection:
                asking = _Asking(connection, kept, vocabulary, prefix, rest, reused)
                for number in range(runs):
                    print(f"store, run {number + 1} of {runs}", file=sys.stderr)
                    for name, seconds in asking.run().items():
                        found[name].append(seconds)
    rows = [Row(f"{name}: TTFT over HTTP", found[name], "s") for name in _CELLS]
    for name, beside in _CELLS.items():
        if beside is not None:
            ratios = [a / b for a, b in zip(found[name], found[beside], strict=True)]
            most = _MOST if name.startswith("zero") else None
            rows.append(Row(f"{name} / nothing of it", ratios, "ratio", most))
    return rows


class _Asking:
    """One run after the other."""

    def __init__(
        self,
        connection: Connection,
        kept: Path,
        vocabulary: Sequence[int],
        prefix: int,
        rest: int,
        reused: int,
    ) -> None:
        self._connection = connection
        self._kept = kept
        self._vocabulary = vocabulary
        self._lengths = prefix, rest
        self._reused = reused
        self._numbers = random.Random(0)

    def run(self) -> dict[str, float]:
        """Seconds to the first token, by cell."""
        names = iter(_CELLS)
        first = self._tokens(self._lengths[0])
        found = {}
        self._sleep(2)
        found[next(names)] = self._ask(first, 0)
        self._sleep(2)
        found[next(names)] = self._ask(first, self._reused)
        self._sleep(2)
        evict_files(path for path in self._kept.rglob("*") if path.is_file())
        found[next(names)] = self._ask(first, self._reused)
        self._sleep(2)
        self._ask([], 0)
        second = self._tokens(self._lengths[0])
        found[next(names)] = self._ask(second, 0)
        found[next(names)] = self._ask(first, self._reused)
        third = self._tokens(self._lengths[0])
        self._sleep(1)
        found[next(names)] = self._ask(third, 0)
        self._sleep(1)
        found[next(names)] = self._ask(third, self._reused)
        return found

    def _tokens(self, count: int) -> list[int]:
        return self._numbers.choices(self._vocabulary, k=count)

    def _sleep(self, level: int) -> None:
        self._connection.post(f"/sleep?level={level}", b"")
        wanted = "zero" if level == 2 else "parked"
        state = json.loads(self._connection.get("/startup").body)["state"]
        if state != wanted:
            raise PlatformError("the server is in another state", expected=wanted, got=state)

    def _ask(self, prefix: list[int], reused: int) -> float:
        """Asks for a prefix with an end that nobody knows."""
        prompt = [*prefix, *self._tokens(self._lengths[1])]
        body = json.loads(completion("m", prompt, 2, stream=True))
        body["stream_options"] = {"include_usage": True}
        answer = self._connection.post("/v1/completions", json.dumps(body).encode())
        if f'"cached_tokens":{reused}' not in answer.body.decode().replace(" ", ""):
            raise ReplicaError(
                "a prompt was not computed from where it should be",
                expected=f"{reused} tokens that are kept",
                got=answer.body[-400:],
            )
        time.sleep(_BETWEEN_S)
        return (answer.first_ns - answer.sent_ns) / 1e9
