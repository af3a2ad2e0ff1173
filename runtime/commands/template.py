"""`coldframe snapshot template`: keeps a warm worker resident that is forked for each start.

For machines that do not allow CRIU, and only where this process outlives the return to zero.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import RequestError
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.compiled.compiling import COMPILE_S, Compiling
from coldframe.runtime.frozen.worker import freeze_order, room, weights_room
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.sizing import ModelFacts, kv_blocks
from coldframe.snapshot.freezer import freezing_environment
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.template import Template

__all__ = ["run"]

_CODE = (
    "from coldframe.runtime.frozen.worker import main; "
    "from coldframe.snapshot.forking import fork_on_demand; main(3, fork_on_demand)"
)


def run(args: argparse.Namespace) -> int:
    """Serves forks until a signal ends it; does not return otherwise.

    Args:
        args: `model`, `threads` and `json`.

    Raises:
        ColdframeError: There can be no template, or it has died.
    """
    started = time.monotonic()
    threads = cpu_count() if args.threads is None else args.threads
    if threads < 1:
        raise RequestError(
            "there must be a thread",
            where="--threads",
            got=threads,
            hint="Ask for at least 1.",
        )
    with _model(args.model) as model, tempfile.TemporaryDirectory(prefix="coldframe-") as work:
        # Where no cache can be written the code lies in `work`, until the template has loaded it.
        key = ModelKey.of(model.directory, model.tensors)
        code = _code(model, threads, work) if args.graphs == "auto" else None
        order = freeze_order(model, weights_room(model), _kv_room(model), threads, code=code)
        template = Template(args.model, key, _CODE, order, freezing_environment(threads))
    try:
        if args.json:
            document = {
                "template": template.id,
                "model": args.model,
                "socket": template.path,
                "pid": template.pid,
                "seconds": time.monotonic() - started,
            }
            print(json.dumps(document), flush=True)
        else:
            print(f"template of {args.model} ready: {template.path}", flush=True)
        template.serve()
    finally:
        template.close()


def _code(model: ModelFacts, threads: int, work: str) -> dict[str, Any]:
    """The model's compiled decode steps, or why there are none."""
    compiling = Compiling(model, threads, work, COMPILE_S)
    try:
        return compiling.wait()
    finally:
        compiling.close()


@contextlib.contextmanager
def _model(name: str) -> Iterator[ModelFacts]:
    """A model whose small files are here for the while."""
    location = parse_location(name)
    if isinstance(location, Directory):
        yield ModelFacts(location.path)
        return
    from coldframe.runtime.replica.replica import Replica

    # It gets the small files first, and is given up before it has the weights.
    with Replica(ReplicaOptions(name, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.known)
        yield replica.model


def _kv_room(model: ModelFacts) -> int:
    """Addresses to keep free for the KV that a replica takes here by default."""
    block_bytes, blocks = kv_blocks(model.spec, None)
    return room(block_bytes * blocks)
