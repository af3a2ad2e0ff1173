"""What benchmarks with a document of a kind end in: a table, a file, the last line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import print_document
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.replica.sizing import ModelFacts

__all__ = ["add_output_arguments", "check_output", "columns", "deliver", "described"]


def add_output_arguments(parser: Parser) -> None:
    """`--json` and `--output`."""
    parser.flag("--json", action="store_true", help="print the JSON document alone")
    # Without a twin in the environment: each command would write to the same file.
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the document there, too")


def check_output(path: Path | None) -> None:
    """Makes sure, before anything is measured, that there is a folder to write to.

    Raises:
        RequestError: There is none, or something else has that name.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise RequestError(
            "the document cannot be written there",
            where="--output",
            expected="a file in a folder that there is",
            got=path,
        )


def deliver(found: dict[str, Any], table: Sequence[str], path: Path | None, *, alone: bool) -> None:
    """Prints the table and the document, and writes that to a file where it is wanted.

    Raises:
        RequestError: The file cannot be written; the document has been printed.
    """
    if not alone:
        print("\n".join(table))
    print_document(found)
    if path is None:
        return
    try:
        path.write_text(json.dumps(found, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(
            "the document cannot be written there", where="--output", got=str(error)
        ) from error


def described(model: Path, facts: ModelFacts) -> dict[str, Any]:
    """The model, as documents have it.

    Args:
        model: Its directory.
        facts: What is known of it.
    """
    return {
        "path": str(model),
        "family": facts.spec.family,
        "dtype": facts.spec.dtype,
        "weights_bytes": facts.weights_bytes or 0,
        "read_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
    }


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
