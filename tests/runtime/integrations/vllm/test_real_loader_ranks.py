"""vLLM over two processes, each of which has its slices from our memory."""

from __future__ import annotations

import pytest

from tests.runtime.integrations.vllm.hosts import host
from tests.runtime.integrations.vllm.memories import memory_of, ranks

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 6, 7], [8, 9], list(range(20, 60))]
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def model(demo_model):
    return demo_model("qwen2")


@pytest.fixture(scope="module")
def plain(model):
    """On one rank: in float32 two of them come to the same tokens."""
    with host(model, dtype="float32") as engine:
        return engine.generate(PROMPTS, max_tokens=12)


def test_each_rank_reads_its_slices(model, plain):
    with host(
        model,
        dtype="float32",
        tensor_parallel_size=2,
        load_format="coldframe",
        model_loader_extra_config={"alias": "on"},
        environment=ENVIRONMENT,
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
        assert found["read"] < 0.6 * whole


def test_each_rank_copies_its_part_of_the_whole(model, plain):
    with (
        memory_of(model, layout="aligned") as memory,
        host(
            model,
            dtype="float32",
            tensor_parallel_size=2,
            load_format="coldframe",
            model_loader_extra_config={"memory_service": memory.path},
            environment=ENVIRONMENT,
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
