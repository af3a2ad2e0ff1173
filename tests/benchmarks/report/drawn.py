"""Documents to draw: of starts that were and of made-up ones, figures as benchmarks make them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from coldframe.benchmarks.document import document, figure
from coldframe.loader.timeline import Span
from coldframe.runtime.timeline.timeline import Timeline

MODEL = {
    "path": '/models/<demo> & "näme"',
    "family": "llama",
    "dtype": "BF16",
    "weights_bytes": 426_313_728,
    "read_bytes": 426_330_240,
}
ATTACK = "<script>window.pwned=1</script>\"'&amp; ünïcode 模型 " + "long " * 30


def a_timeline(
    ttft: float, spans: Sequence[tuple[str, str, float, float]] | None = None
) -> dict[str, Any]:
    """A start's timeline, scaled to its TTFT; spans as process, name, start and end from 0 to 1."""
    told = spans or [
        ("front", "interpreter", 0.0, 0.2),
        ("memory", "imports", 0.05, 0.25),
        ("memory", "weight_read", 0.25, 0.8),
        ("memory", "stage_ready[0]", 0.4, 0.4),
        ("memory", "stage_ready[1]", 0.8, 0.8),
        ("prefill-0", "imports", 0.2, 0.7),
        ("prefill-0", "tokenizer", 0.3, 0.5),
        ("prefill-0", "prefill[0]", 0.72, 0.75),
        ("prefill-0", "prefill[head]", 0.85, 1.0),
        ("front", "decode", 1.0, 1.3),
    ]
    made = [Span(n, p, round(a * ttft * 1e9), round(b * ttft * 1e9)) for p, n, a, b in told]
    made.append(
        Span(
            "wait", "prefill-0", round(75e7 * ttft), round(8e8 * ttft), "a <note>", "stage_ready[1]"
        )
    )
    return Timeline(made, 0, round(ttft * 1e9)).to_json()


def cold_cell(
    ident: str, timelines: Sequence[dict[str, Any] | None], **more: Any
) -> dict[str, Any]:
    """A cell of a cold document around some starts."""
    times = [1.0 + 0.1 * n if t is None else t["ttft_s"] for n, t in enumerate(timelines)]
    told: list[dict[tuple[str, str], float]] = []
    for timeline in timelines:
        sums: dict[tuple[str, str], float] = {}
        for step in timeline["critical_path"] if timeline else ():
            key = (step["process"], step["name"])
            sums[key] = sums.get(key, 0.0) + step["end_s"] - step["start_s"]
        told.append(sums)
    keys = dict.fromkeys(key for sums in told for key in sums)
    paths = {key: [sums.get(key, 0.0) for sums in told] for key in keys}
    move = [0.3 * seconds for seconds in times]
    return {
        "id": ident,
        "who": "coldframe",
        "tier": "fresh",
        "cache": "cold",
        "source": "disk",
        "throttle": None,
        "engine": "native",
        "through": "run",
        "ttft": figure(times, "s"),
        "last_token": figure([1.5 * t for t in times], "s"),
        "bytes": 426_330_240,
        "ceiling": {"rate": figure([1.4e9] * len(times), "B/s"), "how": "O_DIRECT"},
        "move": figure(move, "s"),
        "ratio": figure([t / m for t, m in zip(times, move, strict=True)], "1"),
        "rate": figure([426_330_240 / t for t in times], "B/s"),
        "memory": None,
        "unattributed": figure([t["unattributed_s"] for t in timelines if t] or [0.0], "s"),
        "stages": [],
        "path": [
            {"process": process, "name": name, "seconds": figure(seconds, "s")}
            for (process, name), seconds in paths.items()
        ],
        "tokens": [1, 2, 3],
        "tokens_equal": True,
        "evicted": True,
        "prediction": {
            "ttft_s": 1.23456,
            "memory_bytes": 1e9,
            "ttft_error": -0.0512,
            "memory_error": 0.01,
        },
        "starts": [
            {"ttft_s": seconds, "tier": "fresh", "timeline": timeline}
            for seconds, timeline in zip(times, timelines, strict=True)
        ],
        **more,
    }


