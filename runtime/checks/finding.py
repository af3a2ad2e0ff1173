"""What a check of the doctor's has found, and what it was asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.machine.device_choice import AUTO

__all__ = ["FAIL", "OK", "WARNING", "Case", "Finding"]

OK = "ok"
WARNING = "warning"
FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be looked into.

    Args:
        root: Where `/proc`, `/sys` and `/dev` are.
        model: A MODEL that is to be run here, as it was written; None where none is named.
        host: Where a server would listen; None takes the platform's.
        port: Its port, likewise.
        store: Where images are kept.
        cache: Where weights that came over a network are kept; None where they are not.
        device: What the model would compute on: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    root: Path = Path("/")
    model: str | None = None
    host: str | None = None
    port: int | None = None
    store: str = ""
    cache: str | None = None
    device: str = AUTO


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked into.

    Args:
        name: What.
        says: What there is, for people.
        facts: The same as JSON values.
        error: What is missing.
        needed: Whether nothing runs without it: what is missing is a failure then.
        remedy: What to do, where there is something to be done though nothing is missing.
    """

    name: str
    says: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: ColdframeError | None = None
    needed: bool = False
    remedy: str | None = None

    @property
    def status(self) -> str:
        if self.error is not None:
            return FAIL if self.needed else WARNING
        return OK if self.remedy is None else WARNING

    @property
    def sentence(self) -> str:
        """What it says, of its error where it has one."""
        error = self.error
        if error is None:
            return self.says
        # The remedy stands on a line of its own.
        parts = [error.what]
        parts += [f"in {error.where}"] if error.where else []
        parts += [f"expected {error.expected}"] if error.expected else []
        parts += [f"got {error.got}"] if error.got else []
        said = f"{type(error).__name__}: {', '.join(map(str, parts))}"
        return f"{self.says}\n{said}" if self.says else said

    def to_json(self) -> dict[str, Any]:
        error = self.error
        return {
            "name": self.name,
            "status": self.status,
            "says": self.sentence,
            "remedy": self.remedy if error is None else error.hint or self.remedy,
            "facts": {**self.facts, "error": None if error is None else error.to_wire()},
        }
