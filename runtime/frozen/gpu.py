"""A worker on a GPU up to its freeze point: warm, its steps captured, and nothing of others' left.

It is attached to a replica's memory service like any other worker, so that what it uses for the
first time, and what it captures, is over the addresses that weights and KV have in every process.
Then it lets go of both and keeps the addresses: a driver takes no context off a GPU that has
others' memory in it.
"""

from __future__ import annotations

import torch

import coldframe.runtime.engine.device_errors  # noqa: F401 - a clone may not be let in where it is
from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE
from coldframe.loader.devices import open_device
from coldframe.loader.errors import SnapshotError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.wire import Channel
from coldframe.runtime.engine import device, varlen
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.graphs.graphing import graphs_for
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.tensors import tensor_over, tensors_of, torch_dtypes
from coldframe.runtime.worker.text import Tokenizer
from coldframe.runtime.worker.warm_gpu import WarmGpu
from coldframe.runtime.worker.warmup import first_uses, sample_each, stream_text
from coldframe.runtime.worker.worker import Warm

__all__ = ["warm_on_gpu"]


def warm_on_gpu(
    memory: Channel,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    name: str,
    weights_bytes: int,
    kv_bytes: int,
    *,
    graphs: bool,
) -> Warm:
    """All that a worker on a GPU does before it knows its role.

    Args:
        memory: A connection to the memory service that has the model on that GPU.
        spec: The model's shape.
        tokenizer: The model's.
        name: The GPU's, as `cuda:0`.
        weights_bytes: Addresses to keep for the weights.
        kv_bytes: And for KV.
        graphs: Whether to capture decode steps.

    Raises:
        ColdframeError: The GPU or the memory service is of no use, or an address is taken.
    """
    gpu = open_device(name)
    reserved = (
        gpu.mapping(weights_bytes, WEIGHTS_BASE, exact=True),
        gpu.mapping(kv_bytes, KV_BASE, exact=True),
    )
    client = MemoryClient(memory, "freezing", reserved=reserved, device=gpu)
    where = torch.device("cpu")  # where the GPU is not one of torch's, its memory is the host's
    if torch.cuda.is_available():
        where = torch.device(name)
        device.start(where)
    dtype = torch_dtypes()[spec.dtype]
    attention = varlen.find(spec, dtype, where, block_tokens=BLOCK_TOKENS)
    stream_text(tokenizer)
    plan, weights, kv = client.wait_arenas()
    if client.away:
        raise SnapshotError("the weights have left the GPU", hint="Try again when they are back.")
    spec.check(plan.placements)
    # Over every address that is kept, so that a start may have more blocks than this one.
    place = kv.reservation
    blocks = place.size // kv.block_bytes
    pages = tensor_over(place.address, place.size, place.dlpack_device)
    tensors = tensors_of(plan, weights)
    model = Model(spec, tensors, KVCache(pages, spec, dtype, blocks, BLOCK_TOKENS))
    model.varlen = attention.varlen
    for _ in first_uses(model, tensors):
        pass
    sample_each(spec, model.device)
    steps = graphs_for(model, name) if graphs else None
    if steps is not None:
        steps.capture_all()
    model.settle()
    client.leave()
    _give_back()
    cuda = str(torch.version.cuda)
    warm = WarmGpu(gpu, attention, model, steps, plan.fingerprint, kv.block_bytes, blocks, cuda)
    return Warm(tokenizer, reserved, gpu=warm)


def _give_back() -> None:
    """Memory that torch keeps for later: what it has of the GPU is copied into the image, and what
    it has locked of the host lands there, too."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # Not every torch has a name for it; without it the image is larger.
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_host_cache is not None:
            empty_host_cache()
