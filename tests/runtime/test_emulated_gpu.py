"""Replicas on a GPU that is emulated in each of their processes; see `emulated`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.emulated import emulate
from tests.runtime.helpers import ask, expected, finish, prompt_of

Make = Callable[..., Path]
CUDA = "cuda:0"


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), device=CUDA, **more)  # type: ignore[arg-type]


def role_of(process: str) -> str:
    return process.partition("-")[0]


def size_of(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_answers_are_those_of_transformers(
    demo_model: Make, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, memory={"delay": 0.0005})
    model = demo_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (1, 7, 64, 300)]
    with Replica(options(model, no_leaks, throttle=size_of(model) / 1.0)) as replica:
        loading = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *loading)
        loaded = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *loaded)
        assert replica.facts["device"] == CUDA
        assert replica.facts["mode"] == "copied"
        assert replica.facts["gpu"]["name"] == "Emulated GPU 0"
        assert replica.kv_bytes is not None
        # In the memory that both workers have mapped, and in no other.
        for role in ("prefill", "decode"):
            (found,) = [p for name, p in replica.pids.items() if name.startswith(role)]
            maps = Path(f"/proc/{found}/maps").read_text()
            assert "emulated-vram" in maps
            assert "coldframe-weights" not in maps
        spans = {(s.name, role_of(s.process)): s for s in replica.spans}
        stages = sum(name.startswith("stage_ready") for name, _ in spans)
        assert stages > 2
        for role, until in (("prefill", 0), ("decode", stages // 2)):
            # What needs no weights is done before it is up, and the rest gives way to them.
            assert spans["attention_trial", role].end_ns <= spans["ready", role].start_ns
            warmup = spans["warmup", role]
            assert warmup.waits_for == f"stage_ready[{until}]"
            assert (warmup.note or "").startswith("attention by sequence; not over pages: ")
    for prompt, *clients in zip(prompts, loading, loaded, strict=True):
        for client in clients:
            assert client.error is None
            assert client.tokens == expected(model, tuple(prompt), 12)
