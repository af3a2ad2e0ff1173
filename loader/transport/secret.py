"""The secret that hosts share which give KV to one another."""

from __future__ import annotations

import os
from collections.abc import Mapping

from coldframe.loader.errors import TransferDenied

__all__ = ["SECRET", "SECRET_FILE", "read_secret"]

SECRET_FILE = "COLDFRAME_KV_SECRET_FILE"
SECRET = "COLDFRAME_KV_SECRET"
_LEAST_SECRET = 16
_MOST_SECRET = 4096


def read_secret(environ: Mapping[str, str] | None = None) -> bytes | None:
    """The secret that this machine shares with those it gives KV to, or takes it from.

    Returns:
        None where there is none.

    Raises:
        TransferDenied: It cannot be read, or is too short to be one.
    """
    environ = os.environ if environ is None else environ
    path, text = environ.get(SECRET_FILE) or None, environ.get(SECRET) or None
    if path is None and text is None:
        return None
    if path is None:
        found, where = str(text).encode().strip(), SECRET
    else:
        where = path
        try:
            with open(path, "rb") as file:
                found = file.read(_MOST_SECRET + 1).strip()
        except OSError as error:
            raise TransferDenied(
                "the secret for KV cannot be read", where=where, got=error.strerror
            ) from None
    if not _LEAST_SECRET <= len(found) <= _MOST_SECRET:
        raise TransferDenied(
            "this is no secret for KV",
            where=where,
            expected=f"{_LEAST_SECRET} to {_MOST_SECRET} bytes",
            got=f"{len(found)} bytes",
            hint="Make one with `openssl rand -hex 32`, the same on both sides.",
        )
    return found
