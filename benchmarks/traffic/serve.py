"""`coldframe bench serve MODEL`: a warm server under load.

TTFT, ITL, end to end, tokens a second, and goodput at objectives, for arrivals at given rates, at
the highest rate that is still served well, or as in a trace. Who answers them, in turn:

    apart          `coldframe serve`: a prefill worker and a decode worker
    pinned         the same, each with one half of the cores
    together       our engine with both in one process, without a server (see `one_process`)
    vllm           vLLM's own server, which has both in one process, eager; another engine, too
    vllm-compiled  the same compiled

All of them get the same requests at the same times.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import document
from coldframe.benchmarks.harness import chosen, warm_page_cache
from coldframe.benchmarks.machine import fingerprint
from coldframe.benchmarks.output import (
    add_output_arguments,
    check_output,
    columns,
    deliver,
    described,
)
from coldframe.benchmarks.traffic.arrivals import Ask, Lengths, Traffic
from coldframe.benchmarks.traffic.goodput import Objectives
from coldframe.benchmarks.traffic.offered import AUTO, Offered, say
from coldframe.benchmarks.traffic.traces import read_trace
from coldframe.benchmarks.traffic.ways import WAYS, left_out, start_way
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.units import duration, human_seconds

__all__ = ["add_arguments", "run"]

_AT = {"mean": None, "p90": 0.9, "p99": 0.99, "max": 1.0}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    # Without twins in the environment: other commands mean other things by these words.
    parser.add_argument("--ways", help=f"who answers, of {', '.join(WAYS)} (apart)")
    parser.add_argument(
        "--rate",
        type=_rates,
        help="requests a second: 1,2,4, or auto for the highest that is served well "
        "(auto; with --trace as in the trace)",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals in a load (20)")
    parser.add_argument("--runs", type=int, default=3, help="loads of each kind (3)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gamma distribution of gaps: 1 is Poisson, less is bursts (1)",
    )
    parser.add_argument("--trace", metavar="FILE", type=Path, help="a CSV with arrivals to follow")
    for what in ("prompt", "answer"):
        usual = "256" if what == "prompt" else "64"
        parser.add_argument(
            f"--{what}-tokens",
            metavar="N[-M]",
            type=Lengths.parse,
            default=usual,
            help=f"tokens of each {what}, N to M ({usual})",
        )
    parser.add_argument("--slo-ttft", type=duration, default=0.5, help="for a first token (500ms)")
    parser.add_argument("--slo-itl", type=duration, default=0.1, help="for each other one (100ms)")
    parser.add_argument(
        "--slo-itl-at",
        choices=list(_AT),
        default="mean",
        help="which of an answer's gaps is to be within that (mean, its TPOT)",
    )
    parser.add_argument(
        "--good", type=float, default=0.9, help="share that is served well at a rate (0.9)"
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for an answer (120)")
    parser.flag("--vllm-python", metavar="PATH", type=Path, help="an interpreter that has vLLM")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; the exit status says whether no request failed or was answered wrongly.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: Somebody who is to answer does not start, or ends.
    """
    ways, missing, facts, traffic = _prepare(args)
    bench = Offered(args, traffic, Objectives(args.slo_ttft, args.slo_itl, _AT[args.slo_itl_at]))
    warm_page_cache(args.model)
    with ExitStack() as stack:
        for name in ways:
            say(f"starting {name}")
            way = start_way(stack, name, args, facts, traffic.longest)
            way.offer(_warm_up(traffic))
            bench.ways[name] = way
        bench.run(args.rate)
    found = document(
        "serve",
        model=described(args.model, facts),
        runs=args.runs,
        seed=args.seed,
        seconds=args.seconds,
        arrivals=_arrivals(args, traffic),
        left_out=missing,
        loads=bench.loads(),
        highest=bench.highest,
        compared=bench.compared(),
        fingerprint=fingerprint(
            device=args.device,
            model=args.model,
            vllm_python=args.vllm_python if any(way.startswith("vllm") for way in ways) else None,
        ),
    )
    deliver(found, _table(found), args.output, alone=args.json)
    bad = sum(load["all"][what] for load in found["loads"] for what in ("failed", "wrong"))
    return 1 if bad else 0


