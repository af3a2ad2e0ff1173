"""`coldframe plan`: the stages of a model, what it will need and how fast it can be there."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import time
from contextlib import closing
from typing import Any

from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.errors import RequestError
from coldframe.loader.layouts import Layout
from coldframe.loader.location import parse_location
from coldframe.loader.opening import open_origin
from coldframe.loader.plan import Plan, Rank
from coldframe.loader.process import spawn_python
from coldframe.loader.sources.base import Origin
from coldframe.runtime.device_choice import CPU, add_device_argument, choose_device
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.flags import Parser
from coldframe.runtime.probe import Bandwidth, probe
from coldframe.runtime.run import MODEL_HELP
from coldframe.runtime.target import Target
from coldframe.runtime.units import byte_rate, human_bytes, human_seconds

__all__ = ["add_arguments", "run"]

_FIRST_BYTE_S = 0.1
"""From the exec to the first byte asked for."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.flag("--context", type=int, help="tokens of each sequence (the model's own limit)")
    parser.flag("--batch", type=int, default=1, help="sequences at once (1)")
    parser.flag("--rate", type=byte_rate, help="the path's bandwidth, as 2GB/s (a short probe)")
    parser.flag("--tensor-parallel", type=int, default=1, help="show what each of N ranks reads")
    add_device_argument(parser)
    parser.flag("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ColdframeError: The checkpoint is bad or cannot be read, the engine does not run such a
            model, or there is no such device.
    """
    target = Target.of(choose_device(args.device))
    location = parse_location(args.model)
    with closing(open_origin(location)) as origin:
        document = _planned(args, location.uri, origin, target)
    print(json.dumps(document) if args.json else _table(document))
    return 0


def _planned(
    args: argparse.Namespace, model: str, origin: Origin, target: Target
) -> dict[str, Any]:
    """The document, for a model at a place."""
    checkpoint = Checkpoint.open(origin)
    # As a load lays it out: see `loader.load`.
    as_filed = origin.path is not None and target.choice.device == CPU
    layout = Layout.FILE if as_filed else Layout.ALIGNED
    plan = Plan.build(checkpoint, layout=layout)
    spec = ModelSpec.from_config(checkpoint.config, plan.placements)
    context = spec.context_length if args.context is None else args.context
    if not 0 < context <= spec.context_length or args.batch < 1:
        raise RequestError(
            "no such context or batch",
            where="--context, --batch",
            expected=f"1 to {spec.context_length} tokens, at least one sequence",
            got=f"{context} tokens, {args.batch} sequences",
        )
    ranks = _ranks(checkpoint, args.tensor_parallel)
    if args.rate:
        path = Bandwidth(args.rate, "given")
    else:
        path = probe(origin, checkpoint, plan, maps=as_filed)
    document = _document(model, plan, spec, context, args.batch, path, _worker_start_s(), target)
    document["ranks"] = ranks
    return document


def _ranks(checkpoint: Checkpoint, ranks: int) -> list[dict[str, int]]:
    """What each tensor-parallel rank holds and reads; empty for a model that is not divided."""
    if ranks < 1:
        raise RequestError(
            "no such number of ranks",
            where="--tensor-parallel",
            expected="at least 1",
            got=ranks,
        )
    found = []
    for index in range(ranks if ranks > 1 else 0):
        plan = Plan.build(checkpoint, layout=Layout.ALIGNED, rank=Rank(index, ranks))
        found.append(
            {
                "rank": index,
                "weights_bytes": plan.weights_bytes,
                "read_bytes": plan.read_bytes,
                "extents": sum(len(stage.extents) for stage in plan.stages),
            }
        )
    return found


def _document(
    model: str,
    plan: Plan,
    spec: ModelSpec,
    context: int,
    batch: int,
    path: Bandwidth,
    worker_start_s: float,
    target: Target,
) -> dict[str, Any]:
    memory = target.predict(plan, spec, context=context, batch=batch)
    stages, done = [], 0
    for stage in plan.stages:
        done += stage.nbytes
        stages.append(
            {
                "name": stage.name,
                "bytes": stage.nbytes,
                "extents": len(stage.extents),
                "ready_s": done / path.rate,
            }
        )
    load_s = plan.read_bytes / path.rate
    return {
        "model": model,
        "family": spec.family,
        "dtype": spec.dtype,
        "layout": plan.layout,
        "plan_hash": plan.hash,
        "weights_bytes": plan.weights_bytes,
        "read_bytes": plan.read_bytes,
        "skipped": list(plan.skipped),
        "stages": stages,
        "context": context,
        "batch": batch,
        "memory": {
            "weights": memory.weights,
            "kv": memory.kv,
            "activations": memory.activations,
            "overhead": memory.overhead,
            "total": memory.total,
            "available": target.available,
        },
        "device": target.choice.device,
        "device_why": target.choice.why,
        "gpu": None if target.gpu is None else target.gpu["name"],
        "kv_default": target.kv_default(plan, spec),
        "rate_bytes_per_s": None if path.rate == math.inf else path.rate,
        "rate_source": path.source,
        "predicted_load_s": load_s,
        "worker_start_s": worker_start_s,
        "predicted_ttft_s": max(_FIRST_BYTE_S + load_s, worker_start_s),
    }


def _table(document: dict[str, Any]) -> str:
    lines = [
        f"{document['model']}: {document['family']}, {document['dtype']}, layout "
        f"{document['layout']}, plan {document['plan_hash'][:12]}",
        "",
        f"{'stage':<12}{'bytes':>10}{'reads':>7}{'ready at':>10}",
    ]
    for stage in document["stages"]:
        lines.append(
            f"{stage['name']:<12}{human_bytes(stage['bytes']):>10}{stage['extents']:>7}"
            f"{human_seconds(stage['ready_s']):>10}"
        )
    if document["ranks"]:
        lines += ["", f"{'rank':<12}{'holds':>10}{'bytes':>10}{'reads':>7}"]
    for rank in document["ranks"]:
        lines.append(
            f"{rank['rank']:<12}{human_bytes(rank['weights_bytes']):>10}"
            f"{human_bytes(rank['read_bytes']):>10}{rank['extents']:>7}"
        )
    memory, device = document["memory"], document["device"]
    if document["gpu"] is not None:
        device = f"{device}, {document['gpu']}"
    lines += [
        "",
        f"device {device}" + (f": {document['device_why']}" if document["device_why"] else ""),
        f"memory for {document['batch']} x {document['context']} tokens: "
        f"{human_bytes(memory['total'])} of {human_bytes(memory['available'])} available",
        *(
            f"  {name:<12}{human_bytes(memory[name]):>10}"
            for name in ("weights", "kv", "activations", "overhead")
        ),
        f"KV that a replica takes by default: {human_bytes(document['kv_default'])}",
        "",
        f"weights in after {human_seconds(document['predicted_load_s'])} ({_how(document)}), "
        f"a fresh worker up after {human_seconds(document['worker_start_s'])}:",
        f"first token of a short prompt after about {human_seconds(document['predicted_ttft_s'])}",
    ]
    if document["skipped"]:
        lines.append(f"not loaded: {', '.join(document['skipped'])}")
    return "\n".join(lines)


def _how(document: dict[str, Any]) -> str:
    rate = document["rate_bytes_per_s"]
    source = str(document["rate_source"])
    how = source if rate is None else f"{human_bytes(rate)}/s, {source}"
    return how if document["gpu"] is None else f"{how}; the link to the GPU is not in it"


def _worker_start_s() -> float:
    """How long a fresh process takes to import torch here."""
    null, other = socket.socketpair()
    with null, other:
        started = time.monotonic()
        child = spawn_python("import torch", [], null.fileno(), dict(os.environ))
        child.wait()
        return time.monotonic() - started
