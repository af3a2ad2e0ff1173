"""Other programs' cold starts beside ours: real processes, the same model, prompt and clock.

    vllm                vLLM's own server, eager
    vllm-compiled       the same, compiled; what it compiles is kept nowhere: each start does so
    vllm-compiled-kept  the same with the cache of its first start, which does not count
    transformers        `plain_script.py`: from the exec to the first token that it prints
    fastapi             `plain_app.py` under uvicorn, asked over HTTP

Servers are asked by a thin client that knocks from the exec on, as ours are.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from coldframe.benchmarks.cold.contender import Asked, Contender, Outcome
from coldframe.benchmarks.http_client import Connection, completion, token_ids
from coldframe.benchmarks.interruption import unbroken
from coldframe.benchmarks.memory import replica_pss
from coldframe.benchmarks.peers import lacks_vllm
from coldframe.benchmarks.servers import VLLM_DTYPES, Server, knock_at, plain_server, vllm_server
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import PlatformError
from coldframe.runtime.replica.sizing import ModelFacts

__all__ = ["PEERS", "open_contender"]

_SCRIPT = Path(__file__).with_name("plain_script.py")


def open_contender(name: str, asked: Asked) -> Contender:
    """One of `PEERS`.

    Raises:
        PlatformError: It cannot be measured here, as what it needs is not installed.
    """
    return PEERS[name](asked)


class _Served:
    """A server, asked over HTTP.

    Args:
        name: The peer's.
        asked: What each start is about.
        serving: Starts it.
    """

    through = "http"

    def __init__(
        self, name: str, asked: Asked, serving: Callable[[], AbstractContextManager[Server]]
    ) -> None:
        self.name = name
        self._asked = asked
        self._serving = serving

    def start(self) -> Outcome:
        asked = self._asked
        body = completion("m", list(asked.prompt), asked.tokens, stream=True, ids=True)
        with self._serving() as server:
            deadline_ns = server.started_ns + int(asked.limit_s * 1e9)
            with Connection(knock_at(server, deadline_ns), asked.limit_s) as connection:
                answer = connection.post("/v1/completions", body)
            return Outcome(
                server.since_exec(answer.first_ns),
                server.since_exec(answer.last_ns),
                tuple(token_ids(answer)),
                _memory(server.pid),
            )


class _CompiledServer(_Served):
    """vLLM's server that compiles. Without a cache that is kept each start has an empty one.

    Args:
        name: The peer's.
        asked: What each start is about.
        kept: Whether each start leaves its cache to the next.
    """

    def __init__(self, name: str, asked: Asked, *, kept: bool) -> None:
        super().__init__(name, asked, self._compiling)
        self._python = _vllm_python(asked)
        self._kept = kept
        self._cache = Path(tempfile.mkdtemp(prefix="coldframe-bench-"))
        weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)

    @contextmanager
    def _compiling(self) -> Iterator[Server]:
        cache = self._cache
        with _vllm(self._python, self._asked, compiled=True, cache=cache) as server:
            yield server
        if not self._kept:
            shutil.rmtree(cache)
            cache.mkdir()


class _Script:
    """A script that prints its tokens."""

    name = "transformers"
    through = "run"

    def __init__(self, asked: Asked) -> None:
        _installed(self.name, "transformers", "torch")
        self._asked = asked

    def start(self) -> Outcome:
        asked = self._asked
        wanted = {
            "model": str(asked.model),
            "prompt": list(asked.prompt),
            "tokens": asked.tokens,
            "device": asked.device,
        }
        with tempfile.TemporaryFile() as said, ExitStack() as stack:
            # It ends by itself where we do: it reads from us, and writes to us.
            with unbroken():
                started_ns = time.monotonic_ns()
                process = subprocess.Popen(
                    [sys.executable, str(_SCRIPT), json.dumps(wanted)],
                    env={
                        **os.environ,
                        "HF_HUB_OFFLINE": "1",
                        "OMP_NUM_THREADS": str(cpu_count()),
                    },
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                )
                stack.enter_context(process)
                stack.callback(process.kill)
            lines, moments = self._read(process, started_ns)
            memory = _memory(process.pid)
            process.kill()
            if len(lines) < asked.tokens:
                said.seek(0)
                raise PlatformError(
                    "the script did not print its tokens",
                    where=str(_SCRIPT),
                    expected=f"{asked.tokens} within {asked.limit_s:g} s",
                    got=f"{len(lines)}; it said: {said.read().decode(errors='replace')[-3000:]}",
                )
        first, last = ((moment - started_ns) / 1e9 for moment in (moments[0], moments[-1]))
        return Outcome(first, last, tuple(map(int, lines)), memory)

    def _read(
        self, process: subprocess.Popen[bytes], started_ns: int
    ) -> tuple[list[bytes], list[int]]:
        """The lines that it has printed, and when each was there."""
        assert process.stdout is not None
        fd, received = process.stdout.fileno(), b""
        moments: list[int] = []
        deadline = started_ns / 1e9 + self._asked.limit_s
        while len(moments) < self._asked.tokens:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                break
            part = os.read(fd, 1 << 16)
            if not part:
                break
            received += part
            moments += [time.monotonic_ns()] * part.count(b"\n")
        return received.splitlines()[: len(moments)], moments


def _eager(asked: Asked) -> Contender:
    python = _vllm_python(asked)
    return _Served("vllm", asked, lambda: _vllm(python, asked))


def _fastapi(asked: Asked) -> Contender:
    _installed("fastapi", "transformers", "torch", "fastapi", "uvicorn")
    return _Served("fastapi", asked, lambda: plain_server(asked.model, asked.device))


PEERS: dict[str, Callable[[Asked], Contender]] = {
    "vllm": _eager,
    "vllm-compiled": lambda asked: _CompiledServer("vllm-compiled", asked, kept=False),
    "vllm-compiled-kept": lambda asked: _CompiledServer("vllm-compiled-kept", asked, kept=True),
    "transformers": _Script,
    "fastapi": _fastapi,
}
"""What each is made by; it raises PlatformError where what it needs is not installed."""


def _vllm(
    python: Path, asked: Asked, *, compiled: bool = False, cache: Path | None = None
) -> AbstractContextManager[Server]:
    spec = ModelFacts(str(asked.model)).spec
    return vllm_server(
        python,
        asked.model,
        compiled=compiled,
        dtype=VLLM_DTYPES[spec.dtype],
        context=min(spec.context_length, max(1024, len(asked.prompt) + asked.tokens)),
        device=asked.device,
        cache=cache,
    )


def _vllm_python(asked: Asked) -> Path:
    """The interpreter that has vLLM.

    Raises:
        PlatformError: None is named, or that one has none.
    """
    python = None if asked.vllm_python is None else Path(asked.vllm_python)
    why = lacks_vllm(python)
    if python is None or why is not None:
        raise PlatformError("vLLM cannot be started here", got=why)
    return python


def _installed(name: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise PlatformError("it is not installed here", where=name, got=f"no {', '.join(missing)}")


def _memory(pid: int) -> int | None:
    """PSS of a process and all below it, in bytes; None where it cannot be told."""
    try:
        return replica_pss(pid)
    except PlatformError:
        return None
