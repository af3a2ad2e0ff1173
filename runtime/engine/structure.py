"""What form an answer must have: JSON of a schema, a pattern, one of several texts, a grammar.

No engine of ours can see to that; it is here so that a request can carry it to one that can.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from coldframe.loader.errors import RequestError

__all__ = ["Kind", "MAX_SPEC", "Structure"]

Kind = Literal["json_object", "json", "regex", "choice", "grammar"]

MAX_SPEC = 256 * 1024
"""In characters."""
_KINDS = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Structure:
    """The form.

    Args:
        kind: `json_object` for any JSON object, `json` for what a JSON schema allows, `regex` for
            what a regular expression matches as a whole, `choice` for one of several texts,
            `grammar` for what an EBNF grammar derives.
        spec: The schema as JSON, the expression, the texts as a JSON array, or the grammar; empty
            for `json_object`.
    """

    kind: Kind
    spec: str = ""

    def validate(self) -> None:
        """Check types and sizes, and nothing that takes reading the text: this runs on the front's
        event loop, once for each choice. What the text means is the gateway's to check, and the
        engine's, which refuses what is none (`value`).

        Raises:
            RequestError: It is no structure.
        """
        if self.kind not in _KINDS:
            raise _error("structured.kind", f"one of {', '.join(_KINDS)}", self.kind)
        if not isinstance(self.spec, str) or len(self.spec) > MAX_SPEC:
            raise _error("structured.spec", f"text of at most {MAX_SPEC} characters", self.spec)
        if bool(self.spec) == (self.kind == "json_object"):
            expected = "nothing" if self.kind == "json_object" else "text"
            raise _error("structured.spec", expected, self.spec)

    def value(self) -> Any:
        """What is meant: a schema or the texts parsed, the others as they are.

        Raises:
            RequestError: The text is none of its kind.
        """
        if self.kind not in ("json", "choice"):
            return self.spec
        value = self._parsed()
        if self.kind == "json" and not isinstance(value, dict):
            raise _error("structured.spec", "a JSON schema, which is an object", self.spec)
        if self.kind == "choice" and not _texts(value):
            raise _error("structured.spec", "a JSON array of texts", self.spec)
        return value

    def to_wire(self) -> dict[str, str]:
        return {"kind": self.kind, "spec": self.spec}

    @staticmethod
    def from_wire(data: object) -> Structure:
        """A structure from JSON values; see `validate` for what is in it.

        Raises:
            RequestError: It is none.
        """
        if not isinstance(data, Mapping) or set(data) != {"kind", "spec"}:
            raise _error("structured", "an object of kind and spec", data)
        return Structure(data["kind"], data["spec"])

    def _parsed(self) -> object:
        try:
            return json.loads(self.spec)
        except (ValueError, RecursionError):
            raise _error("structured.spec", "JSON", self.spec) from None


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _error(name: str, expected: str, got: object) -> RequestError:
    shown = repr(got)
    return RequestError(
        "the form asked for the answer is none",
        where=name,
        expected=expected,
        got=shown if len(shown) <= 100 else shown[:97] + "...",
        hint="Change it in the request.",
    )
