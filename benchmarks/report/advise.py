"""The report's section of advice: what each choice costs against its slowest answers."""

from __future__ import annotations

from typing import Any

from coldframe.benchmarks.report.charts import Point, Scale, Series, chart
from coldframe.benchmarks.report.markup import (
    esc,
    figure_html,
    keys,
    left_out,
    number_cell,
    section,
    shown,
    table,
)

__all__ = ["advise_section"]


def advise_section(document: dict[str, Any], ident: str) -> str:
    """An advise document as HTML.

    Args:
        document: Of kind advise.
        ident: An id that is unique within the page.
    """
    choices = document["choices"]
    rows = []
    for number, choice in enumerate(choices):
        meets = '<td class="yes">yes</td>' if choice["meets_slo"] else '<td class="no">no</td>'
        rows.append(
            [
                f'<th scope="row">{number + 1}. {esc(choice["name"])}</th>',
                number_cell(choice["cost"], "", "cost"),
                number_cell(choice["cold_share"], "%", "cold_share"),
                number_cell(choice.get("p50_s"), "s", "p50_s"),
                number_cell(choice["p99_s"], "s", "p99_s"),
                meets,
            ]
        )
    made = table(
        "The choices",
        ["choice", "cost", "cold", "p50 TTFT", "p99 TTFT", "within the objective"],
        rows,
        names=[choice["name"] for choice in choices],
    )
    for choice in choices:
        if choice["name"] == document["take"]:
            row = f'<tr data-row="{esc(choice["name"])}">'
            made = made.replace(row, row[:-1] + ' class="taken">')
    take = f"Take {document['take']}: {document['why']}"
    parts = [f"<p><b>{esc(take)}</b></p>", made, left_out(document)]
    if choices:
        points = [
            Point(
                choice["cost"],
                choice["p99_s"],
                f"{choice['name']}: {choice['cost']:.4g}, {shown(choice['p99_s'], 's')}",
                str(number + 1),
                choice["name"] == document["take"],
            )
            for number, choice in enumerate(choices)
        ]
        drawn = chart(
            f"{ident}-cost",
            "Cost against the slowest answers",
            f"{len(choices)} choices; to take: {document['take']}",
            [Series("choices", points, "c0")],
            Scale("cost of the trace", "", log=True),
            Scale("p99 TTFT", "s", log=True, limits=[(document["slo_s"], "objective")]),
        )
        note = "Each number is a choice of the table; the one to take stands out. Lower and further"
        note += " left is better. Where two would cover each other, the later one stands beside."
        items = [("c0", "choice"), ("star", f"to take: {document['take']}")]
        parts.append(figure_html(drawn, note, keys(items)))
    title = f"Advice at {document['price']:g} an hour and {shown(document['slo_s'], 's')}"
    return section(title, *parts, ident=ident)
