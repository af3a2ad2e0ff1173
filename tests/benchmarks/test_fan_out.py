"""Replicas that feed one another, on hosts of their own behind links of a rate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks import hosts as module
from coldframe.benchmarks.document import parsed
from coldframe.benchmarks.hosts import hosts
from coldframe.loader.errors import PlatformError
from tests.support import unavailable, without_settings

pytestmark = pytest.mark.heavy

NODES = 3
_LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    one, _ = server.accept()
    one.sendall(bytes(int(sys.argv[2])))
    one.close()
"""


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    try:
        with hosts(1, 10e6):
            pass
    except PlatformError as error:
        unavailable(str(error))


def test_a_link_has_its_rate_and_nothing_is_left_behind() -> None:
    rate, nbytes = 4e6, 2_000_000
    with hosts(2, rate) as network:
        first, second = network.hosts
        holders = [host.pid for host in network.hosts]
        serving = subprocess.Popen(
            first.command(sys.executable, "-c", _LISTEN, first.address, str(nbytes)),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert serving.stdout is not None
        port = int(serving.stdout.readline())
        before = second.traffic().received
        started = time.monotonic()
        with network.connect(first.address, port, 20.0) as connection:
            got = 0
            while part := connection.recv(1 << 20):
                got += len(part)
        elapsed = time.monotonic() - started
        assert serving.wait(20) == 0
        serving.stdout.close()
        assert got == nbytes
        # A link that is limited can only be slower than its rate, but for what its bucket holds.
        assert elapsed > 0.7 * nbytes / rate
        assert first.traffic().sent >= nbytes
        assert second.traffic().received - before < nbytes / 10
    assert not any(Path(f"/proc/{holder}").exists() for holder in holders)


def test_without_the_tools_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOOLS", ("ip", "no-such-tool"))
    with pytest.raises(PlatformError, match="tools that are not here") as caught, hosts(1, 1e6):
        pass
    assert caught.value.where == "no-such-tool"


@pytest.mark.timeout(900)
def test_the_last_of_several_is_ready_little_after_one_alone(
    demo_model: Callable[..., Path],
) -> None:
    """Whoever is held up by something else than the links may try once more."""
    model = demo_model(dtype="bfloat16", size="small")
    for _ in range(2):
        done = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "coldframe"), "bench", "peers", str(model)),
                *("--nodes", str(NODES), "--runs", "1", "--load-seconds", "20", "--json"),
            ],
            env={**without_settings(), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        document = parsed(done.stdout)
        assert document is not None, done.stderr
        rows = {row["name"]: row["median"] for row in document["rows"]}
        # In a row the first sends everything once, to one of them.
        assert 1.0 <= rows["sent by the first, in a row"] < 1.3
        assert rows["sent by the first, to each"] > NODES - 0.1
        if rows["in a row, to one"] <= 1.25:
            break
    assert rows["in a row, to one"] <= 1.25, json.dumps(document)
    assert rows["from one, to one"] > 2.0
    assert done.returncode == 0
