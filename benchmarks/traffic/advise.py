"""`coldframe advise --trace FILE --slo TTFT --price X`: which way to scale pays for a trace.

Each choice is simulated: what it costs, how many requests have to wait for a start, and whether
enough of them have their first token in time. Where a device has not room for all models
(`--device-memory`), or they are to keep within a budget, each choice is simulated with that. The
one to take is the cheapest that keeps the limit; where none does, the one that comes nearest.

Starts are as long as they were measured (`--times`), as `coldframe plan` predicts them (`--model`),
or else as they are on another machine, which is said.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import document
from coldframe.benchmarks.output import add_output_arguments, check_output, columns, deliver
from coldframe.benchmarks.traffic.choices import Choice, Judged, decide
from coldframe.benchmarks.traffic.played import PARKED_SHARE, Prices
from coldframe.benchmarks.traffic.policies import (
    fixed,
    policy,
    seconds_or_never,
)
from coldframe.benchmarks.traffic.sharing import Shared, sharing, sharing_of_weights
from coldframe.benchmarks.traffic.simulate import Setup, Sharing, simulate
from coldframe.benchmarks.traffic.stages import StartTier, Times
from coldframe.benchmarks.traffic.times import DEFAULT_CONTEXT, DEFAULTS, predicted, read_times
from coldframe.benchmarks.traffic.trace_flags import add_trace_arguments, chosen_trace
from coldframe.benchmarks.traffic.traces import scaled, token_scale
from coldframe.loader.checkpoints.checkpoint import read_config
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.units import byte_count, duration, human_seconds

__all__ = ["add_arguments", "run"]

_LEAST_CONTEXT = 4
_GPU = "cuda"


def add_arguments(parser: Parser) -> None:
    # Without twins in the environment: other commands mean other things by these words.
    add_trace_arguments(parser)
    parser.add_argument(
        "--slo", metavar="TTFT", help="when the first token is to be there, as 2s or 500ms"
    )
    parser.add_argument(
        "--slo-percentile",
        metavar="P",
        type=float,
        default=99.0,
        help="for so many requests of a hundred (99)",
    )
    parser.add_argument(
        "--price", type=float, help="what the device that a model holds costs an hour"
    )
    parser.add_argument(
        "--parked-price",
        type=float,
        help=f"what a parked model costs an hour ({PARKED_SHARE:g} of --price: host memory)",
    )
    choices = parser.add_argument_group("the choices")
    choices.add_argument(
        "--idle",
        metavar="SECONDS,...",
        default="60",
        help="keep-alives to try with each choice that has one (60)",
    )
    choices.add_argument(
        "--pool",
        metavar="N,...",
        help="pools to try (1, and half of the models)",
    )
    choices.add_argument(
        "--policy", metavar="TEXT", action="append", help="one more, as serve has it"
    )
    limits = parser.add_argument_group("what there is for all models, where that is not enough")
    limits.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help="device seconds in an hour for which models may be held for nobody (no limit)",
    )
    limits.add_argument(
        "--device-memory",
        metavar="SIZE",
        type=byte_count,
        help="of the device that they share (each has one of its own)",
    )
    limits.add_argument(
        "--weights",
        metavar="SIZE,...",
        help="of each model, in their order, further ones as the last (those of --model)",
    )
    limits.add_argument(
        "--kv-memory", metavar="SIZE", type=byte_count, help="of each (as the endpoint chooses)"
    )
    limits.add_argument(
        "--device",
        choices=[CPU, _GPU],
        default=_GPU,
        help="from a GPU parked weights leave for host memory, from a CPU's they do not (cuda)",
    )
    limits.add_argument(
        "--host-memory",
        metavar="SIZE",
        type=byte_count,
        help="for weights that are parked there (no limit)",
    )
    source = parser.add_argument_group("how long starts take")
    source.add_argument(
        "--times", metavar="FILE", type=Path, help="what bench replay or cold printed"
    )
    source.add_argument("--model", metavar="DIR", type=Path, help="predicted for this checkpoint")
    source.add_argument(
        "--context",
        type=int,
        help="tokens that lengths are scaled into (the model's; with --times as they are)",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: There is no prediction.
    """
    check_output(args.output)
    for flag in ("slo", "price"):
        if getattr(args, flag) is None:
            raise RequestError("this must be said", where=f"--{flag}")
    slo_s, percent = _slo(args.slo), args.slo_percentile
    if not 0 < percent <= 100:
        raise RequestError(
            "this is no percentile",
            where="--slo-percentile",
            expected="above 0, at most 100",
            got=percent,
        )
    prices = Prices.of(args.price, args.parked_price)
    models = 1 if args.number is None else args.number
    arrivals, asks, trace = chosen_trace(args, models)
    times, context = _times(args)
    if context is not None:
        trace["token_scale"] = token_scale(arrivals, context)
        arrivals = scaled(arrivals, trace["token_scale"])
    shared = _shared(args, models)
    budget: float | None = args.budget
    if budget is not None and not 0 < budget < math.inf:
        raise RequestError("there must be some", where="--budget", got=budget)
    choices, left_out = _choices(args, models, times, prices)
    names = [f"m{number}" for number in range(models)]
    judged = []
    for choice in choices:
        setup = Setup(
            names,
            times,
            choice.chosen.factory,
            choice.tier,
            choice.begin,
            choice.pool,
            sharing=shared,
            budget=budget,
        )
        played = simulate(arrivals, asks, setup, arrivals[-1].at_s)
        reached = played.ttft(percent)
        cost = played.cost(prices, shared=shared is not None)
        judged.append(Judged(choice, played, cost, reached, reached <= slo_s))
    best, why, near = decide(judged, slo_s, percent)
    told = document(
        "advise",
        trace=trace,
        slo_s=slo_s,
        slo_percentile=percent,
        price=prices.held,
        parked_price=prices.parked,
        start_times=times.to_json(),
        sharing=None if shared is None else asdict(shared),
        budget=budget,
        choices=[one.to_json() for one in judged],
        take=best.choice.name,
        why=why,
        near_ties=near,
        left_out=left_out,
    )
    deliver(told, _table(judged, told), args.output, alone=args.json)
    return 0


