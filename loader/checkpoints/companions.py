"""The small files beside the weights: what a replica reads before it can take a prompt.

They are fetched while the weights stream, into a folder of the replica's own, so that all that
comes after reads them as if the model lay in a local directory.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from coldframe.loader.errors import (
    ColdframeError,
    ReplicaError,
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.files import read_whole
from coldframe.loader.sources.base import Origin
from coldframe.loader.timeline import Recorder, now

__all__ = ["COMPANIONS", "Companions"]

CONFIG_NAME = "config.json"
COMPANIONS = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_MOST_BYTES = 500_000_000


class Companions:
    """A model's small files, where they are or once they are there.

    Args:
        directory: Where those of a model that is not local are put; made when it is needed.
        recorder: Gets a span for the fetch.
        on_there: Called with the directory that has them.
        on_error: Called where they cannot be had.
    """

    def __init__(
        self,
        directory: str,
        recorder: Recorder,
        on_there: Callable[[str], None],
        on_error: Callable[[ColdframeError], None],
    ) -> None:
        self._directory = directory
        self._recorder = recorder
        self._on_there = on_there
        self._on_error = on_error
        self._there = threading.Event()
        self._error: ColdframeError | None = None

    def bring(
        self,
        origin: Origin,
        config: bytes,
        *,
        stay: bool,
        spare: Callable[[], Origin | None] | None = None,
    ) -> None:
        """Fetches them, in a thread of its own.

        Args:
            origin: Where they are.
            config: The one that the checkpoint was opened with. It is checked already, and read
                again it could be another.
            stay: Whether that is a directory that will be there as long as they are needed; then
                they are left in it.
            spare: Another place that has the same, where the first one fails.
        """
        if stay and origin.path is not None:
            self._directory = origin.path
            self._there.set()
            self._on_there(origin.path)
        else:
            thread = threading.Thread(
                target=self._fetch, args=(origin, config, spare), name="companions", daemon=True
            )
            thread.start()

    def _fetch(
        self, origin: Origin, config: bytes, spare: Callable[[], Origin | None] | None
    ) -> None:
        started = now()
        try:
            try:
                _fetch_all(origin, config, self._directory)
            except SourceError:
                other = None if spare is None else spare()
                if other is None or other is origin:
                    raise
                _fetch_all(other, config, self._directory)
        except ColdframeError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            self._error = ReplicaError("the model's small files broke the load", got=repr(error))
        self._there.set()
        if self._error is not None:
            self._on_error(self._error)
        else:
            self._recorder.add("checkpoint_open", started, note="small files")
            self._on_there(self._directory)

    def wait(self) -> None:
        """Returns when they are there, or could not be had."""
        self._there.wait()

    def read(self, name: str) -> bytes:
        """One of them; waits for it.

        Raises:
            SourceError: It is not there, or could not be had.
        """
        self._there.wait()
        if self._error is not None:
            raise ColdframeError.from_wire(self._error.to_wire())
        return read_whole(os.path.join(self._directory, name), _MOST_BYTES)

    def contents(self) -> dict[str, bytes]:
        """All of them by name; waits for them.

        Raises:
            SourceError: One of them could not be had.
        """
        found = {}
        for name in COMPANIONS:
            with contextlib.suppress(SourceNotFound):
                found[name] = self.read(name)
        return found


def _fetch_all(origin: Origin, config: bytes, target: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def fetch(name: str) -> None:
        try:
            content = config if name == CONFIG_NAME else origin.read_small(name, _MOST_BYTES)
        except SourceNotFound:
            return
        except SourceCredentials:
            raise
        except SourceDenied:
            # S3 says so of what is not there, to those who may not list what is. What must be
            # there is missed by whoever needs it.
            return
        with open(os.path.join(target, name), "wb") as file:
            file.write(content)

    os.makedirs(target, mode=0o700, exist_ok=True)
    # All at once: each costs a round trip, and the tokenizer is some megabytes.
    with ThreadPoolExecutor(len(COMPANIONS)) as pool:
        list(pool.map(fetch, COMPANIONS))
