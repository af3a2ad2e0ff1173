"""The one connection of a process to coldframe's memory, with real memory services."""

from __future__ import annotations

import os
import signal

import pytest

from coldframe.loader.checkpoints.slices import Rank
from coldframe.loader.errors import (
    CheckpointError,
    MemoryServiceGone,
    RequestError,
    SourceNotFound,
)
from coldframe.loader.loads.options import LoadOptions
from coldframe.runtime.integrations.vllm import attached
from coldframe.runtime.integrations.vllm.attached import (
    OwnMemory,
    attach,
    attach_late,
    expect,
    own_memory,
    release,
)


@pytest.fixture(autouse=True)
def _nothing_left(no_leaks, monkeypatch):
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    yield
    attached._provided = None
    for client, _ in list(attached._made.values()):
        release(client)


def test_a_service_of_its_own_shared_by_all_who_ask(demo_model):
    source = {"source": str(demo_model())}
    client = attach(source)
    plan, arena = client.wait_weights()
    client.wait_stage(len(plan.stages) - 1)
    assert arena.size >= plan.weights_bytes
    assert attach({**source, "mode": "exact"}) is client
    assert attach({}) is client  # a connector that was told nothing
    assert own_memory(client).report(30)["type"] == "loaded"


def test_a_service_that_does_not_end_is_killed(demo_model, monkeypatch):
    monkeypatch.setattr(attached, "_ENDING_S", 0.5)
    client = attach({"source": str(demo_model())})
    client.wait_weights()
    memory = own_memory(client)
    assert memory.report(30)["type"] == "loaded"
    os.kill(memory.pid, signal.SIGSTOP)
    release(client)
    with pytest.raises(ProcessLookupError):
        os.kill(memory.pid, 0)


def test_another_model_has_another_service(demo_model):
    first = attach({}, model=str(demo_model()))
    assert attach({}, model=str(demo_model("qwen2"))) is not first
    with pytest.raises(RequestError, match="nothing says"):
        attach({})


def test_nothing_says_where_it_is():
    with pytest.raises(RequestError, match="nothing says where"):
        attach({"mode": "exact"})


def test_a_service_that_runs_already(demo_model):
    memory = OwnMemory(LoadOptions(str(demo_model()), layout="aligned"))
    try:
        client = attach({"memory_service": memory.path})
        assert attach({"memory_service": memory.path}) is client
        assert own_memory(client) is None
        client.wait_stage(0)
        release(client)
        assert attach({"memory_service": memory.path}) is not client
    finally:
        memory.close()


def test_what_is_provided_goes_before_all(demo_model):
    client = attach({}, model=str(demo_model()))
    attached.provide(client)
    assert attach({"memory_service": "/nowhere.sock"}) is client


def test_one_that_is_only_expected_is_asked_for_when_it_is_needed(demo_model, monkeypatch):
    with pytest.raises(RequestError, match="nothing says where"):
        attach_late({})
    monkeypatch.setattr(attached, "_expected", False)
    expect()
    late = attach_late({})
    with pytest.raises(RequestError, match="nothing says where"):
        late()
    client = attach({}, model=str(demo_model()))
    attached.provide(client)
    assert late() is late() is client


def test_a_rank_has_its_slices_alone(demo_model):
    both = [attach({}, model=str(demo_model()), rank=Rank(index, 2)) for index in range(2)]
    assert both[0] is not both[1]
    plans = [client.wait_weights()[0] for client in both]
    whole = attach({}, model=str(demo_model())).wait_weights()[0]
    for index, plan in enumerate(plans):
        assert plan.rank == Rank(index, 2)
        gate = plan.placements["model.layers.1.mlp.gate_proj.weight"]
        assert gate.whole == whole.placements[gate.name].shape
        assert gate.begin == (index * gate.shape[0], 0)
        down = plan.placements["model.layers.1.mlp.down_proj.weight"]
        assert down.begin == (0, index * down.shape[1])
        assert plan.placements["model.norm.weight"].whole == ()


def test_no_service_there(tmp_path):
    with pytest.raises(SourceNotFound) as caught:
        attach({"memory_service": str(tmp_path / "memory.sock")})
    assert caught.value.where == str(tmp_path / "memory.sock")


def test_no_such_source(tmp_path):
    client = attach({"source": str(tmp_path / "nothing")})
    with pytest.raises(SourceNotFound):
        client.wait_weights()


def test_a_source_that_is_damaged(demo_model, tmp_path):
    for path in demo_model().iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            content[:-5] if path.suffix == ".safetensors" else content
        )
    client = attach({"source": str(tmp_path)})
    with pytest.raises(CheckpointError):
        client.wait_weights()


def test_a_service_that_is_gone(demo_model):
    client = attach({"source": str(demo_model())})
    client.wait_weights()
    os.kill(own_memory(client).pid, 9)
    with pytest.raises(MemoryServiceGone):
        client._wait(lambda: False, "its end")
    with pytest.raises(MemoryServiceGone):
        attach({"source": str(demo_model())})
