"""`coldframe bench replay MODEL... --trace FILE`: a trace live, and the same by simulation.

A server with the models under the policy gets what the trace has, when it has it, whatever became
of the requests before. Counted are the requests that had to wait for a start, the times to the
first token, and the seconds in which devices were held. The same trace is then simulated with
stages that were measured before and after, on other servers of the same and never in the replay,
and the two are held against each other.

Time that is pressed together (`--seconds`, `--speed`) is the trace's alone: starts, keep-alives and
answers take as long as they take. It is looked until the last answer's end, whatever the policy:
what one holds behind that would count against another that has rested by then.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import document
from coldframe.benchmarks.harness import warm_page_cache
from coldframe.benchmarks.machine import fingerprint
from coldframe.benchmarks.output import (
    add_output_arguments,
    check_output,
    columns,
    deliver,
    described,
)
from coldframe.benchmarks.traffic.live import Fleet, Replayed
from coldframe.benchmarks.traffic.live import replay as replay_live
from coldframe.benchmarks.traffic.measure import measure
from coldframe.benchmarks.traffic.played import Played, Prices
from coldframe.benchmarks.traffic.policies import Chosen, fixed, policy, seconds_or_never, served
from coldframe.benchmarks.traffic.sharing import Shared, sharing
from coldframe.benchmarks.traffic.simulate import Setup, Sharing, simulate
from coldframe.benchmarks.traffic.stages import StartTier
from coldframe.benchmarks.traffic.times import read_times
from coldframe.benchmarks.traffic.trace_flags import add_trace_arguments, chosen_trace
from coldframe.benchmarks.traffic.traces import Arrival, scaled, token_scale
from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoints.checkpoint import read_config
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.machine.free_memory import add_rest, rest_of
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.units import byte_count, human_seconds

__all__ = ["add_arguments", "run"]

_IDLE_S = 5.0
_LEAST_PROMPT = 64
_MOST_PROMPT = 2048


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "models", metavar="MODEL", type=Path, nargs="+", help="checkpoints' directories"
    )
    add_trace_arguments(parser)
    # Without twins in the environment, but for what serve means by them, too: it has its own.
    rest = parser.add_argument_group("what decides when a model rests")
    rest.add_argument("--policy", metavar="TEXT", help="such as fixed:IDLE,PARK")
    rest.add_argument("--idle", metavar="SECONDS", help="warm for so long where nobody asks (5)")
    rest.add_argument("--park", metavar="SECONDS", default="0", help="then parked (0)")
    rest.add_argument("--pool", type=int, default=0, help="so many are kept parked (0)")
    rest.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help="for how many device seconds in an hour models may be held for nobody (no limit)",
    )
    parser.flag(
        "--device-memory", metavar="SIZE", type=byte_count, help="what all models have together"
    )
    parser.flag("--kv-memory", metavar="SIZE", type=byte_count, help="for KV of each model")
    parser.add_argument(
        "--starts",
        choices=["fresh", "image"],
        default="fresh",
        help="from zero: with fresh processes, or from an image that is made before (fresh)",
    )
    parser.add_argument(
        "--times", metavar="FILE", type=Path, help="a document with stages, not to be measured"
    )
    add_rest(parser)
    parser.add_argument(
        "--cycles",
        type=int,
        default=3,
        help="how often each stage is measured before and after the replay (3)",
    )
    parser.add_argument(
        "--tail",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="look on for so long behind the last arrival (until the last answer's end)",
    )
    parser.add_argument(
        "--simulate-only", action="store_true", help="no server: simulate, with --times"
    )
    parser.add_argument("--price", type=float, help="of a device, for an hour")
    parser.add_argument(
        "--parked-price", type=float, help="of a parked model (a twentieth of --price)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of measured starts (0)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; the exit status says whether every request was answered.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A server failed, or there can be no image.
    """
    check_output(args.output)
    for model in args.models:
        if not model.is_dir():
            raise RequestError("there is no such directory", where="MODEL", got=model)
    number = len(args.models) if args.number is None else args.number
    if number < len(args.models):
        raise RequestError(
            "there are fewer models than directories",
            where="--models",
            expected=f"{len(args.models)} or more",
            got=number,
        )
    if args.simulate_only and args.times is None:
        raise RequestError(
            "without a server nothing can be measured",
            where="--simulate-only",
            hint="Give --times.",
        )
    if not 0 <= args.tail < math.inf:
        raise RequestError("this is no time", where="--tail", got=args.tail)
    chosen = _policy(args)
    flags, factory = served(chosen, args.pool, args.budget)
    prices = None if args.price is None else Prices.of(args.price, args.parked_price)
    arrivals, asks, trace = chosen_trace(args, number)
    context, vocabulary = _limits(args.models)
    scale = token_scale(arrivals, context)
    arrivals = scaled(arrivals, scale)
    trace |= {"token_scale": scale, "time": "arrivals alone are pressed together, if any"}
    times = None if args.times is None else read_times(args.times)
    tier: StartTier = "restored" if args.starts == "image" else "fresh"
    places = {f"m{n}": args.models[n % len(args.models)] for n in range(number)}
    shared = None if args.device_memory is None else _sharing(args, list(places.values()))
    rest = rest_of(args)
    found: Replayed | None = None
    if not args.simulate_only:
        with ExitStack() as stack:
            fleet = _fleet(args, places, vocabulary, stack)
            longest = max(arrival.context for arrival in arrivals)
            longest = min(context, max(longest, _LEAST_PROMPT), _MOST_PROMPT)
            before = measure(fleet, longest, args.cycles, rest) if times is None else times
            found = replay_live(fleet, flags, arrivals, asks, args.tail)
            # Half of them behind it: a machine that others use is not as fast all the time.
            after = measure(fleet, longest, args.cycles, rest) if times is None else None
            times = before if after is None else before.and_also(after)
    assert times is not None
    setup = Setup(
        *(tuple(places), times, factory, tier),
        begin="zero",
        pool=args.pool,
        sharing=shared,
        budget=args.budget,
        budget_left=None if found is None else found.budget_left_s,
        seed=args.seed,
    )
    simulated = _simulated(arrivals, asks, setup, found, args.tail)
    told = _document(args, trace, chosen, prices, setup, found, simulated)
    deliver(told, _table(told), args.output, alone=args.json)
    lost = 0 if found is None else found.played.lost("refused") + found.played.lost("failed")
    return 1 if lost else 0


