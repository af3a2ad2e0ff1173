"""Command-line flags whose twins are environment variables; the flag wins.

`--throttle` is also COLDFRAME_THROTTLE. A value from the environment is checked like one from
the command line, and an error names where it came from.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["Parser"]

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose every `--flag` has a default from the environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation today is ambiguous tomorrow
        super().__init__(*args, **kwargs)
        self._twins: list[tuple[argparse.Action, str]] = []

    def flag(
        self, *names: str, group: argparse._ArgumentGroup | None = None, **kwargs: Any
    ) -> None:
        """Adds a flag, as `add_argument` does, with its twin in the environment.

        Args:
            names: Its names; the last one, `--so-long`, is also that of the twin.
            group: Where it stands in the help.
            kwargs: As those of `add_argument`.
        """
        action = (group or self).add_argument(*names, **kwargs)
        twin = "COLDFRAME_" + names[-1].removeprefix("--").replace("-", "_").upper()
        self._twins.append((action, twin))
        action.help = f"{action.help or ''} [{twin}]".lstrip()

    def twins(self) -> dict[str, str]:
        """The environment's name of each flag that has one, by the attribute that it sets."""
        return {action.dest: twin for action, twin in self._twins}

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses the command line, with what the environment gives for flags that are absent.

        A wrong value ends the process with status 2, as argparse does.
        """
        lists = {}
        for action, twin in self._twins:
            if twin in os.environ:
                value = self._from_environment(action, twin, os.environ[twin])
                action.required = False
                if _appends(action):  # which would add to its default
                    lists[action.dest] = value
                else:
                    action.default = value
        # Flags between several of the same; argparse itself takes those in one piece only.
        several = any(action.nargs == "*" for action in self._get_positional_actions())
        args = self.parse_intermixed_args(argv) if several else self.parse_args(argv)
        for name, value in lists.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        return args

    def _from_environment(self, action: argparse.Action, twin: str, text: str) -> Any:
        if action.nargs == 0:
            if text.lower() not in _TRUE | _FALSE:
                self._reject(twin, f"{text!r} is neither true nor false")
            return action.const if text.lower() in _TRUE else action.default
        try:
            value = action.type(text) if callable(action.type) else text
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            self._reject(twin, str(error))
        if action.choices is not None and value not in action.choices:
            self._reject(twin, f"{text!r} is none of {', '.join(map(str, action.choices))}")
        return [value] if action.nargs in ("*", "+") or _appends(action) else value

    def _reject(self, twin: str, why: str) -> NoReturn:
        self.error(f"environment variable {twin}: {why}")


def _appends(action: argparse.Action) -> bool:
    return type(action).__name__ == "_AppendAction"
