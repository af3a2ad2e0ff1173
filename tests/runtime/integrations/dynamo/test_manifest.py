"""What images/k8s/dynamo tells Dynamo's front end, told to the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.runtime.integrations.dynamo.cluster import cluster
from tests.runtime.serving import Server, together
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo

Make = Callable[..., Path]
GRAPH = Path(__file__).parents[4] / "images" / "k8s" / "dynamo" / "graph.yaml"


def told() -> dict[str, str]:
    """The front end's variables."""
    front = yaml.safe_load(GRAPH.read_text())["spec"]["components"][0]
    assert front["type"] == "frontend"
    (container,) = front["podTemplate"]["spec"]["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"]}


def test_at_its_end_the_front_end_waits_for_open_answers(demo_model: Make) -> None:
    # Nothing but SIGKILL cuts off what a worker holds: so the grace period is what counts.
    slow = ("--throttle", "300kB/s")
    with cluster(**told()) as front, front.worker(demo_model(), *slow) as worker:
        eventually(lambda: front.models() == ["m"], seconds=60)
        assert worker.get("/readyz").status_code == 503

        def end() -> None:
            eventually(lambda: _open(worker) == 1, seconds=60)
            front.process.terminate()

        text, _ = together([lambda: front.text("Once", 4), end])
        assert text
        assert front.process.wait(60) == 0


def _open(worker: Server) -> float:
    """Requests that a worker has, and that it has not answered."""
    metrics = worker.metrics()
    return sum(metrics[f"coldframe_num_requests_{where}"] for where in ("waiting", "running"))
