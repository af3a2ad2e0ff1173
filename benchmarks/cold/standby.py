"""What stands ready before the clock of a start begins: images of workers, and a resident template.

Images are made when the first cell asks for them. The template is there only for the start that it
is for, in a run directory of its own: nobody else finds it, or shares its libraries.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from coldframe.benchmarks.cold.sources import Place
from coldframe.benchmarks.harness import coldframe_command
from coldframe.benchmarks.interruption import end, guarded, unbroken
from coldframe.benchmarks.within import run_within
from coldframe.loader.errors import PlatformError

__all__ = ["Engine", "Standby", "Template"]

_WARM_S = 300.0
_END_S = 30.0


@dataclass(frozen=True, slots=True)
class Engine:
    """Where vLLM is, for the cells that have one.

    Args:
        python: The interpreter that has it, or None.
        kv_bytes: Memory for its own KV.
    """

    python: str | None
    kv_bytes: int

    @property
    def flags(self) -> tuple[str, ...]:
        """Those that every command about it takes.

        Raises:
            PlatformError: No interpreter is named.
        """
        if self.python is None:
            raise PlatformError(
                "no interpreter that has vLLM was given", hint="Name it with --vllm-python."
            )
        return ("--vllm-python", self.python, "--vllm-kv", str(self.kv_bytes))


@dataclass(frozen=True, slots=True)
class Template:
    """A template that is up.

    Args:
        run_dir: The run directory by which starts find it.
        pid: The process that is forked.
    """

    run_dir: Path
    pid: int

    def forks(self) -> tuple[int, ...]:
        """Those of its forks that are there now.

        Raises:
            PlatformError: It has ended.
        """
        try:
            return tuple(child.pid for child in psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess as error:
            raise PlatformError("a template has ended", where=f"pid {self.pid}") from error


class Standby:
    """Images and the template of one model.

    Args:
        model: The checkpoint's directory.
        store: Where images are made, an empty directory.
        run_dir: Of the template.
        engine: vLLM, for images of its engine.
    """

    def __init__(self, model: Path, store: Path, run_dir: Path, engine: Engine) -> None:
        self._model = model
        self._store = store
        self._run_dir = run_dir
        self.engine = engine
        self._images: dict[tuple[str, str], Path | PlatformError] = {}

    def store(self, engine: str, source: str, place: Place) -> Path:
        """The store that has the images for a replica with that engine, of a model from there.

        An image is found by the MODEL's name where its files are not on this machine: so each
        source has its own.

        Args:
            engine: `native`; `vllm` and `bridge` have one of vLLM's engine, too.
            source: The source's name.
            place: Where it is.

        Raises:
            PlatformError: There can be none here, as where CRIU is not allowed.
        """
        key = "native" if engine == "native" else "vllm", source
        if key not in self._images:
            try:
                self._images[key] = self._make(*key, place)
            except PlatformError as error:
                self._images[key] = error
        found = self._images[key]
        if isinstance(found, PlatformError):
            raise found
        return found

    def template(self) -> AbstractContextManager[Template]:
        """A template while the context lasts.

        Raises:
            PlatformError: It does not come up.
        """
        return _template(self._model, self._run_dir)

    def _make(self, kind: str, source: str, place: Place) -> Path:
        store = self._store / f"{kind}-{source}"
        store.mkdir(parents=True)
        _create(place, store, ("--graphs", "off"))
        if kind == "vllm":
            _create(place, store, ("--engine", "vllm", *self.engine.flags))
        return store


def _create(place: Place, store: Path, flags: Sequence[str]) -> None:
    command = [
        *(*coldframe_command(), "snapshot", "create", place.uri, *flags),
        *("--snapshot-store", str(store), "--json"),
    ]
    done = run_within(command, None, {**os.environ, **place.environment}, _END_S)
    if done.returncode:
        raise PlatformError(
            "an image cannot be made", where=" ".join(command), got=done.stderr.strip()[-1000:]
        )


@contextmanager
def _template(model: Path, run_dir: Path) -> Iterator[Template]:
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [*coldframe_command(), "snapshot", "template", str(model), "--graphs", "off"]
    process: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryFile() as said, guarded() as watch:
        try:
            with unbroken():
                process = subprocess.Popen(
                    [*command, "--json"],
                    env={**os.environ, "COLDFRAME_RUN_DIR": str(run_dir)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    process_group=0,
                )
                watch(-process.pid)
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], _WARM_S)
            line = process.stdout.readline() if ready else b""
            if not line.startswith(b"{") or b'"template"' not in line:
                said.seek(0)
                raise PlatformError(
                    "a template does not come up",
                    where=" ".join(command),
                    got=said.read().decode(errors="replace").strip()[-1000:] or "no word",
                )
            yield Template(run_dir, int(json.loads(line)["pid"]))
        finally:
            if process is not None:
                end(process, group=True, grace_s=_END_S)
                if process.stdout is not None:
                    process.stdout.close()
