"""What the command line seems to say, before it is parsed: for what must start before that.

A parser costs tens of milliseconds of imports. A guess that turns out wrong costs nothing but a
process that is ended again, or an error a moment later.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["is_set", "said"]

_TRUE = frozenset(["1", "true", "yes", "on"])
"""As the parser of flags takes it."""


def said(arguments: Sequence[str], *flags: str) -> str | None:
    """The value of the first of some flags that is given, else of its twin in the environment.

    Args:
        arguments: The command's, as they are.
        flags: Names such as `--port`; only the first one has a twin, COLDFRAME_PORT.
    """
    for flag in flags:
        value = None
        for index, argument in enumerate(arguments):
            name, equals, rest = argument.partition("=")
            if name == flag:
                value = rest if equals else "".join(arguments[index + 1 : index + 2])
        if value is not None:
            return value
    return os.environ.get("COLDFRAME_" + flags[0].removeprefix("--").replace("-", "_").upper())


def is_set(arguments: Sequence[str], flag: str) -> bool:
    """Whether a flag without a value is given, or its twin in the environment says so.

    Args:
        arguments: The command's, as they are.
        flag: Its name, such as `--dynamo`.
    """
    return flag in arguments or (said((), flag) or "").lower() in _TRUE
