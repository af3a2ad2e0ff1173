"""A memory service for a test, and what a vLLM process has of its arena."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coldframe.loader.loads.options import LoadOptions
from coldframe.runtime.integrations.vllm.attached import OwnMemory


@contextmanager
def memory_of(model: Path | str, **options: Any) -> Iterator[OwnMemory]:
    """A service that loads a model; its `path` is its socket."""
    memory = OwnMemory(LoadOptions(str(model), **options))
    try:
        yield memory
    finally:
        memory.close()


def model_of(engine: Any) -> Any:
    """The model inside an engine whose core and worker are in its own process."""
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.model


def placed(engine: Any) -> dict[str, Any]:
    """What became of the parameters, and what the process has mapped of the arena."""
    filling = model_of(engine).coldframe_filling
    return placed_of(filling, model_of(engine))


def placed_of(filling: Any, model: Any) -> dict[str, Any]:
    import torch

    mapped = filling._arena
    within = range(mapped.address, mapped.address + mapped.size)
    parameters = dict(model.named_parameters())
    packed = [
        name
        for name, module in model.named_modules()
        if getattr(module, "cpu_linear", torch.nn.functional.linear)
        is not torch.nn.functional.linear
    ]
    return {
        "summary": filling.summary(),
        "apart": {n: f.why for n, f in filling.fates.items() if f.address is None},
        "outside": [n for n, p in parameters.items() if p.data_ptr() not in within],
        "inside": [n for n, p in parameters.items() if p.data_ptr() in within],
        "noted": all(
            fate.address == parameters[name].data_ptr()
            for name, fate in filling.fates.items()
            if fate.address is not None
        ),
        "packed": packed,
        "shared": _mapped_bytes(within, "Shared_Dirty"),
        "private": _mapped_bytes(within, "Private_Dirty"),
        "weights": filling._plan.weights_bytes,
        "read": filling._plan.read_bytes,
        "rank": [filling._plan.rank.index, filling._plan.rank.ranks],
    }


def placed_on_rank(worker: Any) -> dict[str, Any]:
    """`placed`, for `collective_rpc`."""
    model = worker.model_runner.model
    return placed_of(model.coldframe_filling, model)


def ranks(engine: Any) -> list[dict[str, Any]]:
    return engine.collective_rpc(placed_on_rank)


def children(engine: Any) -> int:
    """How many processes this one has started that still are."""
    import psutil

    return len(psutil.Process().children())


def loads_early(engine: Any) -> list[int]:
    """How many connections there are to weights when an executor has been made that makes nothing
    of it, for another load, and when that load's loader has asked for its own."""
    from copy import deepcopy

    import torch
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from coldframe.runtime.integrations.vllm import attached, loader

    class Bare(UniProcExecutor):
        def _init_executor(self) -> None:
            pass

    config = deepcopy(engine.vllm_config)
    extra = {**config.load_config.model_loader_extra_config, "threads": 1}
    config.load_config.model_loader_extra_config = extra
    Bare(config)
    deadline = time.monotonic() + 60
    while len(attached._made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    found = [len(attached._made)]
    made = loader.ColdframeModelLoader(config.load_config)
    client = made.connect(config.model_config, torch.device("cpu"))
    found.append(len(attached._made))
    attached.release(client)
    return found


def _mapped_bytes(within: range, kind: str) -> int:
    """Bytes of that kind that this process has in the pages of a range of addresses."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split(maxsplit=1)[0]
        if "-" in word and not word.endswith(":"):
            low, high = (int(part, 16) for part in word.split("-"))
            inside = low < within.stop and high > within.start
        elif inside and word == f"{kind}:":
            found += int(line.split()[1]) << 10
    return found
