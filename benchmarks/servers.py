"""Servers as processes of their own: coldframe's endpoint, and vLLM's beside it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from coldframe.loader.errors import PlatformError

__all__ = ["Server", "coldframe_server", "vllm_server"]

_END_S = 30.0
_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs, or is about to.

    Args:
        port: Where it listens, on loopback.
        started_ns: Just before its exec (CLOCK_MONOTONIC).
        pid: Its first process.
    """

    port: int
    started_ns: int
    pid: int

    def since_exec(self, moment_ns: int) -> float:
        """Seconds from the exec to a moment."""
        return (moment_ns - self.started_ns) / 1e9

    def memory(self) -> dict[str, dict[str, float]]:
        """Memory of the endpoint's own processes: `pss`, `rss` and `peak_rss`, in MB.

        Returns:
            By process: `front`, `gateway`, and `templates`, the gateway's helper.

        Raises:
            PlatformError: One of them is not there.
        """
        gateway = _child(self.pid, "coldframe.runtime.gateway.process")
        templates = _child(gateway, "coldframe.runtime.gateway.template_process")
        pids = {"front": self.pid, "gateway": gateway, "templates": templates}
        return {name: _memory(pid) for name, pid in pids.items()}


@contextmanager
def coldframe_server(
    model: Path | str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`coldframe serve` while the context lasts.

    Args:
        model: A checkpoint's directory, or where else it is.
        arguments: More flags.
        environment: What to change in this process's; workers start fresh where it says nothing.

    Raises:
        PlatformError: It did not end in good order.
    """
    port = _free_port()
    command = [
        *(str(Path(sys.executable).parent / "coldframe"), "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--model-name", "m", *arguments),
    ]
    changed = {**os.environ, "COLDFRAME_SNAPSHOT": "off", **(environment or {})}
    with _process(command, port, changed, "COLDFRAME_EXEC_NS") as server:
        yield server


@contextmanager
def vllm_server(python: Path, model: Path) -> Iterator[Server]:
    """vLLM's own server in eager mode while the context lasts.

    Its `vllm` command is not in its build for the CPU; the module is what that calls.

    Args:
        python: An interpreter that has vLLM.
        model: A checkpoint's directory.

    Raises:
        PlatformError: It failed.
    """
    port = _free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", str(_CONTEXT), "--enforce-eager"),
    ]
    changed = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    }
    with _process(command, port, changed) as server:
        yield server


@contextmanager
def _process(
    command: list[str], port: int, environment: dict[str, str], exec_ns: str | None = None
) -> Iterator[Server]:
    with tempfile.TemporaryFile() as said:
        started = time.monotonic_ns()
        if exec_ns is not None:
            environment[exec_ns] = str(started)
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            yield Server(port, started, process.pid)
            process.send_signal(signal.SIGTERM)
            status = process.wait(_END_S)
            if status not in (0, -signal.SIGTERM):
                raise PlatformError("a server has failed", got=f"status {status}")
        except PlatformError as error:
            _kill(process)
            said.seek(0, os.SEEK_END)
            said.seek(max(0, said.tell() - 3000))
            words = said.read().decode(errors="replace").strip()
            raise PlatformError(
                error.what,
                where=" ".join(command),
                expected=error.expected,
                got=f"{error.got}; it said: {words}",
            ) from error
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left: all that a server has started is in its group, or dies with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    """One that was free just now: whoever knocks must know it before it is bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(parent: int, module: str) -> int:
    """The child that runs a module."""
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise PlatformError("a process of the endpoint is not there", expected=module)


def _memory(pid: int) -> dict[str, float]:
    found = {}
    wanted = {"Pss:": "pss", "Rss:": "rss", "VmHWM:": "peak_rss"}
    for file in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            name, *rest = line.split()
            if name in wanted:
                found[wanted[name]] = int(rest[0]) * 1024 / 1e6
    return found