def _policy(args: argparse.Namespace) -> Chosen:
    if args.policy is not None:
        if args.idle is not None or args.park != "0":
            raise RequestError(
                "these say the same", where="--policy, --idle, --park", hint="Give --policy alone."
            )
        return policy(args.policy)
    idle_s = _IDLE_S if args.idle is None else seconds_or_never(args.idle, "--idle")
    return fixed(idle_s, seconds_or_never(args.park, "--park"))


def _sharing(args: argparse.Namespace, places: list[Path]) -> Sharing:
    """What each model takes of the device's memory, and of the host's while it is parked."""
    host = None if args.device == CPU else memory_available()
    return sharing(places, Shared(args.device_memory, args.kv_memory, args.device, host))


def _told(chosen: Chosen, args: argparse.Namespace) -> str:
    """The policy, and what it has to keep within."""
    text = chosen.text
    if args.pool:
        text += f", pool of {args.pool}"
    if args.budget is not None:
        text += f", budget of {args.budget:g} s an hour"
    return text


def _limits(models: list[Path]) -> tuple[int, int]:
    """The context and the vocabulary that all have."""
    configs = [read_config(str(model)) for model in models]
    contexts = [int(config.get("max_position_embeddings", _MOST_PROMPT)) for config in configs]
    return min(contexts), min(int(config["vocab_size"]) for config in configs)


def _fleet(
    args: argparse.Namespace, places: dict[str, Path], vocabulary: int, stack: ExitStack
) -> Fleet:
    flags: list[str] = []
    for flag, size in (("--device-memory", args.device_memory), ("--kv-memory", args.kv_memory)):
        if size is not None:
            flags += [flag, str(size)]
    environment = {"COLDFRAME_DEVICE": args.device}
    if args.starts == "image":
        from coldframe.benchmarks.snapshot_cells import Image

        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldframe-bench-")))
        for number, model in enumerate(args.models):
            # One store for all: an image is found by what it is of.
            Image.create(model, scratch, "lz4")
            print(f"image {number + 1} of {len(args.models)} is made", file=sys.stderr)
        environment |= {
            "COLDFRAME_SNAPSHOT": "require",
            "COLDFRAME_SNAPSHOT_STORE": str(scratch / "lz4"),
        }
        # Else a better image, with compiled steps, would be made in the middle of it.
        flags += ["--graphs", "off"]
    for model in args.models:
        warm_page_cache(model)
    return Fleet(places, vocabulary, flags, environment)


