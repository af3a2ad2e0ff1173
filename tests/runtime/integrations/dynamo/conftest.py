"""A front end for the tests of a module, and what most of them have behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runtime.integrations.dynamo.cluster import Cluster, cluster, served_by
from tests.runtime.serving import Server
from tests.runtime.snapshots import eventually


@pytest.fixture(scope="module")
def model(demo_model: Callable[..., Path]) -> Path:
    return demo_model("qwen3", "float32")


@pytest.fixture(scope="module")
def front() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture(scope="module")
def pair(model: Path, front: Cluster) -> Iterator[list[Server]]:
    """A prefill worker and a decode worker, which the front end knows both."""
    with ExitStack() as stack:
        roles = ("prefill", "decode")
        found = [stack.enter_context(front.worker(model, role=role)) for role in roles]
        for worker in found:
            worker.ready()
        front.ready()
        eventually(lambda: served_by(found, lambda: front.text("Once", 4)) == [1, 1], seconds=60)
        yield found