def _prepare(
    args: argparse.Namespace,
) -> tuple[list[str], list[dict[str, str]], ModelFacts, Traffic]:
    """Who answers, who is left out and why, the model, and what loads are made of."""
    check_output(args.output)
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    for name in ("seconds", "runs", "burstiness", "slo_ttft", "slo_itl", "limit", "good"):
        if not getattr(args, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            raise RequestError("it must be above zero", where=flag, got=getattr(args, name))
    if args.good > 1:
        raise RequestError("a share is at most 1", where="--good", got=args.good)
    wanted = chosen(args.ways or "apart", WAYS)
    missing = left_out(wanted, args)
    ways = [name for name in wanted if name not in {entry["what"] for entry in missing}]
    if not ways:
        raise RequestError(
            "there is nobody to answer", where="--ways", got="; ".join(m["why"] for m in missing)
        )
    trace = None if args.trace is None else read_trace(args.trace)
    if args.rate is None and trace is None:
        args.rate = AUTO
    facts = ModelFacts(str(args.model))
    traffic = Traffic(
        args.seconds,
        args.prompt_tokens,
        args.answer_tokens,
        facts.spec.context_length,
        facts.spec.vocab_size,
        args.burstiness,
        trace,
    )
    return ways, missing, facts, traffic


def _warm_up(traffic: Traffic) -> list[Ask]:
    """Some requests, one after the other and two together: kernels are made when first used."""
    longest = traffic.load(1.0, -1)[:3]
    return [replace(ask, due_s=0.5 * (number // 2)) for number, ask in enumerate(longest)]


def _arrivals(args: argparse.Namespace, traffic: Traffic) -> dict[str, Any]:
    if traffic.trace is not None:
        return {"kind": "trace", "trace": args.trace.name, "scale": traffic.scale}
    return {
        "kind": "poisson" if traffic.burstiness == 1 else "gamma",
        "burstiness": traffic.burstiness,
        "prompt_tokens": [traffic.prompt.least, traffic.prompt.most],
        "answer_tokens": [traffic.answer.least, traffic.answer.most],
    }


def _table(found: dict[str, Any]) -> list[str]:
    head = ["", "req/s", "asked", "refused", "failed", "wrong", "TTFT p50", "p90", "p99"]
    head += ["ITL p50", "p90", "p99", "tok/s", "good", "good/s", "client late"]
    rows = [head]
    for load in found["loads"]:
        whole = load["all"]
        row = [load["way"], "trace" if load["rate"] is None else f"{load['rate']:.3g}"]
        row += [str(whole[name]) for name in ("requests", "refused", "failed", "wrong")]
        for name in ("ttft", "itl"):
            spread = whole[name]
            row += ["-" if spread is None else _ms(spread[p]) for p in ("p50", "p90", "p99")]
        row += [f"{whole['tokens_rate']:.1f}", f"{100 * whole['goodput']['share']:.0f} %"]
        row += [f"{whole['goodput']['rate']:.3g}", _ms(whole["lateness"]["p99"])]
        rows.append(row)
    lines = columns(rows)
    if any(load["all"]["client_late"] for load in found["loads"]):
        lines.append("the client itself was late: a part of these times is its own")
    for entry in found["highest"]:
        rate = "none" if entry["rate"] is None else f"{entry['rate']:.3g} a second"
        lines.append(f"{entry['way']}: highest rate served well: {rate}")
    for entry in found["compared"]:
        words = [
            f"{name.replace('_', ' ')} {entry[name]:.2f}"
            for name in ("ttft_p50", "ttft_p99", "itl_p99", "goodput")
            if entry[name] is not None
        ]
        rate = "trace" if entry["rate"] is None else f"{entry['rate']:.3g} a second"
        lines.append(f"{entry['way']} / {entry['beside']}, {rate}: {', '.join(words)}")
    lines += [f"left out: {entry['what']}: {entry['why']}" for entry in found["left_out"]]
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else human_seconds(seconds)


def _rates(text: str) -> list[float] | str:
    if text == AUTO:
        return text
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write 1,2,4 or auto")
    return rates
