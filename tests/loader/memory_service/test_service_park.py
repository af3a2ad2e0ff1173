"""Orders to park and to wake, given to a memory service of its own process, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coldframe.loader.errors import MemoryServiceGone, ReplicaError
from coldframe.loader.process import remove_run_dir
from tests.loader.memory_service.test_service import Service, until, wait_all
from tests.loader.weights import layered, reference


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m")


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("r"))
    try:
        yield made
        made.close()
        assert made.child.wait() == 0
    finally:
        made.child.kill()
        remove_run_dir(made.run_dir)


@pytest.mark.parametrize("copy", [False, True])
def test_weights_on_the_cpu_stay_where_they_are(copy: bool, service: Service, model: Path) -> None:
    service.load(model, copy=copy).kv()
    service.expect("loaded")
    before = service.client()
    assert wait_all(before) == reference(model)
    for order, what in (("keep", None), ("park", "parked"), ("park", "parked"), ("wake", "woken")):
        service.owner.send({"type": order})
        if what is not None:
            told = service.expect(what).body
            assert (told["error"], told["left"]) == (None, False)
            assert told["note"] == "in memory, as they were"
        assert not before.is_to_let_go
        assert before.complete
        late = service.client()
        assert wait_all(late) == reference(model)
        assert not late.away


def test_weights_that_are_not_in_yet_are_not_parked(service: Service, model: Path) -> None:
    service.load(model, throttle=20_000)
    service.owner.send({"type": "park"})
    error = ReplicaError.from_wire(service.expect("parked").body["error"])
    assert "not in" in str(error)
    service.owner.send({"type": "wake"})
    assert service.expect("woken").body["error"] is None


@pytest.mark.parametrize("order", ["park", "wake", "keep", "detached"])
def test_who_gives_orders_that_are_not_his_is_shown_out(
    order: str, service: Service, model: Path
) -> None:
    service.load(model).kv()
    service.expect("loaded")
    worker, rogue = service.client(), service.client("rogue")
    assert wait_all(worker) == wait_all(rogue)
    rogue._link.send({"type": order})
    until(lambda: isinstance(rogue.error, MemoryServiceGone))
    assert worker.complete
    assert wait_all(service.client()) == reference(model)
