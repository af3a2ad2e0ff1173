"""`coldframe plan`: the stages of a model, what it will need and how fast it can be there."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import time
from contextlib import closing
from typing import Any

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.layouts import Layout
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.loader.process import spawn_python
from coldframe.loader.sources.base import Origin
from coldframe.loader.sources.location import parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.commands.run import MODEL_HELP
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.snapshots import add_store_arguments, store_options
from coldframe.runtime.machine.device_choice import AUTO, CPU, choose_device
from coldframe.runtime.machine.free_memory import add_rest, rest_of
from coldframe.runtime.planning.document import Subject, plan_document, ranks_of
from coldframe.runtime.planning.kept import MOST_KEPT
from coldframe.runtime.planning.node_answers import ask_nodes
from coldframe.runtime.planning.nodes import KEY_VARIABLE, Node, NodeFacts, read_nodes
from coldframe.runtime.planning.placement import Here, of_device, of_node, ranked
from coldframe.runtime.planning.processes import terminable
from coldframe.runtime.planning.rates import Rates, measure_rates
from coldframe.runtime.planning.table import plan_table
from coldframe.runtime.planning.target import Target, devices_here
from coldframe.runtime.units import byte_rate

__all__ = ["add_arguments", "run"]

_ALL = "all"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.flag("--context", type=int, help="tokens of each sequence (the model's own limit)")
    parser.flag("--batch", type=int, default=1, help="sequences at once (1)")
    parser.flag(
        "--prompt-tokens", type=int, default=64, help="tokens of the prompt that TTFT is of (64)"
    )
    parser.flag("--rate", type=byte_rate, help="the path's bandwidth, as 2GB/s (a short probe)")
    parser.flag("--tensor-parallel", type=int, default=1, help="show what each of N ranks reads")
    parser.flag(
        "--no-rehearsal",
        action="store_true",
        help="do not start a scale model of MODEL to see what starts take here: then only the "
        "import of torch is measured, and no start is predicted but roughly",
    )
    parser.flag(
        "--rehearsals",
        type=int,
        default=1,
        metavar="N",
        help="hold so many, and take the medians: for a machine that is busy (1, of at most 5)",
    )
    add_rest(parser)
    parser.flag(
        "--fresh-probe",
        action="store_true",
        help="forget the rates that are kept from earlier plans, and measure them now",
    )
    add_store_arguments(parser)
    parser.flag(
        "--device",
        metavar="DEVICE",
        default=AUTO,
        help="what to compute on: cpu, cuda or cuda:N, several with commas between them, or all; "
        "auto takes the first GPU that this process can see, and else the CPU (auto)",
    )
    parser.flag(
        "--node",
        metavar="HOST",
        action="append",
        help="another place, HOST[:PORT] or URL of a coldframe endpoint, or peer://HOST:PORT; may "
        f"be given again (a key for endpoints is in {KEY_VARIABLE})",
    )
    parser.flag("--nodes", metavar="FILE", help="the same, and facts of others, from a JSON file")
    parser.flag("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ColdframeError: The checkpoint is bad or cannot be read, the engine does not run such a
            model, or there is no such device.
    """
    nodes = read_nodes(args.node or (), args.nodes)
    with terminable():
        return _run(args, nodes)


def _run(args: argparse.Namespace, nodes: list[Node]) -> int:
    targets, missing = _targets(args.device)
    location = parse_location(args.model)
    with closing(open_origin(location)) as origin:
        checkpoint = Checkpoint.open(origin)
        planned = [_planned(args, location.uri, origin, checkpoint, each) for each in targets]
        (document, rates), *others = planned
        if others or missing or nodes:
            plans = [each for each, _ in planned]
            document["placement"] = _placement(checkpoint, plans, rates, missing, nodes)
            document["others"] = plans[1:]
    print(json.dumps(document) if args.json else plan_table(document))
    return 0


def _targets(devices: str) -> tuple[list[Target], dict[str, str]]:
    """The devices that are named, and why some are not there: one of several at least is.

    Raises:
        ColdframeError: None of them can be used.
    """
    names = devices_here() if devices == _ALL else [name.strip() for name in devices.split(",")]
    if len(names) == 1:
        return [Target.of(choose_device(names[0]))], {}
    found: dict[str, Target] = {}
    missing: dict[str, str] = {}
    first: ColdframeError | None = None
    for name in names:
        choice = choose_device(name)  # of what is no device's name, nothing is made
        try:
            found[choice.device] = Target.of(choice)
        except ColdframeError as error:
            missing[choice.device] = str(error)
            first = first or error
    if not found:
        assert first is not None
        raise first
    return list(found.values()), missing


