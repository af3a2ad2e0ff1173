"""The report's section of the older benchmarks' rows: a table, and every run as a point."""

from __future__ import annotations

from typing import Any

from coldframe.benchmarks.report.markup import esc, number_cell, section, table, text_cell

__all__ = ["rows_section"]


def rows_section(document: dict[str, Any], ident: str) -> str:
    """A document of rows as HTML.

    Args:
        document: Of kind rows.
        ident: An id that is unique within the page.
    """
    rows, verdicts = [], {None: ("", ""), True: ("met", "yes"), False: ("missed", "no")}
    for row in document["rows"]:
        unit, sign = row["unit"], "≥ " if row["at_least"] else "≤ "
        verdict, style = verdicts[row["met"]]
        rows.append(
            [
                f'<th scope="row">{esc(row["name"])}</th>',
                number_cell(row["median"], unit, "median", "num strong"),
                number_cell(min(row["runs"], default=None), unit, "min"),
                number_cell(max(row["runs"], default=None), unit, "max"),
                text_cell("" if row["target"] is None else f"{sign}{row['target']:.4g}", "num"),
                text_cell(verdict, style),
            ]
        )
    heads = ["", "median", "min", "max", "target", ""]
    names = [row["name"] for row in document["rows"]]
    return section("Rows", table("What was measured", heads, rows, names=names), ident=ident)
