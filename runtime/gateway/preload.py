"""What is imported before the gateway becomes a user that may not read its own interpreter.

Much is only imported when it is first asked for, off the path of the first token. In a container
that works for every user. Where Python lies in somebody's home, as on a developer's machine, it has
to be done before.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module

from coldframe.snapshot.identity import Identity

__all__ = ["may_import", "preload"]

_LATER = (
    "concurrent.futures.thread",
    "encodings.idna",
    "encodings.unicode_escape",
    "hmac",
    "linecache",
    "traceback",
    "urllib.parse",
    "coldframe.runtime.gateway.exposition",
    "coldframe.runtime.gateway.openapi",
)


def may_import(identity: Identity) -> bool:
    """Whether a user reaches the folders that modules are in.

    Args:
        identity: The user, as this process's user namespace numbers it.
    """
    places = {os.path.realpath(path) for path in (*sys.path, os.path.dirname(__file__)) if path}
    return all(_reaches(identity, place) for place in places if os.path.isdir(place))


def preload(*, tracing: bool) -> None:
    """Imports and reads whatever may be wanted later.

    Args:
        tracing: Whether spans are exported.
    """
    from coldframe.runtime.gateway.page import read_page
    from coldframe.runtime.gateway.platforms.documents import our_version

    our_version()
    read_page()
    for name in _LATER:
        with suppress(ImportError):  # whoever needs it will say so
            import_module(name)
    if tracing:
        # Where the extra is not installed, or its options are wrong, tracing itself will say so.
        with suppress(Exception):
            from coldframe.runtime.gateway.spans import prepare

            prepare()


def _reaches(identity: Identity, path: str) -> bool:
    while True:
        try:
            status = os.stat(path)
        except OSError:
            return False
        mode = status.st_mode
        if identity.uid == status.st_uid:
            mode >>= 6
        elif status.st_gid in (identity.gid, *identity.groups):
            mode >>= 3
        if not mode & 1:
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)
