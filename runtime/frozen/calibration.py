"""What a worker measures before it is frozen, so that no clone has to."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import replace
from math import prod

from coldframe.runtime.engine.saturation import Saturation, SaturationProbe
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.weights import LayerWeights
from coldframe.runtime.worker.tensors import torch_dtypes
from coldframe.runtime.worker.warmup import dummy_weights

__all__ = ["measure_apart", "measure_saturation"]

_BYTES = 128 << 20
"""Of the weights that are measured with: more than a processor's caches hold."""
_VALUE = 2.0**-10
"""Of each weight: neither zero nor so large that anything becomes infinite."""


def measure_apart(spec: ModelSpec) -> Saturation | None:
    """As `measure_saturation`, in a child: nothing of it is in the image.

    Returns:
        None where it cannot be had; a clone measures then when it has nothing else to do.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        return None  # a child would wait for threads that it does not have
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(measure_saturation(spec).to_wire()).encode())
        except BaseException:  # noqa: BLE001 - nothing may go on behind the fork
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return Saturation.from_wire(json.loads(said)) if said else None


def measure_saturation(spec: ModelSpec) -> Saturation:
    """Measures with dummy weights of a model's shapes, in memory of their own.

    Zeros that nobody wrote will not do: they are one page, and reading it costs nothing.
    """
    each = sum(prod(shape) for shape in spec.layer_tensors(0).values())
    each *= torch_dtypes()[spec.dtype].itemsize
    count = min(spec.layers, 1 + _BYTES // each)
    spec = replace(spec, layers=count, windows=spec.windows[:count])
    tensors = dummy_weights(spec)
    for index in range(count):
        for name in spec.layer_tensors(index):
            tensors[name].fill_(_VALUE)
    layers = [LayerWeights.of(tensors, spec, index) for index in range(count)]
    probe = SaturationProbe()
    while (found := probe.advance(layers)) is None:
        pass
    return found
