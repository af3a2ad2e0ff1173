"""vLLM with its weights from our memory: its tokens are those of vLLM with its own loader."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import psutil
import pytest

from tests.runtime.integrations.vllm.hosts import Host, HostError, host
from tests.runtime.integrations.vllm.memories import children, loads_early, memory_of, placed, ranks

pytestmark = pytest.mark.vllm

RANKS = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PROMPTS = [[5, 6, 7], [8, 9], list(range(20, 60))]


@pytest.fixture(scope="module")
def model(demo_model):
    """With biases, and a head that is tied to the embedding."""
    return demo_model("qwen2")


@pytest.fixture(scope="module")
def plain(model):
    """What vLLM's own loader makes of the model."""
    with host(model, dtype="float32") as engine:
        return engine.generate(PROMPTS, max_tokens=12)


def test_vllm_alone_in_its_three_processes(model, plain):
    """As `vllm serve` has it: the core is another process, which the loader runs in."""
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with host(model, dtype="float32", load_format="coldframe", environment=processes) as engine:
        assert engine.generate(PROMPTS, max_tokens=12) == plain
        family = psutil.Process(engine.process.pid).children(recursive=True)
        # Where vLLM computes with packed copies of its own, nothing of ours is left behind.
        assert not [
            p for p in family if "coldframe.loader.memory_service.service" in " ".join(p.cmdline())
        ]
        assert family
        engine.kill()
    # Nor is anything left of vLLM's where it had no chance to see to that.
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_the_weights_are_there_once_for_all(model, plain):
    with memory_of(model, layout="aligned") as memory:
        extra = {"memory_service": memory.path, "alias": "on"}
        with host(
            model, dtype="float32", load_format="coldframe", model_loader_extra_config=extra
        ) as engine:
            assert engine.generate(PROMPTS, max_tokens=12) == plain
            found = engine.call(placed)
            assert found["apart"] == {}
            assert found["outside"] == []
            assert found["noted"]
            assert found["packed"] == []
            # The service has written the pages; this process has read all of them, and no more.
            assert found["shared"] >= found["weights"]
            assert found["private"] == 0
            assert engine.call(children) == 0


def test_copies_from_weights_that_lie_as_in_their_files(model, plain):
    """Also those of which vLLM packs a copy: what is not packed is not to stay in the arena."""
    with memory_of(model, layout="file") as memory:
        extra = {"memory_service": memory.path, "alias": "off"}
        with host(
            model, dtype="float32", load_format="coldframe", model_loader_extra_config=extra
        ) as engine:
            assert engine.generate(PROMPTS, max_tokens=12) == plain
            found = engine.call(placed)
            assert set(found["apart"].values()) == {"as asked", "apart in the arena"}
            assert found["inside"] == []
            assert len(found["outside"]) > 1


def test_bytes_come_before_the_loader_is_there(model, plain):
    """It finds the service that was started when the engine began to make its worker."""
    extra = {"alias": "on", "gated": False}
    with host(
        model, dtype="float32", load_format="coldframe", model_loader_extra_config=extra
    ) as engine:
        assert engine.generate(PROMPTS, max_tokens=12) == plain
        assert engine.call(children) == 1
        assert engine.call(loads_early) == [2, 2]


def test_another_model_than_vllm_s(model, demo_model, tmp_path):
    """Where MODEL has no weights to hold those against that come: they do not fit."""
    log, empty = tmp_path / "log", tmp_path / "empty"
    shutil.copytree(model, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    extra = {"source": str(demo_model("llama")), "gated": False}
    with pytest.raises(HostError) as caught:
        Host(
            empty,
            dtype="float32",
            load_format="coldframe",
            model_loader_extra_config=extra,
            log=log,
        )
    assert "CheckpointError: the weights do not fit the model" in str(caught.value)
    assert "one and the same model" in str(caught.value)


def test_a_service_that_dies_in_mid_load(model, tmp_path):
    with memory_of(model, throttle=100e3) as memory:
        extra = {"memory_service": memory.path, "gated": False}
        killer = threading.Thread(target=_kill_when_connected, args=(memory.pid, memory.path))
        killer.start()
        with pytest.raises(HostError, match="MemoryServiceGone"):
            Host(
                model,
                load_format="coldframe",
                model_loader_extra_config=extra,
                log=tmp_path / "log",
            )
        killer.join()


def _kill_when_connected(pid: int, path: str) -> None:
    """Kills the service a moment after somebody has connected to it."""
    service = psutil.Process(pid)
    deadline = time.monotonic() + 100
    # The listening socket has that name, and so has each connection to it.
    while [c.laddr for c in service.net_connections("unix")].count(path) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)


def test_each_rank_reads_its_slices(model, plain):
    with host(
        model,
        dtype="float32",
        tensor_parallel_size=2,
        load_format="coldframe",
        model_loader_extra_config={"alias": "on"},
        environment=RANKS,
    ) as engine:
        assert engine.generate(PROMPTS, max_tokens=12) == plain
        both = engine.call(ranks)
    with memory_of(model) as memory:
        whole = _bytes(memory)
    assert [found["rank"] for found in both] == [[0, 2], [1, 2]]
    for found in both:
        # All of it is the arena, which has nothing but this rank's half and the norms.
        assert found["outside"] == []
        assert found["shared"] >= found["weights"]
        assert found["weights"] < 0.55 * whole
        # Rows of so small a model are read across what lies between them.
        assert found["read"] < 0.75 * whole


def test_each_rank_copies_its_part_of_the_whole(model, plain):
    with (
        memory_of(model, layout="aligned") as memory,
        host(
            model,
            dtype="float32",
            tensor_parallel_size=2,
            load_format="coldframe",
            model_loader_extra_config={"memory_service": memory.path},
            environment=RANKS,
        ) as engine,
    ):
        assert engine.generate(PROMPTS, max_tokens=12) == plain
        for found in engine.call(ranks):
            assert found["rank"] == [0, 1]
            columns = {why for name, why in found["apart"].items() if "o_proj" in name}
            assert columns == {"cut by columns"}


def _bytes(memory) -> int:
    from coldframe.runtime.integrations.vllm.attached import attach, release

    client = attach({"memory_service": memory.path})
    try:
        return client.wait_weights()[0].weights_bytes
    finally:
        release(client)
