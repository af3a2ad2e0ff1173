"""vLLM with its weights from our memory: its tokens are those of vLLM with its own loader."""

from __future__ import annotations

import pytest

from tests.runtime.integrations.vllm.hosts import host

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 6, 7], [8, 9], list(range(20, 60))]


@pytest.fixture(scope="module")
def plain(demo_model):
    """What vLLM's own loader makes of the demo model."""
    with host(demo_model(), dtype="float32") as engine:
        return engine.generate(PROMPTS, max_tokens=12)


def test_the_model_that_vllm_was_given(demo_model, plain):
    with host(demo_model(), dtype="float32", load_format="coldframe") as engine:
        assert engine.generate(PROMPTS, max_tokens=12) == plain
