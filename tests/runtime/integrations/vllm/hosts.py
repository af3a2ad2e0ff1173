"""vLLM's engine in a process of its own, which a test asks over a socket and may kill.

An engine leaves threads, sockets and a process group behind, and several of them cannot be had in
one process one after the other: so no test has one in its own.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.runtime.integrations.vllm.forks import Forked, Imported

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(Path(__file__).parents[4] / "build" / "inductor-cache"),
    # Threads that spin have the cores that whoever is waited for needs.
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CACHE_ROOT": str(Path(__file__).parents[4] / "build" / "vllm-cache"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of a host. With the engine's core in the same process its insides can be looked at.

The cache outlives the tests: without it vLLM starts a process to look at each kind of model.
"""

_ROOT = Path(__file__).parents[4]
_KV_BYTES = 256 << 20
"""Each of them is written to at the start; VLLM_CPU_KVCACHE_SPACE knows of whole GiB alone."""
_START_S = 300.0
_ANSWER_S = 110.0
_END_S = 20.0


@dataclass
class Answer:
    """What a request has come to."""

    tokens: list[int]
    finish: str | None
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens, where they were asked for."""
    kv_transfer_params: dict[str, Any] | None = None
    cached: int = field(default=0, compare=False)
    """Tokens of the prompt that it had KV of when it began."""


class HostError(Exception):
    """The engine's process has raised something, or is gone."""


@functools.cache
def imported() -> Imported:
    """Where processes with vLLM in them are forked, for all tests."""
    made = Imported({**os.environ, **ENVIRONMENT})
    atexit.register(made.close)
    return made