def _placement(
    checkpoint: Checkpoint,
    plans: list[dict[str, Any]],
    rates: Rates,
    missing: dict[str, str],
    nodes: list[Node],
) -> list[dict[str, Any]]:
    """Where it fits and would start fastest, the best first."""
    document = plans[0]
    rate = document["disk_bytes_per_s"] or document["rate_bytes_per_s"] or math.inf
    plan = Plan.build(checkpoint, layout=Layout(document["layout"]))
    here = Here(plan, rates, rate, document["memory"]["total"])
    places = [of_device(each) for each in plans]
    places += [of_node(NodeFacts(name, why, "device"), here) for name, why in missing.items()]
    places += [of_node(facts, here) for facts in ask_nodes(nodes, checkpoint.fingerprint)]
    return ranked(places)


def _planned(
    args: argparse.Namespace, model: str, origin: Origin, checkpoint: Checkpoint, target: Target
) -> tuple[dict[str, Any], Rates]:
    """The document, for a model at a place, and what it was made with."""
    subject = _subject(args, model, origin, checkpoint, target)
    ranks = _ranks(checkpoint, args.tensor_parallel)
    if not 1 <= args.rehearsals <= MOST_KEPT:
        raise RequestError(
            "no such number of rehearsals",
            where="--rehearsals",
            expected=f"1 to {MOST_KEPT}",
            got=args.rehearsals,
        )
    rates, worker_s = _rates(args, subject, target)
    document = plan_document(subject, target, args.rate, rates, worker_s)
    return {**document, "ranks": ranks}, rates


def _subject(
    args: argparse.Namespace, model: str, origin: Origin, checkpoint: Checkpoint, target: Target
) -> Subject:
    # As a load lays it out: see `loader.loads.load`.
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
    if not 0 < args.prompt_tokens < context:
        raise RequestError(
            "the prompt does not fit the context",
            where="--prompt-tokens",
            expected=f"1 to {context - 1} tokens, with room for an answer",
            got=args.prompt_tokens,
        )
    sizes = (context, args.batch, args.prompt_tokens)
    return Subject(model, origin, checkpoint, plan, spec, as_filed, *sizes)


def _ranks(checkpoint: Checkpoint, ranks: int) -> list[dict[str, int]]:
    if ranks < 1:
        raise RequestError(
            "no such number of ranks",
            where="--tensor-parallel",
            expected="at least 1",
            got=ranks,
        )
    return ranks_of(checkpoint, ranks)


def _rates(
    args: argparse.Namespace, subject: Subject, target: Target
) -> tuple[Rates, float | None]:
    """What starts take here; where that cannot be rehearsed, why, and what torch's import takes."""
    if args.no_rehearsal:
        return Rates(why={"fresh": "no rehearsal was wanted"}), _worker_start_s()
    gpu = target.gpu
    try:
        rates = measure_rates(
            args.model,
            subject.origin,
            subject.checkpoint,
            subject.spec,
            tokens=subject.prompt_tokens,
            device=target.choice.device,
            maps=subject.maps,
            snapshot=store_options(args),
            anew=args.fresh_probe,
            times=args.rehearsals,
            rest_s=rest_of(args),
            tell=lambda what: print(f"coldframe: {what}", file=sys.stderr, flush=True),
            free=None if gpu is None else lambda: Target.of(target.choice).available,
            gpu=gpu,
        )
    # No room for a scale model, small files that are none: the rest of the plan stands.
    except (ColdframeError, OSError, ValueError) as error:
        print(f"coldframe: no start could be rehearsed: {error}", file=sys.stderr)
        return Rates(why={"fresh": str(error)}), _worker_start_s()
    return rates, None


def _worker_start_s() -> float:
    """How long a fresh process takes to import torch here."""
    null, other = socket.socketpair()
    with null, other:
        started = time.monotonic()
        child = spawn_python("import torch", [], null.fileno(), dict(os.environ))
        child.wait()
        return time.monotonic() - started
