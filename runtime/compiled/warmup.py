"""Compiled decode steps in a worker: loaded and used once before a freeze, taken up by clones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.compiled.folder import CodeFolder
from coldframe.runtime.compiled.loading import load_code
from coldframe.runtime.compiled.notes import EAGERLY
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.compiled import Code, CompiledSteps
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.tensors import torch_dtypes
from coldframe.runtime.worker.warmup import dummy_weights
from coldframe.snapshot.manifest import EAGER_FOR_NOW

__all__ = ["compiled_steps", "ready_code"]


def ready_code(spec: ModelSpec, order: dict[str, Any]) -> tuple[Code | None, str]:
    """Loads a model's code and calls all of it once.

    Args:
        spec: The model's shape.
        order: Where it is, or why there is none (see `Compiling.order`); `for_now` says that
            there could be some.

    Returns:
        The code, or None, and for people how decode steps are computed.
    """
    if order["folder"] is None:
        return None, f"{EAGER_FOR_NOW if order.get('for_now') else 'eager; '}{order['why']}"
    try:
        code = load_code(CodeFolder.read(order["folder"]))
    except ColdframeError as error:
        return None, f"eager; {error}"
    why = _use_once(spec, code)
    return (code, code.note) if why is None else (None, f"eager; {why}")


def compiled_steps(model: Model, code: Code, recorder: Recorder) -> CompiledSteps:
    """A model's decode steps by code that came with the process.

    Args:
        model: The model.
        code: What was compiled for it.
        recorder: Gets a span that says what there is, and another one where it is given up.
    """
    started = now()

    def tell(why: str) -> None:
        # The front says it behind the answer, which this would be in the middle of.
        recorder.add("graph_restore", now(), note=f"{EAGERLY}{why}")

    steps = CompiledSteps(model, code, tell)
    if steps.in_use:
        recorder.add("graph_restore", started, note=code.note)
    return steps


def _use_once(spec: ModelSpec, code: Code) -> str | None:
    """Calls the code as clones will, on weights of nothing. Why it cannot be; None where it can."""
    spec = replace(spec, layers=1, windows=spec.windows[:1])
    most = max(size.sequences for size in code.sizes)
    dtype = torch_dtypes()[spec.dtype]
    size = most * spec.kv_block_bytes(dtype.itemsize, BLOCK_TOKENS)
    cache = KVCache(torch.zeros(size, dtype=torch.uint8), spec, dtype, most, BLOCK_TOKENS)
    why: list[str] = []
    vectors = torch_dtypes()[code.shape.vectors]
    weights = {
        name: tensor if tensor.dim() > 1 else tensor.to(vectors)
        for name, tensor in dummy_weights(spec).items()
    }
    steps = CompiledSteps(Model(spec, weights, cache), code, why.append)
    for sized in code.sizes:
        steps.forward([Chunk((0,), 1, 1, (block,)) for block in range(sized.sequences)])
    return why[0] if why else None
