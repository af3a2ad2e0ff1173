"""The engine in a process of its own on a GPU: weights, KV and scratch where workers have them.

For what is asked of captured steps, not of workers. Whether weights are read is up to who asks: how
long a step takes to capture does not depend on what they say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from coldframe.loader.arena import KV_BASE, SCRATCH_BASE, WEIGHTS_BASE
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.runtime.engine import varlen
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.capture import Capturer
from coldframe.runtime.engine.decode import MOST
from coldframe.runtime.engine.graphs import MOST_GRAPHS, StepGraphs
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.graphs import graphing
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.worker.tensors import tensor_over, tensors_of, torch_dtypes
from coldframe.snapshot.graphs import Region

__all__ = ["Engine", "chunk"]

_BLOCK_TOKENS = 32
_SCRATCH = 64 << 30
"""What `Scratch` reserves."""


@dataclass(slots=True)
class Engine:
    """A model over a GPU's memory.

    Attributes:
        gpu: The device.
        plan: Where its weights lie.
        spec: Its shape.
        model: It computes eagerly.
        capturer: What captures.
        graphs: Its steps, captured when they are asked for.
        regions: The memory that captured steps know of.
    """

    gpu: CudaDevice
    plan: Plan
    spec: ModelSpec
    model: Model
    capturer: Capturer
    graphs: StepGraphs
    regions: tuple[Region, ...]

    @classmethod
    def open(
        cls,
        directory: str | Path,
        device: str,
        blocks: int,
        *,
        fill: bool,
        limit: int = MOST_GRAPHS,
    ) -> Engine:
        """Puts a model on a GPU; it goes with the process.

        Args:
            directory: A checkpoint's.
            device: The GPU.
            blocks: Of KV.
            fill: Whether its weights are read; else they are zeros.
            limit: Steps to be captured at most.

        Raises:
            DeviceError: There is no room for it, or steps cannot be captured.
        """
        gpu = CudaDevice(int(device.rpartition(":")[2]))
        where = torch.device(device if torch.cuda.is_available() else "cpu")
        plan = Plan.build(Checkpoint.open(str(directory)), layout=Layout.ALIGNED)
        spec = ModelFacts(str(directory)).spec
        dtype = torch_dtypes()[spec.dtype]
        weights = _memory(gpu.context, plan.arena_bytes, WEIGHTS_BASE)
        nbytes = blocks * spec.kv_block_bytes(dtype.itemsize, _BLOCK_TOKENS)
        kv = _memory(gpu.context, nbytes, KV_BASE)
        tensors = tensors_of(plan, weights)
        if fill:
            _read(directory, tensors)
        pages = tensor_over(kv.address, nbytes, kv.dlpack_device)
        model = Model(spec, tensors, KVCache(pages, spec, dtype, blocks, _BLOCK_TOKENS))
        model.varlen = varlen.find(spec, dtype, where, block_tokens=_BLOCK_TOKENS).varlen
        capturer = graphing.capturer_for(model.device, device)
        if capturer is None:
            raise RuntimeError(f"nothing captures steps on {model.device}")
        regions = (
            Region("weights", weights.address, weights.size),
            Region("kv", kv.address, kv.size),
            Region("scratch", SCRATCH_BASE, _SCRATCH),
        )
        graphs = StepGraphs(model, capturer, most=MOST, limit=limit)
        return cls(gpu, plan, spec, model, capturer, graphs, regions)

    def greedy(self, prompts: list[list[int]], count: int, *, captured: bool) -> list[list[int]]:
        """Answers, made together: the first token of each by a prefill, the others by steps.

        Args:
            prompts: Token ids.
            count: Tokens of each answer.
            captured: Whether steps are replayed as soon as they can be.
        """
        room = -(-(max(map(len, prompts)) + count) // _BLOCK_TOKENS)
        told = [list(prompt) for prompt in prompts]
        chunks = [chunk(ids, 0, row, room) for row, ids in enumerate(told)]
        with torch.inference_mode():
            logits = self.model.forward(self.model.batch(chunks))
            for step in range(count):
                for ids, token in zip(told, logits.argmax(-1).tolist(), strict=True):
                    ids.append(int(token))
                if step + 1 == count:
                    break
                chunks = [chunk(ids, len(ids) - 1, row, room) for row, ids in enumerate(told)]
                if captured:
                    logits = self.graphs.forward(chunks)
                    self.graphs.between_steps()
                else:
                    logits = self.model.forward(self.model.batch(chunks))
        return [ids[-count:] for ids in told]


def chunk(ids: list[int], start: int, row: int, room: int) -> Chunk:
    """The tokens of a sequence from one on; its KV is the row-th piece of so many blocks."""
    return Chunk(ids[start:], start, len(ids), list(range(row * room, row * room + room)))


def _memory(context: Context, nbytes: int, base: int) -> DeviceReservation:
    """Memory of a GPU, at an address, that nobody else has."""
    found = DeviceReservation(context, nbytes, base, exact=True)
    memory = context.driver.create(context.ordinal, found.size, shareable=False)
    found.map(0, found.size, memory, writable=True)
    context.driver.release(memory)
    tensor_over(found.address, found.size, found.dlpack_device).zero_()
    return found


def _read(directory: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    for file in sorted(Path(directory).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in tensors:
                tensors[name].copy_(tensor)
