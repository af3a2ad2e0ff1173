"""Servers as processes of their own: coldframe's endpoint, and others' beside it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coldframe.benchmarks.hosts import Host
from coldframe.benchmarks.http_client import knock
from coldframe.benchmarks.interruption import end, guarded, unbroken
from coldframe.benchmarks.memory import process_memory
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import PlatformError
from coldframe.runtime.integrations.vllm.environment import own_places

__all__ = [
    "VLLM_DTYPES",
    "Server",
    "coldframe_at",
    "coldframe_server",
    "dynamo_front",
    "free_port",
    "knock_at",
    "plain_server",
    "vllm_server",
]

_END_S = 30.0
_LOOK_NS = 1_000_000_000
"""After so long without an answer it is looked whether a server is still there."""
_CONTEXT = 1024
VLLM_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""A checkpoint's dtypes by vLLM's names."""
_PLAIN_APP = Path(__file__).parent / "cold"
_COMPILED = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs, or is about to.

    Args:
        port: Where it listens, on loopback.
        started_ns: Just before its exec (CLOCK_MONOTONIC).
        pid: Its first process.
        said: The descriptor of a file with what it has written, from its beginning; see `words`.
    """

    port: int
    started_ns: int
    pid: int
    said: int

    def since_exec(self, moment_ns: int) -> float:
        """Seconds from the exec to a moment."""
        return (moment_ns - self.started_ns) / 1e9

    def words(self) -> str:
        """What it has written so far, to stdout and stderr."""
        # Not by reading on: it writes where the descriptor that it has of this file is at.
        size = os.fstat(self.said).st_size
        return os.pread(self.said, size, 0).decode(errors="replace")

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
        return {
            name: {kind: nbytes / 1e6 for kind, nbytes in process_memory(pid).items()}
            for name, pid in pids.items()
        }


def knock_at(server: Server, deadline_ns: int) -> socket.socket:
    """Knocks from the exec on until the server listens; one that has ended is not waited for.

    Args:
        server: Just started.
        deadline_ns: When to give up (CLOCK_MONOTONIC).

    Raises:
        PlatformError: It has ended, or nobody listened in time.
    """
    while True:
        try:
            return knock(server.port, min(deadline_ns, time.monotonic_ns() + _LOOK_NS))
        except PlatformError:
            if time.monotonic_ns() >= deadline_ns:
                raise
            # A child that has ended stays until it is waited for.
            state = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                raise PlatformError("a server has ended", got="no answer from it") from None


@contextmanager
def coldframe_server(
    model: Path | str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    name: str | None = "m",
    under: Sequence[str] = (),
    command: str = "serve",
) -> Iterator[Server]:
    """`coldframe serve`, or another command that listens, while the context lasts.

    Args:
        model: A checkpoint's directory, or where else it is.
        arguments: More flags.
        name: What the model is called; None where `arguments` say that.
        environment: What to change in this process's; workers start fresh where it says nothing.
        under: A command that runs it.
        command: `serve`, or another that has its flags.

    Raises:
        PlatformError: It did not end in good order.
    """
    port = free_port()
    words = [
        *under,
        *(str(Path(sys.executable).parent / "coldframe"), command, str(model)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *(() if name is None else ("--model-name", name)),
        *arguments,
    ]
    changed = {**os.environ, "COLDFRAME_SNAPSHOT": "off", **(environment or {})}
    with _process(words, port, changed, "COLDFRAME_EXEC_NS") as server:
        yield server


@contextmanager
def coldframe_at(
    host: Host, model: Path | str, port: int, *arguments: str, environment: Mapping[str, str]
) -> Iterator[Server]:
    """`coldframe serve` on a host of `hosts` while the context lasts; its workers start fresh.

    Args:
        host: The host.
        model: A checkpoint's directory, or where else it is.
        port: Where it listens, at the host's address.
        arguments: More flags.
        environment: What to change in this process's.

    Raises:
        PlatformError: It did not end in good order.
    """
    command = host.command(
        *(str(Path(sys.executable).parent / "coldframe"), "serve", str(model)),
        *("--host", host.address, "--port", str(port), "--model-name", "m"),
        *arguments,
    )
    changed = {**os.environ, "COLDFRAME_SNAPSHOT": "off", **environment}
    with _process(command, port, changed, "COLDFRAME_EXEC_NS") as server:
        yield server


@contextmanager
def vllm_server(
    python: Path,
    model: Path,
    *,
    compiled: bool = False,
    dtype: str = "bfloat16",
    context: int = _CONTEXT,
    device: str = "cpu",
    cache: Path | None = None,
) -> Iterator[Server]:
    """vLLM's own server while the context lasts.

    Its `vllm` command is not in its build for the CPU; the module is what that calls.

    Args:
        python: An interpreter that has vLLM.
        model: A checkpoint's directory.
        compiled: Whether it compiles the model; else it is in eager mode.
        dtype: What it computes in, by its own name.
        context: Tokens of the longest sequence that it takes.
        device: `cpu` or `cuda:N`.
        cache: Where it keeps what it has compiled and found out; None for its own places.

    Raises:
        PlatformError: It failed.
    """
    port = free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(context)),
        *(() if compiled else ("--enforce-eager",)),
    ]
    with own_places(os.environ) as places:
        changed = {
            **os.environ,
            **_visible(device),
            **places,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            **({} if cache is None else {name: str(cache) for name in _COMPILED}),
        }
        with _process(command, port, changed) as server:
            yield server


@contextmanager
def dynamo_front(python: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """NVIDIA Dynamo's front end with its KV-aware router, on loopback, while the context lasts.

    Args:
        python: An interpreter that has it.
        environment: What to change in this process's: where workers register, for one.

    Raises:
        PlatformError: It failed.
    """
    port = free_port()
    command = [
        *(str(python), "-m", "dynamo.frontend", "--router-mode", "kv"),
        *("--http-host", "127.0.0.1", "--http-port", str(port)),
        *("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"),
    ]
    with _process(command, port, {**os.environ, **environment}) as server:
        yield server


@contextmanager
def plain_server(model: Path, device: str = "cpu") -> Iterator[Server]:
    """A plain FastAPI app around Transformers (`cold/plain_app.py`) while the context lasts.

    Args:
        model: A checkpoint's directory.
        device: `cpu` or `cuda:N`.

    Raises:
        PlatformError: It failed.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "uvicorn", "--app-dir", str(_PLAIN_APP), "plain_app:app"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
    ]
    changed = {
        **os.environ,
        "MODEL_DIR": str(model),
        "DEVICE": device,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(cpu_count()),  # torch does not look at the cgroup's quota
    }
    with _process(command, port, changed) as server:
        yield server


@contextmanager
def _process(
    command: list[str], port: int, environment: dict[str, str], exec_ns: str | None = None
) -> Iterator[Server]:
    process: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryFile() as said, guarded() as watch:
        try:
            with unbroken():
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
                watch(-process.pid)
            yield Server(port, started, process.pid, said.fileno())
            _end_in_order(process)
        except PlatformError as error:
            if process is not None:
                end(process, group=True, grace_s=0.0)
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
            # All that a server has started is in its group, or dies with it.
            if process is not None:
                end(process, group=True)


def _end_in_order(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(_END_S)
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            "a server does not end", expected=f"within {_END_S:g} s of SIGTERM", got="it runs on"
        ) from error
    if status not in (0, -signal.SIGTERM):
        raise PlatformError("a server has failed", got=f"status {status}")


def _visible(device: str) -> dict[str, str]:
    """The variable by which a program that takes the first GPU takes this one."""
    kind, _, number = device.partition(":")
    return {"CUDA_VISIBLE_DEVICES": number or "0"} if kind == "cuda" else {}


def free_port() -> int:
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
