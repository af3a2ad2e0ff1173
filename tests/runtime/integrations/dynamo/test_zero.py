"""A registered model at zero: nothing of it runs, and the first request brings it back."""

from __future__ import annotations

from pathlib import Path

import httpx
import psutil
import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import MODEL, Cluster
from tests.runtime.serving import Server, greedy, together
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo

PROMPT = prompt_of(70)


def state(worker: Server) -> str:
    return str(worker.get("/startup").json()["state"])


def rests(worker: Server) -> bool:
    """Whether it is at zero: a front, a gateway and its helper, and nothing that computes."""
    return state(worker) == "zero" and not worker.memory_services()


def test_requests_before_the_weights_are_held(front: Cluster, model: Path) -> None:
    with front.worker(model, "--throttle", "500kB/s") as worker:
        eventually(lambda: MODEL in front.models(), seconds=60)
        assert worker.get("/readyz").status_code == 503
        front.ready()
        text = front.text(PROMPT, 8)
        assert text == greedy(model, tuple(PROMPT), 8)
        assert worker.get("/startup").json()["timeline"]["ttft_s"] > 0


def test_a_model_at_zero_is_there_and_comes_back_for_who_asks(front: Cluster, model: Path) -> None:
    with front.worker(model, "--idle", "0.5") as worker:
        front.ready()
        for _ in range(2):
            eventually(lambda: rests(worker), seconds=60)
            assert MODEL in front.models()
            # Many at once: one start answers them all.
            texts = together([lambda: front.text(PROMPT, 8) for _ in range(4)])
            assert set(texts) == {greedy(model, tuple(PROMPT), 8)}
        assert starts(worker) == 3
        eventually(lambda: rests(worker), seconds=60)
        resident = sum(p.memory_info().rss for p in family(worker))
        assert resident < 400 << 20


def family(worker: Server) -> list[psutil.Process]:
    front = psutil.Process(worker.process.pid)
    return [front, *front.children(recursive=True)]


def test_who_has_left_is_not_asked(front: Cluster, model: Path) -> None:
    with front.worker(model):
        front.ready()
        assert front.text(PROMPT, 4) == greedy(model, tuple(PROMPT), 4)

    def is_forgotten() -> bool:
        try:
            return MODEL not in front.models()
        except httpx.HTTPError:
            return False

    eventually(is_forgotten, seconds=60)


def test_a_gateway_that_dies_registers_again(front: Cluster, model: Path) -> None:
    password = "ETCD_AUTH_PASSWORD"  # what a discovery may be opened with: the next one may, too
    with front.worker(model, **{password: "x", "HF_TOKEN": "x"}) as worker:
        front.ready()
        gateway = worker.gateway()
        assert {password, "HF_TOKEN"} & set(gateway.environ()) == {password}
        gateway.kill()
        eventually(lambda: front.answers() and worker.get("/readyz").status_code == 200, seconds=90)
        assert {password, "HF_TOKEN"} & set(worker.gateway().environ()) == {password}
        assert front.text(PROMPT, 8) == greedy(model, tuple(PROMPT), 8)


def starts(worker: Server) -> float:
    return worker.metrics()["coldframe_coldstarts_total{fresh}"]


def test_prefill_and_decode_both_come_back(front: Cluster, model: Path) -> None:
    # The gateway that was killed has not unregistered; its entry lapses.
    eventually(lambda: not front.registered(), seconds=60)
    idle = ("--idle", "0.5")
    with (
        front.worker(model, *idle, role="prefill") as prefill,
        front.worker(model, *idle, role="decode") as decode,
    ):
        front.ready()
        # One token needs no decode worker, so that it may be long before they know of it.
        front.text(prompt_of(40), 8)
        eventually(lambda: rests(prefill) and rests(decode), seconds=60)
        before = [starts(worker) for worker in (prefill, decode)]
        assert MODEL in front.models()
        assert front.text(PROMPT, 8) == greedy(model, tuple(PROMPT), 8)
        assert [starts(worker) for worker in (prefill, decode)] == [each + 1 for each in before]