def _slo(text: str) -> float:
    try:
        return duration(text)
    except argparse.ArgumentTypeError as error:
        raise RequestError(
            "this is no time to the first token", where="--slo", expected="2s or 500ms", got=text
        ) from error


def _times(args: argparse.Namespace) -> tuple[Times, int | None]:
    """How long stages take, and the context of the model that they are of."""
    context: int | None = args.context
    if context is not None and context < _LEAST_CONTEXT:
        raise RequestError(
            "this is no context",
            where="--context",
            expected=f"{_LEAST_CONTEXT} or more",
            got=context,
        )
    if args.times is not None and args.model is not None:
        raise RequestError("these two say the same", where="--times, --model", hint="Give one.")
    if args.times is not None:
        return read_times(args.times), context
    if args.model is not None:
        if not args.model.is_dir():
            raise RequestError("there is no such directory", where="--model", got=args.model)
        own = int(read_config(str(args.model)).get("max_position_embeddings", DEFAULT_CONTEXT))
        return predicted(args.model), context or own
    return DEFAULTS, context or DEFAULT_CONTEXT


def _shared(args: argparse.Namespace, models: int) -> Sharing | None:
    """The device that models share, where it is said how much there is of it."""
    if args.device_memory is None:
        for flag in ("weights", "kv_memory", "host_memory"):
            if getattr(args, flag) is not None:
                raise RequestError(
                    "nothing is said of the device that models share",
                    where=f"--{flag.replace('_', '-')}",
                    hint="Give --device-memory, too.",
                )
        return None
    device = CPU if args.device == CPU else f"{_GPU}:0"
    shared = Shared(args.device_memory, args.kv_memory, device, args.host_memory)
    if args.weights is not None:
        try:
            weights = [byte_count(part) for part in args.weights.split(",")]
        except argparse.ArgumentTypeError as error:
            raise RequestError(
                "these are no sizes of weights",
                where="--weights",
                expected="one or more, such as 16GB,140GB",
                got=args.weights,
            ) from error
        if len(weights) > models:
            raise RequestError(
                "there are more sizes than models",
                where="--weights",
                expected=f"at most {models}",
                got=len(weights),
            )
        return sharing_of_weights(weights, shared)
    if args.model is None:
        raise RequestError(
            "it is not known what models take of the device",
            where="--device-memory",
            hint="Give --weights, or --model.",
        )
    return sharing([args.model], shared)


