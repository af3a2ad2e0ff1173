"""What decides which image a replica's engine may be a clone of."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.integrations.vllm.environment import ENGINE_ENVIRONMENT
from coldframe.runtime.integrations.vllm.frozen_key import asked_for, engine_variables, told
from coldframe.snapshot.engine_key import EngineKey

IMAGE = asked_for({"max_num_seqs": 8, "max_model_len": 1024}, 64 << 20, {})


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of these names, for an interpreter that has no vLLM."""
    for package in IMAGE["packages"]:
        (tmp_path / f"{package}-1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])


def refusal(
    args: Mapping[str, Any], kv: int | None = None, environ: Mapping[str, str] | None = None
) -> str | None:
    """The field for which the image is not taken by who asks so."""
    asked = EngineKey.here(asked_for(args, kv, environ or {}))
    found = EngineKey.here(IMAGE).refusal(asked)
    return None if found is None else found.field


def test_an_image_brings_its_sizes_along() -> None:
    assert refusal({"max_num_seqs": 8}) is None
    assert refusal({"max_num_seqs": 8, "max_model_len": 1024}, 64 << 20) is None
    assert refusal({"max_num_seqs": 8, "max_model_len": -1}) is None


def test_another_size_that_is_asked_for_is_another_image() -> None:
    assert refusal({"max_num_seqs": 8}, 65 << 20) == "engine.kv_cache_memory_bytes"
    assert refusal({"max_num_seqs": 8, "max_model_len": 512}) == "engine.max_model_len"


def test_other_arguments_are_another_image() -> None:
    assert refusal({}) == "engine.arguments"
    assert refusal({"max_num_seqs": 9}) == "engine.arguments"
    assert refusal({"max_num_seqs": 8, "seed": 1}) == "engine.arguments"
    assert refusal({"max_num_seqs": 8, "max_model_len": "1k"}) == "engine.arguments"


def test_what_vllm_reads_of_the_environment_counts() -> None:
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_API_KEY": "s", "HOME": "/"}
    assert engine_variables(environ) == {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    assert refusal({"max_num_seqs": 8}, environ=environ) == "engine.arguments"
    harmless = {**ENGINE_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CACHE_ROOT": "/x"}
    assert refusal({"max_num_seqs": 8}, environ=harmless) is None
    # A service by that name in the same namespace of Kubernetes.
    names = ("VLLM_SERVICE_HOST", "VLLM_SERVICE_PORT_HTTP", "VLLM_PORT", "VLLM_PORT_80_TCP_ADDR")
    assert engine_variables(dict.fromkeys(names, "1")) == {}


def test_an_image_says_what_its_user_had_said() -> None:
    assert told(EngineKey.here(IMAGE).arguments) == {"max_num_seqs": 8}
