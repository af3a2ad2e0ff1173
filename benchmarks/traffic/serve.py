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
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import document, figure
from coldframe.benchmarks.harness import chosen, warm_page_cache
from coldframe.benchmarks.output import (
    add_output_arguments,
    check_output,
    columns,
    deliver,
    described,
)
from coldframe.benchmarks.traffic.arrivals import Ask, Lengths, Traffic
from coldframe.benchmarks.traffic.goodput import Objectives, account
from coldframe.benchmarks.traffic.highest import highest_rate
from coldframe.benchmarks.traffic.open_loop import Record
from coldframe.benchmarks.traffic.traces import read_trace
from coldframe.benchmarks.traffic.ways import WAYS, Way, left_out, start_way
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags import Parser
from coldframe.runtime.sizing import ModelFacts
from coldframe.runtime.units import human_seconds

__all__ = ["add_arguments", "run"]

_WITHIN = 0.1
_LEAST_REQUESTS = 20
"""At least, in the mean, in a load that is to say whether a rate is too high."""
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*(ms|s)")
_AT = {"mean": None, "p90": 0.9, "p99": 0.99, "max": 1.0}
_AUTO = "auto"
_AS_IT_IS: tuple[None] = (None,)


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
    parser.add_argument("--slo-ttft", type=_duration, default=0.5, help="for a first token (500ms)")
    parser.add_argument("--slo-itl", type=_duration, default=0.1, help="for each other one (100ms)")
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
    bench = _Bench(args, traffic)
    warm_page_cache(args.model)
    with ExitStack() as stack:
        for name in ways:
            _say(f"starting {name}")
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
        args.rate = _AUTO
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


class _Bench:
    """The loads so far.

    Args:
        args: The command line.
        traffic: What they are made of.
    """

    def __init__(self, args: argparse.Namespace, traffic: Traffic) -> None:
        self.ways: dict[str, Way] = {}
        self.highest: list[dict[str, Any]] = []
        self._args = args
        self._traffic = traffic
        self._wanted = Objectives(args.slo_ttft, args.slo_itl, _AT[args.slo_itl_at])
        self._found: dict[tuple[str, float | None], list[list[Record]]] = {}

    def run(self, rates: list[float] | str | None) -> None:
        """Offers each way what it is to have, run by run in turn."""
        if rates == _AUTO:
            pairs = self._search_all()
        else:
            assert not isinstance(rates, str)
            pairs = [(name, rate) for rate in rates or _AS_IT_IS for name in self.ways]
        for number in range(self._args.runs):
            # All of a run's loads are of one seed: whoever answers gets the same.
            for name, rate in pairs if number % 2 == 0 else reversed(pairs):
                asks = self._traffic.load(rate, self._args.seed + number)
                records = self._offer(name, asks, rate, f"run {number + 1}")
                self._found.setdefault((name, rate), []).append(records)

    def loads(self) -> list[dict[str, Any]]:
        """What they came to, by way and rate."""
        found = []
        for (name, rate), loads in self._found.items():
            runs = [account([load], self._wanted) for load in loads]
            figures = {
                "tokens_rate": figure([one["tokens_rate"] for one in runs], "tok/s"),
                "goodput_share": figure([one["goodput"]["share"] for one in runs], "1"),
                "goodput_rate": figure([one["goodput"]["rate"] for one in runs], "req/s"),
            }
            together = account(loads, self._wanted)
            found.append(
                {"way": name, "rate": rate, "all": together, "runs": runs, "figures": figures}
            )
        return found

    def compared(self) -> list[dict[str, Any]]:
        """Prefill and decode apart, against each way in which they are together, rate by rate."""
        loads = {(load["way"], load["rate"]): load["all"] for load in self.loads()}
        found = []
        for (name, rate), ours in loads.items():
            for beside in ("together", "vllm", "vllm-compiled"):
                theirs = loads.get((beside, rate))
                if name in ("apart", "pinned") and theirs is not None:
                    ratios = {
                        f"{what}_{at}": _ratio(ours[what], theirs[what], at)
                        for what, at in (("ttft", "p50"), ("ttft", "p99"), ("itl", "p99"))
                    }
                    shares = [one["goodput"]["share"] for one in (ours, theirs)]
                    ratios["goodput"] = shares[0] / shares[1] if shares[1] else None
                    found.append({"way": name, "beside": beside, "rate": rate, **ratios})
        return found

    def _search_all(self) -> list[tuple[str, float | None]]:
        """Each way's highest rate, and the lowest of those for all."""
        pairs: list[tuple[str, float | None]] = []
        for name in self.ways:
            rate, probes = self._search(name)
            self.highest.append({"way": name, "rate": rate, "probes": probes})
            if rate is not None:
                pairs.append((name, rate))
        if pairs:
            common = min(rate for _, rate in pairs if rate is not None)
            pairs += [(name, common) for name in self.ways if (name, common) not in pairs]
        return pairs

    def _search(self, name: str) -> tuple[float | None, list[dict[str, float]]]:
        traffic, seed = self._traffic, self._args.seed
        if traffic.trace is None:
            (alone,) = self.ways[name].offer([traffic.load(1.0, seed)[0]])
            if not alone.answered or alone.end_s is None:
                raise PlatformError("a request was not answered", where=name, got=alone.error)
            start = 1 / (alone.end_s - alone.sent_s)
        else:
            start = len(traffic.load(None, seed)) / traffic.seconds

        def share(rate: float) -> float:
            seconds = self._args.seconds
            if traffic.trace is None:
                seconds = max(seconds, _LEAST_REQUESTS / rate)
            longer = replace(traffic, seconds=seconds)
            records = self._offer(name, longer.load(rate, seed), rate, "search")
            return float(account([records], self._wanted)["goodput"]["share"])

        rate, probes = highest_rate(share, start, self._args.good, _WITHIN)
        return rate, [{"rate": probe.rate, "share": probe.share} for probe in probes]

    def _offer(self, name: str, asks: list[Ask], rate: float | None, what: str) -> list[Record]:
        told = "as in the trace" if rate is None else f"{rate:.3g} a second"
        _say(f"{what}: {name}, {len(asks)} requests {told}, {asks[-1].due_s:.0f} s")
        return self.ways[name].offer(asks)


def _warm_up(traffic: Traffic) -> list[Ask]:
    """Some requests, one after the other and two together: kernels are made when first used."""
    longest = traffic.load(1.0, -1)[:3]
    return [replace(ask, due_s=0.5 * (number // 2)) for number, ask in enumerate(longest)]


def _ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None, at: str) -> float | None:
    if ours is None or theirs is None or not theirs[at]:
        return None
    return float(ours[at] / theirs[at])


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rates(text: str) -> list[float] | str:
    if text == _AUTO:
        return text
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write 1,2,4 or auto")
    return rates


def _duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 500ms or 1.5s")
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)
