"""What captured steps consist of, and whether they hold in another process; see `questions`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.questions import up

__all__ = ["memory_of_ours", "nodes_of_ours"]


def memory_of_ours(ordinal: int) -> dict[str, Any]:
    """Does torch take memory of ours for a capture, with its libraries' workspaces."""
    import torch

    from coldframe.loader.devices.scratch import Scratch
    from coldframe.runtime.engine.capture import CudaCapturer

    device = torch.device("cuda", ordinal)
    scratch = Scratch(up(ordinal))
    capturer = CudaCapturer(device, lambda: scratch)
    ones = torch.ones(64, 512, device=device, dtype=torch.bfloat16)
    weight = torch.ones(512, 512, device=device, dtype=torch.bfloat16)
    result = capturer.place(64 * 512 * 2).view(torch.bfloat16).view(64, 512)

    def step() -> None:
        result.copy_(torch.nn.functional.linear(ones, weight) * 2)

    step()
    torch.cuda.synchronize()
    before = scratch.used
    captured = capturer.capture(step)
    found: dict[str, Any] = {
        "addresses": f"{scratch.address:#x}{', as wanted' if scratch.fixed else ', not as wanted'}",
        "note": capturer.note or "none",
        "bytes that a linear map and a product took of it": scratch.used - before,
    }
    result.zero_()
    captured.replay()
    torch.cuda.synchronize()
    right = bool((result == 1024).all().item())
    return {**found, "replayed": "right" if right else "wrong"}


def nodes_of_ours(ordinal: int) -> dict[str, Any]:
    """The nodes and kernels of a decode step of a small model, and what of it cannot be kept."""
    from coldframe.benchmarks.gpu.engine import Engine
    from coldframe.benchmarks.gpu.torch_questions import nodes_of
    from coldframe.loader.devices.graph_calls import Graph
    from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model
    from coldframe.snapshot.graphs import GraphSaver

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "tiny")
        write_demo_model(directory, DemoModel("tiny", "llama", dtype="bfloat16"))
        engine = Engine.open(directory, f"cuda:{ordinal}", 64, fill=False, limit=4)
    started = time.perf_counter()
    count = engine.graphs.capture_all()
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"captured": f"{count} steps in {seconds:.3f} s"}
    for bucket, error in engine.graphs.refused.items():
        found[f"{bucket}, not captured"] = str(error)
    saver = GraphSaver(engine.gpu.context.driver, engine.regions)
    for bucket, captured in engine.graphs.captured.items():
        if captured.handle is None:
            continue
        if "nodes" not in found:
            found["nodes"], found["kernels"] = nodes_of(captured.handle)
        why = saver.add(str(bucket), Graph(captured.handle))
        found[f"{bucket}, in an archive"] = why or "yes"
    return found
