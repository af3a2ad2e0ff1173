"""`coldframe bench swap A B`: two models that do not fit the device together, asked in turn.

One server with an image for each model's workers and memory for the larger one. In each run each
model is asked while the other has the memory (a *swap*), and once while nobody has it (a start
from zero), which is what the swap's time is held against. Times are those from the request to the
first streamed token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows, warm_page_cache
from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.servers import coldframe_server
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]

_PROMPT = [5 + (7 * i) % 997 for i in range(64)]
_WAIT_S = 120.0
_BETWEEN_S = 2.0
_BEYOND_S = 0.3
_KV = 256 << 20
_NAMES = ("m", "other")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("models", metavar="MODEL", type=Path, nargs=2, help="two directories")
    parser.flag("--runs", type=int, default=7, help="runs of each (7)")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether its target is met.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A server failed, or there can be no image.
    """
    for model in args.models:
        if not model.is_dir():
            raise RequestError("there is no such directory", where="MODEL", got=model)
    if args.runs < 1:
        raise RequestError("there must be one", where="--runs", got=args.runs)
    memory = max(map(_weights_bytes, args.models)) + _KV
    first, second = args.models
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as scratch:
        for model in args.models:
            _make_image(model, scratch)
        environment = {"COLDFRAME_SNAPSHOT": "require", "COLDFRAME_SNAPSHOT_STORE": scratch}
        bounds = ("--device-memory", str(memory), "--kv-memory", str(_KV))
        names = (str(second), "--model-name", _NAMES[1])
        with coldframe_server(first, *names, *bounds, environment=environment) as server:
            sock = knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9))
            with Connection(sock, _WAIT_S) as connection:
                for name in _NAMES:
                    _first_token_s(connection, name)
                for number in range(args.runs):
                    print(f"run {number + 1} of {args.runs}", file=sys.stderr)
                    warm_page_cache(first)
                    warm_page_cache(second)
                    for name, place in zip(_NAMES, args.models, strict=True):
                        swap = _first_token_s(connection, name)
                        load = _loaded_in_s(connection, name)
                        connection.post("/sleep?level=2", b"")
                        start = _first_token_s(connection, name)
                        for row, seconds in {
                            "from zero": start,
                            "in place of the other": swap,
                            "beyond the start": swap - start,
                            "the weights alone": load,
                            "beyond the weights": swap - load,
                        }.items():
                            found.setdefault(f"{place.name}: {row}", []).append(seconds)
    rows = [
        Row(name, times, "s", _BEYOND_S if name.endswith("beyond the start") else None)
        for name, times in found.items()
    ]
    more = {"models": [str(model) for model in args.models], "runs": args.runs, "memory": memory}
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _weights_bytes(model: Path) -> int:
    return sum(tensor.nbytes for tensor in Checkpoint.open(str(model)).tensors.values())


def _make_image(model: Path, store: str) -> None:
    print(f"an image for {model}", file=sys.stderr)
    command = [
        *(str(Path(sys.executable).parent / "coldframe"), "snapshot", "create", str(model)),
        *("--snapshot-store", store, "--graphs", "off", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlatformError(
            "an image cannot be made", where=" ".join(command), got=done.stderr.strip()
        )


def _first_token_s(connection: Connection, name: str) -> float:
    answer = connection.post("/v1/completions", completion(name, _PROMPT, 2, stream=True))
    time.sleep(_BETWEEN_S)
    return (answer.first_ns - answer.sent_ns) / 1e9


def _loaded_in_s(connection: Connection, name: str) -> float:
    """How long the weights took that were loaded last."""
    told = json.loads(connection.get(f"/startup?model={name}").body)
    return float(told["bytes_done"] / told["rate"])