def cold(cells: Sequence[dict[str, Any]], runs: int = 3) -> dict[str, Any]:
    """A cold document."""
    return document(
        "cold",
        model=MODEL,
        prompt_tokens=64,
        answer_tokens=8,
        runs=runs,
        cells=list(cells),
        left_out=[{"what": "vllm", "why": "it is <not> installed"}],
        baseline=None,
    )


def edge_cells() -> list[dict[str, Any]]:
    """Cells as they hardly are: odd names, no timeline, nothing to move, no length, very much."""
    many = [
        (f"prefill-{n % 3}", f"prefill[{n}]", (n % 700) / 700, (n % 700) / 700 + 0.0005)
        for n in range(2000)
    ]
    empty = [("front", "interpreter", 0.0, 0.0), ("prefill-0", "prefill[head]", 1.0, 1.0)]
    nothing = {"ceiling": None, "move": None, "ratio": None, "rate": None, "unattributed": None}
    last = cold_cell("gateway last", [a_timeline(1.0), a_timeline(1.2)], through="http")
    for start in last["starts"]:
        start["ttft_s"] *= 1.4
    behind = {"process": "client", "name": "first_token", "seconds": figure([0.4, 0.48], "s")}
    last |= {"ttft": figure([1.4, 1.68], "s"), "path": [*last["path"], behind]}
    return [
        last,
        cold_cell(ATTACK, [a_timeline(0.9), a_timeline(1.1), a_timeline(1.0)]),
        cold_cell("no timeline", [None, None, None], path=[], prediction=None),
        cold_cell("nothing to move", [a_timeline(0.02)], **nothing, tokens_equal=False),
        cold_cell("no length", [a_timeline(1.0, empty)]),
        cold_cell("many spans", [a_timeline(3.0, many)]),
        cold_cell("long tail", [a_timeline(0.5, [("engine", "vllm_engine", 0.1, 40.0)])]),
    ]


def played(seed: int, models: int, requests: int) -> dict[str, Any]:
    """What became of a trace, made up."""
    chance = random.Random(seed)
    asked, states = [], {}
    for number in range(models):
        name = f"model-{number}" if number else ATTACK
        marks = sorted(chance.uniform(0, 300) for _ in range(9))
        edges = [0.0, *marks, 300.0]
        order = ["zero", "starting", "warm", "draining", "parked", "starting", "warm", "draining"]
        order += ["zero", "failed"]
        states[name] = [
            {"state": state, "start_s": a, "end_s": b}
            for state, a, b in zip(order, edges[:-1], edges[1:], strict=True)
        ]
    for _ in range(requests):
        met = chance.choice(["zero", "parked", "warm", "warm", "warm"])
        ttft = {"zero": 1.5, "parked": 0.4, "warm": 0.05}[met] * chance.uniform(0.8, 1.6)
        asked.append(
            {
                "at_s": chance.uniform(0, 300),
                "model": chance.choice(list(states)),
                "ttft_s": ttft,
                "from": met,
            }
        )
    asked.sort(key=lambda request: float(str(request["at_s"])))
    times = [float(str(request["ttft_s"])) for request in asked] or [0.0]
    fig = figure(times, "s")
    colds = sum(request["from"] == "zero" for request in asked)
    return {
        "requests": requests,
        "cold_starts": colds,
        "starts": colds - 1,
        "held_s": 99.9 + seed,
        "cold_share": colds / max(1, requests),
        "ttft": {"p50": fig["median"], "p90": fig["p90"], "p99": fig["max"], "max": fig["max"],
                 "mean": sum(times) / len(times)},
        "gpu_s": 123.4 + seed,
        "parked_s": 45.6,
        "cost": 0.0123,
        "asked": asked,
        "states": states,
    }  # fmt: skip


