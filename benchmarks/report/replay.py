"""The report's section of a replayed trace: states and requests over time, live and simulated.

Above is what each model did, one lane each: the states as colours, requests as ticks in the colour
of what they met. Of many models those with most requests are drawn; requests within a pixel that
met the same are one tick; of a model with very many states those too short to see are left out.
"""

from __future__ import annotations

import html
from typing import Any

from coldframe.benchmarks.report.charts import Point, Scale, Series, chart
from coldframe.benchmarks.report.markup import (
    esc,
    figure_html,
    keys,
    number_cell,
    section,
    shown,
    table,
)
from coldframe.runtime.timeline.svg import Axis, element, fitted, picture, seconds_ticks, text

__all__ = ["replay_section"]

_WIDTH = 1000
_LEFT = 150
_RIGHT = 30
_LANE = 30
_LANES = 24
_DOTS = 3000
_STEPS = 300
_STATES = ("zero", "starting", "warm", "draining", "parked", "failed")
_FROM = ("zero", "parked", "warm")
_WAYS = ("live", "simulated")


def replay_section(document: dict[str, Any], ident: str) -> str:
    """A replay document as HTML.

    Args:
        document: Of kind replay.
        ident: An id that is unique within the page.
    """
    played = {way: document[way] for way in _WAYS if document[way] is not None}
    trace = document["trace"]
    said = (
        f"{trace['arrivals']} requests in {shown(trace['seconds'], 's')} to {trace['models']}"
        f" models; policy: {document['policy']}."
    )
    parts = [f"<p>{esc(said)}</p>", _figures(document, played)]
    if played:
        items = [(f"s-{state}", state) for state in _STATES]
        items += [(f"f-{met}", f"request that met {met}") for met in _FROM]
        drawn, note = _lanes(played, f"{ident}-lanes")
        parts.append(f"<h3>States over time</h3>{figure_html(drawn, note, keys(items))}")
    if any(one["asked"] for one in played.values()):
        parts.append(_scatter(played, ident))
        parts.append(_shares(played, ident))
    return section(f"Replay of {trace['file']}", *parts, ident=ident)


def _figures(document: dict[str, Any], played: dict[str, dict[str, Any]]) -> str:
    told = [("requests", "requests", ""), ("cold starts", "cold_starts", "")]
    told += [("starts of a replica", "starts", ""), ("cold share", "cold_share", "%")]
    told += [("device seconds", "gpu_s", "s"), ("seconds with a device held", "held_s", "s")]
    told += [("parked seconds", "parked_s", "s"), ("cost", "cost", "")]
    # Older documents and those of other traces may lack some.
    told = [each for each in told if any(each[1] in one for one in played.values())]
    rows = [
        [
            f'<th scope="row">{name}</th>',
            *(number_cell(one.get(key), unit, f"{way} {key}") for way, one in played.items()),
            *(
                [number_cell(document["difference"].get(key), "%", f"difference {key}")]
                if document["difference"]
                else []
            ),
        ]
        for name, key, unit in told
    ]
    for key in ("p50", "p90", "p99", "max", "mean"):
        values = (number_cell(one["ttft"][key], "s", f"{w} {key}") for w, one in played.items())
        empty = ["<td></td>"] if document["difference"] else []
        rows.append([f'<th scope="row">TTFT {key}</th>', *values, *empty])
    heads = ["", *played, *(["difference"] if document["difference"] else [])]
    return table("What it took", heads, rows, names=[str(n) for n in range(len(rows))])


def _lanes(played: dict[str, dict[str, Any]], ident: str) -> tuple[str, str]:
    asked: dict[str, int] = {}
    for one in played.values():
        for model in one["states"]:
            asked.setdefault(model, 0)
        for request in one["asked"]:
            asked[request["model"]] = asked.get(request["model"], 0) + 1
    chosen = sorted(asked, key=lambda model: -asked[model])[:_LANES]
    models = [model for model in asked if model in chosen]
    ends = [s["end_s"] for o in played.values() for lane in o["states"].values() for s in lane]
    ends += [request["at_s"] for one in played.values() for request in one["asked"]]
    axis = Axis(0.0, max([*ends, 1e-6]), _LEFT, _WIDTH - _RIGHT)
    drawn: list[str] = []
    y = 4.0
    for way, one in played.items():
        drawn.append(text(4, y + 12, way, "strong"))
        y += 18
        for model in models:
            drawn.append(_lane(way, model, one, axis, y))
            y += _LANE
        y += 8
    ticks = axis.ticks()
    for tick, label in zip(ticks, seconds_ticks(ticks), strict=True):
        drawn.append(text(axis.at(tick), y + 12, label, "middle faint"))
    note = "Each lane is a model: its states as colours, and over them each request as a tick;"
    note += " those within a pixel that met the same are one."
    if any(len(stays) > _STEPS for one in played.values() for stays in one["states"].values()):
        note += " States too short to be seen are left out."
    if len(models) < len(asked):
        note += f" Of {len(asked)} models the {len(models)} most asked for are drawn."
    requests = sum(len(one["asked"]) for one in played.values())
    desc = f"{len(models)} models, {requests} requests, {' and '.join(played)}."
    return picture(
        ident, "States of each model over time", desc, _WIDTH, y + 20, "".join(drawn)
    ), note


