"""A decode worker in another replica, as on another host: what it takes to have KV go there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from coldframe.benchmarks.servers import coldframe_server, free_port
from coldframe.loader.transport.nixl import nixl_package
from coldframe.loader.transport.secret import SECRET
from coldframe.runtime.options import TransferOptions

__all__ = ["decode_host", "lacks_nixl", "transfer_by"]


def lacks_nixl() -> str | None:
    """Why KV cannot go by NIXL here; None where it can."""
    return None if nixl_package() else "NIXL is not installed: pip install 'coldframe[nixl]'"


def transfer_by(way: str) -> TransferOptions:
    """How KV goes to such a worker: by one way and no other."""
    return TransferOptions("127.0.0.1:0", "", (way,))


@contextmanager
def decode_host(model: Path, way: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """`coldframe worker --role decode` while the context lasts: where it listens, on loopback.

    The secret is in this process's environment meanwhile, where a replica finds it.

    Args:
        model: A checkpoint's directory.
        way: Of `loader.transport.base.TRANSPORTS`.
        flags: More of its flags.

    Raises:
        PlatformError: It did not end in good order.
    """
    address, before = f"127.0.0.1:{free_port()}", os.environ.get(SECRET)
    os.environ[SECRET] = secrets.token_hex(32)
    try:
        listens = ("--role", "decode", "--listen", address, "--kv-ways", way)
        with coldframe_server(model, *listens, *flags, command="worker"):
            yield address
    finally:
        del os.environ[SECRET]
        if before is not None:
            os.environ[SECRET] = before
