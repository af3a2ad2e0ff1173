"""`coldframe bench report FILE...`: pictures of what benchmarks have printed.

On stdout a table and a waterfall; `--html` writes the whole report, `--svg` each of its pictures,
`--trace` the runs for Perfetto.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from coldframe.benchmarks.report.markup import shown
from coldframe.benchmarks.report.page import save, write_pictures, write_report
from coldframe.benchmarks.report.reading import read_documents
from coldframe.benchmarks.report.runs import chosen_runs
from coldframe.benchmarks.report.terminal import show_waterfall
from coldframe.benchmarks.report.trace import chrome_trace
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="what a benchmark printed, whole or its last line"
    )
    parser.add_argument("--html", metavar="OUT.html", help="write the report, one page")
    parser.add_argument("--svg", metavar="DIR", help="write each picture of the report there")
    parser.add_argument("--trace", metavar="OUT.trace.json", help="write runs for Perfetto")
    parser.add_argument(
        "--run", metavar="CELL[:N]", help="show this run; without N the cell's median one"
    )


def run(args: argparse.Namespace) -> int:
    """Draws what is asked for.

    Raises:
        RequestError: A file is no document, or there is no such run.
        PlatformError: A file cannot be written.
    """
    documents = read_documents(args.files)
    runs = chosen_runs(documents, args.run)
    if args.trace is not None:
        if not runs:
            raise RequestError(
                "there is nothing to trace",
                where=", ".join(args.files),
                expected="a cold document whose runs have timelines",
                hint="Only runs of bench cold have timelines.",
            )
        text = json.dumps(chrome_trace(runs), ensure_ascii=False, allow_nan=False)
        save(text, args.trace, "the trace")
    if args.html is not None:
        write_report(documents, args.html)
    if args.svg is not None:
        write_pictures(documents, args.svg)
    for document in documents:
        _print_summary(document)
    # One waterfall is enough for a terminal.
    first = next((run for run in runs if run.median or args.run is not None), None)
    if first is not None:
        outside = f"{shown(first.ttft_s, 's')} to the first token by the clock outside"
        print(f"{first.label}{', the median run' if first.median else ''}: {outside}")
        show_waterfall(first.timeline)
    return 0


def _print_summary(document: dict[str, Any]) -> None:
    if document["kind"] != "cold":
        print(f"a document of kind {document['kind']}: give --html to see it")
        return
    rows = [("cell", "TTFT", "p90", "move", "TTFT/move", "predicted", "tokens")]
    for cell in document["cells"]:
        medians = [cell[name]["median"] if cell[name] else None for name in ("move", "ratio")]
        predicted = cell["prediction"]["ttft_s"] if cell["prediction"] else None
        rows.append(
            (
                cell["id"],
                shown(cell["ttft"]["median"], "s"),
                shown(cell["ttft"]["p90"], "s"),
                shown(medians[0], "s"),
                shown(medians[1], "1"),
                shown(predicted, "s"),
                "equal" if cell["tokens_equal"] else "DIFFER",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *rest]).rstrip())
    print()