class Host:
    """An engine.

    Args:
        model: The checkpoint's directory.
        engine: More arguments of vLLM's `EngineArgs`.
        environment: More variables of its process, which then imports vLLM itself; others are
            forks of one that has done so.
        log: A file that gets what it prints; by default it goes where this process' does.
    """

    def __init__(
        self,
        model: Path | str,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        **engine: Any,
    ) -> None:
        ours, theirs = socket.socketpair()
        output = None if log is None else log.open("ab")
        # vLLM leaves files behind, and sockets, whose paths are to be short.
        self._temporary = tempfile.mkdtemp(prefix="cf-")
        variables = {
            **os.environ,
            **ENVIRONMENT,
            "TMPDIR": self._temporary,
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | Forked
        if environment is None:
            streams = (1, 2) if output is None else (output.fileno(),) * 2
            self.process = imported().fork(serve, [theirs.fileno(), *streams], variables)
        else:
            # What imports read of it may be another than theirs.
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=_ROOT,
                env=variables,
                pass_fds=[theirs.fileno()],
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self._over = False
        theirs.close()
        if output is not None:
            output.close()  # the child has its own
        self._connection = Connection(ours.detach())
        try:
            self.ask("start", {"model": str(model), **engine}, wait_s=_START_S)
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, *arguments: Any, wait_s: float = _ANSWER_S) -> Any:
        """Has the process do something, and waits for what comes of it.

        Raises:
            HostError: It raised something, said nothing for so long, or died.
        """
        self.begin(what, *arguments)
        return self.answer(what, wait_s)

    def begin(self, what: str, *arguments: Any) -> None:
        """Has the process do something; `answer` waits for it. One thing at a time."""
        try:
            self._connection.send((what, arguments))
        except OSError as error:
            raise HostError(f"the engine's process is gone: {self.process.poll()}") from error

    def answer(self, what: str = "run", wait_s: float = _ANSWER_S) -> Any:
        """What has come of what was begun; see `ask`."""
        try:
            if not self._connection.poll(wait_s):
                raise HostError(f"no answer to {what!r} within {wait_s:g} s")
            failed, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise HostError(f"the engine's process is gone: {self.process.poll()}") from error
        if failed:
            raise HostError(value)
        return value

    def add(
        self,
        request: str,
        prompt: Sequence[int],
        kv_transfer_params: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        """Gives it a request; greedy, where nothing else is said."""
        self.ask("add", request, list(prompt), kv_transfer_params, sampling)

    def run(self) -> dict[str, Answer]:
        """Steps until all requests are over: what has come of each."""
        return self.ask("run")

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Answer]:
        """What comes of prompts that are given to it together."""
        names = [f"generate-{index}" for index in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self.add(name, prompt, **sampling)
        answers = self.run()
        return [answers[name] for name in names]

    def call(self, function: Callable[..., Any], *arguments: Any, wait_s: float = _ANSWER_S) -> Any:
        """Calls a function of a module's top level over there, with the `LLMEngine` first."""
        where = (function.__module__, function.__qualname__)
        return self.ask("call", *where, arguments, wait_s=wait_s)

    def free_blocks(self) -> int:
        """KV blocks that no request holds."""
        return self.call(_free_blocks)

    def kill(self) -> None:
        """Ends it with no chance to say anything, and all that it has started."""
        if self._over:
            return
        self._over = True
        # Its group first: until it is reaped, nobody else has its number.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(_END_S)

    def close(self) -> None:
        """Has it end, or ends it; nothing of it is left then."""
        self._connection.close()
        deadline = time.monotonic() + _END_S
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _has_ended(self) -> bool:
        if self._over or isinstance(self.process, Forked):
            return self.process.poll() is not None
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None


@contextmanager
def host(model: Path | str, **arguments: Any) -> Iterator[Host]:
    """A `Host` that is closed afterwards."""
    made = Host(model, **arguments)
    try:
        yield made
    finally:
        made.close()


def _free_blocks(engine: Any) -> int:
    scheduler = engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


class _Engine:
    """The other side."""

    def __init__(self) -> None:
        self._engine: Any = None

    def start(self, arguments: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        defaults = {
            "disable_log_stats": True,
            "enforce_eager": True,
            "kv_cache_memory_bytes": _KV_BYTES,
            "max_model_len": 1024,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**{**defaults, **arguments}))

    def add(
        self,
        request: str,
        prompt: list[int],
        kv_transfer_params: Mapping[str, Any] | None,
        sampling: dict[str, Any],
    ) -> None:
        from vllm import SamplingParams

        defaults: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16, "detokenize": False}
        params = SamplingParams(**{**defaults, **sampling})
        if kv_transfer_params is not None:
            params.extra_args = {"kv_transfer_params": dict(kv_transfer_params)}
        self._engine.add_request(request, {"prompt_token_ids": prompt}, params)

    def run(self) -> dict[str, Answer]:
        answers = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    answers[output.request_id] = _answer(output)
        return answers

    def abort(self, request: str) -> None:
        self._engine.abort_request([request])

    def call(self, module: str, name: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(importlib.import_module(module), name)(self._engine, *arguments)


def _answer(output: Any) -> Answer:
    made = output.outputs[0]
    logprobs = [
        step[token].logprob
        for step, token in zip(made.logprobs or (), made.token_ids, strict=False)
    ]
    return Answer(
        list(made.token_ids),
        made.finish_reason,
        logprobs,
        output.kv_transfer_params,
        output.num_cached_tokens or 0,
    )


def serve(number: int) -> _Engine:
    """Has an engine, and does what is asked by the connection of that number.

    Returns:
        The engine: a process that is to end at once does not take it down before.
    """
    connection = Connection(number)
    engine = _Engine()
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return engine
        try:
            value = getattr(engine, what)(*arguments)
        except Exception:  # noqa: BLE001 - the test is to see it
            connection.send((True, traceback.format_exc()))
        else:
            connection.send((False, value))


if __name__ == "__main__":
    # Pickled here, an answer would be of `__main__`.
    from tests.runtime.integrations.vllm import hosts

    hosts.serve(int(sys.argv[1]))
    os._exit(0)  # an engine's threads would keep it
