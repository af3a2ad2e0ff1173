"""The report: one HTML page with inline pictures that needs nothing from elsewhere, no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.report.advise import advise_section
from coldframe.benchmarks.report.cold import cold_section
from coldframe.benchmarks.report.handoff import handoff_section
from coldframe.benchmarks.report.markup import esc, shown
from coldframe.benchmarks.report.pictures import PICTURES, pictures_of
from coldframe.benchmarks.report.replay import replay_section
from coldframe.benchmarks.report.rows import rows_section
from coldframe.benchmarks.report.serve import serve_section
from coldframe.loader.errors import PlatformError

__all__ = ["report_page", "save", "write_pictures", "write_report"]

_SECTIONS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "cold": cold_section,
    "serve": serve_section,
    "handoff": handoff_section,
    "replay": replay_section,
    "advise": advise_section,
    "rows": rows_section,
}

_BYTES = ("memory", "weights_bytes", "read_bytes")
_PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem;
  border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
h4 { font-size: .9rem; margin: 1.2rem 0 .2rem; font-family: ui-monospace, monospace; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--mark); }
figure { margin: .5rem 0 1rem; } figcaption { color: var(--faint); font-size: .85rem; }
table { border-collapse: collapse; font-size: .82rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
thead th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 9rem;
  max-width: 22rem; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.strong { font-weight: 700; } .yes { color: var(--engine); } .no { color: var(--mark);
  font-weight: 700; }
tr.taken { background: var(--card); } tr.taken th::before { content: "★ "; color: var(--mark); }
.facts { display: flex; flex-wrap: wrap; gap: 0 3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem;
  margin: .5rem 0; } dt { color: var(--faint); } dd { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; padding: 0;
  margin: .3rem 0; font-size: .82rem; } .legend svg { display: inline; margin-right: .4em;
  vertical-align: -1px; }
summary { cursor: pointer; color: var(--faint); font-size: .85rem; }
"""
"""The style of what is drawn, beside that of `STYLE`."""


def report_page(documents: Sequence[dict[str, Any]]) -> str:
    """The page, the same for the same documents.

    Args:
        documents: As `read_documents` gives them; at least one.
    """
    models = [document["model"]["path"] for document in documents if _named(document)]
    title = f"coldframe: {Path(models[0]).name}" if models else "coldframe"
    kinds = ", ".join(dict.fromkeys(str(document["kind"]) for document in documents))
    sections = [
        _SECTIONS[document["kind"]](document, f"d{number}-{document['kind']}")
        for number, document in enumerate(documents)
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{esc(title)}</title><style>{PICTURES}{_PAGE}</style></head><body>"
        f"<header><h1>{esc(title)}</h1><p>{esc(kinds)}</p>{_header(documents)}</header>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _named(document: dict[str, Any]) -> bool:
    return isinstance(document.get("model"), dict)


def _header(documents: Sequence[dict[str, Any]]) -> str:
    """The model, and each machine once with the commands that ran there."""
    parts = []
    for document in documents:
        if _named(document):
            model = document["model"]
            told = {key: value for key, value in model.items() if not isinstance(value, dict)}
            parts.append(_list(told, "model"))
            break
    seen: list[dict[str, Any]] = []
    for document in documents:
        machine = {k: v for k, v in document["fingerprint"].items() if k != "command"}
        if machine not in seen:
            seen.append(machine)
            parts.append(_list(machine, "fingerprint"))
    commands = [d["fingerprint"]["command"] for d in documents if "command" in d["fingerprint"]]
    for command in dict.fromkeys(map(str, commands)):
        parts.append(f'<pre class="scroll"><code>{esc(command)}</code></pre>')
    return f'<div class="facts">{"".join(parts)}</div>'


def _list(told: dict[str, Any], style: str) -> str:
    items = "".join(
        f"<dt>{esc(key.replace('_', ' '))}</dt>"
        f'<dd data-name="{esc(key)}">{esc(_plain(key, value))}</dd>'
        for key, value in told.items()
    )
    return f'<dl class="{style}">{items}</dl>'


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, dict):  # what the model's disk is
        return ", ".join(str(part) for part in value.values() if part is not None)
    return shown(value, "B") if key in _BYTES and isinstance(value, int) else value


def write_report(documents: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Writes the page for some documents.

    Args:
        documents: As they were printed; at least one.
        path: An HTML file; what was there is written over.

    Raises:
        PlatformError: It cannot be written.
    """
    save(_whole(documents), path, "the report")


def write_pictures(documents: Sequence[dict[str, Any]], folder: str | Path) -> None:
    """Writes each picture of the page as an SVG file of its own, named after its id.

    Args:
        documents: As they were printed; at least one.
        folder: Made where it is not there; files of the same names are written over.

    Raises:
        PlatformError: They cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformError(
            "there is no folder for the pictures",
            where=folder,
            got=error.strerror,
            hint="Give a folder that can be made or written to.",
        ) from error
    for ident, drawn in pictures_of(_whole(documents)):
        save(drawn, Path(folder, f"{ident}.svg"), "a picture")


def _whole(documents: Sequence[dict[str, Any]]) -> str:
    return report_page([{"kind": "rows", **document} for document in documents])


def save(text: str, path: str | Path, what: str) -> None:
    """Writes a file whole.

    Raises:
        PlatformError: It cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlatformError(
            f"cannot write {what}",
            where=path,
            got=error.strerror,
            hint="Give a file in a folder that can be written to.",
        ) from error
