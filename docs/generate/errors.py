"""The error classes as the code has them, and what a client over HTTP is told of each.

An `ApiError` has one of a few codes. What each of them means cannot be read from the code; that
they are all here, and none that is no more, a test sees to.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from coldframe.loader import errors
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.gateway.api import ApiError
from docs.generate.markdown import cell, code, table

__all__ = ["CODES", "Found", "codes", "facts", "family", "tree"]

_ROOT = Path(__file__).parents[2]
_FLOORS = ("loader", "snapshot", "runtime", "benchmarks")

CODES: dict[str, tuple[str, str]] = {
    "chat_template": ("400", "the chat template failed over these messages, or took too long"),
    "context_length_exceeded": ("400", "prompt and answer are longer than the model's context"),
    "deadline": ("503", "it has waited for its first token for as long as it may (`--max-wait`)"),
    "draining": ("503", "the replica is being shut down; ask another"),
    "internal_error": ("500", "a fault of the server's; the log has it with the `x-request-id`"),
    "invalid_api_key": ("401", "no key, or not one of those that are valid here"),
    "invalid_json": ("400", "the body is not JSON, or could be read in two ways"),
    "invalid_type": ("400", "a field of another type than it takes"),
    "invalid_value": ("400", "a field with a value that it cannot have"),
    "missing_required_parameter": ("400", "a field that has to be there is not"),
    "model_error": ("500", "the model cannot be served, and no later try will find that mended"),
    "model_not_found": (
        "404",
        "this server has no model of that name; the message has those it has",
    ),
    "no_chat_template": ("400", "the model has no chat template: send a prompt, or give it one"),
    "overloaded": ("503", "too many large bodies are being received at once"),
    "queue_full": (
        "503",
        "cold, and as many wait as may; `eta_s` says for how long (`--max-waiting`)",
    ),
    "replica_error": ("503", "the replica died, or cannot go on just now; ask again"),
    "request_timeout": ("408", "the body did not come in time"),
    "request_too_large": ("400, 413", "the body is larger or nested deeper than it may be"),
    "saturated": ("429", "warm, and as many wait as may"),
    "shutting_down": ("503", "the server is ending"),
    "unsupported": ("400", "asks for what the engine does not do; the message says what does"),
}
"""Each code, the statuses that it comes with, and what it means."""


class Found:
    """A class of errors.

    Args:
        name: Its name.
        base: The name of the one above it.
        where: The module, as a path from the repository's root.
    """

    def __init__(self, name: str, base: str, where: str) -> None:
        self.name = name
        self.base = base
        self.where = where


@cache
def family() -> dict[str, Found]:
    """All classes of errors by name, those above before those below: read, not imported."""
    defined = [found for floor in _FLOORS for found in _classes(_ROOT / floor)]
    known = {"ColdframeError": Found("ColdframeError", "Exception", "loader/errors.py")}
    grown = True
    while grown:
        below = [f for f in defined if f.base in known and f.name not in known]
        known.update((found.name, found) for found in below)
        grown = bool(below)
    return known


@cache
def _docstring(where: str, name: str) -> str:
    for node in ast.walk(ast.parse((_ROOT / where).read_bytes())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
    raise KeyError(name)


def _classes(folder: Path) -> Iterator[Found]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            # One with an underscore is its module's own, and nobody gets to see it.
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for base in node.bases:
                    if isinstance(base, ast.Name):
                        yield Found(node.name, base.id, str(path.relative_to(_ROOT)))


def tree() -> str:
    """All classes with what they are, indented below those that they are kinds of."""
    known = family()

    def lines(name: str, depth: int) -> Iterator[str]:
        yield f"{'  ' * depth}- [`{name}`](#{name.lower()}): {_said(known[name])}"
        for below in known.values():
            if below.base == name:
                yield from lines(below.name, depth + 1)

    return "\n".join(lines("ColdframeError", 0)) + "\n"


def _said(found: Found) -> str:
    text = _docstring(found.where, found.name).splitlines()[0].rstrip(".")
    return cell(text[0].lower() + text[1:])


def facts(name: str) -> str:
    """What the code says of a class: what it is a kind of, what clients get, what is advised."""
    found = family()[name]
    said = [f"*{_said(found)[0].upper()}{_said(found)[1:]}.*"]
    if found.base != "Exception":
        said.append(f"A kind of [`{found.base}`](#{found.base.lower()}).")
    kind = getattr(errors, name, None)
    if kind is not None and issubclass(kind, ColdframeError):
        told = ApiError.of(kind("it broke"))
        said.append(f"Over HTTP: {told.status}, code `{told.code}`.")
        said.append(f"Unless it says something better: “{cell(kind.default_hint)}”")
    return " ".join(said)


def codes() -> str:
    """A table of the codes in an error's body."""
    return table(
        ["code", "status", ""],
        ([code(name), status, meaning] for name, (status, meaning) in sorted(CODES.items())),
    )
