"""How far the benchmark is, on standard error: a bar where it is a terminal, else lines."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from coldframe.runtime.units import human_seconds

__all__ = ["Progress"]


class Progress:
    """Progress over so many starts."""

    def __init__(self) -> None:
        self._total = 0
        self._done = 0
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty() and find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            text = TextColumn("{task.description}")
            self._bar = Bar(*columns, text, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """So many starts are to come."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def say(self, what: str) -> None:
        """Something is about to be done that is no start."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        else:
            print(what, file=sys.stderr, flush=True)

    def step(self, name: str, seconds: float | None) -> None:
        """A start is over.

        Args:
            name: Whose.
            seconds: Its time to the first token; None where it failed.
        """
        self._done += 1
        said = "failed" if seconds is None else human_seconds(seconds)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"{name}: {said}")
        else:
            print(f"{self._done} of {self._total}: {name}: {said}", file=sys.stderr, flush=True)
