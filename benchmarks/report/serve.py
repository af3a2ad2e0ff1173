"""The report's section of a warm server under load: latencies by load, and goodput."""

from __future__ import annotations

from typing import Any

from coldframe.benchmarks.report.charts import Point, Scale, Series, chart
from coldframe.benchmarks.report.markup import (
    Cell,
    esc,
    figure_html,
    keys,
    left_out,
    number_cell,
    section,
    shown,
    table,
)

__all__ = ["serve_section"]

_LATENCIES = {"ttft": "time to the first token", "itl": "time between two tokens"}
_LATENCIES |= {"e2e": "time to the last token"}


def serve_section(document: dict[str, Any], ident: str) -> str:
    """A serve document as HTML.

    Args:
        document: Of kind serve.
        ident: An id that is unique within the page.
    """
    loads = document["loads"]
    ways = list(dict.fromkeys(load["way"] for load in loads))
    parts = [_table(loads), left_out(document)]
    items = [(f"c{number % 5}", way) for number, way in enumerate(ways)]
    for key, told in _LATENCIES.items():
        series = []
        for number, way in enumerate(ways):
            for quantile in ("p50", "p99"):
                points = [
                    Point(
                        load["rate"],
                        load["all"][key][quantile],
                        f"{way} {quantile}: {shown(load['all'][key][quantile], 's')}",
                    )
                    for load in _by_rate(loads, way)
                    if load["all"].get(key)
                ]
                style = f"c{number % 5}"
                name = f"{way} {quantile}"
                stroke = f"l{number % 5}" if quantile == "p99" else f"l{number % 5} half"
                series.append(Series(name, points, style, stroke))
        if any(one.points for one in series):
            drawn = chart(
                f"{ident}-{key}",
                told.capitalize(),
                f"{told} by load, p50 and p99",
                series,
                Scale("requests per second offered", ""),
                Scale(key.upper(), "s", log=True),
            )
            note = f"{told.capitalize()} by load: p99 strong, p50 pale."
            parts.append(
                f"<h3>{esc(told.capitalize())}</h3>{figure_html(drawn, note, keys(items))}"
            )
    series = [
        Series(
            way,
            [
                Point(
                    load["rate"],
                    load["all"]["goodput"]["share"],
                    f"{way}: {shown(load['all']['goodput']['share'], '%')}",
                )
                for load in _by_rate(loads, way)
            ],
            f"c{number % 5}",
            f"l{number % 5}",
        )
        for number, way in enumerate(ways)
    ]
    if any(one.points for one in series):
        goodput = loads[0]["all"]["goodput"]
        drawn = chart(
            f"{ident}-goodput",
            "Goodput",
            "Share of requests within the objective",
            series,
            Scale("requests per second offered", ""),
            Scale("share within the objective", "%", top=1.05),
        )
        note = f"Requests with their first token within {shown(goodput['ttft_s'], 's')} and each"
        note += f" further one within {shown(goodput['itl_s'], 's')}."
        parts.append(f"<h3>Goodput</h3>{figure_html(drawn, note, keys(items))}")
    return section(f"Serving {document['model']['path']}", *parts, ident=ident)


def _by_rate(loads: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    found = [load for load in loads if load["way"] == way and load["rate"] is not None]
    return sorted(found, key=lambda load: float(load["rate"]))


def _table(loads: list[dict[str, Any]]) -> str:
    rows: list[list[Cell]] = []
    for load in loads:
        account = load["all"]
        row = [
            f'<th scope="row">{esc(load["way"])}</th>',
            number_cell(load["rate"], "req/s", "rate"),
        ]
        row.append(number_cell(account["requests"], "", "requests"))
        for key in _LATENCIES:
            for quantile in ("p50", "p99"):
                spread = account.get(key) or {}
                row.append(number_cell(spread.get(quantile), "s", f"{key} {quantile}"))
        row.append(number_cell(account["tokens_rate"], "tok/s", "tokens_rate"))
        row.append(number_cell(account["goodput"]["share"], "%", "goodput share"))
        row.append(number_cell(account["goodput"]["rate"], "req/s", "goodput rate"))
        rows.append(row)
    heads = ["way", "offered", "requests"]
    heads += [f"{key.upper()} {quantile}" for key in _LATENCIES for quantile in ("p50", "p99")]
    heads += ["tokens", "good", "goodput"]
    names = [f"{load['way']} {load['rate']}" for load in loads]
    return table("Each load", heads, rows, names=names)
