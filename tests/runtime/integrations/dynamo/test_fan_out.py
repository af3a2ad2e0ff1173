"""Workers on hosts of their own that start at once, and find each other by Dynamo's discovery.

Each host is behind a link of a rate (`benchmarks.hosts`); the discovery is a folder that all of
them see. What the warm one has sent says whether they were in a row: so nothing here depends on how
fast this machine is. How long it takes is what `coldframe bench peers` measures.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.hosts import Host, Network, hosts
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import PlatformError
from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import Cluster, environment, free_port, installed
from tests.runtime.serving import greedy
from tests.runtime.snapshots import eventually
from tests.support import unavailable

pytestmark = [pytest.mark.dynamo, pytest.mark.timeout(600)]

NODES = 3
LOAD_S = 12.0
"""What a link takes for all weights."""
PORT, PEERS = 8000, 9400
PROMPT = prompt_of(20)


def test_three_that_start_at_once_are_fed_by_one_in_a_row(
    demo_model: Callable[..., Path], tmp_path: Path
) -> None:
    installed()
    model = demo_model(dtype="bfloat16", size="small")
    weights = sum(t.nbytes for t in Checkpoint.open(str(model)).tensors.values())
    cluster = Cluster(tmp_path, free_port(), tmp_path / "none")
    with ExitStack() as stack:
        stack.callback(cluster.http.close)
        try:
            network = stack.enter_context(hosts(NODES + 1, weights / LOAD_S))
        except PlatformError as error:
            unavailable(str(error))
        first, *rest = network.hosts
        stack.enter_context(worker(cluster, model, first))
        ready(network, first)
        sent, received = first.traffic().sent, [host.traffic().received for host in rest]
        for host in rest:
            stack.enter_context(worker(cluster, model, host))
        for host in rest:
            ready(network, host)
        sent = first.traffic().sent - sent
        expected = greedy(model, tuple(PROMPT), 4)
        peers = {f"from peer://{host.address}:{PEERS}" for host in network.hosts}
        for before, host in zip(received, rest, strict=True):
            assert host.traffic().received - before >= weights
            # Behind that stands who was asked in vain: a node may be listed before it listens.
            said, *_ = ask(network, host, "/startup")["load_mode_reason"].split(";")
            assert said in peers - {f"from peer://{host.address}:{PEERS}"}
            body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            answer = ask(network, host, "/v1/completions", body)
            assert answer["choices"][0]["text"] == expected
        # To one of them; it would be three times that if each read from it.
        assert weights <= sent < 1.5 * weights


def worker(cluster: Cluster, model: Path, host: Host) -> Any:
    """A worker on a host, that gives its weights away there; a context manager."""
    return cluster.worker(
        model,
        *("--host", host.address, "--port", PORT, "--threads", 1, "--kv-memory", "64MiB", "--copy"),
        *("--serve-peers", f"{host.address}:{PEERS}", "--peers-from", "dynamo:60"),
        under=host.command(),
        COLDFRAME_PEER_TOKEN="the-token-of-all-of-them",
        **environment(cluster.base, host.address),
    )


def ready(network: Network, host: Host) -> None:
    """Waits until it has made a token."""

    def is_ready() -> bool:
        try:
            return bool(ask(network, host, "/readyz"))
        except (OSError, http.client.HTTPException, AssertionError):
            return False

    eventually(is_ready, seconds=90)


def ask(network: Network, host: Host, path: str, body: Any = None) -> Any:
    """What a worker answers to somebody on the switch."""
    connection = http.client.HTTPConnection(host.address, PORT)
    connection.sock = network.connect(host.address, PORT, 60)
    try:
        data = None if body is None else json.dumps(body)
        head = {"content-type": "application/json"}
        connection.request("GET" if body is None else "POST", path, data, head)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text)
    finally:
        connection.close()