def _simulated(
    arrivals: list[Arrival],
    asks: list[int],
    setup: Setup,
    found: Replayed | None,
    tail_s: float,
) -> Played:
    if found is None:
        return simulate(arrivals, asks, setup, arrivals[-1].at_s + tail_s)
    # When they were sent, not when they were to be: what the client is late by is none of the
    # server's.
    moments = [asked.at_s for asked in found.played.asked]
    order = sorted(range(len(moments)), key=moments.__getitem__)
    sent = [replace(arrivals[n], at_s=max(0.0, moments[n])) for n in order]
    return simulate(sent, [asks[n] for n in order], setup, found.played.seconds)


def _document(
    args: argparse.Namespace,
    trace: dict[str, Any],
    chosen: Chosen,
    prices: Prices | None,
    setup: Setup,
    found: Replayed | None,
    simulated: Played,
) -> dict[str, Any]:
    shared = setup.sharing is not None
    live = None
    if found is not None:
        late = [one.sent_s - one.due_s for one in found.sent]
        live = found.played.to_json(prices, shared=shared) | {
            "counted": dict(found.counted),
            "late": {"mean_s": sum(late) / len(late), "max_s": max(late)},
            "errors": sorted({one.error for one in found.sent if one.error is not None})[:5],
        }
    second = simulated.to_json(prices, shared=shared)
    return document(
        "replay",
        trace=trace,
        policy=_told(chosen, args),
        budget=args.budget,
        price=args.price,
        live=live,
        simulated=second,
        models=[described(model, ModelFacts(str(model))) for model in args.models],
        tier=setup.tier,
        sharing=None if setup.sharing is None else asdict(setup.sharing),
        start_times=setup.times.to_json(),
        difference=None
        if live is None
        else {
            name: _difference(live[name], second[name])
            for name in ("cold_starts", "starts", "gpu_s")
        },
        fingerprint=fingerprint(device=args.device, model=args.models[0]),
    )


def _difference(live: float, simulated: float) -> float:
    """By how much a simulation is off, of what it simulates; of nothing, of one."""
    return (simulated - live) / live if live else float(simulated)


def _table(told: dict[str, Any]) -> list[str]:
    parts = [(name, told[name]) for name in ("live", "simulated") if told[name] is not None]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("requests", lambda p: f"{p['requests']}"),
        ("refused", lambda p: f"{p['refused']}"),
        ("failed", lambda p: f"{p['failed']}"),
        ("cold starts", lambda p: f"{p['cold_starts']}"),
        ("cold share", lambda p: f"{p['cold_share']:.1%}"),
        ("starts of a replica", lambda p: f"{p['starts']}"),
        ("TTFT p50", lambda p: human_seconds(p["ttft"]["p50"])),
        ("TTFT p90", lambda p: human_seconds(p["ttft"]["p90"])),
        ("TTFT p99", lambda p: human_seconds(p["ttft"]["p99"])),
        ("TTFT max", lambda p: human_seconds(p["ttft"]["max"])),
        ("devices held", lambda p: f"{p['gpu_s']:.1f} s"),
        ("parked", lambda p: f"{p['parked_s']:.1f} s"),
        ("cost", lambda p: "-" if p["cost"] is None else f"{p['cost']:.4f}"),
    ]
    lines = columns(
        [
            ["", *(name for name, _ in parts)],
            *([name, *(told_as(part) for _, part in parts)] for name, told_as in rows),
        ]
    )
    if told["live"] is not None:
        lines += [f"not answered: {error}" for error in told["live"]["errors"]]
    if told["difference"] is not None:
        cold, held = told["difference"]["cold_starts"], told["difference"]["gpu_s"]
        lines.append(f"simulated against live: cold starts {cold:+.1%}, devices held {held:+.1%}")
    return lines