def replay(live: dict[str, Any] | None, simulated: dict[str, Any] | None) -> dict[str, Any]:
    """A replay document."""
    one = live or simulated or played(0, 0, 0)
    return document(
        "replay",
        trace={
            "file": "azure_<llm>.csv",
            "arrivals": one["requests"],
            "seconds": 300.0,
            "models": 3,
        },
        policy="keep alive for 60 s",
        price=2.5,
        live=live,
        simulated=simulated,
        start_times={},
        difference={"cold_starts": 0.01, "gpu_s": -0.02} if live and simulated else None,
    )


def advise() -> dict[str, Any]:
    """An advise document: two choices cost and wait the same."""
    told = [("always on", 72.0, 0.0, 0.05), ("warm pool", 30.0, 0.01, 0.4)]
    told += [
        ("parked", 8.0, 0.2, 0.45),
        ("parked <longer>", 8.0, 0.2, 0.45),
        ("zero", 5.0, 0.5, 2.5),
    ]
    choices = [
        {"name": n, "cost": c, "cold_share": s, "p99_s": p, "meets_slo": p <= 0.5, "p50_s": p / 3}
        for n, c, s, p in told
    ]
    return document(
        "advise",
        trace={"file": "t.csv", "arrivals": 10, "seconds": 100.0, "models": 1},
        slo_s=0.5,
        price=3.0,
        choices=choices,
        take="parked",
        why="it costs least of those within the objective",
    )


def rows() -> dict[str, Any]:
    """A document of the older kind."""
    row = {"name": "a <row>", "runs": [3.0, 1.0, 2.0], "unit": "s", "target": 2.5}
    row |= {"at_least": False, "median": 2.0, "met": True}
    return {"rows": [row], "fingerprint": cold([])["fingerprint"]}


def serve() -> dict[str, Any]:
    """A serve document: two ways at three loads, one of which nobody answered."""

    def spread(middle: float) -> dict[str, Any]:
        told = {"p50": middle, "p90": 1.5 * middle, "p99": 3 * middle, "max": 4 * middle}
        return {"unit": "s", "count": 17, "mean": 1.1 * middle, **told}

    loads: list[dict[str, Any]] = []
    for slow, way in ((1.0, "apart"), (2.0, "together")):
        for rate in (4.0, 1.0, 2.0):
            good = 1 / (slow * rate)
            account: dict[str, Any] = {"requests": 17, "tokens_rate": 100 * rate / slow}
            for name, middle in (("ttft", 0.2), ("itl", 0.02), ("e2e", 1.5)):
                account[name] = spread(middle * slow * rate)
            if slow * rate == 8:
                account["ttft"] = account["itl"] = account["e2e"] = None
            account["goodput"] = {"ttft_s": 0.5, "itl_s": 0.1, "share": good, "rate": rate * good}
            loads.append({"way": way, "rate": rate, "all": account})
    return document("serve", model=MODEL, left_out=[], loads=loads)


def handoff() -> dict[str, Any]:
    """A handoff document; the step of one is longer than its hand-off, as noise has it."""
    cells = [
        {
            "id": name,
            "prompt_tokens": 64,
            "ttft": figure([0.2, 0.3], "s"),
            "second": figure([second, 1.2 * second], "s"),
            "step": figure([0.02, 0.03], "s"),
            "beyond": figure([second - 0.02, 1.2 * second - 0.03], "s"),
            "bytes": 1 << 20,
            "rate": rate,
            "tokens_equal": equal,
        }
        for name, second, rate, equal in (
            ("shared/<64>", 0.05, figure([1e9, 2e9], "B/s"), True),
            ("recomputed/64", 0.9, None, None),
            ("quick/64", 0.015, None, False),
        )
    ]
    return document("handoff", model=MODEL, left_out=[], cells=cells)