def _lane(way: str, model: str, one: dict[str, Any], axis: Axis, y: float) -> str:
    parts = [text(_LEFT - 8, y + 19, fitted(model, _LEFT - 16), "end", title=model)]
    reached, count = -1.0, 0
    stays = one["states"].get(model, [])
    for stay in stays:
        left, right = axis.at(stay["start_s"]), axis.at(stay["end_s"])
        count += 1
        # What nobody could see: only where there are so many that the page would be large.
        if len(stays) > _STEPS and right - max(left, reached) < 0.5:
            continue
        told = f"{model} {stay['state']}: {shown(stay['end_s'] - stay['start_s'], 's')} from"
        told += f" {shown(stay['start_s'], 's')}"
        parts.append(
            element(
                "rect",
                f"<title>{html.escape(told)}</title>",
                x=left,
                y=y + 10.0,
                width=right - left,
                height=14.0,
                class_=f"stay s-{stay['state']}",
                data_state=stay["state"],
                data_start=stay["start_s"],
                data_end=stay["end_s"],
            )
        )
        reached = right
    ticks: dict[tuple[int, str], list[float]] = {}
    for request in one["asked"]:
        if request["model"] == model:
            at = (round(axis.at(request["at_s"])), request["from"])
            ticks.setdefault(at, []).append(request["at_s"])
    # Those that met least are few, and lie above the others.
    for (_, met), times in sorted(ticks.items(), key=lambda item: -_FROM.index(item[0][1])):
        height = {"zero": 8.0, "parked": 7.0, "warm": 5.0}[met]
        parts.append(
            element(
                "rect",
                x=axis.at(times[0]) - 0.75,
                y=y + 9 - height,
                width=1.5,
                height=height,
                class_=f"tick f-{met}",
                data_from=met,
                data_at=times[0],
                data_count=len(times),
            )
        )
    return element("g", "".join(parts), class_="lane", data_model=model, data_way=way)


def _scatter(played: dict[str, dict[str, Any]], ident: str) -> str:
    series, left = [], 0
    for number, (way, one) in enumerate(played.items()):
        requests = [request for request in one["asked"] if request["ttft_s"] > 0]
        every = -(-len(requests) // _DOTS) or 1
        # The slowest are what one looks for: of many those are drawn, and some of the rest.
        slow = set(map(id, sorted(requests, key=lambda r: -r["ttft_s"])[: _DOTS // 3]))
        kept = [r for n, r in enumerate(requests) if n % every == 0 or id(r) in slow]
        left += len(requests) - len(kept)
        points = [
            Point(
                r["at_s"],
                r["ttft_s"],
                f"{way}: {r['model']} from {r['from']}, {shown(r['ttft_s'], 's')}",
            )
            for r in kept
        ]
        series.append(Series(way, points, f"c{number}"))
    limits = [(one["ttft"]["p99"], f"p99 {way}") for way, one in list(played.items())[:1]]
    drawn = chart(
        f"{ident}-scatter",
        "Time to the first token of each request",
        f"{sum(len(s.points) for s in series)} requests.",
        series,
        Scale("when it was asked, since the first request", "s"),
        Scale("TTFT", "s", log=True, limits=limits),
    )
    note = "Each point is a request." + (
        f" {left} of the quicker ones are left out." if left else ""
    )
    items = [(one.style, one.name) for one in series]
    return f"<h3>Time to the first token</h3>{figure_html(drawn, note, keys(items))}"


def _shares(played: dict[str, dict[str, Any]], ident: str) -> str:
    series = []
    for number, (way, one) in enumerate(played.items()):
        times = sorted(request["ttft_s"] for request in one["asked"])
        if not times:
            continue
        every = -(-len(times) // _STEPS)
        # The tail is steep: its last requests are all there.
        kept = [n for n in range(len(times)) if n % every == 0 or n >= len(times) - 50]
        points = [Point(times[n], (n + 1) / len(times)) for n in kept]
        series.append(Series(way, points, f"c{number}", f"l{number}", dots=False))
    drawn = chart(
        f"{ident}-shares",
        "Share of requests that had their first token within a time",
        "; ".join(
            f"{way}: half within {shown(one['ttft']['p50'], 's')}, 99 % within"
            f" {shown(one['ttft']['p99'], 's')}"
            for way, one in played.items()
        ),
        series,
        Scale("TTFT", "s", log=True),
        Scale("share of requests", "%", top=1.0),
    )
    note = "The share of requests whose first token was out within a time."
    return figure_html(drawn, note, keys([(one.style, one.name) for one in series]))
