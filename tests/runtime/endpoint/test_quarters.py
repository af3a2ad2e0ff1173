"""What a model needs of a GPU whose size only its memory service can tell.

There is no GPU here: what a replica would have heard of one is said in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from coldframe.loader.errors import DeviceError
from coldframe.runtime.endpoint.quarters import Quarters
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts, context_bytes
from coldframe.runtime.replica.vllm_memory import copied_bytes
from coldframe.runtime.replica.vllm_spec import VllmOptions

GIB = 1 << 30
TOTAL = 80 * GIB


class Tenant:
    used_at = 0.0
    leaving = False
    can_go = True

    def make_room(self) -> None: ...


@dataclass
class Heard:
    """What is known of a replica."""

    options: ReplicaOptions
    model: ModelFacts
    facts: dict[str, Any] = field(default_factory=dict)
    kv_bytes: int | None = None
    known: bool = True


class Start:
    """A model that starts in a room."""

    def __init__(self, model: Path, room: Room, **more: Any) -> None:
        self.options = ReplicaOptions(str(model), device="cuda:0", kv_part=0.25, **more)
        self.quarters = Quarters(Tenant(), self.options, room)
        self.replica = Heard(self.options, ModelFacts(str(model)))

    def hears(self, total: int = TOTAL) -> bool:
        """Its memory service has found out what the GPU has; whether it may stay."""
        self.replica.facts = {"gpu": {"name": "a GPU", "total": total, "free": total}}
        self.replica.facts["weights_bytes"] = self.replica.model.weights_bytes
        self.quarters.learn(self.replica.model)
        return self.quarters.settle(cast(Replica, self.replica))


@pytest.fixture
def model(demo_model: Callable[..., Path]) -> Path:
    return demo_model("llama")


def test_the_first_finds_out_and_the_others_wait_for_it(model: Path) -> None:
    room = Room(None)
    first, second = Start(model, room), Start(model, room)
    assert first.quarters.take()
    assert not second.quarters.take()
    assert not second.quarters.fits
    assert first.hears()
    assert room.total == round(0.9 * TOTAL)
    # A quarter each for KV, the weights, and what the workers' contexts take.
    weights = first.replica.model.weights_bytes
    assert weights is not None
    need = weights + room.total // 4 + context_bytes(first.options, "cuda:0")
    assert room.total - room.free == pytest.approx(need, abs=1 << 20)
    assert second.quarters.fits
    assert second.quarters.take()


def test_who_is_parked_keeps_weights_and_contexts(model: Path) -> None:
    room = Room(None)
    start = Start(model, room, kv_bytes=GIB)
    assert start.quarters.take()
    assert start.hears()
    total, weights = room.total, start.replica.model.weights_bytes
    assert total is not None
    assert weights is not None
    start.quarters.park()
    assert total - room.free == weights + context_bytes(start.options, "cuda:0") == weights + GIB


def test_who_is_parked_keeps_nothing_where_all_of_it_leaves(model: Path) -> None:
    room = Room(None)
    start = Start(model, room, kv_bytes=GIB)
    assert start.quarters.take()
    assert start.hears()
    start.quarters.park()
    start.quarters.weights_left()
    total = room.total
    assert total is not None
    assert total - room.free == context_bytes(start.options, "cuda:0")
    start.quarters.weights_left(with_contexts=True)
    assert room.free == total
    assert start.quarters.take()
    assert room.free < total - GIB


def test_a_gpu_that_has_less_than_is_to_be_shared_is_refused(model: Path) -> None:
    start = Start(model, Room(96 * GIB), kv_bytes=GIB)
    assert start.quarters.take()
    with pytest.raises(DeviceError, match="more memory than there is") as raised:
        start.hears()
    assert raised.value.where == "--device-memory"


def test_who_had_to_do_without_the_gpu_shares_what_the_host_has(model: Path) -> None:
    room = Room(None)
    start = Start(model, room)
    assert start.quarters.take()
    start.replica.options = start.options.on_cpu("there is none")
    start.replica.facts = {"weights_bytes": 1}
    start.quarters.settle(cast(Replica, start.replica))
    assert room.total is not None
    assert 0 < room.total < 1 << 50


def beside(model: Path, device: str, total: int, **more: Any) -> tuple[int, Quarters, Room]:
    """What a model with a vLLM engine has of a room, and of that what one without would have."""
    held = []
    for vllm in (None, VllmOptions()):
        options = ReplicaOptions(str(model), device=device, vllm=vllm, **more)
        room = Room(total)
        quarters = Quarters(Tenant(), options, room)
        assert quarters.take()
        held.append(total - room.free - context_bytes(options, device))
    return held[1] - held[0], quarters, room


def test_a_vllm_engine_has_kv_and_packed_weights_of_its_own(model: Path) -> None:
    facts = ModelFacts(str(model))
    packed = copied_bytes(facts.spec, facts.tensors, "cpu")
    assert packed > 0
    more, quarters, room = beside(model, "cpu", 8 * GIB, kv_bytes=GIB)
    assert more == pytest.approx(packed + GIB, abs=1 << 20)
    quarters.park()  # its own stays
    weights = facts.weights_bytes
    assert weights is not None
    assert 8 * GIB - room.free == pytest.approx(weights + packed + GIB, abs=1 << 20)


def test_on_a_gpu_it_computes_with_the_weights_that_are_there(model: Path) -> None:
    more, _, _ = beside(model, "cuda:0", TOTAL, kv_bytes=GIB)
    assert more == pytest.approx(GIB, abs=1 << 20)
    # What the replica chooses for KV they share.
    more, _, _ = beside(model, "cuda:0", TOTAL, kv_part=0.25)
    assert more == pytest.approx(0, abs=1 << 20)


def test_it_does_not_fit_where_only_a_replica_without_it_would(model: Path) -> None:
    facts = ModelFacts(str(model))
    weights, packed = facts.weights_bytes, copied_bytes(facts.spec, facts.tensors, "cpu")
    assert weights is not None
    options = ReplicaOptions(str(model), kv_bytes=1 << 20, vllm=VllmOptions(kv_bytes=GIB))
    room = Room(weights + packed + GIB)
    with pytest.raises(DeviceError, match="does not fit"):
        Quarters(Tenant(), options, room).take()
    room = Room(weights + packed + GIB + (1 << 20))
    assert Quarters(Tenant(), options, room).take()