def _choices(
    args: argparse.Namespace, models: int, times: Times, prices: Prices
) -> tuple[list[Choice], list[dict[str, str]]]:
    """What is tried, and what is not and why."""
    left_out = []
    tier: StartTier = "restored"
    if not times.restored:
        tier = "fresh"
        why = "it is not known how long a start from an image takes"
        left_out.append({"what": "snapshot + zero", "why": why})
    if not times.fresh:
        why = "it is not known how long a start with fresh processes takes"
        left_out.append({"what": "plain zero", "why": why})
        if not times.restored:
            raise RequestError("it is not known how long any start takes", where=times.how)
    found = [Choice("always on", fixed(None), tier, "warm")]
    idles = [seconds_or_never(part, "--idle") for part in args.idle.split(",")]
    for idle_s in idles:
        if idle_s is None:
            raise RequestError("that is `always on`", where="--idle", got=args.idle)
        label = f", idle {idle_s:g} s"
        for pool in _pools(args.pool, models):
            kept = fixed(idle_s, None)
            found.append(Choice(f"warm pool of {pool}{label}", kept, tier, "first", pool))
        if times.parked:
            found.append(Choice(f"parked{label}", fixed(idle_s, None), tier))
        if times.restored:
            found.append(Choice(f"snapshot + zero{label}", fixed(idle_s), "restored"))
        if times.fresh:
            found.append(Choice(f"plain zero{label}", fixed(idle_s), "fresh"))
    if not times.parked:
        why = "it is not known how long a model that is parked takes to wake"
        left_out.append({"what": "parked", "why": why})
        found = [choice for choice in found if not choice.pool]
    if models == 1:
        why = "of one model alone a pool is no other choice than parked"
        left_out.append({"what": "warm pool", "why": why})
    found.append(Choice("histogram", policy("histogram"), tier))
    found.append(Choice("next", policy(_next(prices)), tier))
    for text in args.policy or ():
        chosen = policy(text)
        found.append(Choice(chosen.text, chosen, tier))
    names = [choice.name for choice in found]
    return [c for n, c in enumerate(found) if c.name not in names[:n]], left_out


def _next(prices: Prices) -> str:
    """The policy that reckons with what holding costs, with what it costs here."""
    if not prices.held:
        return "next"
    return f"next:parked={min(1.0, prices.parked / prices.held):g}"


def _pools(text: str | None, models: int) -> list[int]:
    if text is None:
        return sorted({1, -(-models // 2)}) if models > 1 else []
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise RequestError(
            "these are no pools", where="--pool", expected="numbers above 0", got=text
        )
    return sorted({min(pool, models) for pool in found}) if models > 1 else []


def _table(judged: Sequence[Judged], told: dict[str, Any]) -> list[str]:
    rows = [["", "cost", "cold", "p50", f"p{told['slo_percentile']:g}", "held", "parked", ""]]
    rows += [
        [
            one.choice.name,
            f"{one.cost:.4g}",
            f"{one.played.cold_starts / len(one.played.asked):.2%}",
            human_seconds(one.played.ttft(50)),
            human_seconds(one.slo_s),
            f"{one.played.gpu_s:.0f} s",
            f"{one.played.parked_s:.0f} s",
            "" if one.meets else "too late",
        ]
        for one in judged
    ]
    lines = columns(rows)
    lines += [f"left out: {left['what']}: {left['why']}" for left in told["left_out"]]
    lines += ["", f"start times: {told['start_times']['how']}", ""]
    return [*lines, f"take: {told['take']}", told["why"]]
