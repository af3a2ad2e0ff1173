"""vLLM's weight loaders watched: what they would copy is noted, and may become an alias instead.

Each of vLLM's models knows best what becomes of a checkpoint's tensor: which parameter, which rows
of it, which part of the tensor on this rank. All of that ends in `copy_`. So the loaders run as
they are, over tensors that are views of the arena, and a copy from the arena into a parameter is
noted instead of done. Where the copies into a parameter turn out to be one run of bytes in the
arena, the parameter is laid over them: nothing is copied, whatever the model. Any other operation
that touches what is noted has the copies done first, so that it sees what it would have seen.

A rank's slice is shown to the loaders as the whole tensor: same shape, strides as the slice has
them, and the address moved back by what is not here. They narrow it to the slice, as they would
the whole one; any other look at it is refused before it reads what is not there.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coldframe.loader.checkpoints.plan import Placement, Plan
from coldframe.loader.errors import CheckpointError
from coldframe.runtime.integrations.vllm.plain_copies import copy_all, span_of
from coldframe.runtime.worker.tensors import Memory, tensor_over, torch_dtypes

__all__ = ["Copies", "Fate", "Reason", "Shown", "shown_tensor"]

Reason = str
"""Why a parameter is a copy, in a few words."""

_COPY = torch.ops.aten.copy_.default
_Noted = list[tuple[torch.Tensor, torch.Tensor]]
"""Copies that are to be done: where to, and what."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A tensor of the checkpoint as vLLM's loaders see it.

    Attributes:
        placement: Where it, or this rank's slice of it, lies in the arena.
        shape: Of the whole tensor.
        cut: Elements along each dimension that lie before the slice.
    """

    placement: Placement
    shape: tuple[int, ...]
    cut: tuple[int, ...]


def shown_tensor(shown: Shown, memory: Memory) -> torch.Tensor:
    """The whole tensor, of which only the slice may be read."""
    placement = shown.placement
    dtype = torch_dtypes_all()[placement.dtype]
    size = dtype.itemsize
    strides = _strides(placement.shape)
    back = sum(cut * stride for cut, stride in zip(shown.cut, strides, strict=True)) * size
    reach = 1 + sum((n - 1) * s for n, s in zip(shown.shape, strides, strict=True))
    nbytes = reach * size if prod(shown.shape) else 0
    address = memory.address + placement.arena_offset - back
    flat = tensor_over(address, nbytes, memory.dlpack_device).view(dtype)
    return flat.as_strided(shown.shape, strides)


def torch_dtypes_all() -> dict[str, torch.dtype]:
    """Torch's dtypes by their safetensors names: those that vLLM's checkpoints are stored in."""
    more = {
        "F64": torch.float64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    return {**torch_dtypes(), **more}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(slots=True)
class Fate:
    """What has become of one parameter.

    Attributes:
        name: As vLLM's model calls it.
        nbytes: Its size in bytes.
        address: Where it lies in the arena; None where it is a copy, or nothing has come yet.
        why: Why it is a copy.
        loaded: Whether anything has come.
    """

    name: str
    nbytes: int
    address: int | None = None
    why: Reason | None = None
    loaded: bool = False


@dataclass(slots=True)
class _Target:
    """A parameter, and the copies into it that have been noted.

    It is not kept alive: where vLLM packs a layer's weights and drops what it has packed, that
    memory is to be free, and not when all layers are packed.
    """

    parameter: weakref.ref[torch.nn.Parameter]
    fate: Fate
    noted: _Noted = field(default_factory=list)


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies from an arena into a model's parameters; of this thread, while it is entered.

    Args:
        plan: What lies in the arena.
        memory: The arena.
        parameters: The model's, by name; the same one under two names is there once.
        keep_apart: Says of a parameter why it must be a copy, or None where it may be an alias.
    """

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        parameters: Mapping[str, torch.nn.Parameter],
        keep_apart: Callable[[str, torch.nn.Parameter], Reason | None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan
        self._memory = memory
        self._keep_apart = keep_apart
        self._within = range(memory.address, memory.address + plan.arena_bytes)
        self._working = False
        self._showing: tuple[int, int, int, str] | None = None
        self._changed: dict[int, _Target] = {}
        self.fates: dict[str, Fate] = {}
        starts: list[tuple[int, _Target]] = []
        for name, parameter in parameters.items():
            fate = Fate(name, parameter.numel() * parameter.element_size())
            self.fates[name] = fate
            if fate.nbytes and not parameter.is_meta:
                starts.append((parameter.data_ptr(), _Target(weakref.ref(parameter), fate)))
        starts.sort(key=lambda pair: pair[0])
        self._starts = [start for start, _ in starts]
        self._targets = [target for _, target in starts]

    def show(self, shown: Shown) -> torch.Tensor:
        """The tensor for vLLM's loaders, which may look at it until the next one is shown."""
        with self.unwatched():
            tensor = shown_tensor(shown, self._memory)
        start = self._memory.address + shown.placement.arena_offset
        stop = start + shown.placement.nbytes
        self._showing = (tensor.untyped_storage().data_ptr(), start, stop, shown.placement.name)
        return tensor

    def settle(self) -> None:
        """Makes aliases of the parameters that can be, and does the noted copies of all others."""
        with self.unwatched():
            left = [pair for target in self._changed.values() for pair in self._settle(target)]
            self._changed.clear()
            copy_all(left)

    # -- what the loaders do ---------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._working or func.is_view:
            return func(*args, **kwargs)
        if func is _COPY and self._note(args[0], args[1]):
            return args[0]
        self._refuse_write(func, args)
        with self.unwatched():
            for tensor in _tensors(args, kwargs):
                self._before(func, tensor, args)
            return func(*args, **kwargs)

    def _note(self, into: torch.Tensor, source: torch.Tensor) -> bool:
        if into.shape != source.shape or into.dtype != source.dtype or not into.numel():
            return False
        start, stop = span_of(source)
        if start not in self._within or stop - 1 not in self._within:
            return False
        self._check(_COPY, source)
        target = self._target_of(into)
        if target is None:
            return False
        target.fate.loaded = True
        target.noted.append((into, source))
        self._changed[id(target)] = target
        return True

    def _before(self, func: Any, tensor: torch.Tensor, args: Any) -> None:
        self._check(func, tensor)
        target = self._target_of(tensor)
        if target is not None and tensor.numel():
            copy_all(self._take(target, _why_done(func, args)))
            target.fate.loaded = True

    def _refuse_write(self, func: Any, args: Any) -> None:
        """Refuses to write to what may be read only."""
        for declared, value in zip(func._schema.arguments, args, strict=False):
            written = declared.alias_info is not None and declared.alias_info.is_write
            if not written or not isinstance(value, torch.Tensor) or not value.numel():
                continue
            if value.data_ptr() in self._within:
                raise CheckpointError(
                    "vLLM writes to a weight that is laid over the arena",
                    where=f"{func} on {list(value.shape)}",
                    expected="every tensor of the checkpoint once",
                    hint='Load with "alias": "off"; and report this model.',
                )

    def _check(self, func: Any, tensor: torch.Tensor) -> None:
        """Refuses to read what a slice does not have."""
        if self._showing is None or not tensor.numel():
            return
        shown, start, stop, name = self._showing
        if tensor.untyped_storage().data_ptr() != shown:
            return
        first, last = span_of(tensor)
        if not (start <= first and last <= stop):
            raise CheckpointError(
                "vLLM looks at more of a tensor than this rank has of it",
                where=f"tensor {name}, {func}",
                expected=f"the slice of rank {self._plan.rank.index} of {self._plan.rank.ranks}",
                got=f"shape {list(tensor.shape)}",
                hint="Load through a memory service of the whole model (`memory_service`), or with"
                " vLLM's own loader; and report this model.",
            )

    def _target_of(self, tensor: torch.Tensor) -> _Target | None:
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        target = self._targets[at]
        # What was a parameter's memory before it was laid over the arena is anybody's by now.
        replaced = target.parameter() is None and not target.noted
        gone = replaced or target.fate.address is not None
        return None if gone or address >= self._starts[at] + target.fate.nbytes else target

    # -- what becomes of it ----------------------------------------------------------------------

    def _settle(self, target: _Target) -> _Noted:
        """Makes an alias of a parameter, or else says what is to be copied."""
        if not target.noted:
            return []
        parameter = target.parameter()
        if parameter is None:
            # The loader has put another one in its place, which may be the same memory.
            return self._take(target, "replaced")
        why = target.fate.why or self._keep_apart(target.fate.name, parameter)
        if why is None:
            found = self._one_run(target, parameter)
            if isinstance(found, int):
                self._lay_over(target, parameter, found)
                return []
            why = found
        return self._take(target, why)

    def _one_run(self, target: _Target, parameter: torch.nn.Parameter) -> int | Reason:
        """Where the bytes of a whole parameter lie one behind another, or why they do not."""
        base = parameter.data_ptr()
        if not parameter.is_contiguous():
            return "strided"
        reached, shift = base, None
        for into, source in sorted(target.noted, key=lambda pair: pair[0].data_ptr()):
            if not into.is_contiguous() or not source.is_contiguous():
                return "cut by columns"
            if into.data_ptr() != reached:
                return "in part"
            if shift is None:
                shift = source.data_ptr() - base
            elif source.data_ptr() - into.data_ptr() != shift:
                return "apart in the arena"
            reached += into.numel() * into.element_size()
        if shift is None or reached != base + target.fate.nbytes:
            return "in part"
        if (base + shift) % parameter.element_size():
            return "unaligned"
        return base + shift

    def _lay_over(self, target: _Target, parameter: torch.nn.Parameter, address: int) -> None:
        fate = target.fate
        flat = tensor_over(address, fate.nbytes, self._memory.dlpack_device)
        parameter.data = flat.view(parameter.dtype).view(parameter.shape)
        fate.address = address
        target.noted.clear()

    def _take(self, target: _Target, why: Reason) -> _Noted:
        target.fate.why = target.fate.why or why
        noted, target.noted = target.noted, []
        return noted

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What is done meanwhile is no loader's: it is neither noted nor refused."""
        before, self._working = self._working, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._working = before


def _why_done(func: Any, args: Any) -> Reason:
    if func is _COPY:
        return "cast" if args[0].dtype != args[1].dtype else "transformed"
    name = func.overloadpacket.__name__
    return "padded" if name in ("fill_", "zero_") else f"{name} on it"


def _tensors(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))
