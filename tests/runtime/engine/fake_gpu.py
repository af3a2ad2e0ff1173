"""A GPU that computes nothing and knows where everything is: torch's fake tensors, on `cuda:0`.

Whatever mixes devices raises, as it would on a real one. What goes over to the device, what comes
back, and what makes the program wait for the device is counted. Values are nobody's; no kernel of
a GPU is run, so that nothing here says what one computes, or how fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
_COPY = "aten._to_copy.default"
_COPY_INTO = "aten.copy_.default"
_WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")


@dataclass
class Traffic:
    """What has passed between program and device.

    Attributes:
        up, down: Copies to the device and from it that the program does not wait for.
        waits: What the program waits for the device in.
        calls: How many kernels, or what would be one.
    """

    up: int = 0
    down: int = 0
    waits: list[str] = field(default_factory=list)
    calls: int = 0


class _Counting(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, traffic = kwargs or {}, str(func), self._traffic
        devices = _devices(*args, *kwargs.values())
        if GPU in devices and name.startswith(_WAITING):
            traffic.waits.append(name)
        out = func(*args, **kwargs)
        devices |= _devices(out)
        traffic.calls += GPU in devices
        if GPU in devices and len(devices) > 1:
            beside = kwargs.get("non_blocking") or (name == _COPY_INTO and args[2:] == (True,))
            if name not in (_COPY, _COPY_INTO) or not beside:
                traffic.waits.append(name)
            elif out.device == GPU:
                traffic.up += 1
            else:
                traffic.down += 1
        return out


def _devices(*values: Any) -> set[torch.device]:
    return {value.device for value in values if isinstance(value, Tensor)}


class _Indexing(TorchFunctionMode):
    """Indexing and copies by way of the operators: Python's own ask for a device."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and args[0].device == GPU:
            view, indices = self._view(*args)
            return torch.ops.aten.index.Tensor(view, indices) if indices else view
        if func is Tensor.__setitem__ and args[0].device == GPU:
            view, indices = self._view(*args[:2])
            if indices:
                return torch.ops.aten.index_put_(view, indices, args[2])
            return torch.ops.aten.copy_.default(view, args[2])
        if func is Tensor.copy_ and args[0].device == GPU:
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _view(self, tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
        """What whole numbers, slices and None leave, and the tensors that index it."""
        dim = 0
        indices: list[Tensor | None] = []
        for item in index if isinstance(index, tuple) else (index,):
            if isinstance(item, int):
                tensor = tensor.select(dim, item)
                continue
            if item is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(item, slice):
                assert item.step is None
                end = tensor.shape[dim] if item.stop is None else item.stop
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start or 0, end)
            elif isinstance(item, Tensor) and item.dtype == torch.int64:
                indices += [None] * (dim - len(indices)) + [item]
            else:  # a list goes to the device first, a mask comes from it
                self._traffic.waits.append(f"index by {item!r}")
                break
            dim += 1
        return tensor, indices


@contextmanager
def fake_gpu() -> Iterator[Traffic]:
    """Within it tensors are fake; what there was before stays real, and may not be used."""
    traffic = Traffic()
    with warnings.catch_warnings():
        # Neighbours are told by their addresses; fake tensors all have the same.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        # Memory of Python's own makes a real tensor.
        made_fake = mock.patch.object(torch, "frombuffer", _from_buffer)
        with FakeTensorMode(), _Indexing(traffic), _Counting(traffic), made_fake:
            yield traffic


def _from_buffer(data: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(data), dtype=dtype)


def real_zeros(like: Tensor) -> Tensor:
    """Values for a fake tensor."""
    with unset_fake_temporarily():
        return torch.zeros(like.shape, dtype=like.dtype)
