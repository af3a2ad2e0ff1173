"""A server with S3's real interface, in memory, on loopback: moto's."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["KEY", "SECRET", "isolate", "moto", "only_allowed", "upload"]

KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


def isolate(patch: pytest.MonkeyPatch, home: Path, endpoint: str | None = None) -> None:
    """Nothing of this machine's AWS configuration counts; there are credentials of the tests'."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.delenv("COLDFRAME_S3_UNSIGNED", raising=False)
    patch.setenv("AWS_CONFIG_FILE", str(home / "aws-config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "aws-credentials"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    if endpoint is not None:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)


@contextmanager
def moto() -> Iterator[str]:
    """Starts one.

    Yields:
        Its URL.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def upload(client: Any, root: Path, bucket: str, prefix: str = "", **arguments: Any) -> None:
    """Puts a folder's files into a bucket, which is made where it is missing."""
    client.create_bucket(Bucket=bucket)
    for path in sorted(root.iterdir()):
        client.put_object(
            Bucket=bucket, Key=prefix + path.name, Body=path.read_bytes(), **arguments
        )


@contextmanager
def only_allowed(url: str) -> Iterator[None]:
    """From here on a moto checks signatures and policies."""
    _check_after(url, "0")
    try:
        yield
    finally:
        _check_after(url, "inf")


def _check_after(url: str, requests: str) -> None:
    # As anything but text, Flask would take it for a form and show moto an empty body.
    request = urllib.request.Request(
        f"{url}/moto-api/reset-auth", requests.encode(), {"Content-Type": "text/plain"}
    )
    with urllib.request.urlopen(request) as answer:
        answer.read()
