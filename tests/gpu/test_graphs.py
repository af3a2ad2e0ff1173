"""Captured decode steps on the GPU: what is replayed is what was captured, here and elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.replica import Replica
from tests.gpu.replicas import expected, options
from tests.runtime.helpers import ask, finish, prompt_of, wait_for

Make = Callable[..., Path]

LENGTHS = (5, 40, 250)

ENGINE = """
import json, os, sys
import torch
from coldframe.benchmarks.gpu.archiving import install, kept, made
from coldframe.benchmarks.gpu.engine import Engine, chunk
model, device, file, prompts = *sys.argv[2:5], json.loads(sys.argv[5])

def compare():
    engine, found = Engine.open(model, device, 256, fill=True), {}
    for count in (1, 3):
        ids = [list(prompt) for prompt in prompts[:count]]
        with torch.inference_mode():
            chunks = [chunk(i, 0, n, 16) for n, i in enumerate(ids)]
            engine.model.forward(engine.model.batch(chunks))
            step = [chunk(i, len(i) - 1, n, 16) for n, i in enumerate(ids)]
            logits, before = [], engine.graphs.replayed
            while engine.graphs.replayed < before + 2 and len(logits) < 10:
                logits.append(engine.graphs.forward(step).clone())
                engine.graphs.between_steps()
        # Before it is replayed for the first time, it is done kernel by kernel, and padded.
        found[count] = [bool(torch.equal(logits[-3], other)) for other in logits[-2:]]
    return {"same": found, "replayed": engine.graphs.replayed, "refused": refused(engine)}

def capture():
    engine = Engine.open(model, device, 256, fill=True, limit=12)
    engine.graphs.capture_all()
    raw, left = kept(engine)
    open(file, "wb").write(raw)
    answers = [engine.greedy([prompt], 16, captured=True) for prompt in prompts]
    scratch = engine.capturer.scratch
    return {"answers": answers, "replayed": engine.graphs.replayed, "left": left,
            "scratch": scratch and scratch[1], "refused": refused(engine)}

def rebuild():
    engine = Engine.open(model, device, 256, fill=True, limit=1)
    engine.graphs.capture_all()
    rebuilt = made(engine, open(file, "rb").read())
    steps = install(engine, rebuilt, int(sys.argv[6]))
    answers = [engine.greedy([prompt], 16, captured=True) for prompt in prompts]
    return {"answers": answers, "replayed": engine.graphs.replayed, "steps": steps,
            "left": rebuilt.refused, "refused": refused(engine)}

def refused(engine):
    return {str(bucket): str(error) for bucket, error in engine.graphs.refused.items()}

print(json.dumps({"compare": compare, "capture": capture, "rebuild": rebuild}[sys.argv[1]]()))
sys.stdout.flush()
os._exit(0)
"""


def engine(what: str, model: Path, device: str, file: Path, *more: object) -> dict[str, object]:
    """What an engine in a process of its own finds out; skips where it has no GPU of its own."""
    if device == "cpu":
        pytest.skip("a CPU captures nothing")
    prompts = json.dumps([prompt_of(length, seed=length) for length in LENGTHS])
    command = [sys.executable, "-c", ENGINE, what, model, device, file, prompts, *more]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replayed_step_is_the_padded_step_itself(
    demo_model: Make, device: str, tmp_path: Path, dtype: str
) -> None:
    """To the last bit: both are the same kernels over the same numbers."""
    found = engine("compare", demo_model("llama", dtype), device, tmp_path / "graphs")
    assert found["same"] == {"1": [True, True], "3": [True, True]}
    assert found["refused"] == {}
    assert found["replayed"] == 4


def test_answers_with_captured_steps(demo_model: Make, runs: Path, device: str) -> None:
    model = demo_model("qwen3", "float32")
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    wanted = [expected(model, device, tuple(prompt), 24) for prompt in prompts]
    with Replica(options(model, runs, device)) as replica:
        for _ in range(2):
            for prompt, answer in zip(prompts, wanted, strict=True):
                client = ask(replica, prompt, 24)
                finish(replica, client)
                assert client.tokens == answer
            clients = [ask(replica, prompt, 24) for prompt in prompts * 3]
            finish(replica, *clients)
            assert [client.tokens for client in clients] == wanted * 3
            if device != "cpu":
                wait_for(replica, lambda: bool(captures(replica)))
        assert [note for note in captures(replica) if "failed" in note] == []


def captures(replica: Replica) -> list[str]:
    return [span.note or "" for span in replica.spans if span.name == "graph_capture"]


def test_steps_that_were_captured_in_another_process(
    demo_model: Make, device: str, tmp_path: Path
) -> None:
    model, file = demo_model("llama", "float32"), tmp_path / "graphs"
    first = engine("capture", model, device, file)
    wanted = [
        [expected(model, device, tuple(prompt_of(length, seed=length)), 16)] for length in LENGTHS
    ]
    assert first["answers"] == wanted
    assert (first["left"], first["refused"]) == ({}, {})
    second = engine("rebuild", model, device, file, first["scratch"])
    assert second["answers"] == wanted
    assert (second["left"], second["refused"]) == ({}, {})
    assert second["steps"] == 12
    # Each bucket is held against an eager step once, and answers for itself from then on.
    assert second["replayed"]
