"""What of the front's environment its children get: all but what opens doors that are not theirs.

Workers compute and the gateway talks to strangers; neither reads a bucket, a hub or a queue. The
memory service and the restorer do, and get everything.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["without_secrets"]

_SECRET = frozenset(
    [
        *("APIKEY", "AUTH", "AUTHORIZATION", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS"),
        *("PASSWD", "PASSWORD", "SECRET", "SECRETS", "TOKEN", "TOKENS"),
    ]
)


def without_secrets(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment without the variables whose names say that they hold a secret.

    Args:
        environ: All of it; this process's by default.
    """
    environ = os.environ if environ is None else environ
    return {
        name: value
        for name, value in environ.items()
        if not _SECRET.intersection(name.upper().split("_"))
    }
