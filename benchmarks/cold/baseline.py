"""An earlier document to hold a new one against, as a pipeline does with each change.

A cell is *slower* where its median is above the earlier one by more than the limit, and its
fastest run above the earlier median, too: a machine that stutters makes a median late, but seldom
every run. Where only the former holds the cell is *unsure*: it is named, and does not fail. Only
several runs of a cell can tell the two apart.

What differs between machines is no regression, so a document of another machine, model or version
of what we build upon is refused. Another version of coldframe is not: it is what is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import VERSION, parsed
from coldframe.loader.errors import RequestError

__all__ = ["check_same", "compare", "fails", "read_baseline", "share"]

_MACHINE = (
    *("cpu", "cpus", "kernel", "python", "torch", "vllm", "device"),
    *("gpu", "gpu_uuid", "gpu_driver", "disk"),
)
_MODEL = ("family", "dtype", "weights_bytes", "read_bytes", "plan_hash")
_REQUEST = ("prompt_tokens", "answer_tokens")


def share(text: str) -> float:
    """A share from text such as `10%` or `0.1`.

    Raises:
        ValueError: It is none, or not above zero.
    """
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"{text!r} is no share; write 10% or 0.1")
    return found


def read_baseline(path: Path) -> dict[str, Any]:
    """An earlier document, as `--output` has written it, or the output of a run as a whole.

    Raises:
        RequestError: It cannot be read, or is none of a cold-start benchmark.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("the baseline cannot be read", where=path, got=error) from error
    found = parsed(text)
    if found is None or not _is_cold(found):
        raise RequestError(
            "the baseline is no document of this benchmark",
            where=path,
            expected=f"kind cold, schema {VERSION}, with cells",
            got=text.strip()[:200] if found is None else json.dumps(found)[:200],
        )
    return found


def _is_cold(found: Mapping[str, Any]) -> bool:
    if found.get("kind") != "cold" or found.get("schema") != VERSION:
        return False
    if not all(isinstance(found.get(name), dict) for name in ("model", "fingerprint")):
        return False
    cells = found.get("cells")
    return isinstance(cells, list) and all(
        isinstance(cell, dict)
        and isinstance(cell.get("id"), str)
        and isinstance(cell.get("ttft"), dict)
        and isinstance(cell["ttft"].get("median"), (int, float))
        for cell in cells
    )


def check_same(was: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Makes sure that two documents are about the same.

    Args:
        was: The earlier one.
        now: The new one, or as much of it as is known before it is measured: `model`,
            `fingerprint`, `prompt_tokens`, `answer_tokens`.
        path: Where the earlier one is.

    Raises:
        RequestError: They are not.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for part, names in (("fingerprint", _MACHINE), ("model", _MODEL)):
        pairs += [(name, was[part].get(name), now[part].get(name)) for name in names]
    pairs += [(name, was.get(name), now.get(name)) for name in _REQUEST]
    other = {name: (a, b) for name, a, b in pairs if a != b}
    if other:
        raise RequestError(
            "the baseline is of another machine, model or request",
            where=path,
            expected="; ".join(f"{name} {now}" for name, (_, now) in other.items()),
            got="; ".join(f"{name} {was}" for name, (was, _) in other.items()),
            hint="Make one here with --output, or take it as it is with --any-baseline.",
        )


def compare(
    was: Mapping[str, Any],
    cells: Iterable[Mapping[str, Any]],
    lost: Iterable[str],
    path: Path,
    limit: float,
) -> dict[str, Any]:
    """The document's part about its baseline.

    Args:
        was: The earlier document.
        cells: The cells of the new one.
        lost: Ids of cells that were to be measured, and could not be.
        path: Where the earlier one is.
        limit: How much slower a cell may be, as a share.

    Returns:
        `slower` (which fail), `unsure`, `faster`: cells of both by what became of them; `missing`:
        those of the earlier one alone; `lost`: those of these that were asked for (which fail);
        `added`: those of the new one alone.
    """
    before, after = (
        # Others' programs stand beside it; it is not they who are tested.
        {c["id"]: c["ttft"] for c in each if c.get("who", "coldframe") == "coldframe"}
        for each in (was["cells"], cells)
    )
    found: dict[str, list[dict[str, Any]]] = {"slower": [], "unsure": [], "faster": []}
    for name in after.keys() & before.keys():
        then, now = before[name], after[name]
        ratio = now["median"] / then["median"]
        entry = {"id": name, "was_s": then["median"], "now_s": now["median"], "ratio": ratio}
        if ratio > 1 + limit:
            found["slower" if now["min"] > then["median"] else "unsure"].append(entry)
        elif ratio < 1 - limit:
            found["faster"].append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: -abs(entry["ratio"] - 1))
    missing = [name for name in before if name not in after]
    gone = set(lost)
    return {
        "file": str(path),
        "fail_if_slower": limit,
        **found,
        "missing": missing,
        "lost": [name for name in missing if name in gone],
        "added": [name for name in after if name not in before],
    }


def fails(found: Mapping[str, Any] | None) -> bool:
    """Whether a comparison is a failure."""
    return found is not None and bool(found["slower"] or found["lost"])
