"""The table for people: a line for each cell, then what was left out and what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coldframe.benchmarks.output import columns
from coldframe.runtime.units import human_bytes, human_seconds

__all__ = ["table"]

_HEAD = (
    *("cell", "TTFT", "p90", "min", "max", "to move", "TTFT/move", "rate", "unattr."),
    *("memory", "plan: TTFT", "memory", "tokens"),
)


def table(found: Mapping[str, Any]) -> str:
    """The table of a document, with lines of text behind it.

    Args:
        found: The document.
    """
    model = found["model"]
    lines = [
        f"{model['path']}: {model['family']}, {model['dtype']}, "
        f"{human_bytes(model['read_bytes'])} to load; {found['prompt_tokens']} tokens in, "
        f"{found['answer_tokens']} out; medians of {found['runs']}",
        "",
        *columns(_used([_HEAD, *(_row(cell) for cell in found["cells"])])),
    ]
    if any(cell["clock"] == "request" for cell in found["cells"]):
        lines.append("* from the request to a replica that is there; all others from the exec")
    if found["interrupted"]:
        lines.append(f"interrupted after {found['runs']} rounds")
    for cell in found["cells"]:
        if cell["differs"] is not None:
            differs = cell["differs"]
            lines.append(
                f"{cell['id']}: other tokens from number {differs['at']} on, in run "
                f"{differs['run']}: {differs['got']}, expected {differs['expected']}"
            )
    lines += [f"left out: {each['what']}: {each['why']}" for each in found["left_out"]]
    if found["baseline"] is not None:
        lines += ["", *_baseline(found["baseline"])]
    return "\n".join(lines)


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    ttft, prediction = cell["ttft"], cell["prediction"] or {}
    rate = cell["rate"]
    return (
        cell["id"] + (" *" if cell["clock"] == "request" else ""),
        *(human_seconds(ttft[name]) for name in ("median", "p90", "min", "max")),
        "" if cell["move"] is None else human_seconds(cell["move"]["median"]),
        "" if cell["ratio"] is None else f"{cell['ratio']['median']:.2f}",
        "" if rate is None else f"{human_bytes(int(rate['median']))}/s",
        "" if cell["unattributed"] is None else human_seconds(cell["unattributed"]["median"]),
        "" if cell["memory"] is None else human_bytes(int(cell["memory"]["median"])),
        _predicted(prediction.get("ttft_s"), prediction.get("ttft_error"), human_seconds),
        _predicted(
            prediction.get("memory_bytes"),
            prediction.get("memory_error"),
            lambda value: human_bytes(int(value)),
        ),
        "equal" if cell["tokens_equal"] else "DIFFER",
    )


def _predicted(value: float | None, error: float | None, said: Callable[[float], str]) -> str:
    if value is None:
        return ""
    return said(value) + ("" if error is None else f" ({error:+.0%})")


def _used(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without the columns that have nothing but a head."""
    used = [at for at in range(len(rows[0])) if any(row[at] for row in rows[1:])]
    return [[row[at] for at in used] for row in rows]


def _baseline(found: Mapping[str, Any]) -> list[str]:
    lines = [f"against {found['file']}, {found['fail_if_slower']:.0%} allowed:"]
    for kind in ("slower", "unsure", "faster"):
        word = {"unsure": "slower, but within the spread of its runs"}.get(kind, kind)
        lines += [
            f"  {word}: {entry['id']}: {human_seconds(entry['was_s'])} to "
            f"{human_seconds(entry['now_s'])} ({entry['ratio'] - 1:+.0%})"
            for entry in found[kind]
        ]
    lines += [f"  lost, though it was asked for: {name}" for name in found["lost"]]
    lines += [
        f"  not measured now: {name}" for name in found["missing"] if name not in found["lost"]
    ]
    lines += [f"  not there before: {name}" for name in found["added"]]
    return lines if len(lines) > 1 else [*lines, "  nothing slower"]
