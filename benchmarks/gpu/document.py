"""The results file of one run on one machine: built, checked, written, read."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.budget import Outcome
from coldframe.benchmarks.harness import Row
from coldframe.loader.checkpoints.whole_file import write_whole
from coldframe.loader.errors import PlatformError

__all__ = ["FORMAT", "build", "file_name", "problems", "read", "succeeded", "write"]

FORMAT = 1

_FINGERPRINT = {
    "gpu": str,
    "gpu_memory": int,
    "cuda": str,
    "torch": str,
    "coldframe": str,
    "python": str,
    "kernel": str,
    "cpu": str,
    "cpus": int,
    "memory": int,
}
_PART = {
    "name": str,
    "what": str,
    "status": str,
    "seconds": float,
    "rows": list,
    "checks": list,
    "answers": dict,
    "left_out": dict,
}
_STATUSES = ("done", "left out", "failed", "out of time")
_CHECKS = ("passed", "failed", "skipped")


def build(
    fingerprint: dict[str, Any], date: str, seconds: float, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The document of a run.

    Args:
        fingerprint: The machine and the versions.
        date: The day, as 2026-11-30.
        seconds: How long all of it took.
        outcomes: How each part ended.
    """
    return {
        "format": FORMAT,
        "date": date,
        "seconds": round(seconds, 1),
        "fingerprint": fingerprint,
        "parts": [_part(outcome) for outcome in outcomes],
    }


def _part(outcome: Outcome) -> dict[str, Any]:
    found = outcome.found
    return {
        "name": outcome.part.name,
        "what": outcome.part.what,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 2),
        "rows": [{**asdict(row), "median": row.median, "met": row.met} for row in found.rows],
        "checks": [asdict(check) for check in found.checks],
        "answers": found.answers,
        "left_out": found.left_out,
    }


def succeeded(document: dict[str, Any]) -> bool:
    """Whether nothing failed and every aim was met. What was left out has not failed."""
    return all(
        part["status"] in ("done", "left out")
        and all(row["met"] is not False for row in part["rows"])
        and all(check["outcome"] != "failed" for check in part["checks"])
        for part in document["parts"]
    )


def file_name(document: dict[str, Any]) -> str:
    """`<gpu>-<date>.json`: a second run on the same day takes the place of the first."""
    gpu = re.sub(r"[^a-z0-9]+", "-", document["fingerprint"]["gpu"].lower()).strip("-")
    return f"{gpu}-{document['date']}.json"


def write(document: dict[str, Any], directory: Path) -> Path:
    """Writes a document whole or not at all; returns the file.

    Raises:
        PlatformError: It is not what a results file has to be.
    """
    wrong = problems(document)
    if wrong:
        raise PlatformError("the results make no document", got="; ".join(wrong))
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / file_name(document)
    write_whole(str(target), (json.dumps(document, indent=1) + "\n").encode(), 0o666)
    return target


def read(file: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        PlatformError: It is none.
    """
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise PlatformError("a results file cannot be read", where=file, got=error) from error
    wrong = problems(document)
    if wrong:
        raise PlatformError("a results file is not as it has to be", where=file, got=wrong[0])
    return dict(document)


def problems(document: object) -> list[str]:
    """What of a document is not as it has to be; nothing where it is sound."""
    if not isinstance(document, dict):
        return ["it is no object"]
    found = _missing(
        document,
        {"format": int, "date": str, "seconds": float, "fingerprint": dict, "parts": list},
        "",
    )
    if found:
        return found
    if document["format"] != FORMAT:
        return [f"format is {document['format']}, not {FORMAT}"]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", document["date"]):
        found.append(f"date is {document['date']!r}")
    found += _missing(document["fingerprint"], _FINGERPRINT, "fingerprint.")
    for number, part in enumerate(document["parts"]):
        found += _problems_of_part(part, f"parts[{number}].")
    names = [part.get("name") for part in document["parts"] if isinstance(part, dict)]
    found += [f"there are two parts {name!r}" for name in set(names) if names.count(name) > 1]
    return found


def _problems_of_part(part: object, where: str) -> list[str]:
    found = _missing(part, _PART, where)
    if found or not isinstance(part, dict):
        return found
    if part["status"] not in _STATUSES:
        found.append(f"{where}status is {part['status']!r}")
    if part["status"] != "done" and not part.get("reason"):
        found.append(f"{where}reason is missing, and it is {part['status']}")
    for number, row in enumerate(part["rows"]):
        found += _problems_of_row(row, f"{where}rows[{number}].")
    for number, check in enumerate(part["checks"]):
        at = f"{where}checks[{number}]."
        wrong = _missing(check, {"name": str, "outcome": str}, at)
        if not wrong and check["outcome"] not in _CHECKS:
            wrong = [f"{at}outcome is {check['outcome']!r}"]
        if not wrong and check["outcome"] != "passed" and not check.get("reason"):
            wrong = [f"{at}reason is missing, and it was {check['outcome']}"]
        found += wrong
    found += [
        f"{where}left_out[{what!r}] has no reason"
        for what, reason in part["left_out"].items()
        if not reason or not isinstance(reason, str)
    ]
    return found


def _problems_of_row(row: object, where: str) -> list[str]:
    found = _missing(row, {"name": str, "runs": list, "unit": str, "at_least": bool}, where)
    if found or not isinstance(row, dict):
        return found
    runs = row["runs"]
    if not runs or not all(isinstance(value, int | float) for value in runs):
        return [f"{where}runs are {runs!r}"]
    again = Row(row["name"], runs, row["unit"], row.get("target"), row["at_least"])
    if row.get("median") != statistics.median(runs) or row.get("met") != again.met:
        found.append(f"{where}median or met do not follow from its runs")
    return found


def _missing(value: object, fields: dict[str, type], where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where.rstrip('.') or 'it'} is no object"]
    found = []
    for name, kind in fields.items():
        kinds = (int, float) if kind is float else kind
        if name not in value:
            found.append(f"{where}{name} is missing")
        elif not isinstance(value[name], kinds) or (kind is int and value[name] is True):
            found.append(f"{where}{name} is {value[name]!r}, which is no {kind.__name__}")
    return found
