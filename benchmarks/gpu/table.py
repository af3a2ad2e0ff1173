"""A results file as Markdown, and its place in a log: between two marks, to be found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coldframe.loader.errors import PlatformError

__all__ = ["into_log", "render", "sections"]

_HEAD = "| | median | least | most | unit | aim | |"
_BEGIN, _END = "<!-- results: {} -->", "<!-- end of results -->"


def render(document: dict[str, Any]) -> str:
    """The tables of a run: figures with their aims, checks, answers, and what was left out."""
    machine = document["fingerprint"]
    lines = [
        f"{machine['gpu']}, {machine['gpu_memory'] / 1e9:.0f} GB, driver "
        f"{machine.get('driver_version', 'unknown')}, CUDA {machine['cuda']}; {machine['cpus']} "
        f"processors ({machine['cpu']}), {machine['memory'] / 1e9:.0f} GB, kernel "
        f"{machine['kernel']}; torch {machine['torch']}, Python {machine['python']}. "
        f"All of it took {document['seconds']:.0f} s.",
    ]
    if machine.get("notes"):
        lines += ["", *(f"- note: {note}" for note in machine["notes"])]
    for part in document["parts"]:
        lines += ["", f"**{part['what']}**{_ending(part)}"]
        if part["rows"]:
            lines += [
                "",
                "| | median | least | most | unit | aim | |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [_row(row) for row in part["rows"]]
        lines += _checks(part["checks"])
        if part["answers"]:
            lines.append("")
            lines += [f"- {name}: {_told(value)}" for name, value in part["answers"].items()]
        if part["left_out"]:
            lines.append("")
            lines += [f"- left out: {what}: {why}" for what, why in part["left_out"].items()]
    return "\n".join(lines) + "\n"


def _ending(part: dict[str, Any]) -> str:
    if part["status"] == "done":
        return f" ({part['seconds']:.0f} s)"
    return f": **{part['status']}**, {part['reason']}"


def _row(row: dict[str, Any]) -> str:
    aim = ""
    if row["target"] is not None:
        aim = f"at {'least' if row['at_least'] else 'most'} {row['target']:.4g}"
    verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
    least, most = min(row["runs"]), max(row["runs"])
    name = row["name"].strip().replace("|", "\\|")
    return (
        f"| {name} | {row['median']:.4g} | {least:.4g} | {most:.4g} | {row['unit']} | {aim} | "
        f"{verdict} |"
    )


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    if not checks:
        return []
    count = {kind: [c for c in checks if c["outcome"] == kind] for kind in ("passed", "failed")}
    lines = ["", f"{len(count['passed'])} of {len(checks)} checks passed."]
    others = [check for check in checks if check["outcome"] != "passed"]
    if others:
        lines.append("")
        lines += [f"- {check['outcome']}: {check['name']}: {check['reason']}" for check in others]
    return lines


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_told(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def into_log(log: Path, name: str, document: dict[str, Any]) -> None:
    """Puts a run's tables on top of a log, or in the place of what it has of that file already.

    Args:
        log: A Markdown file whose entries begin with `## `, the newest first.
        name: The results file's name.
        document: What is in it.

    Raises:
        PlatformError: The log has no entry, so that there is no telling where it would go.
    """
    text = log.read_text(encoding="utf-8")
    body = f"{_BEGIN.format(name)}\n\n{render(document)}\n{_END}\n"
    known = sections(text)
    if name in known:
        old = f"{_BEGIN.format(name)}{known[name]}{_END}\n"
        log.write_text(text.replace(old, body), encoding="utf-8")
        return
    at = text.find("\n## ")
    if at < 0:
        raise PlatformError("the log has no entry yet", where=log, expected="a line with '## '")
    head = f"## {document['date']}: {document['fingerprint']['gpu']}, measured by `make gpu`\n\n"
    log.write_text(f"{text[: at + 1]}{head}{body}\n{text[at + 1 :]}", encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """What a log has of results files: what stands between the marks, by the file's name."""
    found = {}
    begin, end = _BEGIN.split("{}")
    for part in text.split(begin)[1:]:
        name, _, rest = part.partition(end)
        found[name] = rest.partition(_END)[0]
    return found
