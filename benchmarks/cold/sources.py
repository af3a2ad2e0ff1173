"""Where the weights of cells come from: the directory, nginx on loopback, a replica that has them.

Servers have the files in memory: nginx in the page cache, the peer in an arena of its own. nginx
runs for as long as the benchmark does. A peer is there only for the start that loads from it:
libraries that it has mapped would be shared with any other replica, whose memory would seem less.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from coldframe.benchmarks.http_client import Connection, completion
from coldframe.benchmarks.nginx import BUCKET, serve
from coldframe.benchmarks.servers import coldframe_server, knock_at
from coldframe.loader.errors import PlatformError

__all__ = ["Place", "Sources", "weight_files"]

_S3 = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SHARDS = "/v1/shards"
_WAIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Place:
    """A source that is there.

    Args:
        uri: What a command line names it by.
        environment: What whoever loads from it needs besides.
        base: The URL below which its weight files can be had by plain HTTP; None for a directory.
    """

    uri: str
    environment: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None


def weight_files(model: Path) -> list[Path]:
    """The files of a checkpoint that the page cache may or may not have."""
    return sorted(model.glob("*.safetensors"))


class Sources:
    """The sources of one model.

    Args:
        model: The checkpoint's directory.
        run_dir: Where the peer has its run directory.
    """

    def __init__(self, model: Path, run_dir: Path) -> None:
        self._model = model
        self._run_dir = run_dir
        self._stack = ExitStack()
        self._nginx: str | None = None
        self._peers: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, at)

    @contextmanager
    def place(self, source: str) -> Iterator[Place]:
        """The place of a source, which is there while the context lasts.

        Args:
            source: `disk`, `http`, `s3` or `peer`.

        Raises:
            PlatformError: It cannot be had here.
        """
        if source == "disk":
            yield Place(str(self._model))
        elif source == "peer":
            with self._peer() as place:
                yield place
        else:
            if self._nginx is None:
                self._nginx = self._stack.enter_context(serve(self._model))
            base = f"{self._nginx}/{BUCKET}/model"
            if source == "http":
                yield Place(base, {}, base)
            else:
                _needs("boto3", "awscrt")
                environment = {**_S3, "AWS_ENDPOINT_URL": self._nginx}
                yield Place(f"s3://{BUCKET}/model", environment, base)

    @contextmanager
    def _peer(self) -> Iterator[Place]:
        """A warm replica that gives its weights away; it has copied them, and holds no file."""
        if self._peers is None:  # the same each time: an image knows its model by this name
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._peers = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = ("--copy", "--serve-peers", self._peers)
        environment = {"COLDFRAME_RUN_DIR": str(self._run_dir)}
        with coldframe_server(self._model, *flags, environment=environment) as server:
            sock = knock_at(server, server.started_ns + int(_WAIT_S * 1e9))
            with Connection(sock, _WAIT_S) as connection:
                connection.post("/v1/completions", completion("m", [5, 6, 7], 1, stream=False))
            yield Place(f"peer://{self._peers}", {}, f"http://{self._peers}{_SHARDS}")


def _needs(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise PlatformError(f"{package} is not installed", hint="pip install 'coldframe[s3]'")
